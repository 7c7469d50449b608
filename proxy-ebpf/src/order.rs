//! Integers in network byte order, and addresses.
//!
//! Map keys are compared byte by byte, so a port stored in host order is not an error
//! anybody sees: it is a Service that is never found. These types have no arithmetic and
//! only named conversions.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// 16 bits in network byte order: a port.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Be16(u16);

impl Be16 {
    #[must_use]
    #[inline(always)]
    pub const fn from_host(value: u16) -> Self {
        Self(value.to_be())
    }

    #[must_use]
    #[inline(always)]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }

    /// Bytes as they stand in a packet.
    #[must_use]
    #[inline(always)]
    pub const fn from_wire(bytes: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(bytes))
    }

    /// As `bpf_sock_addr.user_port` has it: network order in the low 16 bits.
    #[must_use]
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the kernel keeps a __be16 in a u32")]
    pub const fn from_kernel(value: u32) -> Self {
        Self(value as u16)
    }

    #[must_use]
    #[inline(always)]
    pub const fn to_kernel(self) -> u32 {
        self.0 as u32
    }

    #[must_use]
    #[inline(always)]
    pub const fn to_wire(self) -> [u8; 2] {
        self.0.to_ne_bytes()
    }
}

impl fmt::Debug for Be16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_host(), f)
    }
}

/// 32 bits in network byte order: an IPv4 address, or a quarter of an IPv6 one.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Be32(u32);

impl Be32 {
    #[must_use]
    #[inline(always)]
    pub const fn from_host(value: u32) -> Self {
        Self(value.to_be())
    }

    #[must_use]
    #[inline(always)]
    pub const fn from_wire(bytes: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(bytes))
    }

    #[must_use]
    #[inline(always)]
    pub const fn to_wire(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    /// As `bpf_sock_addr.user_ip4` and the words of `user_ip6` have it.
    #[must_use]
    #[inline(always)]
    pub const fn from_kernel(value: u32) -> Self {
        Self(value)
    }

    #[must_use]
    #[inline(always)]
    pub const fn to_kernel(self) -> u32 {
        self.0
    }

    #[must_use]
    #[inline(always)]
    pub const fn masked(self, mask: Self) -> Self {
        Self(self.0 & mask.0)
    }
}

impl fmt::Debug for Be32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_wire(), f)
    }
}

/// `::ffff:0:0/96`, RFC 4291 section 2.5.5.2.
const MAPPED: Be32 = Be32::from_host(0xffff);

/// An address of either family; IPv4 in the IPv4-mapped form of RFC 4291.
///
/// One form for both means one table, one code path, and sockets of family `AF_INET6`
/// that connect to an IPv4 Service by its mapped address need nothing special.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Address([Be32; 4]);

impl Address {
    #[must_use]
    #[inline(always)]
    pub const fn v4(address: Be32) -> Self {
        Self([Be32(0), Be32(0), MAPPED, address])
    }

    /// In 127.0.0.0/8.
    #[must_use]
    #[inline(always)]
    pub const fn is_loopback_v4(&self) -> bool {
        let [first, second, third, last] = self.0;
        first.0 | second.0 == 0 && third.0 == MAPPED.0 && last.to_wire()[0] == 127
    }

    #[must_use]
    #[inline(always)]
    pub const fn v6(words: [Be32; 4]) -> Self {
        Self(words)
    }

    /// The IPv4 address, when it is one.
    #[must_use]
    #[inline(always)]
    pub fn to_v4(self) -> Option<Be32> {
        let [a, b, c, d] = self.0;
        (a.0 == 0 && b.0 == 0 && c == MAPPED).then_some(d)
    }

    #[must_use]
    #[inline(always)]
    pub const fn words(self) -> [Be32; 4] {
        self.0
    }

    /// `::`, which a zeroed map value holds where there is no address.
    #[must_use]
    #[inline(always)]
    pub fn is_unset(&self) -> bool {
        let [a, b, c, d] = self.0;
        a.0 | b.0 | c.0 | d.0 == 0
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self::v4(Be32::from_wire(address.octets()))
    }
}

impl From<Ipv6Addr> for Address {
    fn from(address: Ipv6Addr) -> Self {
        let o = address.octets();
        Self([
            Be32::from_wire([o[0], o[1], o[2], o[3]]),
            Be32::from_wire([o[4], o[5], o[6], o[7]]),
            Be32::from_wire([o[8], o[9], o[10], o[11]]),
            Be32::from_wire([o[12], o[13], o[14], o[15]]),
        ])
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => address.into(),
        }
    }
}

impl From<Address> for IpAddr {
    /// A mapped address is IPv4: the API does not accept mapped addresses as IPv6 ones.
    fn from(address: Address) -> Self {
        if let Some(v4) = address.to_v4() {
            return Self::V4(v4.to_wire().into());
        }
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(address.0) {
            chunk.copy_from_slice(&word.to_wire());
        }
        Self::V6(octets.into())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn addresses_survive_the_round_trip() {
        for text in ["10.96.0.1", "255.255.255.255", "fd00:1:2:3:4:5:6:7", "::1", "::"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(address)).to_string(), text);
        }
    }

    #[test]
    fn bytes_stand_as_on_the_wire() {
        let port = Be16::from_host(0x1f90);
        assert_eq!(port.to_kernel().to_ne_bytes()[..2], [0x1f, 0x90]);
        assert_eq!(Be16::from_wire([0x1f, 0x90]), port);
        assert_eq!(Be16::from_kernel(port.to_kernel()).to_host(), 8080);
        let address = Address::from(Ipv4Addr::new(10, 96, 0, 1));
        assert_eq!(address.words()[3].to_kernel().to_ne_bytes(), [10, 96, 0, 1]);
        assert_eq!(address.words()[2].to_kernel().to_ne_bytes(), [0, 0, 0xff, 0xff]);
    }
}
