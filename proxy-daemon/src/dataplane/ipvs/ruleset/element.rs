//! What the ruleset's sets and maps hold, and its encoding.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use crate::kernel::nftables::{ElementBytes, Field, SetLayout, Shape};
use crate::model::{Family, HostPort, Protocol};

/// The sets and maps of one family's table.
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
    /// Frontends that only some clients may use.
    Guarded,
    /// These clients: frontends with ranges of source addresses.
    Allowed,
    /// Map: the frontend that serves clients inside the cluster instead.
    ShortCircuit,
    /// Map: the frontend that serves all clients instead, so that affinity is one for
    /// both.
    Shared,
}

impl Set {
    pub const ALL: [Self; 12] = [
        Self::Vips,
        Self::Owned,
        Self::Frontends,
        Self::ClusterIps,
        Self::Masquerade,
        Self::Reject,
        Self::Drop,
        Self::Hairpin,
        Self::Guarded,
        Self::Allowed,
        Self::ShortCircuit,
        Self::Shared,
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
            Self::Guarded => "guarded",
            Self::Allowed => "allowed-sources",
            Self::ShortCircuit => "short-circuit",
            Self::Shared => "shared-affinity",
        }
    }

    pub(super) const fn shape(self) -> Shape {
        match self {
            Self::Allowed => Shape::Interval,
            Self::ShortCircuit | Self::Shared => Shape::Data,
            _ => Shape::Key,
        }
    }

    pub(super) fn layout(self, family: Family) -> SetLayout {
        let shape = self.shape();
        SetLayout { key: self.key(family), shape, data: Self::data(family) }
    }

    fn key(self, family: Family) -> &'static [Field] {
        const fn port(address: Field) -> [Field; 3] {
            [address, Field::Protocol, Field::Port]
        }
        const fn hairpin(address: Field) -> [Field; 4] {
            [address, address, Field::Protocol, Field::Port]
        }
        const fn allowed(address: Field) -> [Field; 4] {
            [address, Field::Protocol, Field::Port, address]
        }
        const V4: Field = Field::Address(Family::V4);
        const V6: Field = Field::Address(Family::V6);
        match (self, family) {
            (Self::Vips, Family::V4) => &const { [V4] },
            (Self::Vips, Family::V6) => &const { [V6] },
            (Self::Hairpin, Family::V4) => &const { hairpin(V4) },
            (Self::Hairpin, Family::V6) => &const { hairpin(V6) },
            (Self::Allowed, Family::V4) => &const { allowed(V4) },
            (Self::Allowed, Family::V6) => &const { allowed(V6) },
            (_, Family::V4) => &const { port(V4) },
            (_, Family::V6) => &const { port(V6) },
        }
    }

    /// What the maps hold: a frontend's address and port.
    const fn data(family: Family) -> &'static [Field] {
        match family {
            Family::V4 => &const { [Field::Address(Family::V4), Field::Port] },
            Family::V6 => &const { [Field::Address(Family::V6), Field::Port] },
        }
    }
}

/// What an element says; its family is the address's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ElementKey {
    /// In [`Set::Vips`].
    Address(IpAddr),
    /// In the sets without a variant of their own. In [`Set::Hairpin`] it is an
    /// endpoint, in the others a frontend.
    Port { address: IpAddr, protocol: Protocol, port: u16 },
    /// In [`Set::Allowed`]: a frontend, and a range without host bits.
    Range { address: IpAddr, protocol: Protocol, port: u16, from: IpNetwork },
    /// In the maps: a frontend, and another of the same family and protocol.
    Redirect { address: IpAddr, protocol: Protocol, port: u16, to: HostPort },
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

    /// For the sets that hold frontends or endpoints alone.
    #[must_use]
    pub const fn port(set: Set, address: IpAddr, protocol: Protocol, port: u16) -> Self {
        Self { set, key: ElementKey::Port { address, protocol, port } }
    }

    #[must_use]
    pub const fn family(self) -> Family {
        match self.key {
            ElementKey::Address(address)
            | ElementKey::Port { address, .. }
            | ElementKey::Range { address, .. }
            | ElementKey::Redirect { address, .. } => Family::of(address),
        }
    }

    /// As the kernel has it: every field padded to whole registers. `None` when this
    /// kind of key has no place in that set.
    pub(super) fn encode(self) -> Option<ElementBytes> {
        let mut bytes = ElementBytes::default();
        let key = &mut bytes.key;
        match (self.set, self.set.shape(), self.key) {
            (Set::Vips, _, ElementKey::Address(address)) => put_address(key, address),
            (Set::Vips, ..) => return None,
            (set, Shape::Key, ElementKey::Port { address, protocol, port }) => {
                if set == Set::Hairpin {
                    put_address(key, address);
                }
                put_port(key, address, protocol, port);
            }
            (_, Shape::Interval, ElementKey::Range { address, protocol, port, from }) => {
                for (bytes, end) in [(key, from.network()), (&mut bytes.more, from.broadcast())] {
                    put_port(bytes, address, protocol, port);
                    put_address(bytes, end);
                }
            }
            (_, Shape::Data, ElementKey::Redirect { address, protocol, port, to }) => {
                put_port(key, address, protocol, port);
                put_address(&mut bytes.more, to.address);
                bytes.more.extend(to.port.to_be_bytes());
                bytes.more.extend([0, 0]);
            }
            _ => return None,
        }
        Some(bytes)
    }

    /// `None` for what we never write: another length, another protocol, a hairpin
    /// between two addresses, an interval that is no prefix.
    pub(super) fn decode(set: Set, family: Family, bytes: &ElementBytes) -> Option<Self> {
        if set == Set::Vips {
            let (address, rest) = take_address(family, &bytes.key)?;
            return rest.is_empty().then_some(Self::vip(address));
        }
        let mut key = bytes.key.as_slice();
        if set == Set::Hairpin {
            let (source, rest) = take_address(family, key)?;
            key = take_address(family, rest).filter(|(to, _)| *to == source).map(|_| rest)?;
        }
        let (address, protocol, port, rest) = take_port(family, key)?;
        let key = match set.shape() {
            Shape::Key => {
                rest.is_empty().then_some(ElementKey::Port { address, protocol, port })?
            }
            Shape::Interval => {
                let (first, rest) = take_address(family, rest)?;
                let last = last_address(family, &bytes.more, &bytes.key)?;
                let from = network(first, last).filter(|_| rest.is_empty())?;
                ElementKey::Range { address, protocol, port, from }
            }
            Shape::Data => {
                let (to, port_bytes) = take_address(family, &bytes.more)?;
                let &[high, low, _, _] = port_bytes else { return None };
                let to = HostPort::new(to, u16::from_be_bytes([high, low]));
                rest.is_empty().then_some(ElementKey::Redirect { address, protocol, port, to })?
            }
        };
        Some(Self { set, key })
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
            ElementKey::Range { address, protocol, port, from } => {
                write!(f, "{set} {address} {protocol} {port} {from}")
            }
            ElementKey::Redirect { address, protocol, port, to } => {
                write!(f, "{set} {address} {protocol} {port} to {to}")
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

fn put_port(key: &mut Vec<u8>, address: IpAddr, protocol: Protocol, port: u16) {
    put_address(key, address);
    key.extend([protocol.number(), 0, 0, 0]);
    key.extend(port.to_be_bytes());
    key.extend([0, 0]);
}

fn take_port(family: Family, key: &[u8]) -> Option<(IpAddr, Protocol, u16, &[u8])> {
    let (address, rest) = take_address(family, key)?;
    let (&[protocol, _, _, _, high, low, _, _], rest) = rest.split_first_chunk::<8>()?;
    Some((address, Protocol::from_number(protocol)?, u16::from_be_bytes([high, low]), rest))
}

/// The source address that ends an interval; its frontend must be that of the start.
fn last_address(family: Family, end: &[u8], start: &[u8]) -> Option<IpAddr> {
    let frontend = start.len().checked_sub(match family {
        Family::V4 => 4,
        Family::V6 => 16,
    })?;
    let (same, last) = end.split_at_checked(frontend)?;
    let (address, rest) = take_address(family, last)?;
    (start.starts_with(same) && rest.is_empty()).then_some(address)
}

/// The prefix whose first and last addresses these are.
fn network(first: IpAddr, last: IpAddr) -> Option<IpNetwork> {
    let (longest, common) = match (first, last) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (32, (a.to_bits() ^ b.to_bits()).leading_zeros()),
        (IpAddr::V6(a), IpAddr::V6(b)) => (128, (a.to_bits() ^ b.to_bits()).leading_zeros()),
        _ => return None,
    };
    let prefix = u8::try_from(common.min(longest)).ok()?;
    let network = IpNetwork::new(first, prefix).ok()?;
    (network.network() == first && network.broadcast() == last).then_some(network)
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
