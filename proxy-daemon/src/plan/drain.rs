//! Retired objects, waiting for their last connection or their deadline.
//!
//! Nothing of this is stored: after a restart a retired object is found in the kernel
//! (weight 0, not wanted) and starts a new wait.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::objects::ObjectKey;

#[derive(Debug)]
pub struct Drain<K: ObjectKey> {
    deadlines: HashMap<K, Instant>,
    timeout: Duration,
}

impl<K: ObjectKey> Drain<K> {
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { deadlines: HashMap::new(), timeout }
    }

    /// Starts the wait of `key`; a wait under way keeps its deadline.
    pub fn begin(&mut self, key: K, now: Instant) {
        self.deadlines.entry(key).or_insert(now + self.timeout);
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

    /// Objects whose wait is over by the clock.
    pub fn expired(&self, now: Instant) -> impl Iterator<Item = &K> {
        self.deadlines.iter().filter(move |(_, deadline)| **deadline <= now).map(|(key, _)| key)
    }

    /// Objects that may still have connections.
    pub fn waiting(&self, now: Instant) -> impl Iterator<Item = &K> {
        self.deadlines.iter().filter(move |(_, deadline)| **deadline > now).map(|(key, _)| key)
    }

    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.values().min().copied()
    }
}
