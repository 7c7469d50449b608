//! Taking the node over from kube-proxy's ipvs mode, without a gap: what a Service wants
//! was adopted by then, so what is left goes. Chains and sets go in a thread of their
//! own, since a table of a hundred thousand rules takes seconds to exchange.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::thread::JoinHandle;

use ipnetwork::IpNetwork;
use tracing::{debug, info, warn};

use super::objects::{Forward, Key, Value};
use super::{IpvsPlane, PlaneError};
use crate::dataplane::kubeproxy::{Evidence, Forwarding, LeftoverError, Leftovers, Removed};
use crate::kernel::netlink::Netlink;
use crate::plan::ObjectKey as _;

/// Why a kube-proxy must be thought to run on this node; `None` when it seems not to.
pub type Rival = Box<dyn Fn() -> Option<String> + Send>;

pub struct Takeover {
    rival: Rival,
    stage: Stage,
    waiting_said: bool,
}

impl fmt::Debug for Takeover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Takeover").field("stage", &self.stage).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Stage {
    /// Leftovers may be there.
    Due(Leftovers),
    Removing(JoinHandle<(Leftovers, bool)>),
    /// All is removed: if it comes back, somebody makes it.
    Removed(Leftovers),
    Looking(#[expect(dead_code, reason = "nobody waits for it")] JoinHandle<()>),
    Over,
}

impl Takeover {
    pub fn new(leftovers: Leftovers, rival: Rival) -> Self {
        Self { rival, stage: Stage::Due(leftovers), waiting_said: false }
    }

    /// Why a kube-proxy must be thought to run on this node.
    pub fn rival(&self) -> Option<String> {
        (self.rival)()
    }

    /// For taking down: everything goes, in the calling thread.
    pub fn into_leftovers(self) -> Option<Leftovers> {
        match self.stage {
            Stage::Due(leftovers) | Stage::Removed(leftovers) => Some(leftovers),
            Stage::Removing(_) | Stage::Looking(_) | Stage::Over => None,
        }
    }

    /// Brings the stage up to date; the leftovers when they are to be removed now.
    fn due(&mut self) -> Option<&mut Leftovers> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Removing(thread) if thread.is_finished() => match thread.join() {
                Ok((leftovers, true)) => Stage::Removed(leftovers),
                Ok((leftovers, false)) => Stage::Due(leftovers),
                Err(_) => Stage::Over,
            },
            Stage::Removed(leftovers) => start("look", || look(leftovers), Stage::Looking),
            stage => stage,
        };
        if !matches!(self.stage, Stage::Due(_)) {
            return None;
        }
        if let Some(reason) = self.rival() {
            if !self.waiting_said {
                warn!(
                    reason,
                    "kube-proxy seems to run on this node: what it has made stays. Stop it; \
                     its leftovers are then removed at the next resync"
                );
            }
            self.waiting_said = true;
            return None;
        }
        match &mut self.stage {
            Stage::Due(leftovers) => Some(leftovers),
            _ => None,
        }
    }

    fn remove(&mut self) {
        if let Stage::Due(leftovers) = std::mem::replace(&mut self.stage, Stage::Over) {
            self.stage = start("takeover", || remove(leftovers), Stage::Removing);
        }
    }
}

fn start<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
    stage: fn(JoinHandle<T>) -> Stage,
) -> Stage {
    match std::thread::Builder::new().name(name.to_owned()).spawn(work) {
        Ok(thread) => stage(thread),
        Err(error) => {
            warn!(%error, "cannot start a thread to remove what kube-proxy left; restart to retry");
            Stage::Over
        }
    }
}

fn remove(mut leftovers: Leftovers) -> (Leftovers, bool) {
    let result = leftovers.remove(Forwarding::Keep);
    tell(&result);
    (leftovers, result.is_ok())
}

fn tell(result: &Result<Removed, LeftoverError>) {
    match result {
        Ok(removed) => {
            if !removed.is_nothing() {
                let Removed { rules, chains, sets, .. } = removed;
                info!(rules, chains, sets, "removed what kube-proxy had left");
            }
            for (chain, reason) in &removed.kept {
                warn!(chain, reason, "an iptables chain of kube-proxy stays");
            }
        }
        Err(error) => warn!(
            %error,
            "cannot remove what kube-proxy left, which may refuse connections to new ports; \
             trying again at the next resync. By hand, with kube-proxy's own image: \
             `kube-proxy --cleanup`"
        ),
    }
}

fn look(mut leftovers: Leftovers) {
    match leftovers.present() {
        Ok(false) => {}
        Ok(true) => warn!(
            "iptables chains or ipsets of kube-proxy came back after they were removed: it \
             still runs on this node. Stop it, then restart this daemon to remove them"
        ),
        Err(error) => debug!(%error, "cannot see whether kube-proxy came back"),
    }
}

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

    /// Until the thread that was started has ended, and one step more.
    fn settle(takeover: &mut Takeover) {
        while matches!(&takeover.stage, Stage::Removing(thread) if !thread.is_finished()) {
            std::thread::yield_now();
        }
        let _ = takeover.due();
    }

    #[test]
    fn nothing_goes_while_kube_proxy_seems_to_run() {
        let sets = sets();
        let answer = std::sync::Arc::new(std::sync::Mutex::new(true));
        let shared = std::sync::Arc::clone(&answer);
        let rival = move || shared.lock().unwrap().then(|| "port taken".to_owned());
        let mut takeover = Takeover::new(leftovers(&sets), Box::new(rival));
        assert!(takeover.due().is_none());
        assert_eq!(sets.state().sets.len(), 2);
        *answer.lock().unwrap() = false;
        assert!(takeover.due().is_some());
        takeover.remove();
        settle(&mut takeover);
        assert!(matches!(takeover.stage, Stage::Removed(_)));
        assert!(sets.state().sets.is_empty());
    }

    #[test]
    fn what_fails_is_tried_again_and_what_is_done_is_done_once() {
        let sets = FakeIpSets::default();
        sets.state().sets.insert("KUBE-CLUSTER-IP".to_owned(), Vec::new());
        let refusing = FakeNetlink::new(|_| Err(crate::kernel::netlink::Errno(1)));
        let kernel = refusing.clone();
        let xtables = Box::new(FakeXTables::default());
        let leftovers = Leftovers::new(Box::new(refusing), xtables, Box::new(sets.clone()));
        let mut takeover = Takeover::new(leftovers, Box::new(|| None));
        takeover.remove();
        settle(&mut takeover);
        assert!(matches!(takeover.stage, Stage::Due(_)), "{:?}", takeover.stage);
        assert_eq!(sets.state().sets.len(), 1);
        kernel.respond(|_| Ok(Vec::new()));
        takeover.remove();
        settle(&mut takeover);
        assert!(sets.state().sets.is_empty());
        assert!(takeover.due().is_none() && takeover.due().is_none());
        assert!(matches!(takeover.stage, Stage::Looking(_)), "seen once whether it comes back");
    }
}
