//! The metrics: kube-proxy's names where it has the same, ours with `node_dataplane_`.
//!
//! Names, labels and buckets of `kubeproxy_*` are those that dashboards and alerts for
//! kube-proxy ask for (`pkg/proxy/metrics` of Kubernetes). One round of the engine serves
//! both address families, so what kube-proxy measures per family is recorded under each.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Vector;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::features::FeaturesCollector;
use super::process::ProcessCollector;
use super::source::SourceCollector;
use super::traffic::{Limits, Traffic};
use crate::config::{Config, KUBERNETES, NodePortAddresses, ProxyMode, Source};
use crate::dataplane::Fill;
use crate::dataplane::traffic::TrafficSource;
use crate::model::{Family, Rejected};
use crate::policy::NoLocal;
use crate::state::Trigger;
use crate::sync::{SyncKind, SyncReport};
use crate::watch::SourceStats;

type Seconds = Gauge<f64, AtomicU64>;
type Histograms = Vector<FamilyLabel, Histogram, fn() -> Histogram>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FamilyLabel {
    ip_family: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabels {
    ip_family: &'static str,
    traffic_policy: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TableLabel {
    table: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
    /// Whose semantics, flags and names of metrics these are.
    kubernetes: &'static str,
    arch: &'static str,
    mode: String,
}

/// What was chosen, by configuration and by what the kernel has. Few values each, and none
/// that changes while the process lives.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuntimeLabels {
    mode: String,
    kernel: String,
    ip_families: &'static str,
    scheduler: String,
    detect_local_mode: &'static str,
    node_port_addresses: &'static str,
    masquerade_all: &'static str,
    source: &'static str,
}

impl RuntimeLabels {
    fn new(families: &[Family], config: &Config) -> Self {
        let scheduler = match config.proxy_mode {
            ProxyMode::Ipvs => config.ipvs.scheduler.clone(),
            ProxyMode::Ebpf => String::new(),
        };
        Self {
            mode: config.proxy_mode.to_string(),
            kernel: nix::sys::utsname::uname()
                .map(|uname| uname.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            ip_families: match families {
                [] => "",
                [Family::V4] => "IPv4",
                [Family::V6] => "IPv6",
                _ => "IPv4,IPv6",
            },
            scheduler,
            detect_local_mode: config.detect_local.name(),
            node_port_addresses: match config.node_port_addresses {
                NodePortAddresses::All => "all",
                NodePortAddresses::Primary => "primary",
                NodePortAddresses::Cidrs(_) => "cidrs",
            },
            masquerade_all: if config.masquerade.all { "true" } else { "false" },
            source: match config.source {
                Source::Api { .. } => "api",
                Source::Manifests(_) => "manifests",
            },
        }
    }
}

const fn label(family: Family) -> FamilyLabel {
    FamilyLabel {
        ip_family: match family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        },
    }
}

/// 1 ms doubled 14 times.
fn sync_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// 0.25 s and 0.5 s, then by the second up to a minute, by 5 s up to two, by 30 s to five.
fn programming_buckets() -> Histogram {
    let whole = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(whole.map(f64::from)))
}

/// All metrics of the process. Recording takes short locks only, never one that a scrape
/// holds while it formats.
pub struct Metrics {
    families: Vec<Family>,
    started: SystemTime,
    registry: Registry,
    sync: Histograms,
    sync_full: Histograms,
    sync_partial: Histograms,
    programming: Histograms,
    last_sync: Vector<FamilyLabel, Seconds>,
    last_queued: Vector<FamilyLabel, Seconds>,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    service_changes: Counter,
    service_changes_pending: Gauge,
    no_local_endpoints: Vector<PolicyLabels, Gauge>,
    conntrack: Histograms,
    conntrack_deleted: Vector<FamilyLabel, Counter>,
    conntrack_failures: Counter,
    healthz: Vector<CodeLabel, Counter>,
    livez: Vector<CodeLabel, Counter>,
    ops: Vector<ResultLabel, Counter>,
    requests: Counter,
    dumps: Counter,
    sends: Counter,
    rejected: Vector<KindLabel, Counter>,
    services: Gauge,
    slices: Gauge,
    frontends: Gauge,
    backends: Gauge,
    conflicts: Gauge,
    draining: Gauge,
    divergent: Vector<StateLabel, Gauge>,
    repaired: Counter,
    failing: Gauge,
    table_entries: Vector<TableLabel, Gauge>,
    table_capacity: Vector<TableLabel, Gauge>,
    table_growths: Vector<TableLabel, Counter>,
    node_eligible: Gauge,
    source: SourceCollector,
    traffic: Traffic,
    features: FeaturesCollector,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("families", &self.families).finish_non_exhaustive()
    }
}

impl Metrics {
    /// `started` bounds the programming latency: what was triggered before is not ours.
    #[must_use]
    pub fn new(families: &[Family], config: &Config, started: SystemTime) -> Self {
        let metrics = Self {
            families: families.to_vec(),
            started,
            registry: Registry::default(),
            sync: Vector::new_with_constructor(sync_buckets),
            sync_full: Vector::new_with_constructor(sync_buckets),
            sync_partial: Vector::new_with_constructor(sync_buckets),
            programming: Vector::new_with_constructor(programming_buckets),
            last_sync: Vector::default(),
            last_queued: Vector::default(),
            endpoint_changes: Counter::default(),
            endpoint_changes_pending: Gauge::default(),
            service_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            no_local_endpoints: Vector::default(),
            conntrack: Vector::new_with_constructor(sync_buckets),
            conntrack_deleted: Vector::default(),
            conntrack_failures: Counter::default(),
            healthz: Vector::default(),
            livez: Vector::default(),
            ops: Vector::default(),
            requests: Counter::default(),
            dumps: Counter::default(),
            sends: Counter::default(),
            rejected: Vector::default(),
            services: Gauge::default(),
            slices: Gauge::default(),
            frontends: Gauge::default(),
            backends: Gauge::default(),
            conflicts: Gauge::default(),
            draining: Gauge::default(),
            divergent: Vector::default(),
            repaired: Counter::default(),
            failing: Gauge::default(),
            table_entries: Vector::default(),
            table_capacity: Vector::default(),
            table_growths: Vector::default(),
            node_eligible: Gauge::default(),
            source: SourceCollector::default(),
            traffic: Traffic::new(limits(config)),
            features: FeaturesCollector::default(),
        };
        metrics.node_eligible.set(1);
        for result in ["applied", "failed"] {
            // Present at 0 from the start, so that a rate over the first failure is right.
            let _ = metrics.ops.get_or_create(&ResultLabel { result });
        }
        for family in families {
            let _ = metrics.conntrack.get_or_create(&label(*family));
            let _ = metrics.conntrack_deleted.get_or_create(&label(*family));
        }
        let mut registry = Registry::default();
        metrics.register_kube_proxy(registry.sub_registry_with_prefix("kubeproxy"));
        let own = registry.sub_registry_with_prefix("node_dataplane");
        register_info(own, families, config);
        metrics.register_own(own);
        registry.register_collector(Box::new(ProcessCollector));
        Self { registry, ..metrics }
    }

    /// The encoder appends `_total` to the names of counters.
    fn register_kube_proxy(&self, registry: &mut Registry) {
        let r = registry;
        r.register(
            "sync_proxy_rules_duration_seconds",
            "Duration of one round of programming, full or partial",
            self.sync.clone(),
        );
        r.register(
            "sync_full_proxy_rules_duration_seconds",
            "Duration of one round that compared everything with the kernel",
            self.sync_full.clone(),
        );
        r.register(
            "sync_partial_proxy_rules_duration_seconds",
            "Duration of one round that programmed only what changed",
            self.sync_partial.clone(),
        );
        r.register(
            "network_programming_duration_seconds",
            "From the change of an endpoint, as its EndpointSlice notes it, until it was programmed",
            self.programming.clone(),
        );
        r.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When a round last ended without a failure",
            self.last_sync.clone(),
        );
        r.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "When a change last arrived to be programmed",
            self.last_queued.clone(),
        );
        r.register(
            "sync_proxy_rules_endpoint_changes",
            "EndpointSlice changes seen",
            self.endpoint_changes.clone(),
        );
        r.register(
            "sync_proxy_rules_endpoint_changes_pending",
            "EndpointSlice changes not yet programmed",
            self.endpoint_changes_pending.clone(),
        );
        r.register(
            "sync_proxy_rules_service_changes",
            "Service changes seen",
            self.service_changes.clone(),
        );
        r.register(
            "sync_proxy_rules_service_changes_pending",
            "Service changes not yet programmed",
            self.service_changes_pending.clone(),
        );
        r.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with a Local traffic policy and no endpoint on this node",
            self.no_local_endpoints.clone(),
        );
        r.register(
            "conntrack_reconciler_sync_duration_seconds",
            "Duration of one look for conntrack entries of removed endpoints",
            self.conntrack.clone(),
        );
        r.register(
            "conntrack_reconciler_deleted_entries",
            "Conntrack entries deleted so that their flows find a live endpoint",
            self.conntrack_deleted.clone(),
        );
        r.register("proxy_healthz", "Answers of /healthz by status code", self.healthz.clone());
        r.register("proxy_livez", "Answers of /livez by status code", self.livez.clone());
    }

    fn register_own(&self, registry: &mut Registry) {
        let r = registry;
        r.register("ops", "Changes of kernel objects by result", self.ops.clone());
        r.register("netlink_requests", "Netlink requests sent", self.requests.clone());
        r.register("netlink_dumps", "Netlink dumps asked for", self.dumps.clone());
        r.register(
            "netlink_sends",
            "System calls that sent netlink requests, many requests in each",
            self.sends.clone(),
        );
        r.register(
            "conntrack_failures",
            "Times that conntrack entries of removed endpoints could not be deleted",
            self.conntrack_failures.clone(),
        );
        r.register(
            "rejected_objects",
            "Objects that could not be used, each refused alone",
            self.rejected.clone(),
        );
        r.register("services", "Services known", self.services.clone());
        r.register("endpoint_slices", "EndpointSlices known", self.slices.clone());
        r.register("frontends", "Frontends programmed", self.frontends.clone());
        r.register("backends", "Backends programmed", self.backends.clone());
        r.register(
            "frontend_conflicts",
            "Frontends that a younger Service claims in vain",
            self.conflicts.clone(),
        );
        r.register(
            "draining_backends",
            "Removed backends that wait for their last connection",
            self.draining.clone(),
        );
        r.register(
            "divergent_objects",
            "Kernel objects that differed from what Services want at the last comparison and \
             could not be repaired: missing ones, and unwanted ones",
            self.divergent.clone(),
        );
        r.register(
            "repaired_objects",
            "Kernel objects that comparisons found to differ from what Services want",
            self.repaired.clone(),
        );
        r.register("failing_objects", "Kernel objects that keep failing", self.failing.clone());
        r.register(
            "table_entries",
            "Entries in use of the eBPF maps that can be full",
            self.table_entries.clone(),
        );
        r.register(
            "table_capacity",
            "Entries that these have room for",
            self.table_capacity.clone(),
        );
        r.register(
            "table_growths",
            "How often one of these was replaced by a larger one",
            self.table_growths.clone(),
        );
        r.register(
            "node_eligible",
            "1 while load balancers may send to this node",
            self.node_eligible.clone(),
        );
        r.register_collector(Box::new(self.source.clone()));
        r.register_collector(Box::new(self.traffic.clone()));
        r.register_collector(Box::new(self.features.clone()));
    }

    #[must_use]
    pub const fn registry(&self) -> &Registry {
        &self.registry
    }

    pub fn queued(&self, at: SystemTime, service_changes: usize, slice_changes: usize) {
        self.service_changes.inc_by(count(service_changes));
        self.endpoint_changes.inc_by(count(slice_changes));
        self.service_changes_pending.inc_by(level(service_changes));
        self.endpoint_changes_pending.inc_by(level(slice_changes));
        for family in &self.families {
            self.last_queued.get_or_create(&label(*family)).set(epoch_seconds(at));
        }
    }

    pub fn synced(&self, report: &SyncReport, now: SystemTime) {
        let duration = report.duration.as_secs_f64();
        let by_kind = match report.kind {
            SyncKind::Full => &self.sync_full,
            SyncKind::Partial => &self.sync_partial,
        };
        for family in &self.families {
            let label = label(*family);
            self.sync.get_or_create(&label).observe(duration);
            by_kind.get_or_create(&label).observe(duration);
            if report.ops_failed == 0 {
                self.last_sync.get_or_create(&label).set(epoch_seconds(now));
            }
        }
        self.pending_after(report);
        self.programmed(&report.triggers, now);
        self.work_of(report);
        self.totals_of(report);
    }

    fn pending_after(&self, report: &SyncReport) {
        if report.pending == 0 {
            self.service_changes_pending.set(0);
            self.endpoint_changes_pending.set(0);
        } else {
            self.service_changes_pending.dec_by(level(report.service_changes));
            self.endpoint_changes_pending.dec_by(level(report.slice_changes));
        }
    }

    /// One slice, one observation.
    fn programmed(&self, triggers: &[Trigger], now: SystemTime) {
        for family in &self.families {
            let histogram = self.programming.get_or_create_owned(&label(*family));
            let of_family = triggers.iter().filter(|(of, at)| of == family && *at >= self.started);
            for (_, at) in of_family {
                let took = now.duration_since(*at).unwrap_or_default();
                histogram.observe(took.as_secs_f64());
            }
        }
    }

    fn work_of(&self, report: &SyncReport) {
        let result = |result| self.ops.get_or_create_owned(&ResultLabel { result });
        result("applied").inc_by(count(report.ops_applied));
        result("failed").inc_by(count(report.ops_failed));
        self.requests.inc_by(report.work.requests);
        self.dumps.inc_by(report.work.dumps);
        self.sends.inc_by(report.work.sends);
        for release in &report.releases {
            let label = label(release.family);
            self.conntrack.get_or_create(&label).observe(release.duration.as_secs_f64());
            match release.released {
                Some(released) => {
                    self.conntrack_deleted.get_or_create(&label).inc_by(count(released));
                }
                None => {
                    self.conntrack_failures.inc();
                }
            }
        }
    }

    fn totals_of(&self, report: &SyncReport) {
        let totals = &report.totals;
        for (gauge, value) in [
            (&self.services, totals.services),
            (&self.slices, totals.slices),
            (&self.frontends, totals.frontends),
            (&self.backends, totals.backends),
            (&self.conflicts, totals.conflicts),
            (&self.draining, totals.draining),
            (&self.failing, report.failing_total),
        ] {
            gauge.set(level(value));
        }
        for Fill { table, used, capacity, growths } in &report.fills {
            let label = TableLabel { table };
            self.table_entries.get_or_create(&label).set(i64::from(*used));
            self.table_capacity.get_or_create(&label).set(i64::from(*capacity));
            let counter = self.table_growths.get_or_create(&label);
            counter.inc_by(growths.saturating_sub(counter.get()));
        }
        for (state, value) in [("missing", totals.missing), ("unwanted", totals.unwanted)] {
            self.divergent.get_or_create(&StateLabel { state }).set(level(value));
        }
        self.repaired.inc_by(totals.repaired.saturating_sub(self.repaired.get()));
        for family in &self.families {
            let ip_family = label(*family).ip_family;
            let NoLocal { internal, external } = totals.no_local;
            for (traffic_policy, counts) in [("internal", internal), ("external", external)] {
                let value = counts.of(*family);
                let labels = PolicyLabels { ip_family, traffic_policy };
                self.no_local_endpoints.get_or_create(&labels).set(level(value));
            }
        }
    }

    pub fn rejected(&self, object: &Rejected) {
        self.rejected.get_or_create(&KindLabel { kind: object.kind }).inc();
    }

    pub fn node(&self, eligible: bool) {
        self.node_eligible.set(i64::from(eligible));
    }

    /// The counters of the source of objects, read at each scrape from now on.
    pub fn watch_source(&self, stats: Arc<SourceStats>) {
        self.source.set(stats);
    }

    /// The kernel's counters, read at each scrape from now on.
    pub fn watch_traffic(&self, source: Box<dyn TrafficSource>) {
        self.traffic.read_from(source);
    }

    pub(super) fn chose(&self, features: Vec<(&'static str, String)>) {
        self.features.set(features);
    }

    pub(super) const fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    pub(super) fn healthz(&self, code: u16) {
        self.healthz.get_or_create(&CodeLabel { code }).inc();
    }

    pub(super) fn livez(&self, code: u16) {
        self.livez.get_or_create(&CodeLabel { code }).inc();
    }
}

/// Without a server nobody asks.
fn limits(config: &Config) -> Limits {
    match config.serving.metrics {
        Some(_) => Limits {
            service_ports: config.series.service_ports,
            endpoints: if config.series.endpoints { config.series.endpoint_limit } else { 0 },
        },
        None => Limits { service_ports: 0, endpoints: 0 },
    }
}

fn register_info(registry: &mut Registry, families: &[Family], config: &Config) {
    let build = BuildLabels {
        version: env!("CARGO_PKG_VERSION"),
        kubernetes: KUBERNETES,
        arch: std::env::consts::ARCH,
        mode: config.proxy_mode.to_string(),
    };
    registry.register("build", "What runs", Info::new(build));
    let runtime = RuntimeLabels::new(families, config);
    registry.register("runtime", "What was chosen, and the kernel's release", Info::new(runtime));
}

fn count(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

fn level(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn epoch_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
