//! UDP flows that changes of virtual and real servers leave behind.
//!
//! The conntrack entry of a flow remembers the endpoint that its replies come from. IPVS
//! writes that into entries that are not confirmed yet and never alters a confirmed one
//! (`ip_vs_update_conntrack` in `net/netfilter/ipvs/ip_vs_nfct.c`). So an entry older
//! than the virtual server leads past it, without masquerading and without end as long
//! as the client sends; and one whose real server is gone costs the packet by which
//! IPVS notices (`ip_vs_conn_uses_old_conntrack`). Such entries are deleted.

#[cfg(test)]
mod prop_tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::num::NonZeroU16;

use super::objects::{Key, Value};
use super::ruleset::Set;
use super::{FrontendKey, OpError};
use crate::kernel::conntrack::Flow;
use crate::model::{Family, HostPort, Protocol};
use crate::plan::Op;

/// Changes kept while the kernel cannot be asked. Beyond that they are forgotten: an
/// entry of a client that falls silent ends by itself.
const LIMIT: usize = 100_000;

/// What has changed since stale entries were last deleted, and where frontends lead.
#[derive(Debug, Default)]
pub struct StaleFlows {
    removed: HashSet<(FrontendKey, HostPort)>,
    /// New virtual servers with the real servers they have now.
    created: HashMap<FrontendKey, HashSet<HostPort>>,
    /// Frontends that lead elsewhere than before: flows of earlier did not go there.
    redirected: HashSet<FrontendKey>,
    /// Frontends that are gone, of those whose flows went elsewhere.
    ended: HashSet<FrontendKey>,
    /// All frontends whose packets are sent to other virtual servers, by map. Their entries
    /// have the first as destination and a real server of the second as endpoint.
    redirects: HashMap<FrontendKey, BTreeMap<Set, FrontendKey>>,
    /// Where they were sent before: a flow goes on there until its endpoint is removed.
    former: HashMap<FrontendKey, BTreeSet<FrontendKey>>,
}

impl StaleFlows {
    /// Takes in what a round did. An operation whose outcome is unknown counts as done:
    /// deleting an entry too many costs a lookup, one too few a flow.
    pub fn applied(&mut self, ops: &[Op<Key>], results: &[Result<(), OpError>]) {
        for (op, result) in ops.iter().zip(results) {
            if !matches!(result, Err(OpError::Refused(_))) {
                self.note(op);
            }
        }
        if self.removed.len() + self.created.len() + self.ended.len() > LIMIT {
            self.clear();
        }
    }

    fn note(&mut self, op: &Op<Key>) {
        match (op, op.key()) {
            (Op::Create(..), Key::VirtualServer(server)) if is_udp(server) => {
                self.created.insert(*server, HashSet::new());
            }
            (Op::Delete(_), Key::VirtualServer(server)) => {
                self.created.remove(server);
                let former = self.former.remove(server).is_some();
                if self.redirects.contains_key(server) || former {
                    self.ended.insert(*server);
                }
            }
            (Op::Create(..), Key::RealServer(server, at)) if is_udp(server) => {
                self.removed.remove(&(*server, *at));
                if let Some(servers) = self.created.get_mut(server) {
                    servers.insert(*at);
                }
            }
            (Op::Delete(_), Key::RealServer(server, at)) if is_udp(server) => {
                self.removed.insert((*server, *at));
                if let Some(servers) = self.created.get_mut(server) {
                    servers.remove(at);
                }
            }
            (Op::Create(_, value) | Op::Update(_, value), Key::Redirect(map, from))
                if is_udp(from) =>
            {
                if let Some(to) = target(value) {
                    let before = self.redirects.entry(*from).or_default().insert(*map, to);
                    self.leads_elsewhere(*from, before);
                }
            }
            (Op::Delete(_), Key::Redirect(map, from)) if is_udp(from) => {
                let Some(targets) = self.redirects.get_mut(from) else { return };
                let before = targets.remove(map);
                if targets.is_empty() {
                    self.redirects.remove(from);
                }
                self.leads_elsewhere(*from, before);
            }
            _ => {}
        }
    }

    /// New flows only: the entry of one that began has the translation.
    fn leads_elsewhere(&mut self, from: FrontendKey, before: Option<FrontendKey>) {
        self.redirected.insert(from);
        if let Some(before) = before {
            self.former.entry(from).or_default().insert(before);
        }
    }

    /// The kernel was found to hold this.
    pub fn found(&mut self, key: &Key, value: &Value) {
        if let (Key::Redirect(map, from), Some(to)) = (key, target(value))
            && is_udp(from)
        {
            self.redirects.entry(*from).or_default().insert(*map, to);
        }
    }

    /// Whose tables hold entries that may be stale: none when no UDP server changed.
    #[must_use]
    pub fn families(&self) -> BTreeSet<Family> {
        let removed = self.removed.iter().map(|(server, _)| server);
        removed.chain(self.created.keys()).chain(&self.ended).map(FrontendKey::family).collect()
    }

    /// The stale entries are gone.
    pub fn clear(&mut self) {
        self.removed.clear();
        self.created.clear();
        self.redirected.clear();
        self.ended.clear();
    }

    /// Whether a UDP entry leads where its frontend does not lead any more.
    #[must_use]
    pub fn is_stale(&self, flow: &Flow) -> bool {
        let destination = flow.original.destination;
        let Some(port) = NonZeroU16::new(destination.port()) else { return false };
        let frontend = FrontendKey { address: destination.ip(), protocol: Protocol::Udp, port };
        if self.ended.contains(&frontend) {
            return true;
        }
        let endpoint = HostPort::from(flow.reply.source);
        let elsewhere = self.redirects.get(&frontend).into_iter().flat_map(BTreeMap::values);
        let formerly = self.former.get(&frontend).into_iter().flatten();
        // What is there only since the frontend leads to it says nothing of flows of earlier.
        let by_all = self.created.contains_key(&frontend) || !self.redirected.contains(&frontend);
        let mut in_new_server = None;
        for server in std::iter::once(&frontend).chain(elsewhere).chain(formerly) {
            if self.removed.contains(&(*server, endpoint)) {
                return true;
            }
            if let Some(servers) = self.created.get(server).filter(|_| by_all) {
                let has = servers.contains(&endpoint);
                in_new_server = Some(in_new_server.unwrap_or(false) || has);
            }
        }
        in_new_server == Some(false)
    }
}

/// The UDP virtual server that a redirect leads to.
fn target(value: &Value) -> Option<FrontendKey> {
    let Value::Redirect(to) = value else { return None };
    let port = NonZeroU16::new(to.port)?;
    Some(FrontendKey { address: to.address, protocol: Protocol::Udp, port })
}

fn is_udp(frontend: &FrontendKey) -> bool {
    frontend.protocol == Protocol::Udp
}
