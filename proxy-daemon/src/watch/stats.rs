//! What the sources count, for metrics: written by the sources, read by whoever asks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use super::convert::Part;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
}

impl ObjectKind {
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];

    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }
}

/// Why a source had to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// No connection, or it broke off.
    Unreachable,
    /// Connected, but nothing came in time.
    NoAnswer,
    /// 401, or credentials that could not be read.
    Unauthorized,
    /// 403: RBAC.
    Forbidden,
    /// 410: the version to go on from is gone. Ordinary, it leads to a new list.
    Expired,
    /// 404: the API server has no such kind.
    Absent,
    /// Any other error status.
    Status,
    /// An answer that is not what the API speaks.
    Rubbish,
    /// A directory or file that cannot be read.
    File,
    /// A manifest that does not parse.
    Manifest,
}

impl Cause {
    pub const ALL: [Self; 10] = [
        Self::Unreachable,
        Self::NoAnswer,
        Self::Unauthorized,
        Self::Forbidden,
        Self::Expired,
        Self::Absent,
        Self::Status,
        Self::Rubbish,
        Self::File,
        Self::Manifest,
    ];

    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::NoAnswer => "no_answer",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::Expired => "expired",
            Self::Absent => "absent",
            Self::Status => "status",
            Self::Rubbish => "rubbish",
            Self::File => "file",
            Self::Manifest => "manifest",
        }
    }
}

/// Counters of one kind of object.
#[derive(Debug, Default)]
pub struct KindStats {
    applied: AtomicU64,
    gone: AtomicU64,
    lists: AtomicU64,
    watches: AtomicU64,
    rejected: AtomicU64,
    complaints: [AtomicU64; Part::ALL.len()],
    failures: [AtomicU64; Cause::ALL.len()],
    absent: AtomicBool,
    /// Milliseconds since the epoch; 0: not connected.
    connected_since: AtomicU64,
    /// Milliseconds since the epoch; 0: never.
    last_contact: AtomicU64,
}

impl KindStats {
    /// Single changes received (added or modified).
    pub fn applied(&self) -> u64 {
        self.applied.load(Relaxed)
    }

    /// Deletions received, and objects that turned into what is not ours.
    pub fn gone(&self) -> u64 {
        self.gone.load(Relaxed)
    }

    /// Whole lists received.
    pub fn lists(&self) -> u64 {
        self.lists.load(Relaxed)
    }

    /// Watches begun; all but the first are reconnects.
    pub fn watches(&self) -> u64 {
        self.watches.load(Relaxed)
    }

    /// Objects rejected as a whole.
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Relaxed)
    }

    /// Parts of objects dropped.
    pub fn complaints(&self, part: Part) -> u64 {
        self.complaints[part as usize].load(Relaxed)
    }

    pub fn failures(&self, cause: Cause) -> u64 {
        self.failures[cause as usize].load(Relaxed)
    }

    /// The source does not have this kind, and need not.
    pub fn is_absent(&self) -> bool {
        self.absent.load(Relaxed)
    }

    /// Since when the watch stands; `None` while it does not.
    pub fn connected_since(&self) -> Option<SystemTime> {
        time(self.connected_since.load(Relaxed))
    }

    /// When the source last heard anything, bookmarks included.
    pub fn last_contact(&self) -> Option<SystemTime> {
        time(self.last_contact.load(Relaxed))
    }

    pub(super) fn count_applied(&self) {
        self.applied.fetch_add(1, Relaxed);
    }

    pub(super) fn count_gone(&self) {
        self.gone.fetch_add(1, Relaxed);
    }

    pub(super) fn count_list(&self) {
        self.lists.fetch_add(1, Relaxed);
    }

    pub(super) fn count_rejected(&self) {
        self.rejected.fetch_add(1, Relaxed);
    }

    pub(super) fn count_complaint(&self, part: Part) {
        self.complaints[part as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn count_failure(&self, cause: Cause) {
        self.failures[cause as usize].fetch_add(1, Relaxed);
    }

    /// A watch began. One that only resumes keeps the time of its first connect.
    pub(super) fn connected(&self) {
        self.watches.fetch_add(1, Relaxed);
        self.absent.store(false, Relaxed);
        let _ = self.connected_since.compare_exchange(0, now(), Relaxed, Relaxed);
        self.contact();
    }

    pub(super) fn disconnected(&self) {
        self.connected_since.store(0, Relaxed);
    }

    pub(super) fn absent(&self) {
        self.absent.store(true, Relaxed);
        self.disconnected();
        self.contact();
    }

    pub(super) fn contact(&self) {
        self.last_contact.store(now(), Relaxed);
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn time(millis: u64) -> Option<SystemTime> {
    (millis != 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_millis(millis))
}

/// Counters of a source, one set per kind. Shared by `Arc`.
#[derive(Debug, Default)]
pub struct SourceStats {
    kinds: [KindStats; ObjectKind::ALL.len()],
}

impl SourceStats {
    pub fn kind(&self, kind: ObjectKind) -> &KindStats {
        &self.kinds[kind as usize]
    }
}
