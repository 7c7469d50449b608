//! Every kernel object there is reason to know of: what frontends want it to be, and what
//! the kernel is known to hold.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;

use super::diff::Op;
use super::objects::ObjectKey;
use crate::policy::FrontendKey;

/// Both sides of each object in one place, so that the usual case, a kernel that holds
/// what is wanted, takes the room of one.
#[derive(Debug)]
pub struct Ledger<K: ObjectKey> {
    entries: BTreeMap<K, Entry<K::Value>>,
    /// Which of its usual objects a frontend wants.
    usual: HashMap<FrontendKey, u16>,
    /// What a frontend wants besides, without those that are found as children of another.
    besides: HashMap<FrontendKey, Box<[K]>>,
    /// Counts readbacks; the one under way, or else the last.
    readback: u32,
    reading: bool,
    /// Since the readback under way began: it may still tell of these.
    deleted: HashSet<K>,
}

#[derive(Debug, Clone)]
struct Entry<V> {
    sides: Sides<V>,
    /// How many frontends want it.
    frontends: u32,
    /// The readback in which the kernel's side was found, or during which it was written.
    seen: u32,
}

#[derive(Debug, Clone, Default)]
enum Sides<V> {
    #[default]
    Neither,
    Wanted(V),
    Held(V),
    Same(V),
    Differing(Box<Difference<V>>),
}

#[derive(Debug, Clone)]
struct Difference<V> {
    wanted: V,
    held: V,
}

impl<V: PartialEq> Sides<V> {
    fn of(wanted: Option<V>, held: Option<V>) -> Self {
        match (wanted, held) {
            (None, None) => Self::Neither,
            (Some(wanted), None) => Self::Wanted(wanted),
            (None, Some(held)) => Self::Held(held),
            (Some(wanted), Some(held)) if wanted == held => Self::Same(wanted),
            (Some(wanted), Some(held)) => Self::Differing(Box::new(Difference { wanted, held })),
        }
    }

    const fn wanted(&self) -> Option<&V> {
        match self {
            Self::Wanted(value) | Self::Same(value) => Some(value),
            Self::Differing(both) => Some(&both.wanted),
            Self::Neither | Self::Held(_) => None,
        }
    }

    const fn held(&self) -> Option<&V> {
        match self {
            Self::Held(value) | Self::Same(value) => Some(value),
            Self::Differing(both) => Some(&both.held),
            Self::Neither | Self::Wanted(_) => None,
        }
    }
}

impl<V: Clone + PartialEq> Sides<V> {
    fn want(&mut self, wanted: Option<V>) {
        let held = match std::mem::take(self) {
            Self::Held(value) | Self::Same(value) => Some(value),
            Self::Differing(both) => Some(both.held),
            Self::Neither | Self::Wanted(_) => None,
        };
        *self = Self::of(wanted, held);
    }

    fn hold(&mut self, held: Option<V>) {
        let wanted = match std::mem::take(self) {
            Self::Wanted(value) | Self::Same(value) => Some(value),
            Self::Differing(both) => Some(both.wanted),
            Self::Neither | Self::Held(_) => None,
        };
        *self = Self::of(wanted, held);
    }
}

impl<V> Default for Entry<V> {
    fn default() -> Self {
        Self { sides: Sides::Neither, frontends: 0, seen: 0 }
    }
}

/// How far a walk over all objects has come, and what it has found to be unwanted.
#[derive(Debug)]
pub struct Sweep<K> {
    after: Option<K>,
    /// Held and not wanted. To be dealt with once everything wanted is there.
    pub unwanted: Vec<K>,
    pub over: bool,
}

impl<K> Default for Sweep<K> {
    fn default() -> Self {
        Self { after: None, unwanted: Vec::new(), over: false }
    }
}

fn is_found_as_child<K: ObjectKey>(key: &K) -> bool {
    key.parent().and_then(|parent| parent.children()).is_some_and(|range| range.contains(key))
}

/// Each of a frontend's usual objects with its bit.
fn usual<K: ObjectKey>(frontend: &FrontendKey) -> impl Iterator<Item = (u16, K)> {
    (0..u16::BITS).map(|place| 1 << place).zip(K::usual(frontend))
}

impl<K: ObjectKey> Default for Ledger<K> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            usual: HashMap::new(),
            besides: HashMap::new(),
            readback: 0,
            reading: false,
            deleted: HashSet::new(),
        }
    }
}

impl<K: ObjectKey> Ledger<K> {
    /// Replaces the objects that `frontend` wants; `touched` receives every key that may
    /// have changed. An object is wanted as long as one frontend wants it; one shared by
    /// several has the same value for each.
    pub fn replace(
        &mut self,
        frontend: FrontendKey,
        new: Vec<(K, K::Value)>,
        touched: &mut impl Extend<K>,
    ) {
        let old = self.take_keys(frontend);
        let places: Vec<(u16, K)> = usual(&frontend).collect();
        let mut wanted = 0;
        let mut besides = Vec::new();
        // New before old: a shared object's count must not pass through zero.
        for (key, value) in new {
            let entry = self.entries.entry(key.clone()).or_default();
            entry.frontends += 1;
            if entry.sides.wanted() != Some(&value) {
                entry.sides.want(Some(value));
                touched.extend([key.clone()]);
            }
            match places.iter().find(|(_, usual)| *usual == key) {
                Some((bit, _)) => wanted |= bit,
                None if is_found_as_child(&key) => {}
                None => besides.push(key),
            }
        }
        for key in old {
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            entry.frontends -= 1;
            if entry.frontends == 0 {
                entry.sides.want(None);
                self.forget_if_empty(&key);
                touched.extend([key]);
            }
        }
        if wanted != 0 {
            self.usual.insert(frontend, wanted);
        }
        if !besides.is_empty() {
            self.besides.insert(frontend, besides.into_boxed_slice());
        }
    }

    /// All that `frontend` wanted so far.
    fn take_keys(&mut self, frontend: FrontendKey) -> Vec<K> {
        let mut keys = self.besides.remove(&frontend).unwrap_or_default().into_vec();
        let wanted = self.usual.remove(&frontend).unwrap_or_default();
        keys.extend(usual(&frontend).filter(|(bit, _)| wanted & bit != 0).map(|(_, key)| key));
        let ranges: Vec<_> = keys.iter().filter_map(K::children).collect();
        for range in ranges {
            let children = self.entries.range(range);
            let wanted = children.filter(|(_, entry)| entry.frontends > 0);
            keys.extend(wanted.map(|(key, _)| key.clone()));
        }
        keys
    }

    #[must_use]
    pub fn wanted(&self, key: &K) -> Option<&K::Value> {
        self.entries.get(key)?.sides.wanted()
    }

    #[must_use]
    pub fn held(&self, key: &K) -> Option<&K::Value> {
        self.entries.get(key)?.sides.held()
    }

    /// The kernel holds what is wanted, which may be nothing.
    #[must_use]
    pub fn agrees(&self, key: &K) -> bool {
        self.entries.get(key).is_none_or(|entry| matches!(entry.sides, Sides::Same(_)))
    }

    /// The kernel holds something inside the object.
    #[must_use]
    pub fn holds_children(&self, key: &K) -> bool {
        let mut children = key.children().into_iter().flat_map(|range| self.entries.range(range));
        children.any(|(_, entry)| entry.sides.held().is_some())
    }

    /// Every object with what is wanted and what is held.
    pub fn iter(&self) -> impl Iterator<Item = (&K, Option<&K::Value>, Option<&K::Value>)> {
        self.entries.iter().map(|(key, entry)| (key, entry.sides.wanted(), entry.sides.held()))
    }

    /// The kernel confirmed the operation.
    pub fn applied(&mut self, op: &Op<K>) {
        match op {
            Op::Create(key, value) | Op::Update(key, value) | Op::Retire(key, value) => {
                self.hold(key, value.clone());
            }
            Op::Delete(key) => {
                if self.reading {
                    self.deleted.insert(key.clone());
                }
                if let Some(entry) = self.entries.get_mut(key) {
                    entry.sides.hold(None);
                    self.forget_if_empty(key);
                }
            }
        }
    }

    /// The object is in the kernel.
    pub fn hold(&mut self, key: &K, value: K::Value) {
        let seen = self.readback;
        let entry = self.entries.entry(key.clone()).or_default();
        entry.sides.hold(Some(value));
        entry.seen = seen;
    }

    /// A readback begins: until it ends, what it tells counts less than what is written.
    pub fn begin_readback(&mut self) {
        self.readback = self.readback.wrapping_add(1);
        self.reading = true;
        self.deleted.clear();
    }

    /// The object was written since the readback began: what that tells of it may be older.
    #[must_use]
    pub fn is_newer(&self, key: &K) -> bool {
        self.deleted.contains(key)
            || self
                .entries
                .get(key)
                .is_some_and(|entry| entry.seen == self.readback && entry.sides.held().is_some())
    }

    /// The readback has ended. When it told everything, a sweep has to follow, which takes
    /// note of what it did not tell of.
    pub fn end_readback(&mut self) {
        self.reading = false;
        self.deleted = HashSet::new();
    }

    /// Walks on over at most `limit` objects: those that are wanted otherwise than the
    /// kernel holds them.
    pub fn sweep(&mut self, sweep: &mut Sweep<K>, limit: usize) -> Vec<K> {
        let start = sweep.after.take().map_or(Bound::Unbounded, Bound::Excluded);
        let mut divergent = Vec::new();
        let mut gone = Vec::new();
        let mut last = None;
        let mut walked = 0;
        for (key, entry) in self.entries.range_mut((start, Bound::Unbounded)).take(limit) {
            walked += 1;
            last = Some(key);
            if entry.seen != self.readback && entry.sides.held().is_some() {
                entry.sides.hold(None);
            }
            match entry.sides {
                Sides::Wanted(_) | Sides::Differing(_) => divergent.push(key.clone()),
                Sides::Held(_) => sweep.unwanted.push(key.clone()),
                Sides::Neither => gone.push(key.clone()),
                Sides::Same(_) => {}
            }
        }
        sweep.after = last.cloned();
        sweep.over = walked < limit;
        for key in &gone {
            self.entries.remove(key);
        }
        divergent
    }

    /// Packs the objects closely. A map that grew by insertions has room for half as many
    /// again, and after a start few objects come and go.
    pub fn compact(&mut self) {
        self.entries = std::mem::take(&mut self.entries).into_iter().collect();
    }

    /// Objects that are wanted or held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn forget_if_empty(&mut self, key: &K) {
        if self.entries.get(key).is_some_and(|entry| matches!(entry.sides, Sides::Neither)) {
            self.entries.remove(key);
        }
    }
}
