//! What the engine compares: frontends, as the maps can hold them and give them back.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use proxy_ebpf::layout::{self, ServiceId};
use proxy_ebpf::order::Be16;
use proxy_ebpf::parse::{SCTP, TCP, UDP};
use proxy_ebpf::unmatched::{address_key, external_key};

use super::members::{Member, Members};
use super::slots::{Fill, Share, fill, key_of};
use crate::model::{LocalDetect, Protocol, Selection};
use crate::plan::{ObjectKey, Standing};
use crate::policy::{
    Backend, Frontend, FrontendKey, FrontendKind, Known, Masquerade, PortName, WhenEmpty,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    Frontend(FrontendKey),
    /// A Service's own: its other ports are refused.
    Address(IpAddr),
    /// One that leads to a Service and may be another machine's: its other ports are refused only to
    /// who comes in by an uplink, whom nobody else would answer.
    External(IpAddr),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frontend(frontend) => write!(f, "frontend {frontend}"),
            Self::Address(address) => write!(f, "address {address}"),
            Self::External(address) => write!(f, "external address {address}"),
        }
    }
}

impl ObjectKey for Key {
    type Value = Value;

    fn create_phase(&self) -> u8 {
        0
    }

    fn delete_phase(&self) -> u8 {
        match self {
            Self::Frontend(_) => 0,
            Self::Address(_) | Self::External(_) => 1,
        }
    }

    /// Connections live in the table of flows, not in the frontend.
    fn retired(&self, _: &Value, _: Standing) -> Option<Value> {
        None
    }

    /// There is no more.
    fn usual(frontend: &FrontendKey) -> Vec<Self> {
        let FrontendKey { address, .. } = *frontend;
        vec![Self::Frontend(*frontend), Self::Address(address), Self::External(address)]
    }

    fn parent(&self) -> Option<Self> {
        None
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Frontend(Arc<Programmed>),
    Address,
}

/// A frontend with everything it leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programmed {
    pub service: ServiceId,
    pub affinity: u32,
    pub flags: u32,
    pub node: Arc<Set>,
    pub outside: Arc<Set>,
    /// Of UDP, which has no end: all endpoints that serve, whose flows go on. Sorted.
    pub serving: Members,
    /// Sorted; of no meaning without the flag.
    pub source_ranges: BTreeSet<IpNetwork>,
}

/// A set of backends in the order of its range.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Set {
    /// Sorted; only those that have a slot.
    pub members: Members,
    /// For each slot the index of its member. Empty when each has one, in their order: without
    /// weights and Maglev hashing that is so.
    order: Box<[u32]>,
}

impl Set {
    fn of(backends: &[Backend], kind: Fill, is_own: impl Fn(IpAddr) -> bool) -> Self {
        let weighing = || backends.iter().filter(|backend| backend.weight > 0);
        let members: Vec<Member> = weighing()
            .map(|backend| Member {
                address: backend.address,
                port: backend.port.get(),
                local: backend.local,
                // Endpoints that nobody manages name no node.
                host: is_own(backend.address),
            })
            .collect();
        // Only Maglev tells backends apart by it.
        let key = |backend| if kind == Fill::Maglev { place_of(backend) } else { 0 };
        let shares: Vec<Share> =
            weighing().map(|backend| Share { key: key(backend), weight: backend.weight }).collect();
        let slots = fill(kind, &shares);
        let flat: Vec<Member> = slots.iter().map(|slot| members[*slot as usize]).collect();
        Self::from_slots(&flat)
    }

    /// What the slots say, in the one form in which equal sets are equal.
    pub fn from_slots(slots: &[Member]) -> Self {
        let mut members = slots.to_vec();
        members.sort_unstable();
        members.dedup();
        let index = |member| members.binary_search(member).map_or(u32::MAX, index32);
        let in_order = members == slots;
        let order = if in_order { Box::default() } else { slots.iter().map(index).collect() };
        Self { members: members.into(), order }
    }

    /// For each slot the index of its member.
    pub fn slots(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        let count = if self.order.is_empty() { self.members.len() } else { self.order.len() };
        (0..count).map(|slot| self.order.get(slot).map_or(slot, |member| *member as usize))
    }
}

fn index32(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// The same on every node.
fn place_of(backend: &Backend) -> u64 {
    let address: layout::Backend =
        layout::Backend { address: backend.address.into(), ..layout::Backend::default() };
    let mut bytes: Vec<u8> =
        address.address.words().iter().flat_map(|word| word.to_wire()).collect();
    bytes.extend(backend.port.get().to_be_bytes());
    key_of(&bytes)
}

/// What lowering depends on besides the frontend.
#[derive(Debug, Clone, Default)]
pub struct Lowering {
    pub masquerade_all: bool,
    pub selection: Selection,
    /// Addresses of the node.
    pub own: BTreeSet<IpAddr>,
    /// Networks at the node's own links.
    pub near: Vec<IpNetwork>,
    /// What counts as a pod.
    pub detect: LocalDetect,
}

impl Lowering {
    /// The objects of one frontend.
    pub fn lower(&self, key: &FrontendKey, frontend: &Frontend) -> Vec<(Key, Value)> {
        // A second set is a second range here, not a second frontend.
        if frontend.kind == FrontendKind::Hidden {
            return Vec::new();
        }
        let programmed = Value::Frontend(Arc::new(self.programmed(key, frontend)));
        let mut objects = vec![(Key::Frontend(*key), programmed)];
        match frontend.kind {
            FrontendKind::ClusterIp => objects.push((Key::Address(key.address), Value::Address)),
            // An address of the node has processes behind its other ports.
            FrontendKind::ExternalIp | FrontendKind::LoadBalancer if !frontend.on_node_address => {
                let may_be_a_machines = frontend.among_nodes || self.is_near(key.address);
                let as_key = if may_be_a_machines { Key::External } else { Key::Address };
                objects.push((as_key(key.address), Value::Address));
            }
            _ => {}
        }
        objects
    }

    /// In a network with other machines, one of which may have the address.
    fn is_near(&self, address: IpAddr) -> bool {
        self.near.iter().any(|network| network.contains(address))
    }

    fn programmed(&self, key: &FrontendKey, frontend: &Frontend) -> Programmed {
        let kind = match self.selection_of(frontend) {
            Selection::Maglev => Fill::Maglev,
            Selection::Hash | Selection::Random => Fill::Plain,
        };
        let is_own = |address| self.own.contains(&address);
        let outside = Arc::new(Set::of(&frontend.backends, kind, is_own));
        let node = match &frontend.short_circuit_set {
            Some(backends) => Arc::new(Set::of(backends, kind, is_own)),
            None => Arc::clone(&outside),
        };
        let source_ranges: BTreeSet<IpNetwork> = frontend.source_ranges.iter().copied().collect();
        Programmed {
            service: service_id(&frontend.port, key),
            affinity: frontend
                .affinity
                .map_or(0, |timeout| u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX)),
            flags: self.flags(key, frontend),
            node,
            outside,
            serving: self.serving(key, frontend),
            source_ranges,
        }
    }

    fn selection_of(&self, frontend: &Frontend) -> Selection {
        match frontend.scheduling.as_ref().and_then(|s| s.scheduler.as_deref()) {
            // The kernel's name for Maglev hashing.
            Some("mh") => Selection::Maglev,
            Some(_) if self.selection == Selection::Maglev => Selection::Hash,
            _ => self.selection,
        }
    }

    fn serving(&self, key: &FrontendKey, frontend: &Frontend) -> Members {
        if key.protocol != Protocol::Udp {
            return Members::default();
        }
        let serving = frontend.endpoints.iter().filter(|endpoint| endpoint.serving);
        let member = |endpoint: &Known| Member {
            address: endpoint.at.address,
            port: endpoint.at.port,
            local: endpoint.local,
            host: self.own.contains(&endpoint.at.address),
        };
        serving.map(member).collect::<Vec<_>>().into()
    }

    fn flags(&self, key: &FrontendKey, frontend: &Frontend) -> u32 {
        use layout::Frontend as F;
        let mut flags = 0;
        if frontend.local_only {
            flags |= F::OUTSIDE_LOCAL_SET;
        }
        if frontend.when_empty == WhenEmpty::Drop {
            flags |= F::OUTSIDE_DROPS;
        }
        if frontend.short_circuit_set.is_none() {
            if frontend.local_only {
                flags |= F::NODE_LOCAL_SET;
            }
            if frontend.when_empty == WhenEmpty::Drop {
                flags |= F::NODE_DROPS;
            }
        }
        if !frontend.source_ranges.is_empty() {
            flags |= F::SOURCE_RANGES;
        }
        if self.selection_of(frontend) == Selection::Random {
            flags |= F::RANDOM;
        }
        flags
            | match frontend.masquerade {
                _ if self.masquerade_all => F::MASQUERADE_ALL,
                Masquerade::Always => F::MASQUERADE_REMOTE,
                // Where nothing tells who is outside, nobody is.
                Masquerade::FromOutside if self.detect.tells(key.family()) => F::MASQUERADE_OUTSIDE,
                Masquerade::FromOutside | Masquerade::Never => 0,
            }
    }
}

/// Of the Service port's name, its protocol and its family.
fn service_id(port: &PortName, key: &FrontendKey) -> ServiceId {
    ServiceId::new(key_of(format!("{port} {} {:?}", key.protocol, key.family()).as_bytes()))
}

#[must_use]
pub const fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
        Protocol::Sctp => SCTP,
    }
}

#[must_use]
pub const fn protocol_of(number: u8) -> Option<Protocol> {
    match number {
        TCP => Some(Protocol::Tcp),
        UDP => Some(Protocol::Udp),
        SCTP => Some(Protocol::Sctp),
        _ => None,
    }
}

/// The key in the map.
#[must_use]
pub fn map_key(key: &Key) -> layout::FrontendKey {
    match key {
        Key::Frontend(key) => layout::FrontendKey::new(
            key.address.into(),
            Be16::from_host(key.port.get()),
            protocol_number(key.protocol),
        ),
        Key::Address(address) => address_key((*address).into()),
        Key::External(address) => external_key((*address).into()),
    }
}

/// The inverse; `None` for what this daemon never writes.
#[must_use]
pub fn from_map_key(key: &layout::FrontendKey) -> Option<Key> {
    let address = key.address().into();
    if *key == address_key(key.address()) {
        return Some(Key::Address(address));
    }
    if *key == external_key(key.address()) {
        return Some(Key::External(address));
    }
    let port = key.port().to_host().try_into().ok()?;
    let protocol = protocol_of(key.protocol())?;
    Some(Key::Frontend(FrontendKey { address, protocol, port }))
}

#[cfg(test)]
mod tests;
