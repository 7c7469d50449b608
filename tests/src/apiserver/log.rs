//! What was asked of the server, so that a test can say how much work a client made.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde_json::{Value, json};

use super::resource::Resource;

/// Entries kept; the counters know no such bound.
const KEPT: usize = 10_000;

/// What kind of request it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Verb {
    /// One object.
    Get,
    /// A list, or the first page of one.
    List,
    /// A further page.
    Page,
    /// A watch from a version, or with old-style initial events.
    Watch,
    /// A watch with `sendInitialEvents`.
    WatchList,
    /// POST.
    Create,
    /// PUT.
    Update,
    /// PATCH.
    Patch,
    /// DELETE, of one object or many.
    Delete,
    /// Discovery, version, health, or a path that is not served.
    Other,
}

/// One request.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// What kind of request.
    pub verb: Verb,
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub uri: String,
    /// HTTP version, such as `HTTP/2.0`.
    pub version: String,
    /// Status code answered.
    pub code: u16,
}

/// The log of requests.
#[derive(Debug, Clone, Default)]
pub struct RequestLog {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: VecDeque<Entry>,
    counters: BTreeMap<(Option<Resource>, Verb), u64>,
    open_watches: BTreeMap<Resource, usize>,
}

impl RequestLog {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests of one kind for one resource, whatever they were answered.
    pub fn count(&self, resource: Resource, verb: Verb) -> u64 {
        self.lock().counters.get(&(Some(resource), verb)).copied().unwrap_or(0)
    }

    /// All requests, discovery and health included.
    pub fn total(&self) -> u64 {
        self.lock().counters.values().sum()
    }

    /// The latest requests, oldest first.
    pub fn entries(&self) -> Vec<Entry> {
        self.lock().entries.iter().cloned().collect()
    }

    /// Watches that are being served now.
    pub fn open_watches(&self, resource: Resource) -> usize {
        self.lock().open_watches.get(&resource).copied().unwrap_or(0)
    }

    /// Forgets entries and counters.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.entries.clear();
        inner.counters.clear();
    }

    pub(super) fn record(&self, resource: Option<Resource>, entry: Entry) {
        let mut inner = self.lock();
        *inner.counters.entry((resource, entry.verb)).or_default() += 1;
        if inner.entries.len() == KEPT {
            inner.entries.pop_front();
        }
        inner.entries.push_back(entry);
    }

    /// Counts a watch as open for as long as the guard lives.
    pub(super) fn watch_opened(&self, resource: Resource) -> OpenWatch {
        *self.lock().open_watches.entry(resource).or_default() += 1;
        OpenWatch { log: self.clone(), resource }
    }

    /// The counters as JSON: `{"services": {"List": 1}, ...}`.
    pub fn to_value(&self) -> Value {
        let inner = self.lock();
        let mut requests = json!({});
        for ((resource, verb), count) in &inner.counters {
            let name = resource.map_or_else(|| "other".to_owned(), Resource::qualified);
            requests[name][format!("{verb:?}")] = json!(count);
        }
        let open: BTreeMap<_, _> =
            inner.open_watches.iter().map(|(r, count)| (r.qualified(), count)).collect();
        json!({"requests": requests, "openWatches": open})
    }
}

/// See [`RequestLog::watch_opened`].
#[derive(Debug)]
pub(super) struct OpenWatch {
    log: RequestLog,
    resource: Resource,
}

impl Drop for OpenWatch {
    fn drop(&mut self) {
        if let Some(open) = self.log.lock().open_watches.get_mut(&self.resource) {
            *open -= 1;
        }
    }
}
