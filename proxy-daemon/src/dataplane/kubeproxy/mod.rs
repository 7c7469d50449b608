//! What kube-proxy leaves in the kernel besides virtual servers and addresses, and its
//! removal: iptables chains of both backends, ipsets, and nf_tables tables. Spoken over netlink
//! and socket options; no program of the host is run.

mod chains;
mod handover;
mod names;
mod takeover;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use nix::libc;
use tracing::{info, warn};

use crate::kernel::conntrack::ConntrackError;
use crate::kernel::ipset::{BUSY, IpSets, Member, explain};
use crate::kernel::netlink::{Errno, Message, Netlink, NetlinkError};
use crate::kernel::nftables::{self, Table, batch, decode_chain_info, decode_rule_info};
use crate::kernel::xtables::{self, XTables, XTablesError};
use crate::model::{Family, Protocol};

pub use chains::Forwarding;
use chains::{Removal, View, plan};
pub use handover::{Handover, Servers};
use names::{FRONTEND_SETS, NODE_PORT_SETS, OWN_TABLE, TABLES, is_chain, is_set, set_name};
pub use takeover::{Rival, Takeover};

/// Rounds of reading a table and changing it, when others change it too.
const TRIES: u32 = 10;
/// nf_tables lets go of the sets that deleted rules referred to behind the transaction
/// (`nf_tables_trans_destroy_work`), after a grace period.
const SET_TRIES: u32 = 40;
const SET_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub enum LeftoverError {
    #[error("{what}: {source}")]
    Netlink { what: &'static str, source: NetlinkError },
    #[error("nf_tables refused to change table `{table}` of {family}: {errno}")]
    Refused { family: Family, table: &'static str, errno: Errno },
    #[error(transparent)]
    XTables(#[from] XTablesError),
    #[error("ipset {set} stays: {reason}")]
    Set { set: String, reason: String },
    #[error(transparent)]
    Conntrack(#[from] ConntrackError),
    #[error("virtual servers of an earlier proxy stay: {0}")]
    Servers(#[from] crate::dataplane::PlaneError),
}

/// What was removed, and what was not and why.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Of built-in chains.
    pub rules: usize,
    pub chains: usize,
    pub sets: usize,
    /// Of nf_tables.
    pub tables: usize,
    pub kept: BTreeMap<String, &'static str>,
}

impl Removed {
    fn add<R>(&mut self, removal: Removal<R>) {
        self.rules += removal.rules.len();
        self.chains += removal.chains.len();
        self.kept.extend(removal.kept);
    }

    #[must_use]
    pub const fn is_nothing(&self) -> bool {
        self.rules == 0 && self.chains == 0 && self.sets == 0 && self.tables == 0
    }

    /// For the user.
    pub fn in_words(&self) -> impl Iterator<Item = String> {
        let Self { chains, sets, tables, .. } = self;
        let first = format!(
            "removed {chains} iptables chains, {sets} ipsets and {tables} nf_tables tables of \
             kube-proxy"
        );
        let kept = self.kept.iter();
        let kept = kept.map(|(chain, reason)| format!("iptables chain {chain} stays: {reason}"));
        std::iter::once(first).chain(kept)
    }

    fn tell(&self) {
        if !self.is_nothing() {
            let Self { rules, chains, sets, tables, .. } = self;
            info!(rules, chains, sets, tables, "removed what kube-proxy had left");
        }
        for (chain, reason) in &self.kept {
            warn!(chain, reason, "an iptables chain of kube-proxy stays");
        }
    }
}

/// The frontends that kube-proxy has noted in its sets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Evidence {
    frontends: HashSet<(IpAddr, u8, u16)>,
    node_ports: HashSet<(Family, u8, u16)>,
}

impl Evidence {
    /// Whether kube-proxy knew this frontend; for node ports any address of the node
    /// counts, as kube-proxy notes the port alone.
    #[must_use]
    pub fn names(&self, address: IpAddr, protocol: Protocol, port: u16, of_node: bool) -> bool {
        let number = protocol.number();
        self.frontends.contains(&(address, number, port))
            || (of_node && self.node_ports.contains(&(Family::of(address), number, port)))
    }
}

pub struct Leftovers {
    netfilter: Box<dyn Netlink>,
    xtables: Box<dyn XTables>,
    sets: Box<dyn IpSets>,
    /// For data planes that connections do not go through by themselves.
    handover: Option<Handover>,
}

impl std::fmt::Debug for Leftovers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leftovers").finish_non_exhaustive()
    }
}

fn nf_tables(source: NetlinkError) -> LeftoverError {
    LeftoverError::Netlink { what: "nf_tables", source }
}

fn ipset(source: NetlinkError) -> LeftoverError {
    LeftoverError::Netlink { what: "ipset", source }
}

impl Leftovers {
    pub fn new(
        netfilter: Box<dyn Netlink>,
        xtables: Box<dyn XTables>,
        sets: Box<dyn IpSets>,
    ) -> Self {
        Self { netfilter, xtables, sets, handover: None }
    }

    /// Connections that go through what kube-proxy left live on.
    #[must_use]
    pub fn with_handover(mut self, mut handover: Handover) -> Self {
        if let Err(error) = handover.begin(&mut self) {
            warn!(%error, "cannot see whether connections go through another proxy");
        }
        self.handover = Some(handover);
        self
    }

    /// Removes all of it, and tells what.
    fn take_over(&mut self) -> Result<(), LeftoverError> {
        match self.handover.take() {
            Some(mut handover) => {
                let result = handover.run(self);
                self.handover = Some(handover);
                result
            }
            None => {
                self.remove(Forwarding::Keep)?.tell();
                Ok(())
            }
        }
    }

    /// # Errors
    /// When the sets cannot be read.
    pub fn evidence(&mut self) -> Result<Evidence, LeftoverError> {
        let present: BTreeSet<String> = self.sets.names().map_err(ipset)?.into_iter().collect();
        let mut evidence = Evidence::default();
        for family in Family::ALL {
            for set in FRONTEND_SETS {
                let members = self.members(&set_name(set, family), &present)?;
                evidence.frontends.extend(
                    members.iter().filter_map(|member| {
                        Some((member.address?, member.protocol?, member.port?))
                    }),
                );
            }
            for (set, protocol) in NODE_PORT_SETS {
                let members = self.members(&set_name(set, family), &present)?;
                let ports = members.iter().filter_map(|member| member.port);
                evidence.node_ports.extend(ports.map(|port| (family, protocol.number(), port)));
            }
        }
        Ok(evidence)
    }

    fn members(
        &mut self,
        set: &str,
        present: &BTreeSet<String>,
    ) -> Result<Vec<Member>, LeftoverError> {
        if !present.contains(set) {
            return Ok(Vec::new());
        }
        self.sets.members(set).map_err(ipset)
    }

    /// Whether sets of kube-proxy's ipvs mode are there.
    ///
    /// # Errors
    /// When the sets cannot be listed.
    pub fn has_sets(&mut self) -> Result<bool, LeftoverError> {
        Ok(self.sets.names().map_err(ipset)?.iter().any(|set| is_set(set)))
    }

    /// Whether something of kube-proxy's is there that its proxy makes at every sync.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub fn present(&mut self) -> Result<bool, LeftoverError> {
        const MADE_ALWAYS: &str = "KUBE-SERVICES";
        if self.has_sets()? {
            return Ok(true);
        }
        for family in Family::ALL {
            let chains = self.chains(family)?;
            let theirs = |chain: &nftables::ChainInfo| {
                chain.chain == MADE_ALWAYS || chain.table == OWN_TABLE
            };
            if chains.iter().any(theirs) {
                return Ok(true);
            }
            for table in self.xtables.tables(family)? {
                let mut found = false;
                self.xtables.edit(family, &table, &mut |table| {
                    found = table.chains.iter().any(|chain| chain.name() == Some(MADE_ALWAYS));
                    false
                })?;
                if found {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Removes chains, then sets: sets that rules refer to cannot go, and emptied ones
    /// would make the rules refuse what they let pass.
    ///
    /// # Errors
    /// The first one, with everything before it removed: to be called again.
    pub fn remove(&mut self, forwarding: Forwarding) -> Result<Removed, LeftoverError> {
        let mut removed = Removed::default();
        for family in Family::ALL {
            for table in TABLES {
                self.remove_nft(family, table, forwarding, &mut removed)?;
            }
            for table in self.xtables.tables(family)? {
                if TABLES.contains(&table.as_str()) {
                    self.remove_legacy(family, &table, forwarding, &mut removed)?;
                }
            }
            self.remove_own_table(family, &mut removed)?;
        }
        self.remove_sets(&mut removed)?;
        Ok(removed)
    }

    /// Of kube-proxy's nftables mode.
    fn remove_own_table(
        &mut self,
        family: Family,
        removed: &mut Removed,
    ) -> Result<(), LeftoverError> {
        if !self.chains(family)?.iter().any(|chain| chain.table == OWN_TABLE) {
            return Ok(());
        }
        let table = Table { family, name: OWN_TABLE };
        match self.netfilter.transaction(&batch([table.delete()])).map_err(nf_tables)? {
            Ok(()) => removed.tables += 1,
            // Somebody else was first.
            Err((_, Errno(libc::ENOENT))) => {}
            Err((_, errno)) => {
                return Err(LeftoverError::Refused { family, table: OWN_TABLE, errno });
            }
        }
        Ok(())
    }

    fn chains(&mut self, family: Family) -> Result<Vec<nftables::ChainInfo>, LeftoverError> {
        // The kernel lists the chains of all tables.
        let request = Table { family, name: "" }.list_chains();
        let parts = match self.netfilter.dump(&request) {
            Ok(parts) => parts,
            // `nfnetlink_rcv_msg`: no nf_tables.
            Err(NetlinkError::Refused { errno: Errno(libc::EINVAL), .. }) => Vec::new(),
            Err(error) => return Err(nf_tables(error)),
        };
        parts
            .iter()
            .map(|part| decode_chain_info(part).map_err(|error| nf_tables(error.into())))
            .collect()
    }

    /// The chains of one table with their rules; nothing when none is kube-proxy's.
    fn views(&mut self, table: Table<'_>) -> Result<Vec<View<u64>>, LeftoverError> {
        let mut chains = self.chains(table.family)?;
        chains.retain(|chain| chain.table == table.name);
        if !chains.iter().any(|chain| is_chain(&chain.chain)) {
            return Ok(Vec::new());
        }
        let mut views: BTreeMap<String, View<u64>> = BTreeMap::new();
        for chain in chains {
            let (base, drops) = (chain.base, chain.drops);
            let view = View { name: chain.chain.clone(), base, drops, rules: Vec::new() };
            views.insert(chain.chain, view);
        }
        for part in self.netfilter.dump(&table.list_rules()).map_err(nf_tables)? {
            let rule = decode_rule_info(&part).map_err(|error| nf_tables(error.into()))?;
            if rule.table == table.name
                && let Some(view) = views.get_mut(&rule.chain)
            {
                view.rules.push((rule.handle, rule.jumps));
            }
        }
        Ok(views.into_values().collect())
    }

    /// One transaction: packets meet all of it or nothing.
    fn remove_nft(
        &mut self,
        family: Family,
        name: &'static str,
        forwarding: Forwarding,
        removed: &mut Removed,
    ) -> Result<(), LeftoverError> {
        let table = Table { family, name };
        let mut held = BTreeSet::new();
        let mut refusal = Errno(libc::EAGAIN);
        for _ in 0..TRIES {
            let removal = plan(&self.views(table)?, forwarding, &held);
            if removal.rules.is_empty() && removal.chains.is_empty() {
                removed.add(removal);
                return Ok(());
            }
            let changes = requests(table, &removal);
            let messages = batch(changes.iter().map(|(message, _)| message.clone()));
            let Err((index, errno)) = self.netfilter.transaction(&messages).map_err(nf_tables)?
            else {
                removed.add(removal);
                return Ok(());
            };
            refusal = errno;
            // Index 0 is the frame.
            let deleted = index.checked_sub(1).and_then(|at| changes.get(at)?.1);
            match (errno.0, deleted) {
                // An element of a verdict map leads there.
                (libc::EBUSY, Some(chain)) => {
                    held.insert(chain.to_owned());
                }
                // Somebody has removed or added something since it was read.
                (libc::ENOENT | libc::EBUSY | libc::ERESTART, _) => {}
                _ => break,
            }
        }
        Err(LeftoverError::Refused { family, table: name, errno: refusal })
    }

    fn remove_legacy(
        &mut self,
        family: Family,
        table: &str,
        forwarding: Forwarding,
        removed: &mut Removed,
    ) -> Result<(), LeftoverError> {
        let mut done = None;
        self.xtables.edit(family, table, &mut |table| {
            let removal = plan(&legacy_views(table), forwarding, &BTreeSet::new());
            let rules = removal.rules.iter().map(|(_, rule)| *rule).collect();
            table.remove(&removal.chains, &rules);
            let changes = !rules.is_empty() || !removal.chains.is_empty();
            done = Some(removal);
            changes
        })?;
        if let Some(removal) = done {
            removed.add(removal);
        }
        Ok(())
    }

    fn remove_sets(&mut self, removed: &mut Removed) -> Result<(), LeftoverError> {
        let names = self.sets.names().map_err(ipset)?;
        let mut left: Vec<&str> =
            names.iter().map(String::as_str).filter(|set| is_set(set)).collect();
        for attempt in 1..=SET_TRIES {
            if left.is_empty() {
                break;
            }
            let results = self.sets.destroy(&left).map_err(ipset)?;
            let refused: Vec<(&str, Errno)> =
                left.iter().zip(results).filter_map(|(set, r)| Some((*set, r.err()?))).collect();
            removed.sets += left.len() - refused.len();
            let last = attempt == SET_TRIES || refused.iter().any(|(_, errno)| *errno != BUSY);
            if let Some((set, errno)) = refused.first().filter(|_| last) {
                return Err(LeftoverError::Set { set: (*set).to_owned(), reason: explain(*errno) });
            }
            left = refused.into_iter().map(|(set, _)| set).collect();
            if !left.is_empty() {
                sleep(SET_PAUSE);
            }
        }
        Ok(())
    }
}

/// Rules of others that lead there first, then what is in the chains, then the chains,
/// each of which is named for the case that it cannot go.
fn requests<'r>(table: Table<'_>, removal: &'r Removal<u64>) -> Vec<(Message, Option<&'r str>)> {
    let rules = removal.rules.iter().map(|(chain, rule)| (table.delete_rule(chain, *rule), None));
    let flush = removal.chains.iter().map(|chain| (table.flush_chain(chain), None));
    let delete =
        removal.chains.iter().map(|chain| (table.delete_chain(chain), Some(chain.as_str())));
    rules.chain(flush).chain(delete).collect()
}

/// Rules are named by the position of their chain and their own.
fn legacy_views(table: &xtables::Table) -> Vec<View<(usize, usize)>> {
    let view = |(at, chain): (usize, &xtables::Chain)| {
        let rule = |(position, rule): (usize, &xtables::Rule)| {
            ((at, position), rule.jump().map(str::to_owned).into_iter().collect())
        };
        View {
            name: chain.name().unwrap_or_default().to_owned(),
            base: chain.name().is_none(),
            drops: chain.drops(table.family),
            rules: chain.rules.iter().enumerate().map(rule).collect(),
        }
    };
    table.chains.iter().enumerate().map(view).collect()
}
