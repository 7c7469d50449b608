//! A packet's bytes, read and written. Implemented by the kernel's two kinds of packet and,
//! for tests, by a vector.

use crate::checksum;

/// Bytes of a packet, bounds-checked at each read: the verifier wants the check next to
/// the access, and a slice on the host behaves the same.
///
/// Two bytes or more at a time: the comparison for a single one becomes "not beyond the
/// end" in the compiler, from which the verifier draws nothing.
pub trait Bytes {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

impl Bytes for &[u8] {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
}

/// What a transport checksum covers and means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sum {
    /// The change is one of the pseudo-header's addresses. A checksum that the sender left
    /// to the hardware covers nothing else so far.
    pub pseudo: bool,
    /// Zero means that there is no checksum (UDP).
    pub optional: bool,
    /// The pseudo-header is that of IPv6, whose addresses no header checksum covers.
    pub v6: bool,
}

/// A packet that can be changed. Methods give `None` when the place is not there or the
/// kernel refuses; the packet may then be half changed and has to be dropped.
pub trait Packet: Bytes {
    /// Checksums are not touched.
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()>;

    /// Whole words, as they lie in memory.
    #[inline(always)]
    fn store_words<const N: usize>(&mut self, offset: usize, words: [u32; N]) -> Option<()> {
        let mut i = 0;
        while i < N {
            self.store(offset + i * 4, words[i].to_ne_bytes())?;
            i += 1;
        }
        Some(())
    }

    /// The IPv4 header checksum at `offset` after a change of the header by `delta`.
    #[inline(always)]
    fn adjust_header_sum(&mut self, offset: usize, delta: u32) -> Option<()> {
        let field = u16::from_ne_bytes(self.load(offset)?);
        self.store(offset, checksum::adjust(field, delta).to_ne_bytes())
    }

    /// The transport checksum at `offset`, likewise.
    #[inline(always)]
    fn adjust_sum(&mut self, offset: usize, delta: u32, kind: Sum) -> Option<()> {
        let field = u16::from_ne_bytes(self.load(offset)?);
        if kind.optional && field == 0 {
            return Some(());
        }
        let adjusted = match checksum::adjust(field, delta) {
            0 if kind.optional => 0xffff,
            adjusted => adjusted,
        };
        self.store(offset, adjusted.to_ne_bytes())
    }
}

/// A packet that can be made into another one.
pub trait Resize: Packet {
    /// Cuts off the end.
    fn truncate(&mut self, length: usize) -> Option<()>;

    /// Room of `length` bytes before the first.
    fn push_front(&mut self, length: usize) -> Option<()>;

    /// Without one a packet stands where it would stand after an Ethernet header.
    #[inline(always)]
    fn has_link_header(&self) -> bool {
        true
    }

    /// Whether the transport checksum at `offset` is still to be completed by whoever puts
    /// the packet on a wire.
    fn is_sum_partial(&mut self, _offset: usize) -> Option<bool> {
        Some(false)
    }
}

#[cfg(any(test, feature = "host"))]
mod host {
    extern crate alloc;

    use alloc::vec::Vec;

    use super::{Bytes, Packet, Resize};

    impl Bytes for Vec<u8> {
        fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
            self.as_slice().load(offset)
        }
    }

    impl Packet for Vec<u8> {
        fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
            *self.get_mut(offset..)?.first_chunk_mut()? = bytes;
            Some(())
        }
    }

    impl Resize for Vec<u8> {
        fn truncate(&mut self, length: usize) -> Option<()> {
            (length <= self.len()).then(|| Self::truncate(self, length))
        }

        fn push_front(&mut self, length: usize) -> Option<()> {
            self.splice(0..0, core::iter::repeat_n(0, length));
            Some(())
        }
    }
}
