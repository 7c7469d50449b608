//! The internet checksum (RFC 1071), changed in place (RFC 1624).
//!
//! Words are taken as they lie in memory: one's complement sums come out the same in either
//! byte order, as long as it is the same one throughout.

use crate::layout::Tuple;

/// What a change of some words adds to a sum over them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delta(u64);

impl Delta {
    /// A word, or two 16-bit ones side by side.
    #[inline(always)]
    pub const fn change(&mut self, old: u32, new: u32) {
        // Below 2^33 each; no packet has 2^31 words.
        self.0 += !old as u64 + new as u64;
    }

    /// A 16-bit word that stands alone.
    #[inline(always)]
    pub const fn change16(&mut self, old: u16, new: u16) {
        self.0 += !old as u64 + new as u64;
    }

    #[inline(always)]
    pub const fn add(&mut self, other: Self) {
        self.0 += other.0;
    }

    /// As the kernel's helpers take it.
    #[must_use]
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "folded twice, the carry is in")]
    pub const fn folded(self) -> u32 {
        let once = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((once & 0xffff_ffff) + (once >> 32)) as u32
    }
}

/// A checksum field after such a change.
///
/// A sum of nothing but zeros has two representations; the one chosen here is the one that
/// the kernel's `csum_replace_by_diff` and a full computation choose.
#[must_use]
#[inline(always)]
pub const fn adjust(field: u16, delta: u32) -> u16 {
    finish((0xffff_0000 | !field as u32 & 0xffff) as u64 + delta as u64)
}

/// The field for a sum of words.
#[must_use]
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "folded until the carry is in")]
pub const fn finish(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Over the pseudo-header, RFC 9293 section 3.1 and RFC 8200 section 8.1: addresses, protocol,
/// and the length of what follows the IP header.
#[must_use]
#[inline(always)]
pub fn pseudo_sum(tuple: &Tuple, protocol: u8, length: u16) -> u64 {
    let (source, destination) = (tuple.source.words(), tuple.destination.words());
    let first = if tuple.source.to_v4().is_some() { 3 } else { 0 };
    let mut sum = u64::from(u16::from(protocol).to_be()) + u64::from(length.to_be());
    let mut i = 0;
    while i < 4 {
        if i >= first {
            sum += u64::from(source[i].to_kernel()) + u64::from(destination[i].to_kernel());
        }
        i += 1;
    }
    sum
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn sum(words: &[u16]) -> u64 {
        words.iter().map(|word| u64::from(*word)).sum()
    }

    proptest! {
        #[test]
        fn adjusted_is_computed_anew(
            words in prop::collection::vec(any::<u16>(), 2..40),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u16>()), 0..8),
        ) {
            // The field counts itself, so that the sum is never one of zeros alone.
            prop_assume!(words.iter().any(|word| *word != 0));
            let mut changed: Vec<u16> = words.clone();
            let mut delta = Delta::default();
            for (index, value) in changes {
                let word = &mut changed[index.index(words.len())];
                delta.change16(*word, value);
                *word = value;
            }
            prop_assume!(changed.iter().any(|word| *word != 0));
            prop_assert_eq!(adjust(finish(sum(&words)), delta.folded()), finish(sum(&changed)));
        }
    }
}
