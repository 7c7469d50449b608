//! The checksum of SCTP (RFC 9260 section 6.8, appendix A), changed without reading the packet.
//!
//! A CRC is linear: when bits of a message change, the CRC changes by that of a message with
//! those bits alone, whatever the others are. And zeros behind them multiply by a power of `x`,
//! modulo the polynomial; bytes are taken with the lowest bit first, so the coefficient of
//! `x^0` is the highest bit here.

/// Castagnoli's.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `x^0` and `x^8`.
const ONE: u32 = 1 << 31;
const BYTE: u32 = 1 << (31 - 8);

/// What so many bytes multiply by, and so many times 256 bytes. Tables, since the verifier goes
/// through every step for each way to come here.
static BYTES: [u32; 256] = powers(BYTE);
static BLOCKS: [u32; 256] = powers(times(powers(BYTE)[255], BYTE));

const fn powers(of: u32) -> [u32; 256] {
    let mut powers = [ONE; 256];
    let mut k = 1;
    while k < 256 {
        powers[k] = times(powers[k - 1], of);
        k += 1;
    }
    powers
}

/// Without a branch, so that the verifier goes through it once.
#[inline(always)]
const fn times(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        product ^= b & 0_u32.wrapping_sub((a >> (31 - bit)) & 1);
        b = (b >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(b & 1));
        bit += 1;
    }
    product
}

/// What is to be exclusive-ored with the checksum when the first four bytes of a message of
/// `length` bytes change by `delta`; both as little-endian numbers, as the packet has them.
#[must_use]
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn change(delta: u32, length: u16) -> u32 {
    let [blocks, bytes] = length.to_be_bytes();
    times(times(delta, BYTES[usize::from(bytes)]), BLOCKS[usize::from(blocks)])
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::fake::frames::crc32c;

    #[test]
    fn the_plain_sum_is_the_one_of_the_standard() {
        // RFC 3720 appendix B.4.
        assert_eq!(crc32c(&[0; 32]).to_le_bytes(), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(crc32c(&[0xff; 32]).to_le_bytes(), [0x43, 0xab, 0xa8, 0x62]);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest! {
        /// As if the whole message had been read again.
        #[test]
        fn changed_is_summed_anew(
            message in prop::collection::vec(any::<u8>(), 4..2000),
            new: [u8; 4],
        ) {
            let mut changed: Vec<u8> = message.clone();
            changed[..4].copy_from_slice(&new);
            let old = [message[0], message[1], message[2], message[3]];
            let delta = u32::from_le_bytes(old) ^ u32::from_le_bytes(new);
            let length = u16::try_from(message.len()).unwrap();
            prop_assert_eq!(crc32c(&message) ^ change(delta, length), crc32c(&changed));
        }
    }

    #[test]
    fn the_longest_message_too() {
        let mut message = std::vec![7; usize::from(u16::MAX)];
        let before = crc32c(&message);
        message[2] ^= 0x55;
        assert_eq!(before ^ change(0x0055_0000, u16::MAX), crc32c(&message));
    }
}
