//! Letting connections that go through another proxy's translation live on while what it left is
//! removed.
//!
//! Their translation is in their conntrack entries, not in the rules. But the kernel tracks
//! connections of a network namespace only as long as some rule needs it, and translates only as
//! long as there is a nat chain: when the last one goes it takes its hooks out
//! (`nf_ct_netns_put`, `nf_nat_unregister_fn`), and every packet of theirs goes where nobody knows
//! it. So a table of our own needs both, until the last of them has ended. IPVS drops the packets
//! of a connection whose virtual server is gone, so virtual servers stay as long, up to a limit.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::libc;
use tracing::{info, warn};

use super::{Forwarding, LeftoverError, Leftovers, nf_tables};
use crate::dataplane::PlaneError;
use crate::kernel::conntrack::{Conntrack, ConntrackError, Flow};
use crate::kernel::netlink::{Errno, Message, Netlink};
use crate::kernel::nftables::{
    BaseChain, ChainKind, CompareOp, CtKey, Expression, Hook, Register, Table, Verdict, batch,
};
use crate::model::Family;

/// The table that is there as long as connections need it.
const HOLD: &str = "proxy-daemon-hold";
const CHAIN: &str = "connections";
/// How often it is seen whether they have ended.
const POLL: Duration = Duration::from_secs(5);

/// Virtual servers and addresses that a proxy on IPVS left.
pub trait Servers: Send {
    fn present(&mut self) -> bool;

    /// Removes them, and what else that proxy left; in words what was done.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn take_down(&mut self, forwarding: Forwarding) -> Result<Vec<String>, PlaneError>;
}

pub struct Handover {
    netfilter: Box<dyn Netlink>,
    conntrack: Box<dyn Conntrack>,
    servers: Box<dyn Servers>,
    /// Longest time that virtual servers stay for their connections.
    limit: Duration,
    poll: Duration,
    /// Connections may go through what is left: whoever translates packets leaves those alone that
    /// begin none.
    going_on: Arc<AtomicBool>,
}

impl Handover {
    pub fn new(
        netfilter: Box<dyn Netlink>,
        conntrack: Box<dyn Conntrack>,
        servers: Box<dyn Servers>,
        limit: Duration,
    ) -> Self {
        let going_on = Arc::new(AtomicBool::new(false));
        Self { netfilter, conntrack, servers, limit, poll: POLL, going_on }
    }

    /// Whether it goes on, now and later.
    #[must_use]
    pub fn going_on(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.going_on)
    }

    /// To be called before anything is taken from another proxy.
    pub(super) fn begin(&mut self, leftovers: &mut Leftovers) -> Result<(), LeftoverError> {
        let there = self.something_is_left(leftovers)?;
        self.going_on.store(there, Ordering::Relaxed);
        Ok(())
    }

    fn something_is_left(&mut self, leftovers: &mut Leftovers) -> Result<bool, LeftoverError> {
        Ok(self.servers.present() || leftovers.present()? || self.is_held(leftovers)?)
    }

    fn is_held(&mut self, leftovers: &mut Leftovers) -> Result<bool, LeftoverError> {
        for family in Family::ALL {
            if leftovers.chains(family)?.iter().any(|chain| chain.table == HOLD) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes what is left, and returns when the last connection that went through it has ended.
    pub(super) fn run(&mut self, leftovers: &mut Leftovers) -> Result<(), LeftoverError> {
        let mut old = HashSet::new();
        let left = self.something_is_left(leftovers)?;
        if left {
            old = self.translated()?;
            self.hold(&old)?;
        }
        // Rules of a proxy on IPVS tell which virtual servers are its own, and go with these.
        let mut servers = self.servers.present();
        if !servers {
            leftovers.remove(Forwarding::Keep)?.tell();
            if left {
                // The rules have translated until now: what a pod on a bridge sends meets them
                // before it meets a program at the bridge (br_netfilter).
                old.extend(self.translated()?);
                self.hold(&old)?;
            }
        }
        if !old.is_empty() {
            info!(connections = old.len(), "connections go through an earlier proxy's translation");
        }
        let start = Instant::now();
        loop {
            if servers && (old.is_empty() || start.elapsed() >= self.limit) {
                servers = false;
                for what in self.servers.take_down(Forwarding::Keep)? {
                    info!("of an earlier proxy on IPVS: {what}");
                }
            }
            if old.is_empty() {
                break;
            }
            sleep(self.poll);
            let now = self.translated()?;
            old.retain(|flow| now.contains(flow));
        }
        self.release(leftovers)?;
        self.going_on.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn translated(&mut self) -> Result<HashSet<Flow>, LeftoverError> {
        let mut found = HashSet::new();
        for family in Family::ALL {
            let result = self.conntrack.tcp(family, &mut |flow| {
                if flow.is_translated() {
                    found.insert(flow);
                }
            });
            match result {
                // Nothing is tracked, or nobody can tell.
                Ok(()) | Err(ConntrackError::Missing(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found)
    }

    /// Makes the kernel go on with tracking and translating, in the families that need it.
    fn hold(&mut self, flows: &HashSet<Flow>) -> Result<(), LeftoverError> {
        for family in Family::ALL {
            if !flows.iter().any(|flow| flow.family() == family) {
                continue;
            }
            match self.netfilter.transaction(&batch(table(family))).map_err(nf_tables)? {
                // It is there.
                Ok(()) | Err((_, Errno(libc::EEXIST))) => {}
                Err((_, errno)) => {
                    return Err(LeftoverError::Refused { family, table: HOLD, errno });
                }
            }
        }
        Ok(())
    }

    /// Removes the table, connections or not.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn release(&mut self, leftovers: &mut Leftovers) -> Result<(), LeftoverError> {
        for family in Family::ALL {
            if !leftovers.chains(family)?.iter().any(|chain| chain.table == HOLD) {
                continue;
            }
            let delete = Table { family, name: HOLD }.delete();
            match self.netfilter.transaction(&batch([delete])).map_err(nf_tables)? {
                Ok(()) | Err((_, Errno(libc::ENOENT))) => {}
                Err((_, errno)) => {
                    warn!(%errno, table = HOLD, "stays");
                    return Err(LeftoverError::Refused { family, table: HOLD, errno });
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handover").field("going_on", &self.going_on).finish_non_exhaustive()
    }
}

/// A nat chain, and in it a rule that looks at a packet's connection.
fn table(family: Family) -> [Message; 3] {
    let table = Table { family, name: HOLD };
    // Behind all others (`NF_IP_PRI_NAT_DST` is -100): it decides nothing.
    let base = BaseChain { kind: ChainKind::Nat, hook: Hook::Prerouting, priority: 1000 };
    let register = Register(0);
    let rule = [
        Expression::LoadCt { key: CtKey::State, to: register },
        Expression::Compare { register, op: CompareOp::NotEqual, value: vec![0; 4] },
        Expression::Verdict(Verdict::Accept),
    ];
    [table.create(), table.add_chain(CHAIN, Some(base)), table.append_rule(CHAIN, &rule)]
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use super::*;
    use crate::kernel::conntrack::{FakeConntrack, Tuple};
    use crate::kernel::ipset::FakeIpSets;
    use crate::kernel::netlink::FakeNetlink;
    use crate::kernel::xtables::FakeXTables;

    /// `NFT_MSG_NEWTABLE`, `NFT_MSG_DELTABLE`, `NFT_MSG_GETCHAIN`.
    const NEW_TABLE: u16 = 10 << 8;
    const DEL_TABLE: u16 = (10 << 8) | 2;
    const GET_CHAIN: u16 = (10 << 8) | 4;

    fn flow(port: u16) -> Flow {
        let client = SocketAddr::from(([10, 244, 0, 9], port));
        let at = |last, port| SocketAddr::from(([10, 244, 0, last], port));
        let vip = SocketAddr::from(([10, 96, 0, 10], 80));
        Flow {
            original: Tuple { source: client, destination: vip },
            reply: Tuple { source: at(7, 8080), destination: client },
        }
    }

    /// What was done, in order.
    type Log = Arc<Mutex<Vec<&'static str>>>;

    /// A kernel with our table or without. `late` begins while rules are being removed.
    fn kernel(log: &Log, conntrack: &FakeConntrack, mut late: Option<Flow>) -> FakeNetlink {
        let (log, conntrack) = (Arc::clone(log), conntrack.clone());
        let mut held = false;
        FakeNetlink::new(move |message| {
            match message.kind {
                NEW_TABLE if held => {}
                NEW_TABLE => {
                    held = true;
                    log.lock().unwrap().push("held");
                }
                DEL_TABLE => {
                    held = false;
                    log.lock().unwrap().push("released");
                }
                GET_CHAIN => {
                    // Both families were looked at once.
                    let mut tracked = conntrack.inner();
                    if tracked.dumps == 2 {
                        tracked.tcp.extend(late.take());
                    }
                    if !held || message.payload.first() != Some(&2) {
                        return Ok(Vec::new());
                    }
                    let table = Table { family: Family::V4, name: HOLD };
                    return Ok(vec![table.add_chain(CHAIN, None)]);
                }
                _ => {}
            }
            Ok(Vec::new())
        })
    }

    struct Virtual {
        log: Log,
        there: bool,
    }

    impl Servers for Virtual {
        fn present(&mut self) -> bool {
            self.there
        }

        fn take_down(&mut self, _: Forwarding) -> Result<Vec<String>, PlaneError> {
            self.there = false;
            self.log.lock().unwrap().push("servers gone");
            Ok(Vec::new())
        }
    }

    fn scene(servers: bool, limit: Duration) -> (Log, FakeConntrack, FakeIpSets, Leftovers) {
        scene_with(servers, limit, None)
    }

    fn scene_with(
        servers: bool,
        limit: Duration,
        late: Option<Flow>,
    ) -> (Log, FakeConntrack, FakeIpSets, Leftovers) {
        let log = Log::default();
        let (conntrack, sets) = (FakeConntrack::default(), FakeIpSets::default());
        let netlink = kernel(&log, &conntrack, late);
        sets.state().sets.insert("KUBE-CLUSTER-IP".to_owned(), Vec::new());
        let servers = Box::new(Virtual { log: Arc::clone(&log), there: servers });
        let mut handover =
            Handover::new(Box::new(netlink.clone()), Box::new(conntrack.clone()), servers, limit);
        handover.poll = Duration::from_millis(1);
        let xtables = Box::new(FakeXTables::default());
        let leftovers = Leftovers::new(Box::new(netlink), xtables, Box::new(sets.clone()));
        (log, conntrack, sets, leftovers.with_handover(handover))
    }

    fn end_later(conntrack: &FakeConntrack) {
        let conntrack = conntrack.clone();
        std::thread::spawn(move || {
            // It has been looked at more than once by then.
            while conntrack.inner().dumps < 8 {
                std::thread::yield_now();
            }
            conntrack.inner().tcp.clear();
        });
    }

    #[test]
    fn tracking_is_held_until_the_last_translated_connection_ends() {
        let (log, conntrack, sets, mut leftovers) = scene(false, Duration::ZERO);
        let going_on = leftovers.handover.as_ref().unwrap().going_on();
        let mut plain = flow(1);
        plain.reply.source = plain.original.destination;
        conntrack.inner().tcp.extend([plain, flow(2)]);
        assert!(going_on.load(Ordering::Relaxed));
        end_later(&conntrack);
        leftovers.take_over().unwrap();
        assert!(sets.state().sets.is_empty());
        assert_eq!(*log.lock().unwrap(), ["held", "released"]);
        assert!(!going_on.load(Ordering::Relaxed));
    }

    #[test]
    fn a_connection_that_began_before_the_rules_were_gone_is_waited_for() {
        let (log, conntrack, sets, mut leftovers) =
            scene_with(false, Duration::ZERO, Some(flow(1)));
        end_later(&conntrack);
        leftovers.take_over().unwrap();
        assert!(sets.state().sets.is_empty());
        assert_eq!(*log.lock().unwrap(), ["held", "released"]);
    }

    #[test]
    fn nothing_is_held_for_connections_that_go_through_nothing() {
        let (log, _, sets, mut leftovers) = scene(false, Duration::ZERO);
        leftovers.take_over().unwrap();
        assert!(sets.state().sets.is_empty() && log.lock().unwrap().is_empty());
        // And nobody else's connections are asked about when nothing is left.
        let (log, conntrack, sets, mut leftovers) = scene(false, Duration::ZERO);
        sets.state().sets.clear();
        conntrack.inner().tcp.push(flow(1));
        leftovers.take_over().unwrap();
        assert!(log.lock().unwrap().is_empty() && conntrack.inner().dumps == 0);
    }

    #[test]
    fn virtual_servers_stay_as_long_as_connections_and_no_longer_than_allowed() {
        let (log, conntrack, sets, mut leftovers) = scene(true, Duration::from_secs(60));
        conntrack.inner().tcp.push(flow(1));
        end_later(&conntrack);
        leftovers.take_over().unwrap();
        assert_eq!(*log.lock().unwrap(), ["held", "servers gone", "released"]);
        assert_eq!(sets.state().sets.len(), 1, "rules go with the servers that they tell of");
        let (log, conntrack, _, mut leftovers) = scene(true, Duration::ZERO);
        conntrack.inner().tcp.push(flow(1));
        end_later(&conntrack);
        leftovers.take_over().unwrap();
        assert_eq!(*log.lock().unwrap(), ["held", "servers gone", "released"]);
    }
}
