//! What one round of the engine did, for metrics and health.
//!
//! The engine knows nothing of HTTP or Prometheus: it tells an [`Observer`].

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use crate::dataplane::{Fill, FlowRelease};
use crate::model::{ObjectName, Rejected};
use crate::policy::{FrontendKey, LocalReady, NoLocal, PortName};
use crate::state::Trigger;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SyncKind {
    /// Everything was compared with what the kernel holds.
    Full,
    /// Only what changed.
    Partial,
}

/// Gauges after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    pub services: usize,
    pub slices: usize,
    pub frontends: usize,
    pub backends: usize,
    /// Frontends that a second, younger Service claims as well.
    pub conflicts: usize,
    /// Backends at weight 0 that wait for their last connection.
    pub draining: usize,
    pub no_local: NoLocal,
    /// Kernel objects that the last comparison with the kernel found to be wrong or not
    /// there, and could not repair.
    pub missing: usize,
    /// Those it found to be there, wanted by nobody, and could not remove.
    pub unwanted: usize,
    /// All that comparisons found to diverge since the start.
    pub repaired: u64,
}

/// Requests that one round sent to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    pub requests: u64,
    pub dumps: u64,
    pub sends: u64,
}

#[derive(Debug, Clone)]
pub struct SyncReport {
    pub kind: SyncKind,
    pub started: Instant,
    pub duration: Duration,
    /// Objects whose changes this round programmed.
    pub service_changes: usize,
    pub slice_changes: usize,
    /// Of the slices programmed in this round.
    pub triggers: Vec<Trigger>,
    pub ops_applied: usize,
    pub ops_failed: usize,
    pub work: Work,
    /// Looks for flows of endpoints that are gone.
    pub releases: Vec<FlowRelease>,
    /// Of the data plane's tables that can be full.
    pub fills: Vec<Fill>,
    /// Service and slice changes received but not yet programmed.
    pub pending: usize,
    pub totals: Totals,
    /// Kernel objects that keep failing, with the time of the first failure and the
    /// last error; at most [`SyncReport::MAX_FAILING`] of them.
    pub failing: Vec<Failing>,
    pub failing_total: usize,
}

impl SyncReport {
    /// Enough to name the trouble in a health answer without making it a dump.
    pub const MAX_FAILING: usize = 10;
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    pub object: String,
    pub error: String,
    pub since: Instant,
}

/// Hears what the engine does. Called on the engine's thread: must not block.
pub trait Observer: Send {
    /// What was not seen once yet, so that nothing is programmed; empty when all was. Told when it
    /// changes.
    fn awaiting(&mut self, _missing: &[&'static str], _at: Instant) {}
    /// Work began at that time, and has ended when there is none.
    fn busy(&mut self, _since: Option<Instant>) {}
    /// Changes arrived and wait to be programmed.
    fn queued(&mut self, at: Instant, service_changes: usize, slice_changes: usize);
    /// A round ended. With `pending == 0` and nothing failing the proxy is up to date.
    fn synced(&mut self, report: &SyncReport);
    fn rejected(&mut self, object: &Rejected);
    /// `loser` wants a frontend that an older Service holds.
    fn conflict(&mut self, loser: &ObjectName, holder: &ObjectName, frontend: &FrontendKey);
    /// The frontend is this Service port's now, with the number of the Service's own port, or
    /// no Service's any more. Also told when nothing of it changed.
    fn serves(&mut self, _frontend: &FrontendKey, _port: Option<(&PortName, Option<NonZeroU16>)>) {}
    /// The Node object as last seen: `None` when it is gone; else whether it is
    /// eligible for load balancers (not deleting, not scaling down).
    fn node(&mut self, eligible: Option<bool>);
    /// On which addresses of the node its node ports listen from now on.
    fn node_port_addresses(&mut self, _addresses: &[IpAddr]) {}
    /// Local ready endpoints of a Service with a health-check node port; `None`: gone.
    fn health_check(&mut self, service: &ObjectName, check: Option<HealthCheck>);
}

/// `healthCheckNodePort` of an external-Local load balancer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthCheck {
    pub port: u16,
    pub local_endpoints: LocalReady,
}
