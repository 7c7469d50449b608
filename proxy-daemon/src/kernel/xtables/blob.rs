//! A table of the xtables kernel interface (`struct ipt_entry`, `struct ip6t_entry` in
//! `uapi/linux/netfilter_ipv4/ip_tables.h` and `.../netfilter_ipv6/ip6_tables.h`): one
//! run of bytes in which chains follow each other and jumps are byte offsets.
//!
//! ```text
//! rules of the first hook's chain, its policy     hook_entry, underflow
//! rules of the next hook's chain, its policy
//! ERROR "NAME", rules of a user chain, RETURN     jumps lead to the first of these rules
//! ...
//! ERROR "ERROR"
//! ```
//!
//! Pure. A rule is kept as the bytes it was read as; only jumps are written anew.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::Family;

/// `NF_INET_NUMHOOKS`.
pub const HOOKS: usize = 5;
/// `sizeof(struct xt_entry_target)`: size, name and revision.
const TARGET_HEADER: usize = 32;
/// `XT_EXTENSION_MAXNAMELEN`.
const TARGET_NAME: usize = 29;
/// `XT_FUNCTION_MAXNAMELEN`: of a chain, with its NUL.
const CHAIN_NAME: usize = 30;
/// `sizeof(struct xt_standard_target)` without the padding behind the verdict.
const STANDARD_TARGET: usize = TARGET_HEADER + 4;
/// `-NF_DROP - 1` as a verdict.
const DROP: i32 = -1;

/// Bytes that are no table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// Sizes and offsets within one entry.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// `sizeof(struct ipt_entry)`, where the matches begin.
    entry: usize,
    /// `offsetof(struct ipt_entry, target_offset)`; `next_offset` is behind it.
    target_offset: usize,
}

const fn layout(family: Family) -> Layout {
    match family {
        Family::V4 => Layout { entry: 112, target_offset: 88 },
        Family::V6 => Layout { entry: 168, target_offset: 140 },
    }
}

/// What goes with the bytes, in `struct ipt_getinfo` and `struct ipt_replace`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Info {
    pub valid_hooks: u32,
    pub hook_entry: [u32; HOOKS],
    pub underflow: [u32; HOOKS],
    pub entries: u32,
    pub size: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub family: Family,
    pub chains: Vec<Chain>,
    info: Info,
    end: Entry,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    head: Head,
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Head {
    Hook {
        number: usize,
        /// Position of the policy among the rules.
        policy: usize,
    },
    User {
        name: String,
        entry: Entry,
    },
}

/// The bytes of an entry, and its position when it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    bytes: Vec<u8>,
    number: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    entry: Entry,
    next: Next,
}

/// Whether the rule's target has an offset in it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    /// None: a verdict, or a target of another kind.
    Fixed,
    /// The rule behind it: a rule that only counts.
    Through,
    /// The first rule of this chain.
    Jump(String),
}

impl Rule {
    /// As they were read.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.entry.bytes
    }

    /// The chain it jumps (or goes) to.
    #[must_use]
    pub fn jump(&self) -> Option<&str> {
        match &self.next {
            Next::Jump(chain) => Some(chain),
            Next::Fixed | Next::Through => None,
        }
    }
}

impl Chain {
    /// The name of a user chain; `None` for the chain of a hook.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match &self.head {
            Head::User { name, .. } => Some(name),
            Head::Hook { .. } => None,
        }
    }

    /// A hook's chain whose policy is to drop.
    #[must_use]
    pub fn drops(&self, family: Family) -> bool {
        match self.head {
            Head::Hook { policy, .. } => self.rules.get(policy).is_some_and(|rule| {
                parts(layout(family), &rule.entry.bytes) == Ok(Kind::Verdict(DROP))
            }),
            Head::User { .. } => false,
        }
    }
}

/// What an entry is, by its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind<'a> {
    /// The standard target: an offset, or a negative verdict.
    Verdict(i32),
    /// Begins a user chain of this name, or ends the table.
    Error(&'a str),
    Other,
}

/// Checks that lengths stay inside of the entry, and looks at its target.
fn parts(layout: Layout, entry: &[u8]) -> Result<Kind<'_>, Malformed> {
    let target_offset =
        usize::from(read_u16(entry, layout.target_offset).ok_or(Malformed("an entry is cut off"))?);
    if target_offset < layout.entry {
        return Err(Malformed("a target lies inside of the entry's header"));
    }
    let target = entry.get(target_offset..).ok_or(Malformed("a target is outside of its entry"))?;
    let size = usize::from(read_u16(target, 0).ok_or(Malformed("a target is cut off"))?);
    if size < TARGET_HEADER || size > target.len() {
        return Err(Malformed("the length of a target is outside of its entry"));
    }
    let name = text(target.get(2..2 + TARGET_NAME).unwrap_or_default())?;
    match name {
        "" => {
            let verdict =
                target.get(TARGET_HEADER..STANDARD_TARGET).and_then(|v| v.try_into().ok());
            verdict
                .map(|bytes| Kind::Verdict(i32::from_ne_bytes(bytes)))
                .ok_or(Malformed("a verdict is cut off"))
        }
        "ERROR" => target
            .get(TARGET_HEADER..TARGET_HEADER + CHAIN_NAME)
            .ok_or(Malformed("the name of a chain is cut off"))
            .and_then(text)
            .map(Kind::Error),
        _ => Ok(Kind::Other),
    }
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_ne_bytes)
}

fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    std::str::from_utf8(text).map_err(|_| Malformed("a name is not UTF-8"))
}

/// An entry where it stood.
struct Placed<'a> {
    offset: usize,
    bytes: &'a [u8],
    kind: Kind<'a>,
}

fn split(layout: Layout, blob: &[u8]) -> Result<Vec<Placed<'_>>, Malformed> {
    let mut placed = Vec::new();
    let mut offset = 0;
    while let Some(rest) = blob.get(offset..).filter(|rest| !rest.is_empty()) {
        let length = read_u16(rest, layout.target_offset + 2).map(usize::from);
        // `next_offset` of 0 would never end.
        let bytes = length
            .filter(|length| *length >= layout.entry + TARGET_HEADER)
            .and_then(|length| rest.get(..length))
            .ok_or(Malformed("the length of an entry is outside of its table"))?;
        placed.push(Placed { offset, bytes, kind: parts(layout, bytes)? });
        offset += bytes.len();
    }
    Ok(placed)
}

impl Table {
    /// Of what `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES` answered.
    ///
    /// # Errors
    /// When the bytes are not a table as this describes it: then it is better left alone.
    pub fn parse(family: Family, info: Info, blob: &[u8]) -> Result<Self, Malformed> {
        let placed = split(layout(family), blob)?;
        let [entries @ .., last] = placed.as_slice() else {
            return Err(Malformed("a table without entries"));
        };
        if last.kind != Kind::Error("ERROR") {
            return Err(Malformed("a table without its last entry"));
        }
        if u32::try_from(placed.len()) != Ok(info.entries)
            || u32::try_from(blob.len()) != Ok(info.size)
        {
            return Err(Malformed("a table of another size than announced"));
        }
        let chains = chains(&info, entries)?;
        let end = Entry { bytes: last.bytes.to_vec(), number: entries.len() };
        let table = Self { family, chains, info, end };
        table.names()?;
        Ok(table)
    }

    /// What to hand to `IPT_SO_SET_REPLACE`.
    ///
    /// # Errors
    /// When a rule jumps to a chain that is not there (any more), or a hook has lost its
    /// policy.
    pub fn write(&self) -> Result<(Info, Vec<u8>), Malformed> {
        let starts = self.starts()?;
        let mut info = self.info;
        let mut blob = Vec::new();
        for chain in &self.chains {
            if let Head::User { entry, .. } = &chain.head {
                blob.extend_from_slice(&entry.bytes);
            }
            let mut offsets = Vec::with_capacity(chain.rules.len());
            for rule in &chain.rules {
                offsets.push(offset(blob.len())?);
                self.write_rule(rule, &starts, &mut blob)?;
            }
            if let Head::Hook { number, policy } = chain.head {
                let lost = Malformed("a hook without its policy");
                let (first, policy) = (offsets.first(), offsets.get(policy));
                *info.hook_entry.get_mut(number).ok_or(lost)? = *first.ok_or(lost)?;
                *info.underflow.get_mut(number).ok_or(lost)? = *policy.ok_or(lost)?;
            }
        }
        blob.extend_from_slice(&self.end.bytes);
        info.entries = offset(self.numbers().len())?;
        info.size = offset(blob.len())?;
        Ok((info, blob))
    }

    fn write_rule(
        &self,
        rule: &Rule,
        starts: &BTreeMap<&str, u32>,
        blob: &mut Vec<u8>,
    ) -> Result<(), Malformed> {
        let begin = blob.len();
        blob.extend_from_slice(&rule.entry.bytes);
        let to = match &rule.next {
            Next::Fixed => return Ok(()),
            Next::Through => offset(blob.len())?,
            Next::Jump(chain) => *starts
                .get(chain.as_str())
                .ok_or(Malformed("a rule jumps to a chain that is not there"))?,
        };
        let at = read_u16(&rule.entry.bytes, layout(self.family).target_offset).map(usize::from);
        let verdict = at
            .map(|at| begin + at + TARGET_HEADER)
            .and_then(|at| blob.get_mut(at..at + 4))
            .ok_or(Malformed("a verdict is cut off"))?;
        verdict.copy_from_slice(&to.to_ne_bytes());
        Ok(())
    }

    /// Where the first rule of each user chain comes to stand.
    fn starts(&self) -> Result<BTreeMap<&str, u32>, Malformed> {
        let mut starts = BTreeMap::new();
        let mut at = 0;
        for chain in &self.chains {
            if let Head::User { name, entry } = &chain.head {
                at += entry.bytes.len();
                starts.insert(name.as_str(), offset(at)?);
            }
            at += chain.rules.iter().map(|rule| rule.entry.bytes.len()).sum::<usize>();
        }
        Ok(starts)
    }

    /// For each entry in order, its position when it was read: its counters are there.
    #[must_use]
    pub fn numbers(&self) -> Vec<usize> {
        let chain = |chain: &Chain| {
            let head = match &chain.head {
                Head::User { entry, .. } => Some(entry.number),
                Head::Hook { .. } => None,
            };
            head.into_iter().chain(chain.rules.iter().map(|r| r.entry.number)).collect::<Vec<_>>()
        };
        self.chains.iter().flat_map(chain).chain([self.end.number]).collect()
    }

    /// Takes out user chains and single rules, the latter by the chain's position and
    /// their own. A policy stays.
    pub fn remove(&mut self, chains: &BTreeSet<String>, rules: &BTreeSet<(usize, usize)>) {
        for (at, chain) in self.chains.iter_mut().enumerate() {
            let mut position = 0;
            let mut before_policy = 0;
            let policy = match chain.head {
                Head::Hook { policy, .. } => policy,
                // `RETURN`, which the kernel asks for at the end of a chain.
                Head::User { .. } => chain.rules.len().saturating_sub(1),
            };
            chain.rules.retain(|_| {
                let goes = position != policy && rules.contains(&(at, position));
                before_policy += usize::from(goes && position < policy);
                position += 1;
                !goes
            });
            if let Head::Hook { policy, .. } = &mut chain.head {
                *policy -= before_policy;
            }
        }
        self.chains.retain(|chain| chain.name().is_none_or(|name| !chains.contains(name)));
    }

    fn names(&self) -> Result<(), Malformed> {
        let mut seen = BTreeSet::new();
        let twice = self.chains.iter().filter_map(Chain::name).any(|name| !seen.insert(name));
        if twice { Err(Malformed("two chains of one name")) } else { Ok(()) }
    }
}

fn offset(bytes: usize) -> Result<u32, Malformed> {
    // Verdicts are signed.
    i32::try_from(bytes).map(i32::cast_unsigned).map_err(|_| Malformed("a table of 2 GiB"))
}

fn chains(info: &Info, entries: &[Placed<'_>]) -> Result<Vec<Chain>, Malformed> {
    let valid = |hook: &usize| info.valid_hooks & (1 << hook) != 0;
    let mut hooks: BTreeMap<usize, usize> = BTreeMap::new();
    for hook in (0..HOOKS).filter(valid) {
        let at = info.hook_entry.get(hook).and_then(|at| usize::try_from(*at).ok());
        let at = at.ok_or(Malformed("a hook without an entry"))?;
        if hooks.insert(at, hook).is_some() {
            return Err(Malformed("two hooks with one chain"));
        }
    }
    let targets = jump_targets(entries);
    let mut chains: Vec<Chain> = Vec::new();
    for (number, placed) in entries.iter().enumerate() {
        let entry = Entry { bytes: placed.bytes.to_vec(), number };
        if let Kind::Error(name) = placed.kind {
            if name.is_empty() {
                return Err(Malformed("a chain without a name"));
            }
            let head = Head::User { name: name.to_owned(), entry };
            chains.push(Chain { head, rules: Vec::new() });
            continue;
        }
        if let Some(hook) = hooks.remove(&placed.offset) {
            let head = Head::Hook { number: hook, policy: usize::MAX };
            chains.push(Chain { head, rules: Vec::new() });
        }
        let chain = chains.last_mut().ok_or(Malformed("a rule outside of any chain"))?;
        if let Head::Hook { number, policy } = &mut chain.head
            && info.underflow.get(*number).and_then(|at| usize::try_from(*at).ok())
                == Some(placed.offset)
        {
            *policy = chain.rules.len();
        }
        chain.rules.push(Rule { entry, next: next(placed, &targets)? });
    }
    let whole = chains.iter().all(|chain| match chain.head {
        Head::Hook { policy, .. } => policy < chain.rules.len(),
        Head::User { .. } => !chain.rules.is_empty(),
    });
    if !hooks.is_empty() || !whole {
        return Err(Malformed("a chain without rules or without its policy"));
    }
    Ok(chains)
}

/// The names of user chains by the offset of their first rule.
fn jump_targets<'a>(entries: &[Placed<'a>]) -> BTreeMap<usize, &'a str> {
    let heads = entries.iter().filter_map(|placed| match placed.kind {
        Kind::Error(name) => Some((placed.offset + placed.bytes.len(), name)),
        _ => None,
    });
    heads.collect()
}

fn next(placed: &Placed<'_>, targets: &BTreeMap<usize, &str>) -> Result<Next, Malformed> {
    let Kind::Verdict(verdict) = placed.kind else { return Ok(Next::Fixed) };
    let Ok(to) = usize::try_from(verdict) else { return Ok(Next::Fixed) };
    if to == placed.offset + placed.bytes.len() {
        return Ok(Next::Through);
    }
    let name = targets.get(&to).ok_or(Malformed("a jump into the middle of a chain"))?;
    Ok(Next::Jump((*name).to_owned()))
}
