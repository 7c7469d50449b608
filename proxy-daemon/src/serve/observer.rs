//! The engine's reports, passed on to health and metrics.

use std::sync::Arc;
use std::time::Instant;

use tracing::warn;

use super::Status;
use crate::model::{ObjectName, Rejected};
use crate::sync::{HealthCheck, Observer, SyncReport};

/// Given to the engine; everything it does is a short lock.
#[derive(Debug, Clone)]
pub struct StatusObserver(pub(super) Arc<Status>);

impl Observer for StatusObserver {
    fn queued(&mut self, at: Instant, service_changes: usize, slice_changes: usize) {
        self.0.health().queued(at);
        self.0.metrics.queued(self.0.now().wall, service_changes, slice_changes);
    }

    fn synced(&mut self, report: &SyncReport) {
        self.0.health().synced(report);
        self.0.metrics.synced(report, self.0.now().wall);
    }

    fn rejected(&mut self, object: &Rejected) {
        self.0.metrics.rejected(object);
    }

    fn node(&mut self, eligible: Option<bool>) {
        if eligible != Some(true) {
            let why = eligible.map_or("it does not exist", |_| "it is being taken out of service");
            warn!("this Node takes no traffic of load balancers: {why}; /healthz says 503");
        }
        self.0.health().node(eligible);
        self.0.metrics.node(eligible.unwrap_or(false));
    }

    fn health_check(&mut self, service: &ObjectName, check: Option<HealthCheck>) {
        self.0.checks.set(service, check);
    }
}
