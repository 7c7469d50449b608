//! The kernel objects of ipvs mode, and which of them a frontend needs. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::codec::{self, Netmask, SchedulerName, ServiceFlags, VirtualServer, VirtualServerKey};
use super::ruleset::{Element, ElementKey, Set};
use crate::model::{HostPort, Protocol, SchedulerFlags, Scheduling};
use crate::plan::{ObjectKey, Standing};
use crate::policy::{Frontend, FrontendKey, FrontendKind, Masquerade, WhenEmpty};

/// Identity of a kernel object. The derived order keeps the real servers of one virtual
/// server together within a batch.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// An element of our nf_tables sets.
    Element(Element),
    /// What one of our nf_tables maps has for a frontend.
    Redirect(Set, FrontendKey),
    VirtualServer(FrontendKey),
    RealServer(FrontendKey, HostPort),
    /// An address on `kube-ipvs0`.
    Address(IpAddr),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Element(element) => element.fmt(f),
            Self::Redirect(map, frontend) => write!(f, "{frontend} in map {}", map.name()),
            Self::VirtualServer(frontend) => write!(f, "virtual server {frontend}"),
            Self::RealServer(frontend, to) => write!(f, "real server {to} of {frontend}"),
            Self::Address(address) => write!(f, "address {address}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// The object has no more to it than its key.
    Present,
    VirtualServer(Arc<ServerConfig>),
    RealServer(Forward),
    /// Another virtual server of the same protocol. Few objects are: they must not make
    /// all others larger.
    Redirect(Box<HostPort>),
}

/// What of a virtual server can be changed in place.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServerConfig {
    pub scheduler: SchedulerName,
    pub flags: ServiceFlags,
    /// Client affinity in seconds; 0 means none.
    pub timeout: u32,
    pub netmask: Netmask,
}

impl ServerConfig {
    /// The virtual server that `key` names, with this configuration.
    #[must_use]
    pub fn server(&self, key: &FrontendKey) -> VirtualServer {
        VirtualServer {
            flags: self.flags,
            timeout: self.timeout,
            netmask: self.netmask,
            ..VirtualServer::new(server_key(key), self.scheduler.clone())
        }
    }
}

impl From<VirtualServer> for ServerConfig {
    fn from(server: VirtualServer) -> Self {
        let VirtualServer { scheduler, flags, timeout, netmask, .. } = server;
        Self { scheduler, flags, timeout, netmask }
    }
}

#[must_use]
pub const fn server_key(key: &FrontendKey) -> VirtualServerKey {
    VirtualServerKey::Address { addr: key.address, protocol: key.protocol, port: key.port.get() }
}

/// How packets get to a real server, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    pub weight: u32,
    /// False for a real server that somebody else made with another forwarding method.
    pub masquerading: bool,
}

impl Forward {
    #[must_use]
    pub fn real_server(self, at: HostPort) -> codec::RealServer {
        codec::RealServer::new(at.address, at.port, self.weight)
    }
}

impl ObjectKey for Key {
    type Value = Value;

    /// The address comes last: until then no packet of the node takes the frontend for
    /// its own, and before it the sets know that unused ports are to be refused.
    /// `Frontends`, which lets packets pass, comes after there is something to pass to, and
    /// before `Vips`, which lets no others pass: on a node that is taken over both the
    /// address and the virtual server have traffic already.
    fn create_phase(&self) -> u8 {
        match self {
            Self::Element(element) if element.set == Set::Frontends => 3,
            Self::Redirect(..) => 3,
            Self::Element(element) if element.set == Set::Vips => 4,
            Self::Element(_) => 0,
            Self::VirtualServer(_) => 1,
            Self::RealServer(..) => 2,
            Self::Address(_) => 5,
        }
    }

    /// `Reject` and `Drop` go once real servers are there; the mark of ownership goes
    /// after what it marks.
    fn delete_phase(&self) -> u8 {
        match self {
            Self::Address(_) => 0,
            Self::Redirect(..) => 1,
            Self::Element(element) => match element.set {
                Set::Reject | Set::Drop | Set::Frontends => 1,
                _ => 4,
            },
            Self::RealServer(..) => 2,
            Self::VirtualServer(_) => 3,
        }
    }

    /// A range that contains another takes none into the set beside it.
    fn deleted_first(&self) -> bool {
        matches!(self, Self::Element(element) if element.set == Set::Allowed)
    }

    /// UDP has no end that could be waited for: its real servers go when the endpoint serves
    /// no longer, and take their flows along. At weight 0 a server is an available one to
    /// `expire_nodest_conn`, so that flows to it go on.
    fn retired(&self, value: &Value, standing: Standing) -> Option<Value> {
        match (self, value) {
            (Self::RealServer(frontend, _), Value::RealServer(forward))
                if frontend.protocol != Protocol::Udp || standing == Standing::Serving =>
            {
                Some(Value::RealServer(Forward { weight: 0, ..*forward }))
            }
            _ => None,
        }
    }

    fn leads_to(&self) -> Option<(FrontendKey, HostPort)> {
        match self {
            Self::RealServer(frontend, at) => Some((*frontend, *at)),
            _ => None,
        }
    }

    fn server_of(frontend: &FrontendKey) -> Option<Self> {
        Some(Self::VirtualServer(*frontend))
    }

    /// All but what endpoints and source ranges add.
    fn usual(frontend: &FrontendKey) -> Vec<Self> {
        const SETS: [Set; 7] = [
            Set::Owned,
            Set::Frontends,
            Set::ClusterIps,
            Set::Masquerade,
            Set::Reject,
            Set::Drop,
            Set::Guarded,
        ];
        let FrontendKey { address, protocol, port } = *frontend;
        let element = |set| Self::Element(Element::port(set, address, protocol, port.get()));
        let others = [
            Self::Element(Element::vip(address)),
            Self::Address(address),
            Self::VirtualServer(*frontend),
            Self::Redirect(Set::ShortCircuit, *frontend),
            Self::Redirect(Set::Shared, *frontend),
        ];
        SETS.into_iter().map(element).chain(others).collect()
    }

    fn parent(&self) -> Option<Self> {
        match self {
            Self::RealServer(frontend, _) => Some(Self::VirtualServer(*frontend)),
            _ => None,
        }
    }

    fn children(&self) -> Option<RangeInclusive<Self>> {
        const FIRST: HostPort = HostPort::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        const LAST: HostPort = HostPort::new(IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)), u16::MAX);
        match self {
            Self::VirtualServer(frontend) => {
                Some(Self::RealServer(*frontend, FIRST)..=Self::RealServer(*frontend, LAST))
            }
            _ => None,
        }
    }
}

/// Lowers a frontend to kernel objects; `scheduler` is the one to be used for it.
#[must_use]
pub fn lower(
    key: &FrontendKey,
    frontend: &Frontend,
    scheduler: &SchedulerName,
) -> Vec<(Key, Value)> {
    let mut objects = Vec::with_capacity(frontend.backends.len() + 7);
    elements(key, frontend, |element| objects.push((Key::Element(element), Value::Present)));
    if is_on_dummy_link(frontend) {
        objects.push((Key::Address(key.address), Value::Present));
    }
    for (map, target) in
        [(Set::ShortCircuit, frontend.short_circuit), (Set::Shared, frontend.shared)]
    {
        objects.extend(target.map(|target| {
            let to = HostPort::new(target.address, target.port.get());
            (Key::Redirect(map, *key), Value::Redirect(Box::new(to)))
        }));
    }
    let config = server_config(key, frontend, scheduler);
    objects.push((Key::VirtualServer(*key), Value::VirtualServer(Arc::new(config))));
    objects.extend(frontend.backends.iter().map(|backend| {
        let at = HostPort::new(backend.address, backend.port.get());
        let forward = Forward { weight: backend.weight.into(), masquerading: true };
        (Key::RealServer(*key, at), Value::RealServer(forward))
    }));
    objects
}

/// A node port's address, and any other that is the node's own, is there without us. A
/// hidden frontend's comes with the ClusterIP whose it is.
fn is_on_dummy_link(frontend: &Frontend) -> bool {
    !matches!(frontend.kind, FrontendKind::NodePort | FrontendKind::Hidden)
        && !frontend.on_node_address
}

fn elements(key: &FrontendKey, frontend: &Frontend, mut element: impl FnMut(Element)) {
    let FrontendKey { address, protocol, port: number } = *key;
    let port = |set| Element::port(set, address, protocol, number.get());
    element(port(Set::Owned));
    if frontend.kind != FrontendKind::Hidden {
        element(port(Set::Frontends));
    }
    match frontend.masquerade {
        Masquerade::Always => element(port(Set::Masquerade)),
        Masquerade::FromOutside => element(port(Set::ClusterIps)),
        Masquerade::Never => {}
    }
    if frontend.backends.is_empty() {
        element(port(match frontend.when_empty {
            WhenEmpty::Reject => Set::Reject,
            WhenEmpty::Drop => Set::Drop,
        }));
    }
    for backend in frontend.backends.iter().filter(|backend| backend.local) {
        element(Element::port(Set::Hairpin, backend.address, protocol, backend.port.get()));
    }
    if !frontend.source_ranges.is_empty() {
        element(port(Set::Guarded));
    }
    for &from in frontend.source_ranges.iter() {
        let port = number.get();
        let key = ElementKey::Range { address, protocol, port, from };
        element(Element { set: Set::Allowed, key });
    }
    if is_on_dummy_link(frontend) {
        element(Element::vip(address));
    }
}

fn server_config(
    key: &FrontendKey,
    frontend: &Frontend,
    scheduler: &SchedulerName,
) -> ServerConfig {
    let timeout = frontend.affinity.map_or(0, |t| u32::try_from(t.as_secs()).unwrap_or(u32::MAX));
    let affinity = if timeout > 0 { ServiceFlags::PERSISTENT } else { ServiceFlags::default() };
    ServerConfig {
        scheduler: scheduler.clone(),
        flags: affinity | scheduler_flags(frontend.scheduling.as_deref(), scheduler),
        timeout,
        netmask: Netmask::host(key.family()),
    }
}

/// `IP_VS_SVC_F_SCHED_SH_*` and `IP_VS_SVC_F_SCHED_MH_*` of `uapi/linux/ip_vs.h`, which
/// mean nothing to other schedulers. Where nothing is said about `mh`, it hashes the
/// client's port too, as kube-proxy has it.
fn scheduler_flags(scheduling: Option<&Scheduling>, scheduler: &SchedulerName) -> ServiceFlags {
    let default = SchedulerFlags { fallback: false, port: scheduler.as_str() == "mh" };
    let wanted = match (scheduler.as_str(), scheduling) {
        ("sh" | "mh", Some(said)) if said.scheduler.is_some() => said.flags,
        ("sh" | "mh", Some(said)) if said.flags != SchedulerFlags::default() => said.flags,
        ("sh" | "mh", _) => default,
        _ => return ServiceFlags::default(),
    };
    let flag = |set, flag| if set { flag } else { ServiceFlags::default() };
    flag(wanted.fallback, ServiceFlags::SCHEDULER_1) | flag(wanted.port, ServiceFlags::SCHEDULER_2)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;
    use std::time::Duration;

    use super::*;
    use crate::model::ObjectName;
    use crate::policy::{Backend, sample};

    fn key(protocol: Protocol) -> FrontendKey {
        FrontendKey { address: [10, 96, 0, 1].into(), protocol, port: NonZeroU16::new(80).unwrap() }
    }

    fn frontend(backends: &[u8]) -> Frontend {
        let backend = |n: &u8| Backend {
            address: [10, 244, 0, *n].into(),
            port: NonZeroU16::new(8080).unwrap(),
            local: *n == 1,
            weight: u16::from(*n),
        };
        sample::frontend(ObjectName::new("ns", "web"), backends.iter().map(backend).collect())
    }

    fn lowered(key: &FrontendKey, frontend: &Frontend) -> Vec<(Key, Value)> {
        lower(key, frontend, &SchedulerName::new("rr").unwrap())
    }

    fn sets(objects: &[(Key, Value)]) -> Vec<Set> {
        let set = |(key, _): &(Key, Value)| match key {
            Key::Element(element) => Some(element.set),
            _ => None,
        };
        objects.iter().filter_map(set).collect()
    }

    #[test]
    fn a_cluster_ip_is_an_address_a_server_and_its_set_elements() {
        let objects = lowered(&key(Protocol::Tcp), &frontend(&[1, 2]));
        let count = |wanted: fn(&Key) -> bool| objects.iter().filter(|(k, _)| wanted(k)).count();
        assert_eq!(count(|k| matches!(k, Key::Address(_))), 1);
        assert_eq!(count(|k| matches!(k, Key::VirtualServer(_))), 1);
        assert_eq!(count(|k| matches!(k, Key::RealServer(..))), 2);
        let expected = [Set::Owned, Set::Frontends, Set::ClusterIps, Set::Hairpin, Set::Vips];
        assert_eq!(sets(&objects), expected, "hairpin for the local endpoint only");
    }

    #[test]
    fn what_a_frontend_wants_is_usual_but_for_what_endpoints_and_ranges_add() {
        let redirected = Frontend {
            masquerade: Masquerade::Always,
            short_circuit: Some(key(Protocol::Tcp)),
            shared: Some(key(Protocol::Tcp)),
            source_ranges: Arc::from(["203.0.113.0/24".parse().unwrap()]),
            ..frontend(&[1])
        };
        let dropped = Frontend { when_empty: WhenEmpty::Drop, ..frontend(&[]) };
        let usual = Key::usual(&key(Protocol::Tcp));
        assert!(usual.len() <= 16);
        let mut wanted = std::collections::BTreeSet::new();
        for frontend in [frontend(&[1]), frontend(&[]), redirected, dropped] {
            for (key, _) in lowered(&key(Protocol::Tcp), &frontend) {
                match &key {
                    Key::RealServer(..) => assert!(!usual.contains(&key)),
                    Key::Element(element) if matches!(element.set, Set::Hairpin | Set::Allowed) => {
                        assert!(!usual.contains(&key));
                    }
                    _ => _ = wanted.insert(key),
                }
            }
        }
        assert_eq!(wanted, usual.into_iter().collect());
    }

    #[test]
    fn without_backends_the_answer_is_what_policy_says() {
        let empty = frontend(&[]);
        assert!(sets(&lowered(&key(Protocol::Tcp), &empty)).contains(&Set::Reject));
        let dropped = Frontend { when_empty: WhenEmpty::Drop, ..empty };
        let sets = sets(&lowered(&key(Protocol::Tcp), &dropped));
        assert!(sets.contains(&Set::Drop) && !sets.contains(&Set::Reject));
    }

    #[test]
    fn node_ports_and_the_nodes_own_addresses_are_not_put_on_the_dummy_link() {
        let node_port = Frontend { kind: FrontendKind::NodePort, ..frontend(&[1]) };
        let own =
            Frontend { kind: FrontendKind::ExternalIp, on_node_address: true, ..frontend(&[1]) };
        for frontend in [node_port, own] {
            let objects = lowered(&key(Protocol::Tcp), &frontend);
            assert!(!objects.iter().any(|(k, _)| matches!(k, Key::Address(_))));
            assert!(!sets(&objects).contains(&Set::Vips), "its other ports stay open");
        }
    }

    #[test]
    fn a_hidden_frontend_is_a_virtual_server_that_nobody_reaches_directly() {
        let hidden = Frontend {
            kind: FrontendKind::Hidden,
            masquerade: Masquerade::Never,
            ..frontend(&[2])
        };
        let objects = lowered(&key(Protocol::Tcp), &hidden);
        assert_eq!(sets(&objects), [Set::Owned]);
        assert!(!objects.iter().any(|(k, _)| matches!(k, Key::Address(_))));
    }

    #[test]
    fn source_ranges_guard_and_let_through() {
        let ranges = Arc::from(["203.0.113.0/24".parse().unwrap()]);
        let guarded = Frontend { source_ranges: ranges, ..frontend(&[2]) };
        let sets = sets(&lowered(&key(Protocol::Tcp), &guarded));
        assert!(sets.contains(&Set::Guarded) && sets.contains(&Set::Allowed));
    }

    #[test]
    fn weights_and_scheduler_flags_are_the_services() {
        let weigh = |objects: &[(Key, Value)]| -> Vec<u32> {
            objects
                .iter()
                .filter_map(|(_, value)| match value {
                    Value::RealServer(forward) => Some(forward.weight),
                    _ => None,
                })
                .collect()
        };
        assert_eq!(weigh(&lowered(&key(Protocol::Tcp), &frontend(&[3, 5]))), [3, 5]);
        let both = ServiceFlags::SCHEDULER_1 | ServiceFlags::SCHEDULER_2;
        let said = Scheduling {
            flags: SchedulerFlags { fallback: true, port: true },
            ..Scheduling::default()
        };
        let flags = |said: Option<&Scheduling>, name: &str| {
            scheduler_flags(said, &SchedulerName::new(name).unwrap())
        };
        assert_eq!(flags(Some(&said), "sh"), both);
        assert_eq!(flags(Some(&said), "rr"), ServiceFlags::default());
        assert_eq!(flags(None, "mh"), ServiceFlags::SCHEDULER_2, "as kube-proxy");
        assert_eq!(flags(None, "sh"), ServiceFlags::default());
    }

    #[test]
    fn affinity_is_persistence_with_its_timeout() {
        let sticky = Frontend { affinity: Some(Duration::from_secs(600)), ..frontend(&[1]) };
        let objects = lowered(&key(Protocol::Tcp), &sticky);
        let config = objects.iter().find_map(|(_, value)| match value {
            Value::VirtualServer(config) => Some(config.clone()),
            _ => None,
        });
        let config = config.unwrap();
        assert_eq!((config.timeout, config.flags), (600, ServiceFlags::PERSISTENT));
    }

    #[test]
    fn real_servers_retire_at_weight_0_those_of_udp_while_the_endpoint_serves() {
        let value = Value::RealServer(Forward { weight: 1, masquerading: true });
        let at = "10.244.0.1:8080".parse().unwrap();
        let retires = |protocol, standing| {
            let retired = Key::RealServer(key(protocol), at).retired(&value, standing);
            assert!(
                retired.is_none()
                    || retired
                        == Some(Value::RealServer(Forward { weight: 0, masquerading: true }))
            );
            retired.is_some()
        };
        for (standing, udp) in
            [(Standing::Gone, false), (Standing::Present, false), (Standing::Serving, true)]
        {
            assert!(retires(Protocol::Tcp, standing) && retires(Protocol::Sctp, standing));
            assert_eq!(retires(Protocol::Udp, standing), udp, "{standing:?}");
        }
    }

    #[test]
    fn a_port_is_let_through_before_others_of_its_address_are_refused() {
        let objects = lowered(&key(Protocol::Tcp), &frontend(&[1]));
        let phase = |set| {
            let of = |(k, _): &(Key, Value)| match k {
                Key::Element(element) if element.set == set => Some(k.create_phase()),
                _ => None,
            };
            objects.iter().find_map(of).unwrap()
        };
        assert!(phase(Set::Frontends) < phase(Set::Vips));
    }

    #[test]
    fn the_address_comes_last_and_goes_first() {
        let objects = lowered(&key(Protocol::Tcp), &frontend(&[1]));
        let last = objects.iter().map(|(k, _)| k.create_phase()).max();
        let address = Key::Address([10, 96, 0, 1].into());
        assert_eq!(Some(address.create_phase()), last);
        assert!(objects.iter().all(|(k, _)| address.delete_phase() <= k.delete_phase()));
    }
}
