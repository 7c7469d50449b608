//! Kernel objects whose last operation failed, and when to try again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::report::{Failing, SyncReport};
use crate::dataplane::OpError;
use crate::plan::ObjectKey;

/// First delay after a failure; doubled each time.
const FIRST: Duration = Duration::from_millis(200);
/// No failing object is left alone for longer.
const LONGEST: Duration = Duration::from_secs(30);

#[must_use]
pub fn backoff(attempts: u32) -> Duration {
    FIRST.saturating_mul(1 << attempts.saturating_sub(1).min(16)).min(LONGEST)
}

#[derive(Debug)]
struct Failure {
    since: Instant,
    attempts: u32,
    next: Instant,
    error: String,
    /// The last time, and not by an answer that was lost.
    refused: bool,
}

#[derive(Debug)]
pub struct Retry<K> {
    failures: HashMap<K, Failure>,
}

impl<K> Default for Retry<K> {
    fn default() -> Self {
        Self { failures: HashMap::new() }
    }
}

impl<K: ObjectKey> Retry<K> {
    /// Records a failure; true when it is the first one or says something new, that is
    /// when it is worth a log line.
    pub fn failed(&mut self, key: &K, error: &OpError, now: Instant) -> bool {
        let refused = matches!(error, OpError::Refused(_));
        let error = error.to_string();
        let failure = self.failures.entry(key.clone()).or_insert_with(|| Failure {
            since: now,
            attempts: 0,
            next: now,
            error: String::new(),
            refused,
        });
        let news = failure.error != error;
        failure.attempts = failure.attempts.saturating_add(1);
        failure.next = now + backoff(failure.attempts);
        failure.error = error;
        failure.refused = refused;
        news
    }

    pub fn succeeded(&mut self, key: &K) -> bool {
        self.failures.remove(key).is_some()
    }

    /// Objects nobody wants changed any more.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.failures.retain(|key, _| keep(key));
    }

    pub fn due(&self, now: Instant) -> Vec<K> {
        self.failures.iter().filter(|(_, f)| f.next <= now).map(|(key, _)| key.clone()).collect()
    }

    pub fn next(&self) -> Option<Instant> {
        self.failures.values().map(|failure| failure.next).min()
    }

    pub fn len(&self) -> usize {
        self.failures.len()
    }

    /// The kernel answers for all that fails, and says no.
    pub fn all_refused(&self) -> bool {
        self.failures.values().all(|failure| failure.refused)
    }

    /// The longest failing ones.
    pub fn report(&self) -> Vec<Failing> {
        let mut failing: Vec<Failing> = self
            .failures
            .iter()
            .map(|(key, failure)| Failing {
                object: key.to_string(),
                error: failure.error.clone(),
                since: failure.since,
            })
            .collect();
        failing.sort_by(|a, b| a.since.cmp(&b.since).then_with(|| a.object.cmp(&b.object)));
        failing.truncate(SyncReport::MAX_FAILING);
        failing
    }
}
