//! `struct nlmsghdr` (include/uapi/linux/netlink.h): 16 bytes in host byte order,
//! messages padded to 4.

use super::{Errno, Message, NetlinkError};

pub(super) const HEADER_LENGTH: usize = 16;

/// `NLMSG_NOOP` .. `NLMSG_OVERRUN`: control messages below the first family.
pub(super) const NOOP: u16 = 1;
pub(super) const ERROR: u16 = 2;
pub(super) const DONE: u16 = 3;
pub(super) const OVERRUN: u16 = 4;

pub(super) const FLAG_REQUEST: u16 = 0x1;
pub(super) const FLAG_ACK: u16 = 0x4;
/// A dump met a change of what it lists: its parts may not belong together.
pub(super) const FLAG_DUMP_INTERRUPTED: u16 = 0x10;
/// `NLM_F_ROOT | NLM_F_MATCH`.
pub(super) const FLAG_DUMP: u16 = 0x300;
/// On errors and acknowledgements: the request's payload was not echoed.
const FLAG_CAPPED: u16 = 0x100;
/// On errors and acknowledgements: attributes follow.
const FLAG_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

const fn align(length: usize) -> usize {
    (length + 3) & !3
}

/// The space `message` takes in a datagram.
pub(super) const fn framed_length(message: &Message) -> usize {
    align(HEADER_LENGTH + message.payload.len())
}

/// Appends `message` with its header and padding.
pub(super) fn append(
    buffer: &mut Vec<u8>,
    message: &Message,
    flags: u16,
    sequence: u32,
) -> Result<(), NetlinkError> {
    let length = u32::try_from(HEADER_LENGTH + message.payload.len())
        .map_err(|_| NetlinkError::Malformed("a request of more than 4 GiB"))?;
    buffer.extend_from_slice(&length.to_ne_bytes());
    buffer.extend_from_slice(&message.kind.to_ne_bytes());
    buffer.extend_from_slice(&(message.flags | flags).to_ne_bytes());
    buffer.extend_from_slice(&sequence.to_ne_bytes());
    // The port id: 0, the kernel fills in the sender's.
    buffer.extend_from_slice(&0u32.to_ne_bytes());
    buffer.extend_from_slice(&message.payload);
    buffer.resize(align(buffer.len()), 0);
    Ok(())
}

/// One message of a received datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

impl Frame<'_> {
    pub(super) fn to_message(self) -> Message {
        Message { kind: self.kind, flags: self.flags, payload: self.payload.to_vec() }
    }

    /// The result an `NLMSG_ERROR` or `NLMSG_DONE` carries: 0 or a negative errno in
    /// its first four bytes.
    pub(super) fn outcome(&self) -> Result<Result<(), Errno>, NetlinkError> {
        let Some(code) = self.payload.first_chunk::<4>() else {
            return Err(NetlinkError::Malformed("an acknowledgement without its code"));
        };
        match i32::from_ne_bytes(*code) {
            0 => Ok(Ok(())),
            code @ i32::MIN..0 => Ok(Err(Errno(code.saturating_neg()))),
            // `NLMSG_DONE` of some dumps carries a byte count.
            _ => Ok(Ok(())),
        }
    }

    /// The kernel's sentence about an error, where it has one (`NETLINK_EXT_ACK`).
    pub(super) fn explanation(&self) -> Option<&str> {
        if self.kind != ERROR || self.flags & FLAG_ACK_TLVS == 0 {
            return None;
        }
        let header = self.payload.get(4..4 + HEADER_LENGTH)?;
        let echoed = if self.flags & FLAG_CAPPED == 0 {
            let length = u32::from_ne_bytes(*header.first_chunk::<4>()?);
            align(usize::try_from(length).ok()?)
        } else {
            HEADER_LENGTH
        };
        let attributes = self.payload.get(echoed.checked_add(4)?..)?;
        netlink_packet_core::NlasIterator::new(attributes)
            .filter_map(Result::ok)
            .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
            .and_then(|attribute| {
                let end = 4usize.checked_add(attribute.value_length())?;
                let text = attribute.into_inner().get(4..end)?;
                std::str::from_utf8(text).ok().map(|text| text.trim_end_matches('\0'))
            })
    }
}

/// The messages of one datagram.
#[derive(Debug)]
pub(super) struct Frames<'a> {
    rest: &'a [u8],
}

impl<'a> Frames<'a> {
    pub(super) const fn new(datagram: &'a [u8]) -> Self {
        Self { rest: datagram }
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, NetlinkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let frame = parse(self.rest);
        self.rest = match &frame {
            Some((_, taken)) => self.rest.get(*taken..).unwrap_or_default(),
            None => &[],
        };
        Some(frame.map(|(frame, _)| frame).ok_or(NetlinkError::Malformed("a cut message")))
    }
}

fn parse(bytes: &[u8]) -> Option<(Frame<'_>, usize)> {
    let header = bytes.first_chunk::<HEADER_LENGTH>()?;
    let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
    let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
    let frame = Frame {
        kind: u16::from_ne_bytes([k0, k1]),
        flags: u16::from_ne_bytes([f0, f1]),
        sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
        payload: bytes.get(HEADER_LENGTH..length)?,
    };
    Some((frame, align(length)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(payload: &[u8]) -> Message {
        Message { kind: 0x20, flags: 0x400, payload: payload.to_vec() }
    }

    #[test]
    fn messages_are_padded_and_found_again() {
        let mut buffer = Vec::new();
        append(&mut buffer, &message(b"abcde"), FLAG_REQUEST, 7).unwrap();
        append(&mut buffer, &message(b""), FLAG_REQUEST, 8).unwrap();
        assert_eq!(buffer.len(), 24 + 16);
        assert_eq!(framed_length(&message(b"abcde")), 24);
        let frames: Vec<_> = Frames::new(&buffer).map(Result::unwrap).collect();
        assert_eq!(frames.len(), 2);
        assert_eq!(frames[0].payload, b"abcde");
        assert_eq!((frames[0].sequence, frames[1].sequence), (7, 8));
        assert_eq!(frames[0].flags, 0x401);
    }

    #[test]
    fn a_cut_message_is_an_error_and_ends_the_datagram() {
        let mut buffer = Vec::new();
        append(&mut buffer, &message(b"abcdefgh"), 0, 1).unwrap();
        let mut frames = Frames::new(&buffer[..20]);
        assert!(matches!(frames.next(), Some(Err(NetlinkError::Malformed(_)))));
        assert!(frames.next().is_none());
    }

    #[test]
    fn the_kernels_explanation_is_read() {
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend_from_slice(&[0; HEADER_LENGTH]);
        payload.extend_from_slice(&9u16.to_ne_bytes());
        payload.extend_from_slice(&NLMSGERR_ATTR_MSG.to_ne_bytes());
        payload.extend_from_slice(b"nope\0\0\0\0");
        let flags = FLAG_CAPPED | FLAG_ACK_TLVS;
        let frame = Frame { kind: ERROR, flags, sequence: 1, payload: &payload };
        assert_eq!(frame.outcome().unwrap(), Err(Errno(22)));
        assert_eq!(frame.explanation(), Some("nope"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            for frame in Frames::new(&bytes).flatten() {
                let _ = frame.outcome();
                let _ = frame.explanation();
            }
            for flags in [0, FLAG_CAPPED, FLAG_ACK_TLVS, FLAG_CAPPED | FLAG_ACK_TLVS] {
                let frame = Frame { kind: ERROR, flags, sequence: 0, payload: &bytes };
                let _ = frame.outcome();
                let _ = frame.explanation();
            }
        }
    }
}
