//! One copy of what many objects repeat: names of namespaces, nodes, zones and ports, and
//! where endpoints are. With an allocation for each, ten endpoints of 44,000 Services spend
//! 60 MiB on the names of a few hundred nodes.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use super::Placement;

/// Pruned no earlier than at this size.
const SMALLEST: usize = 1024;

/// One copy of each value that somebody has.
#[derive(Debug)]
pub struct Pool<T: ?Sized + Eq + Hash> {
    held: HashSet<Arc<T>>,
    /// What nobody has any more goes when there are this many.
    prune_at: usize,
}

static NAMES: LazyLock<Mutex<Pool<str>>> = LazyLock::new(Mutex::default);
static PLACEMENTS: LazyLock<Mutex<Pool<Placement>>> = LazyLock::new(Mutex::default);

/// The shared copy of `name`.
#[must_use]
pub fn intern(name: &str) -> Arc<str> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner).get(name, |name| name.into())
}

impl Placement {
    /// The shared copy.
    #[must_use]
    pub fn shared(self) -> Arc<Self> {
        let mut pool = PLACEMENTS.lock().unwrap_or_else(PoisonError::into_inner);
        pool.get(&self, |placement| Arc::new(placement.clone()))
    }
}

impl<T: ?Sized + Eq + Hash> Default for Pool<T> {
    fn default() -> Self {
        Self { held: HashSet::new(), prune_at: SMALLEST }
    }
}

impl<T: ?Sized + Eq + Hash> Pool<T> {
    /// The one that is equal to `value`: `copy`, when there is none yet.
    pub fn get(&mut self, value: &T, copy: impl FnOnce(&T) -> Arc<T>) -> Arc<T> {
        if let Some(held) = self.held.get(value) {
            return Arc::clone(held);
        }
        if self.held.len() >= self.prune_at {
            self.held.retain(|held| Arc::strong_count(held) > 1);
            self.prune_at = SMALLEST.max(2 * self.held.len());
        }
        let copy = copy(value);
        self.held.insert(Arc::clone(&copy));
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_are_one_and_unused_ones_go() {
        let mut pool: Pool<str> = Pool::default();
        let kept = pool.get("node-a", |name| name.into());
        assert!(Arc::ptr_eq(&kept, &pool.get("node-a", |name| name.into())));
        for n in 0..10 * SMALLEST {
            let _ = pool.get(&n.to_string(), |name| name.into());
        }
        assert!(pool.held.len() <= SMALLEST, "{}", pool.held.len());
        assert!(Arc::ptr_eq(&kept, &pool.get("node-a", |name| name.into())));
    }
}
