//! Kernel objects wanted, with how many frontends want each.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;

use crate::policy::FrontendKey;

/// A kernel object of a data plane: identity, with a value that can be updated in place.
pub trait ObjectKey: Clone + Eq + Hash + Ord + fmt::Debug + Send {
    type Value: Clone + PartialEq + fmt::Debug + Send;

    /// Position among the creations and updates of one round: lower goes first.
    fn create_phase(&self) -> u8;

    /// Position among the deletions of one round, all of which come after all creations.
    fn delete_phase(&self) -> u8;

    /// The object goes before anything is created in the same round, since it may stand
    /// in the way of what replaces it.
    fn deleted_first(&self) -> bool {
        false
    }

    /// The value under which the object takes no new connection but keeps those it has;
    /// `None` for objects that are deleted at once.
    fn retired(&self, value: &Self::Value) -> Option<Self::Value>;

    /// The object that this one lives in: when that goes, there is nothing to keep.
    fn parent(&self) -> Option<Self>;
}

#[derive(Debug, Clone)]
struct Wanted<V> {
    value: V,
    frontends: u32,
}

/// What the kernel should hold. An object is wanted as long as one frontend wants it.
#[derive(Debug)]
pub struct Objects<K: ObjectKey> {
    wanted: HashMap<K, Wanted<K::Value>>,
    by_frontend: HashMap<FrontendKey, Vec<K>>,
}

impl<K: ObjectKey> Default for Objects<K> {
    fn default() -> Self {
        Self { wanted: HashMap::new(), by_frontend: HashMap::new() }
    }
}

impl<K: ObjectKey> Objects<K> {
    /// Replaces the objects that `frontend` wants; `touched` receives every key that may
    /// have changed. An object shared by several frontends has the same value for each.
    pub fn replace(
        &mut self,
        frontend: FrontendKey,
        new: Vec<(K, K::Value)>,
        touched: &mut impl Extend<K>,
    ) {
        let old = self.by_frontend.remove(&frontend).unwrap_or_default();
        let mut keys = Vec::with_capacity(new.len());
        // New before old: a shared object's count must not pass through zero.
        for (key, value) in new {
            match self.wanted.get_mut(&key) {
                Some(wanted) => {
                    wanted.frontends += 1;
                    if wanted.value != value {
                        wanted.value = value;
                        touched.extend([key.clone()]);
                    }
                }
                None => {
                    self.wanted.insert(key.clone(), Wanted { value, frontends: 1 });
                    touched.extend([key.clone()]);
                }
            }
            keys.push(key);
        }
        for key in old {
            if let Some(wanted) = self.wanted.get_mut(&key) {
                wanted.frontends -= 1;
                if wanted.frontends == 0 {
                    self.wanted.remove(&key);
                    touched.extend([key]);
                }
            }
        }
        if !keys.is_empty() {
            keys.shrink_to_fit();
            self.by_frontend.insert(frontend, keys);
        }
    }

    #[must_use]
    pub fn get(&self, key: &K) -> Option<&K::Value> {
        self.wanted.get(key).map(|wanted| &wanted.value)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&K, &K::Value)> {
        self.wanted.iter().map(|(key, wanted)| (key, &wanted.value))
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.wanted.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }
}
