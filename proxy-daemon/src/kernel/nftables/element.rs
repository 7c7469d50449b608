//! Elements of sets and maps: many to a message, several messages to a transaction.

use crate::kernel::netlink::Message;

use super::attribute::{Attribute, HEADER, Malformed, Writer, attributes};
use super::expression::DATA_VALUE;
use super::object::{CREATE, Kind, Table, payload_attributes};

/// `NFTA_LIST_ELEM`.
const LIST_ELEM: u16 = 1;
/// `NFTA_SET_ELEM_LIST_SET`, `NFTA_SET_ELEM_LIST_ELEMENTS`.
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
/// `NFTA_SET_ELEM_KEY`, `NFTA_SET_ELEM_DATA`, `NFTA_SET_ELEM_KEY_END` (kernel 5.6).
const ELEM_KEY: u16 = 1;
const ELEM_DATA: u16 = 2;
const ELEM_KEY_END: u16 = 10;

/// Longest list of elements in one message, in bytes. An attribute's length has 16
/// bits; half of that keeps messages, and what a refusal puts in doubt, small.
const LIST_BYTES: usize = 32 * 1024;

/// Deletions of a transaction come first: an interval that goes makes room for one that
/// overlaps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// Deleting what is not there is refused with `ENOENT`.
    Delete,
    /// Adding what is there already changes nothing.
    Add,
    /// For maps, where adding a key that is there with other data is refused: deleted
    /// and added in one transaction.
    Replace,
}

/// What an element consists of besides its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Nothing.
    Key,
    /// The last key of the interval that starts with the key.
    Interval,
    /// Of a map: the data that the key stands for.
    Data,
}

/// An element's bytes: a key, and what its [`Shape`] has besides (else empty).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ElementBytes {
    pub key: Vec<u8>,
    pub more: Vec<u8>,
}

impl ElementBytes {
    fn len(&self) -> usize {
        // Five headers at most: the element, key and value, second key or data and value.
        5 * HEADER + self.key.len().next_multiple_of(4) + self.more.len().next_multiple_of(4)
    }
}

impl Table<'_> {
    /// How many elements like this one go into one message.
    #[must_use]
    pub fn elements_per_message(like: &ElementBytes) -> usize {
        (LIST_BYTES / like.len()).max(1)
    }

    /// One message, or two for [`Operation::Replace`]; `elements` are at most
    /// [`Table::elements_per_message`].
    #[must_use]
    pub fn change_elements(
        self,
        operation: Operation,
        set: &str,
        shape: Shape,
        elements: &[&ElementBytes],
    ) -> Vec<Message> {
        let message = |kind, flags, shape| {
            self.message(kind, flags, |w| {
                w.put_str(LIST_SET, set);
                w.nest(LIST_ELEMENTS, |w| {
                    for element in elements {
                        write_element(w, shape, element);
                    }
                });
            })
        };
        let add = || message(Kind::NewElement, CREATE, shape);
        // What a map holds for a key need not be known to delete it.
        let delete = || {
            let shape = if shape == Shape::Data { Shape::Key } else { shape };
            message(Kind::DelElement, 0, shape)
        };
        match operation {
            Operation::Add => vec![add()],
            Operation::Delete => vec![delete()],
            Operation::Replace => vec![delete(), add()],
        }
    }

    /// Dump of a set's elements.
    #[must_use]
    pub fn list_elements(self, set: &str) -> Message {
        self.message(Kind::GetElement, 0, |w| w.put_str(LIST_SET, set))
    }
}

fn write_element(w: &mut Writer, shape: Shape, element: &ElementBytes) {
    w.nest(LIST_ELEM, |w| {
        w.nest(ELEM_KEY, |w| w.put(DATA_VALUE, &element.key));
        let more = match shape {
            Shape::Key => return,
            Shape::Interval => ELEM_KEY_END,
            Shape::Data => ELEM_DATA,
        };
        w.nest(more, |w| w.put(DATA_VALUE, &element.more));
    });
}

/// The elements in one part of a dump (or in a request: the encoding is the same).
///
/// # Errors
/// When the bytes are not those of an element list.
pub fn decode_elements(payload: &[u8]) -> Result<Vec<ElementBytes>, Malformed> {
    let mut elements = Vec::new();
    for list in payload_attributes(payload)? {
        let list = list?;
        if list.kind != LIST_ELEMENTS {
            continue;
        }
        for element in attributes(list.value) {
            let value = element?.value;
            let key = value_of(value, ELEM_KEY)?.ok_or(Malformed("element without a key"))?;
            let end = value_of(value, ELEM_KEY_END)?;
            let more = if end.is_some() { end } else { value_of(value, ELEM_DATA)? };
            let more = more.unwrap_or_default().to_vec();
            elements.push(ElementBytes { key: key.to_vec(), more });
        }
    }
    Ok(elements)
}

fn value_of(element: &[u8], kind: u16) -> Result<Option<&[u8]>, Malformed> {
    let Some(part) = find(element, kind)? else { return Ok(None) };
    let value = find(part.value, DATA_VALUE)?.ok_or(Malformed("element part without a value"))?;
    Ok(Some(value.value))
}

pub(super) fn find(bytes: &[u8], kind: u16) -> Result<Option<Attribute<'_>>, Malformed> {
    for attribute in attributes(bytes) {
        let attribute = attribute?;
        if attribute.kind == kind {
            return Ok(Some(attribute));
        }
    }
    Ok(None)
}
