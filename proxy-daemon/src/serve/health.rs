//! Whether the proxy keeps up, as `/healthz` and `/livez` tell it.
//!
//! Pure: times come in, so that "late" is a plain unit test. Unlike kube-proxy, which
//! counts a failed write as done, an object that keeps failing makes health bad, and the
//! answer names it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use serde::{Serialize, Serializer};

use crate::model::Family;
use crate::sync::{Failing, SyncKind, SyncReport};

/// One moment on both clocks: intervals are measured on the first, which no
/// administrator can set, and shown on the second.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub monotonic: Instant,
    pub wall: SystemTime,
}

impl Now {
    #[must_use]
    pub fn read() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }

    /// The wall-clock time of an earlier instant.
    fn wall_of(self, instant: Instant) -> SystemTime {
        let age = self.monotonic.saturating_duration_since(instant);
        self.wall.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

/// A failure shorter than this is nobody's business.
const PASSING: Duration = Duration::from_secs(5);

/// A round takes seconds at most, and a start in which the eBPF programs are loaded some more. An
/// engine that does not come back for this long will not.
const STUCK: Duration = Duration::from_secs(300);

/// How far the daemon has come since its start.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// These were not seen once yet.
    Awaiting(Vec<&'static str>),
    /// All were listed; the first comparison of everything with the kernel is not over.
    Programming,
    InService,
}

/// What health depends on.
#[derive(Debug)]
pub struct Health {
    families: Vec<Family>,
    timeout: Duration,
    phase: Phase,
    /// When the engine went to work, while it has not come back.
    busy_since: Option<Instant>,
    /// When the oldest change arrived that is not yet programmed.
    oldest_pending: Option<Instant>,
    last_updated: Option<Instant>,
    failing: Vec<Failing>,
    /// Those of them that [`Health::lasting`] has told of.
    told: BTreeSet<String>,
    /// True until a Node event says otherwise, so that a node can start while the API
    /// server is away (as kube-proxy does).
    node_eligible: bool,
}

impl Health {
    /// A change or a failing object older than `timeout` makes health bad.
    #[must_use]
    pub fn new(families: &[Family], timeout: Duration) -> Self {
        Self {
            families: families.to_vec(),
            timeout,
            phase: Phase::Awaiting(vec!["the data plane"]),
            busy_since: None,
            oldest_pending: None,
            last_updated: None,
            failing: Vec::new(),
            told: BTreeSet::new(),
            node_eligible: true,
        }
    }

    /// What has to be seen before the first round; nothing: it is under way.
    pub fn awaiting(&mut self, missing: &[&'static str], at: Instant) {
        if !missing.is_empty() {
            self.phase = Phase::Awaiting(missing.to_vec());
        } else if matches!(self.phase, Phase::Awaiting(_)) {
            self.phase = Phase::Programming;
            self.oldest_pending = Some(at);
        }
    }

    /// What is waited for until the node is fit for traffic.
    #[must_use]
    pub fn awaits(&self) -> Option<String> {
        match &self.phase {
            Phase::Awaiting(missing) => Some(missing.join(", ")),
            Phase::Programming => Some("the first full round of programming".to_owned()),
            Phase::InService => None,
        }
    }

    pub(super) fn enter_service(&mut self) {
        self.phase = Phase::InService;
    }

    pub fn busy(&mut self, since: Option<Instant>) {
        self.busy_since = since;
    }

    /// How long the engine has been at one piece of work, when that is too long.
    #[must_use]
    pub fn stuck(&self, now: Now) -> Option<Duration> {
        let busy = now.monotonic.saturating_duration_since(self.busy_since?);
        (busy >= STUCK).then_some(busy)
    }

    pub fn queued(&mut self, at: Instant) {
        // What cannot be programmed before something else is listed is not late.
        if !matches!(self.phase, Phase::Awaiting(_)) {
            self.oldest_pending.get_or_insert(at);
        }
    }

    pub fn synced(&mut self, report: &SyncReport) {
        if report.kind == SyncKind::Full {
            self.enter_service();
        }
        if report.pending == 0 {
            self.oldest_pending = None;
        }
        self.failing.clone_from(&report.failing);
        if report.pending == 0 && report.failing_total == 0 {
            self.last_updated = Some(report.started + report.duration);
        }
    }

    /// What has been failing for longer than a retry or two take, each told once until it works
    /// again.
    pub fn lasting(&mut self, now: Now) -> Vec<Failing> {
        self.told.retain(|told| self.failing.iter().any(|failing| failing.object == *told));
        let lasting = self.failing.iter().filter(|failing| {
            now.monotonic.saturating_duration_since(failing.since) >= PASSING
                && self.told.insert(failing.object.clone())
        });
        lasting.cloned().collect()
    }

    pub fn node(&mut self, eligible: Option<bool>) {
        // A Node that is gone takes no traffic of load balancers either.
        self.node_eligible = eligible.unwrap_or(false);
    }

    /// Whether programming keeps up, whatever the Node says: `/livez`, and what the
    /// per-Service health checks show.
    #[must_use]
    pub fn is_keeping_up(&self, now: Now) -> bool {
        let late = |since: Instant| now.monotonic.saturating_duration_since(since) >= self.timeout;
        !self.oldest_pending.is_some_and(late) && !self.failing.iter().any(|f| late(f.since))
    }

    #[must_use]
    pub fn livez(&self, now: Now) -> Answer {
        self.answer(now, None)
    }

    #[must_use]
    pub fn healthz(&self, now: Now) -> Answer {
        self.answer(now, Some(self.node_eligible))
    }

    /// `node_eligible` where traffic depends on the answer: a daemon that has programmed nothing
    /// yet is alive, but nothing should be sent to its node.
    fn answer(&self, now: Now, node_eligible: Option<bool>) -> Answer {
        let programmed = node_eligible.is_none() || self.phase == Phase::InService;
        let well = programmed && self.is_keeping_up(now);
        let healthy = well && node_eligible.unwrap_or(true);
        let last_updated = self.last_updated.map(|at| now.wall_of(at));
        let status = || FamilyStatus { last_updated: Stamp(last_updated), healthy: well };
        let known = self.last_updated.is_some() || !well;
        let families = if known { self.families.as_slice() } else { &[] };
        let failing = self.failing.iter().map(|failing| FailingObject {
            object: failing.object.clone(),
            error: failing.error.clone(),
            since: Stamp(Some(now.wall_of(failing.since))),
        });
        Answer {
            // A healthy proxy without changes shows the present, as kube-proxy does for
            // readers that take an old time for a hung proxy.
            last_updated: Stamp(if healthy { Some(now.wall) } else { last_updated }),
            current_time: Stamp(Some(now.wall)),
            node_eligible,
            healthy,
            status: families.iter().map(|family| (family.to_string(), status())).collect(),
            failing: failing.collect(),
        }
    }
}

/// The body of `/healthz` and `/livez`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    last_updated: Stamp,
    current_time: Stamp,
    /// On `/healthz` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    pub healthy: bool,
    status: BTreeMap<String, FamilyStatus>,
    /// Not in kube-proxy's answer, and absent while all is well.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failing: Vec<FailingObject>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyStatus {
    last_updated: Stamp,
    healthy: bool,
}

#[derive(Debug, Clone, Serialize)]
struct FailingObject {
    object: String,
    error: String,
    since: Stamp,
}

/// RFC 3339 in UTC with the fraction's zeros trimmed, as Go writes a time; Go's zero time
/// for "never".
#[derive(Debug, Clone, Copy)]
struct Stamp(Option<SystemTime>);

impl Serialize for Stamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let stamp = self.0.and_then(|time| jiff::Timestamp::try_from(time).ok());
        match stamp {
            Some(stamp) => serializer.collect_str(&stamp),
            None => serializer.serialize_str("0001-01-01T00:00:00Z"),
        }
    }
}
