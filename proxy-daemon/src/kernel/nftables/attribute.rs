//! Netlink attributes (`struct nlattr`): type-length-value, padded to four bytes.

use crate::kernel::netlink::NetlinkError;

/// `NLA_F_NESTED`: the value is itself a list of attributes.
const NESTED: u16 = 1 << 15;
/// `NLA_TYPE_MASK`: what is left of `nla_type` without the flag bits.
const TYPE_MASK: u16 = 0x3fff;
/// `NLA_HDRLEN`.
pub(super) const HEADER: usize = 4;
/// `NLA_ALIGNTO`.
const ALIGN: usize = 4;

/// Attribute bytes whose lengths contradict each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

impl From<Malformed> for NetlinkError {
    fn from(error: Malformed) -> Self {
        Self::Malformed(error.0)
    }
}

/// One attribute, its type stripped of flag bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attribute<'a> {
    pub kind: u16,
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// A C string: up to the first NUL, which `NLA_STRING` may lack.
    ///
    /// # Errors
    /// When it is not UTF-8.
    pub fn string(self) -> Result<&'a str, Malformed> {
        let text = self.value.split(|byte| *byte == 0).next().unwrap_or_default();
        std::str::from_utf8(text).map_err(|_| Malformed("name is not UTF-8"))
    }

    /// nf_tables has its integers in network byte order.
    ///
    /// # Errors
    /// When it is not four bytes long.
    pub fn u32(self) -> Result<u32, Malformed> {
        let bytes = self.value.try_into().map_err(|_| Malformed("integer is not four bytes"))?;
        Ok(u32::from_be_bytes(bytes))
    }
}

/// Walks a list of attributes; ends after the first malformed one.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<Attribute<'_>, Malformed>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let item = split_first(rest);
        rest = item.map_or(&[][..], |(_, tail)| tail);
        Some(item.map(|(attribute, _)| attribute))
    })
}

fn split_first(bytes: &[u8]) -> Result<(Attribute<'_>, &[u8]), Malformed> {
    let &[l0, l1, k0, k1, ..] = bytes else {
        return Err(Malformed("attribute header is cut off"));
    };
    let length = usize::from(u16::from_ne_bytes([l0, l1]));
    let kind = u16::from_ne_bytes([k0, k1]) & TYPE_MASK;
    let value =
        bytes.get(HEADER..length).ok_or(Malformed("attribute length is outside of its message"))?;
    let tail = bytes.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
    Ok((Attribute { kind, value }, tail))
}

/// Appends attributes to a message.
#[derive(Debug, Default, Clone)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Starts with what precedes the attributes (`struct nfgenmsg`).
    #[must_use]
    pub fn after(header: &[u8]) -> Self {
        Self { bytes: header.to_vec() }
    }

    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    pub fn put(&mut self, kind: u16, value: &[u8]) {
        let start = self.open(kind);
        self.bytes.extend_from_slice(value);
        self.close(start);
    }

    pub fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    /// With the terminating NUL that `NLA_NUL_STRING` policies ask for.
    pub fn put_str(&mut self, kind: u16, value: &str) {
        let start = self.open(kind);
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.close(start);
    }

    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.open(kind | NESTED);
        fill(self);
        self.close(start);
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        start
    }

    /// Lengths are 16 bits wide. No caller comes near: rules are constants of ours, and
    /// element lists are bounded by [`super::Table::elements_per_message`].
    fn close(&mut self, start: usize) {
        let length = self.bytes.len() - start;
        debug_assert!(length <= usize::from(u16::MAX), "attribute of {length} bytes");
        let length = u16::try_from(length).unwrap_or(u16::MAX);
        if let Some(slot) = self.bytes.get_mut(start..start + 2) {
            slot.copy_from_slice(&length.to_ne_bytes());
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
    }
}
