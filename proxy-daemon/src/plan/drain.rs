//! Retired objects, waiting for their last connection or their deadline. The deadline is for
//! endpoints that are gone: one that only is in no set that clients reach keeps what it has.
//!
//! Nothing of this is stored: after a restart a retired object is found in the kernel
//! (weight 0, not wanted) and starts a new wait.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::objects::{ObjectKey, Standing};

#[derive(Debug)]
pub struct Drain<K: ObjectKey> {
    deadlines: HashMap<K, Option<Instant>>,
    timeout: Duration,
}

impl<K: ObjectKey> Drain<K> {
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { deadlines: HashMap::new(), timeout }
    }

    /// Starts the wait of `key`, or goes on with it: its deadline is counted from when its
    /// endpoint was first said to be gone.
    pub fn begin(&mut self, key: K, standing: Standing, now: Instant) {
        let deadline = self.deadlines.entry(key).or_default();
        *deadline = match standing {
            Standing::Gone => deadline.or(Some(now + self.timeout)),
            Standing::Present | Standing::Serving => None,
        };
    }

    /// The object is wanted again, or gone.
    pub fn end(&mut self, key: &K) {
        self.deadlines.remove(key);
    }

    pub fn contains(&self, key: &K) -> bool {
        self.deadlines.contains_key(key)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.deadlines.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.deadlines.is_empty()
    }

    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.deadlines.keys()
    }

    /// Objects whose wait is over by the clock.
    pub fn expired(&self, now: Instant) -> impl Iterator<Item = &K> {
        let over = move |deadline: &Option<Instant>| deadline.is_some_and(|at| at <= now);
        self.deadlines.iter().filter(move |(_, deadline)| over(deadline)).map(|(key, _)| key)
    }

    /// Objects that may still have connections.
    pub fn waiting(&self, now: Instant) -> impl Iterator<Item = &K> {
        let over = move |deadline: &Option<Instant>| deadline.is_some_and(|at| at <= now);
        self.deadlines.iter().filter(move |(_, deadline)| !over(deadline)).map(|(key, _)| key)
    }

    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.values().copied().flatten().min()
    }
}
