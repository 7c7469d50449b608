//! What the ruleset's sets hold, and its encoding as keys.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::kernel::nftables::Field;
use crate::model::{Family, Protocol};

/// The sets of one family's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Set {
    /// Addresses on the dummy interface. Every port of theirs that is no frontend is
    /// refused, so that it never reaches a process which listens on all addresses.
    Vips,
    /// Virtual servers that we made: IPVS itself has no place for a mark of ownership.
    Owned,
    /// Frontends that have a virtual server.
    Frontends,
    /// ClusterIP frontends: masqueraded for clients from outside the cluster.
    ClusterIps,
    /// External frontends under policy Cluster: masqueraded for everyone.
    Masquerade,
    /// Frontends that answer with a TCP reset or port unreachable.
    Reject,
    /// Frontends that do not answer.
    Drop,
    /// Local endpoints, for connections that come back to where they started.
    Hairpin,
}

impl Set {
    pub const ALL: [Self; 8] = [
        Self::Vips,
        Self::Owned,
        Self::Frontends,
        Self::ClusterIps,
        Self::Masquerade,
        Self::Reject,
        Self::Drop,
        Self::Hairpin,
    ];

    /// None is a keyword of `nft`, so that what it lists it can also load.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vips => "vips",
            Self::Owned => "owned",
            Self::Frontends => "frontends",
            Self::ClusterIps => "cluster-ips",
            Self::Masquerade => "masqueraded",
            Self::Reject => "rejected",
            Self::Drop => "dropped",
            Self::Hairpin => "hairpin",
        }
    }

    pub(super) fn key(self, family: Family) -> &'static [Field] {
        const fn port(address: Field) -> [Field; 3] {
            [address, Field::Protocol, Field::Port]
        }
        const fn hairpin(address: Field) -> [Field; 4] {
            [address, address, Field::Protocol, Field::Port]
        }
        const V4: Field = Field::Address(Family::V4);
        const V6: Field = Field::Address(Family::V6);
        match (self, family) {
            (Self::Vips, Family::V4) => &const { [V4] },
            (Self::Vips, Family::V6) => &const { [V6] },
            (Self::Hairpin, Family::V4) => &const { hairpin(V4) },
            (Self::Hairpin, Family::V6) => &const { hairpin(V6) },
            (_, Family::V4) => &const { port(V4) },
            (_, Family::V6) => &const { port(V6) },
        }
    }

    pub(super) fn key_length(self, family: Family) -> u32 {
        self.key(family).iter().map(|field| field.length()).sum()
    }
}

/// What an element says; its family is the address's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ElementKey {
    /// In [`Set::Vips`].
    Address(IpAddr),
    /// In every other set. In [`Set::Hairpin`] it is an endpoint, in the others a
    /// frontend.
    Port { address: IpAddr, protocol: Protocol, port: u16 },
}

/// One element of one set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    pub set: Set,
    pub key: ElementKey,
}

impl Element {
    #[must_use]
    pub const fn vip(address: IpAddr) -> Self {
        Self { set: Set::Vips, key: ElementKey::Address(address) }
    }

    /// For every set but [`Set::Vips`].
    #[must_use]
    pub const fn port(set: Set, address: IpAddr, protocol: Protocol, port: u16) -> Self {
        Self { set, key: ElementKey::Port { address, protocol, port } }
    }

    #[must_use]
    pub const fn family(self) -> Family {
        match self.key {
            ElementKey::Address(address) | ElementKey::Port { address, .. } => Family::of(address),
        }
    }

    /// The key as the kernel compares it: every field padded to whole registers.
    /// `None` when this kind of key has no place in that set.
    pub(super) fn encode(self) -> Option<Vec<u8>> {
        let mut key = Vec::with_capacity(40);
        match (self.set, self.key) {
            (Set::Vips, ElementKey::Address(address)) => put_address(&mut key, address),
            (Set::Vips, ElementKey::Port { .. }) | (_, ElementKey::Address(_)) => return None,
            (set, ElementKey::Port { address, protocol, port }) => {
                if set == Set::Hairpin {
                    put_address(&mut key, address);
                }
                put_address(&mut key, address);
                key.extend([protocol.number(), 0, 0, 0]);
                key.extend(port.to_be_bytes());
                key.extend([0, 0]);
            }
        }
        Some(key)
    }

    /// `None` for what we never write: another length, another protocol, a hairpin
    /// between two addresses.
    pub(super) fn decode(set: Set, family: Family, key: &[u8]) -> Option<Self> {
        let (address, rest) = take_address(family, key)?;
        if set == Set::Vips {
            return rest.is_empty().then_some(Self::vip(address));
        }
        let rest = if set == Set::Hairpin {
            let (destination, rest) = take_address(family, rest)?;
            (destination == address).then_some(rest)?
        } else {
            rest
        };
        let &[protocol, _, _, _, high, low, _, _] = rest else {
            return None;
        };
        let protocol = Protocol::from_number(protocol)?;
        Some(Self::port(set, address, protocol, u16::from_be_bytes([high, low])))
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = self.set.name();
        match self.key {
            ElementKey::Address(address) => write!(f, "{set} {address}"),
            ElementKey::Port { address, protocol, port } => {
                write!(f, "{set} {address} {protocol} {port}")
            }
        }
    }
}

fn put_address(key: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => key.extend(address.octets()),
        IpAddr::V6(address) => key.extend(address.octets()),
    }
}

fn take_address(family: Family, key: &[u8]) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => {
            let (octets, rest) = key.split_first_chunk::<4>()?;
            Some((Ipv4Addr::from(*octets).into(), rest))
        }
        Family::V6 => {
            let (octets, rest) = key.split_first_chunk::<16>()?;
            Some((Ipv6Addr::from(*octets).into(), rest))
        }
    }
}
