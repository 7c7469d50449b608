//! Our own nf_tables tables, `ip proxy-daemon` and `ip6 proxy-daemon`: what IPVS alone
//! cannot do, masquerading and refusing connections. Not one table of family `inet`,
//! whose nat chains need kernel 5.2.
//!
//! The rules ([`rules`]) are written once; a change of a Service is a change of set
//! elements ([`Ruleset::apply`]).

mod apply;
mod element;
mod read;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;

use crate::kernel::netlink::{Errno, Message, Netlink, NetlinkError};
use crate::kernel::nftables::{
    Field, SetInfo, SetLayout, Shape, Table, batch, decode_chain, decode_rule, decode_rule_info,
    decode_set,
};
use crate::model::{Family, LocalDetect};

pub use crate::kernel::nftables::Operation;
pub use element::{Element, ElementKey, Set};
pub use read::read_elements;

use rules::{Chain, chains, requests};

/// Of the table in each family.
pub const TABLE: &str = "proxy-daemon";

/// An empty set named after the content of the ruleset: it says that the table is ours,
/// and which rules are in it. Table user data would need kernel 5.10 and does not show
/// in `nft list`.
const MARKER_PREFIX: &str = "proxy-daemon-";

/// `masqueradeBit` of kube-proxy's configuration when absent.
pub const DEFAULT_MASQUERADE_BIT: u8 = 14;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulesetConfig {
    /// Masquerade all traffic to ClusterIPs, also of pods.
    pub masquerade_all: bool,
    /// Which bit of the packet mark asks for masquerading, 0 to 31.
    pub masquerade_bit: u8,
    pub local_detect: LocalDetect,
    /// What is in these and no Service is dropped.
    pub service_cidrs: Vec<IpNetwork>,
    pub families: Vec<Family>,
}

/// What [`Ruleset::ensure`] found and did in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ensured {
    Created,
    /// Nothing was written.
    Unchanged,
    /// Chains and rules were replaced in one transaction, elements kept.
    Replaced,
    /// The family is not configured; its table was left from an earlier configuration.
    Deleted,
}

#[derive(Debug, thiserror::Error)]
pub enum RulesetError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(
        "nf_tables table `{} {TABLE}` exists and was not made by this program; \
         rename or delete it (`nft delete table {} {TABLE}`)",
        table_family(*.0), table_family(*.0)
    )]
    Foreign(Family),
    #[error("nf_tables refused to {step} table `{} {TABLE}`: {errno}", table_family(*.family))]
    Refused { step: &'static str, family: Family, errno: Errno },
    #[error("masquerade bit {0} is not a bit of the packet mark: choose 0 to 31")]
    MasqueradeBit(u8),
    #[error("`{0}` cannot be an interface name or prefix: it has to be 1 to 15 bytes long")]
    InterfaceName(String),
}

/// As `nft` has it.
const fn table_family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

const fn table(family: Family) -> Table<'static> {
    Table { family, name: TABLE }
}

#[derive(Debug)]
pub struct Ruleset<N> {
    netlink: N,
    /// Those that [`Ruleset::ensure`] was last asked for.
    families: Vec<Family>,
}

impl<N: Netlink> Ruleset<N> {
    /// On a socket of protocol `NETLINK_NETFILTER`.
    pub const fn new(netlink: N) -> Self {
        Self { netlink, families: Vec::new() }
    }

    pub const fn netlink(&self) -> &N {
        &self.netlink
    }

    /// Makes the tables what `config` says, keeping the elements they have. Writes
    /// nothing when they are so already.
    ///
    /// # Errors
    /// When a table of our name is somebody else's (it is left alone), when the
    /// configuration is impossible, or when the kernel refuses.
    pub fn ensure(
        &mut self,
        config: &RulesetConfig,
    ) -> Result<Vec<(Family, Ensured)>, RulesetError> {
        let mark = 1_u32
            .checked_shl(config.masquerade_bit.into())
            .ok_or(RulesetError::MasqueradeBit(config.masquerade_bit))?;
        check_interface_name(&config.local_detect)?;
        let mut done = Vec::new();
        for family in Family::ALL {
            if config.families.contains(&family) {
                let wanted = chains(family, config, mark);
                done.push((family, self.ensure_family(family, &wanted)?));
            } else if matches!(self.sets(family)?, Present::Ours(_)) {
                self.transact(family, "delete", vec![table(family).delete()])?;
                done.push((family, Ensured::Deleted));
            }
        }
        self.families.clone_from(&config.families);
        Ok(done)
    }

    /// Looks for tables of ours without making any: for taking down what an earlier run
    /// left.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub fn find(&mut self) -> Result<(), RulesetError> {
        self.families.clear();
        for family in Family::ALL {
            if matches!(self.sets(family)?, Present::Ours(_)) {
                self.families.push(family);
            }
        }
        Ok(())
    }

    /// All elements of all sets.
    #[cfg(test)]
    pub fn elements(&mut self) -> Result<std::collections::BTreeSet<Element>, RulesetError> {
        let mut found = std::collections::BTreeSet::new();
        let families = self.families.clone();
        read_elements(&mut self.netlink, &families, &mut |element| {
            found.insert(element);
        })?;
        Ok(found)
    }

    /// Those that [`Ruleset::ensure`] was last asked for, or [`Ruleset::find`] found.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// Deletes our tables with everything in them, in all families.
    ///
    /// # Errors
    /// When the kernel refuses. Tables of somebody else are no error, and stay.
    pub fn delete_table(&mut self) -> Result<Vec<Family>, RulesetError> {
        let mut deleted = Vec::new();
        for family in Family::ALL {
            if matches!(self.sets(family)?, Present::Ours(_)) {
                self.transact(family, "delete", vec![table(family).delete()])?;
                deleted.push(family);
            }
        }
        self.families.clear();
        Ok(deleted)
    }

    fn ensure_family(&mut self, family: Family, wanted: &[Chain]) -> Result<Ensured, RulesetError> {
        let content = content(family, wanted);
        let marker = format!("{MARKER_PREFIX}{:016x}", fingerprint(&content));
        match self.sets(family)? {
            Present::No => {
                let create = std::iter::once(table(family).create());
                let changes = create.chain(content).chain([add_marker(family, &marker)]);
                self.transact(family, "create", changes.collect())?;
                Ok(Ensured::Created)
            }
            Present::Foreign => Err(RulesetError::Foreign(family)),
            Present::Ours(sets) => {
                let complete = sets.iter().any(|set| set.name == marker)
                    && Set::ALL.iter().all(|set| sets.iter().any(|info| is(info, *set, family)))
                    && self.rule_counts(family)? == rule_counts(wanted);
                if complete {
                    return Ok(Ensured::Unchanged);
                }
                self.replace(family, &sets, wanted, &marker)?;
                Ok(Ensured::Replaced)
            }
        }
    }

    /// Everything but the elements anew, in one transaction: packets meet the old rules
    /// or the new ones.
    fn replace(
        &mut self,
        family: Family,
        sets: &[SetInfo],
        wanted: &[Chain],
        marker: &str,
    ) -> Result<(), RulesetError> {
        let table = table(family);
        let usable = |info: &SetInfo| Set::ALL.into_iter().any(|set| is(info, set, family));
        let mut changes = vec![table.delete_rules()];
        for chain in self.netlink.dump(&table.list_chains())? {
            let name = decode_chain(&chain).map_err(NetlinkError::from)?;
            if name.table == TABLE {
                changes.push(table.delete_chain(&name.chain));
            }
        }
        let obsolete = sets.iter().filter(|info| !usable(info));
        changes.extend(obsolete.map(|info| table.delete_set(&info.name)));
        let missing = |set: &Set| !sets.iter().any(|info| is(info, *set, family));
        changes.extend(add_sets(family, missing));
        changes.extend(requests(table, wanted));
        changes.push(add_marker(family, marker));
        self.transact(family, "replace", changes)
    }

    fn sets(&mut self, family: Family) -> Result<Present, RulesetError> {
        let dump = match self.netlink.dump(&table(family).list_sets()) {
            Ok(dump) => dump,
            Err(NetlinkError::Refused { errno, .. }) if errno.0 == nix::libc::ENOENT => {
                return Ok(Present::No);
            }
            Err(error) => return Err(error.into()),
        };
        let sets = dump
            .iter()
            .map(decode_set)
            .collect::<Result<Vec<_>, _>>()
            .map_err(NetlinkError::from)?;
        let ours = sets.iter().any(|set| set.name.starts_with(MARKER_PREFIX));
        Ok(if ours { Present::Ours(sets) } else { Present::Foreign })
    }

    fn rule_counts(&mut self, family: Family) -> Result<BTreeMap<String, usize>, RulesetError> {
        let mut counts = BTreeMap::new();
        for rule in self.netlink.dump(&table(family).list_rules())? {
            let place = decode_rule(&rule).map_err(NetlinkError::from)?;
            if place.table == TABLE {
                *counts.entry(place.chain).or_default() += 1;
            }
        }
        Ok(counts)
    }

    fn transact(
        &mut self,
        family: Family,
        step: &'static str,
        changes: Vec<Message>,
    ) -> Result<(), RulesetError> {
        self.netlink.transaction(&batch(changes))?.map_err(|(_, errno)| RulesetError::Refused {
            step,
            family,
            errno,
        })
    }
}

/// New connections that the rules of `family` have refused or dropped so far, by reason; none
/// where there is no table.
///
/// # Errors
/// The kernel refuses, or answers what cannot be read.
pub fn read_refusals<N: Netlink>(
    netlink: &mut N,
    family: Family,
) -> Result<BTreeMap<&'static str, u64>, NetlinkError> {
    let dump = match netlink.dump(&table(family).list_rules()) {
        Err(NetlinkError::Refused { errno, .. }) if errno.0 == nix::libc::ENOENT => Vec::new(),
        dump => dump?,
    };
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut refusals = BTreeMap::new();
    for message in dump {
        let rule = decode_rule_info(&message).map_err(NetlinkError::from)?;
        let Some(packets) = rule.packets.filter(|_| rule.table == TABLE) else { continue };
        let place = places.entry(rule.chain.clone()).or_default();
        if let Some(reason) = rules::reason(&rule.chain, *place) {
            *refusals.entry(reason).or_default() += packets;
        }
        *place += 1;
    }
    Ok(refusals)
}

enum Present {
    No,
    Foreign,
    Ours(Vec<SetInfo>),
}

fn is(info: &SetInfo, set: Set, family: Family) -> bool {
    info.name == set.name() && info.has(&set.layout(family))
}

/// Sets, chains and rules of a whole table, without the marker.
fn content(family: Family, wanted: &[Chain]) -> Vec<Message> {
    let mut messages: Vec<_> = add_sets(family, |_| true).collect();
    messages.extend(requests(table(family), wanted));
    messages
}

fn add_sets(family: Family, filter: impl Fn(&Set) -> bool) -> impl Iterator<Item = Message> {
    (1..)
        .zip(Set::ALL)
        .filter(move |(_, set)| filter(set))
        .map(move |(id, set)| table(family).add_set(set.name(), id, &set.layout(family)))
}

fn add_marker(family: Family, name: &str) -> Message {
    const LAYOUT: SetLayout = SetLayout { key: &[Field::Port], shape: Shape::Key, data: &[] };
    table(family).add_set(name, u32::MAX, &LAYOUT)
}

/// FNV-1a over what would be written: a change of the configuration or of this program
/// changes it. Rust's own hasher gives no promise across versions.
fn fingerprint(messages: &[Message]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in
        messages.iter().flat_map(|m| m.kind.to_be_bytes().into_iter().chain(m.payload.clone()))
    {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash
}

fn rule_counts(chains: &[Chain]) -> BTreeMap<String, usize> {
    let filled = chains.iter().filter(|chain| !chain.rules.is_empty());
    filled.map(|chain| (chain.name.to_owned(), chain.rules.len())).collect()
}

fn check_interface_name(local: &LocalDetect) -> Result<(), RulesetError> {
    match local {
        LocalDetect::Bridge(name) | LocalDetect::InterfacePrefix(name) => {
            // `IFNAMSIZ` is 16 with the NUL.
            let usable = (1..16).contains(&name.len()) && !name.contains('\0');
            if usable { Ok(()) } else { Err(RulesetError::InterfaceName(name.to_string())) }
        }
        LocalDetect::Unknown | LocalDetect::Cidrs(_) => Ok(()),
    }
}
