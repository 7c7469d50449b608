//! Taking the node over from kube-proxy's ipvs mode, without a gap: what a Service wants
//! was adopted by then, so what is left goes. Chains and sets go in a thread of their
//! own, since a table of a hundred thousand rules takes seconds to exchange.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use tracing::{info, warn};

use super::objects::{Forward, Key, Value};
use super::{IpvsPlane, PlaneError};
use crate::dataplane::kubeproxy::{Evidence, Leftovers};
use crate::kernel::netlink::Netlink;
use crate::plan::ObjectKey as _;

impl<N: Netlink + 'static> IpvsPlane<N> {
    /// The unwanted objects that kube-proxy left, now that all wanted ones are there; and
    /// a start on the rest that it left.
    pub(super) fn take_over(&mut self, foreign: &HashMap<Key, Value>) -> Vec<Key> {
        let Some(mut takeover) = self.takeover.take() else { return Vec::new() };
        let mut keys = Vec::new();
        if let Some(leftovers) = takeover.due() {
            match self.left_by_kube_proxy(foreign, leftovers) {
                Ok(found) => {
                    if !found.is_empty() {
                        let objects = found.len();
                        info!(objects, "deleting what kube-proxy made and no Service wants");
                    }
                    keys = found;
                    takeover.remove();
                }
                Err(error) => warn!(%error, "cannot tell what kube-proxy left; trying again"),
            }
        }
        self.takeover = Some(takeover);
        keys
    }

    /// Of `foreign`, what kube-proxy made.
    pub(super) fn left_by_kube_proxy(
        &mut self,
        foreign: &HashMap<Key, Value>,
        leftovers: &mut Leftovers,
    ) -> Result<Vec<Key>, PlaneError> {
        if foreign.is_empty() {
            return Ok(Vec::new());
        }
        let all = self.links.addresses().map_err(|error| PlaneError::new("addresses", error))?;
        let (ours, others): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|address| address.link == self.link);
        let addresses = |list: Vec<crate::kernel::links::LinkAddress>| {
            list.into_iter().map(|address| address.address).collect::<BTreeSet<IpAddr>>()
        };
        let scene = Scene {
            link: addresses(ours),
            node: addresses(others),
            evidence: leftovers
                .evidence()
                .map_err(|error| PlaneError::new("kube-proxy's ipsets", error))?,
            excluded: self.config.exclude_cidrs.clone(),
        };
        Ok(scene.left_by_kube_proxy(foreign))
    }
}

/// What tells kube-proxy's objects from those of others. Pure.
struct Scene {
    /// Addresses of `kube-ipvs0`.
    link: BTreeSet<IpAddr>,
    /// All others of the node.
    node: BTreeSet<IpAddr>,
    evidence: Evidence,
    /// `--ipvs-exclude-cidrs`.
    excluded: Vec<IpNetwork>,
}

impl Scene {
    /// kube-proxy marks nothing as its own. Taken for its are addresses of the link that
    /// bears its name; virtual servers on such addresses; and those that its ipsets name.
    /// A real server that does not masquerade is never its making, and neither is the
    /// virtual server that has one.
    fn left_by_kube_proxy(&self, foreign: &HashMap<Key, Value>) -> Vec<Key> {
        let mut others: BTreeSet<Key> = BTreeSet::new();
        for (key, value) in foreign {
            if matches!(value, Value::RealServer(Forward { masquerading: false, .. })) {
                others.extend(key.parent());
            }
        }
        let theirs = |key: &Key| match key {
            Key::VirtualServer(_) => !others.contains(key) && self.made_by_kube_proxy(key),
            Key::Address(address) => !self.excluded(*address),
            Key::RealServer(..) | Key::Element(_) | Key::Redirect(..) => false,
        };
        let of_theirs = |key: &&Key| match key.parent() {
            Some(parent) => foreign.contains_key(&parent) && theirs(&parent),
            None => theirs(key),
        };
        foreign.keys().filter(of_theirs).cloned().collect()
    }

    fn made_by_kube_proxy(&self, key: &Key) -> bool {
        let Key::VirtualServer(frontend) = key else { return false };
        let (address, port) = (frontend.address, frontend.port.get());
        let of_node = self.node.contains(&address);
        !self.excluded(address)
            && (self.link.contains(&address)
                || self.evidence.names(address, frontend.protocol, port, of_node))
    }

    fn excluded(&self, address: IpAddr) -> bool {
        self.excluded.iter().any(|cidr| cidr.contains(address))
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::dataplane::ipvs::ServerConfig;
    use crate::dataplane::ipvs::codec::{Netmask, SchedulerName, ServiceFlags};
    use crate::kernel::ipset::{FakeIpSets, Member};
    use crate::kernel::netlink::FakeNetlink;
    use crate::kernel::xtables::FakeXTables;
    use crate::model::{Family, Protocol};
    use crate::policy::FrontendKey;

    fn frontend(address: &str, port: u16) -> FrontendKey {
        let port = NonZeroU16::new(port).unwrap();
        FrontendKey { address: address.parse().unwrap(), protocol: Protocol::Tcp, port }
    }

    fn leftovers(sets: &FakeIpSets) -> Leftovers {
        let netlink = Box::new(FakeNetlink::default());
        Leftovers::new(netlink, Box::new(FakeXTables::default()), Box::new(sets.clone()))
    }

    fn sets() -> FakeIpSets {
        let sets = FakeIpSets::default();
        let named = Member {
            address: Some("198.51.100.9".parse().unwrap()),
            port: Some(80),
            protocol: Some(Protocol::Tcp.number()),
        };
        let port = Member { port: Some(30900), ..Member::default() };
        let mut state = sets.state();
        state.sets.insert("KUBE-EXTERNAL-IP".to_owned(), vec![named]);
        state.sets.insert("KUBE-NODE-PORT-TCP".to_owned(), vec![port]);
        drop(state);
        sets
    }

    fn scene() -> Scene {
        let addresses = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect();
        Scene {
            link: addresses(&["10.96.0.1", "10.200.0.1"]),
            node: addresses(&["192.0.2.1"]),
            evidence: leftovers(&sets()).evidence().unwrap(),
            excluded: vec!["10.200.0.0/16".parse().unwrap()],
        }
    }

    fn server(objects: &mut HashMap<Key, Value>, address: &str, port: u16, masquerading: bool) {
        let key = frontend(address, port);
        let config = ServerConfig {
            scheduler: SchedulerName::new("rr").unwrap(),
            flags: ServiceFlags::default(),
            timeout: 0,
            netmask: Netmask::host(Family::V4),
        };
        objects.insert(Key::VirtualServer(key), Value::VirtualServer(config.into()));
        let real = Key::RealServer(key, "10.244.0.5:8080".parse().unwrap());
        objects.insert(real, Value::RealServer(Forward { weight: 1, masquerading }));
    }

    #[test]
    fn what_kube_proxy_made_is_told_from_what_others_made() {
        let mut foreign = HashMap::new();
        let theirs = [("10.96.0.1", 443), ("198.51.100.9", 80), ("192.0.2.1", 30900)];
        for (address, port) in theirs {
            server(&mut foreign, address, port, true);
        }
        // In no set and on no address of the link; a port of no Service; excluded.
        for (address, port) in [("203.0.113.1", 80), ("192.0.2.1", 8443), ("10.200.0.1", 80)] {
            server(&mut foreign, address, port, true);
        }
        // A director that does not masquerade.
        server(&mut foreign, "10.96.0.1", 53, false);
        for address in ["10.96.0.1", "10.200.0.1"] {
            foreign.insert(Key::Address(address.parse().unwrap()), Value::Present);
        }
        let mut found = scene().left_by_kube_proxy(&foreign);
        found.sort();
        let real = "10.244.0.5:8080".parse().unwrap();
        let mut expected: Vec<Key> = theirs
            .into_iter()
            .map(|(address, port)| frontend(address, port))
            .flat_map(|key| [Key::VirtualServer(key), Key::RealServer(key, real)])
            .chain([Key::Address("10.96.0.1".parse().unwrap())])
            .collect();
        expected.sort();
        assert_eq!(found, expected);
    }
}
