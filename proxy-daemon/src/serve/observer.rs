//! The engine's reports, passed on to health and metrics.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Instant;

use tracing::{info, warn};

use super::Status;
use super::traffic::ServicePort;
use crate::model::{ObjectName, Rejected};
use crate::policy::{FrontendKey, PortName};
use crate::sync::{Failing, HealthCheck, Observer, SyncReport};
use crate::watch::announce::{Announcement, Regarding};

/// Given to the engine; everything it does is a short lock.
#[derive(Debug, Clone)]
pub struct StatusObserver(pub(super) Arc<Status>);

impl Observer for StatusObserver {
    fn awaiting(&mut self, missing: &[&'static str], at: Instant) {
        self.0.health().awaiting(missing, at);
    }

    fn busy(&mut self, since: Option<Instant>) {
        self.0.health().busy(since);
    }

    fn queued(&mut self, at: Instant, service_changes: usize, slice_changes: usize) {
        self.0.health().queued(at);
        self.0.metrics.queued(self.0.now().wall, service_changes, slice_changes);
    }

    fn synced(&mut self, report: &SyncReport) {
        let now = self.0.now();
        let (lasting, entered) = {
            let mut health = self.0.health();
            let waited = health.awaits().is_some();
            health.synced(report);
            (health.lasting(now), waited && health.awaits().is_none())
        };
        if entered {
            info!(
                services = report.totals.services,
                failing = report.failing_total,
                "all Services are programmed: in service"
            );
        }
        self.0.metrics.synced(report, now.wall);
        for Failing { object, error, .. } in lasting {
            self.0.announce(Announcement {
                regarding: Regarding::node(&self.0.node),
                warning: true,
                reason: "ProgrammingFailed",
                action: "Program",
                note: format!("{object}: {error}"),
            });
        }
    }

    fn rejected(&mut self, object: &Rejected) {
        self.0.metrics.rejected(object);
    }

    fn conflict(&mut self, loser: &ObjectName, holder: &ObjectName, frontend: &FrontendKey) {
        self.0.announce(Announcement {
            regarding: Regarding::by_name("Service", loser.clone()),
            warning: true,
            reason: "FrontendConflict",
            action: "Program",
            note: format!("{frontend} is served for {holder}, the older of the two"),
        });
    }

    fn serves(&mut self, frontend: &FrontendKey, port: Option<(&PortName, Option<NonZeroU16>)>) {
        let port = port.map(|(name, number)| ServicePort {
            name: name.clone(),
            number,
            protocol: frontend.protocol,
        });
        self.0.metrics.traffic().serves(*frontend, port);
    }

    fn node(&mut self, eligible: Option<bool>) {
        if eligible != Some(true) {
            let why = eligible.map_or("it does not exist", |_| "it is being taken out of service");
            warn!("this Node takes no traffic of load balancers: {why}; /healthz says 503");
        }
        self.0.health().node(eligible);
        self.0.metrics.node(eligible.unwrap_or(false));
    }

    fn node_port_addresses(&mut self, addresses: &[IpAddr]) {
        self.0.checks.listen_on(addresses);
    }

    fn health_check(&mut self, service: &ObjectName, check: Option<HealthCheck>) {
        self.0.checks.set(service, check);
    }
}
