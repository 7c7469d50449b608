//! Set elements: many to a message, several messages to a transaction.

use crate::kernel::netlink::Message;

use super::attribute::{Attribute, HEADER, Malformed, Writer, attributes};
use super::expression::DATA_VALUE;
use super::object::{CREATE, Kind, Table, body};

/// `NFTA_LIST_ELEM`.
const LIST_ELEM: u16 = 1;
/// `NFTA_SET_ELEM_LIST_SET`, `NFTA_SET_ELEM_LIST_ELEMENTS`.
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
/// `NFTA_SET_ELEM_KEY`.
const ELEM_KEY: u16 = 1;

/// Longest list of elements in one message, in bytes. An attribute's length has 16
/// bits; half of that keeps messages, and what a refusal puts in doubt, small.
const LIST_BYTES: usize = 32 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// Adding what is there already changes nothing.
    Add,
    /// Deleting what is not there is refused with `ENOENT`.
    Delete,
}

impl Table<'_> {
    /// How many keys of this length go into one message.
    #[must_use]
    pub fn elements_per_message(key_length: usize) -> usize {
        // Three headers: the element, its key, the key's value.
        (LIST_BYTES / (3 * HEADER + key_length.next_multiple_of(4))).max(1)
    }

    /// One message; `keys` are at most [`Table::elements_per_message`].
    #[must_use]
    pub fn change_elements(self, operation: Operation, set: &str, keys: &[&[u8]]) -> Message {
        let (kind, flags) = match operation {
            Operation::Add => (Kind::NewElement, CREATE),
            Operation::Delete => (Kind::DelElement, 0),
        };
        self.message(kind, flags, |w| {
            w.put_str(LIST_SET, set);
            w.nest(LIST_ELEMENTS, |w| {
                for key in keys {
                    write_element(w, key);
                }
            });
        })
    }

    /// Dump of a set's elements.
    #[must_use]
    pub fn list_elements(self, set: &str) -> Message {
        self.message(Kind::GetElement, 0, |w| w.put_str(LIST_SET, set))
    }
}

fn write_element(w: &mut Writer, key: &[u8]) {
    w.nest(LIST_ELEM, |w| w.nest(ELEM_KEY, |w| w.put(DATA_VALUE, key)));
}

/// The keys in one part of a dump (or in a request: the encoding is the same).
///
/// # Errors
/// When the bytes are not those of an element list.
pub fn decode_elements(message: &Message) -> Result<Vec<&[u8]>, Malformed> {
    let mut keys = Vec::new();
    for list in body(message)? {
        let list = list?;
        if list.kind != LIST_ELEMENTS {
            continue;
        }
        for element in attributes(list.value) {
            let key = find(element?.value, ELEM_KEY)?.ok_or(Malformed("element without a key"))?;
            let value = find(key.value, DATA_VALUE)?.ok_or(Malformed("key without a value"))?;
            keys.push(value.value);
        }
    }
    Ok(keys)
}

fn find(bytes: &[u8], kind: u16) -> Result<Option<Attribute<'_>>, Malformed> {
    for attribute in attributes(bytes) {
        let attribute = attribute?;
        if attribute.kind == kind {
            return Ok(Some(attribute));
        }
    }
    Ok(None)
}
