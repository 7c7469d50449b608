//! What the daemon shows of itself: health, metrics, configuration, and the health-check
//! node ports of Services.
//!
//! [`Status`] is the meeting point: the engine's thread writes through a
//! [`StatusObserver`], HTTP handlers read. Locks are held for the length of a field
//! access, so neither waits for the other's work.

mod checks;
#[cfg(test)]
mod deploy_tests;
mod exposition;
mod features;
pub mod health;
mod http;
mod metrics;
mod observer;
mod process;
mod source;
#[cfg(test)]
mod tests;
mod traffic;
mod zpages;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::config::{Config, NodePortAddresses, ProxyMode, Serving};
use crate::dataplane::traffic::TrafficSource;
use crate::model::{Family, NodeName};
use crate::watch::SourceStats;
use crate::watch::announce::{Announcement, Announcer};
use checks::Checks;
use health::{Health, Now};

pub use metrics::Metrics;
pub use observer::StatusObserver;

/// kube-proxy tries again this often too.
const BIND_RETRY: Duration = Duration::from_secs(5);

/// A start that takes no longer needs no explanation.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is still waited for is said this often, at most.
const REMINDER: Duration = Duration::from_secs(300);

/// How often it is looked whether the engine comes round.
pub const WATCH: Duration = Duration::from_secs(10);
/// False when how much is logged is decided elsewhere.
type SetVerbosity = Box<dyn Fn(u32) -> bool + Send + Sync>;

type Clock = Box<dyn Fn() -> Now + Send + Sync>;

/// Shared by the engine's observer and the HTTP servers.
pub struct Status {
    mode: ProxyMode,
    node: NodeName,
    configz: serde_json::Value,
    started: SystemTime,
    /// By name.
    flags: BTreeMap<String, String>,
    profiling: bool,
    slis: zpages::Slis,
    verbosity: OnceLock<SetVerbosity>,
    health: Mutex<Health>,
    metrics: Metrics,
    checks: Checks,
    announcer: OnceLock<Announcer>,
    clock: Clock,
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Status").field("health", &self.health).finish_non_exhaustive()
    }
}

impl Status {
    /// `families` are those the node has, as `ip_family` labels and health entries.
    #[must_use]
    pub fn new(config: &Config, families: &[Family]) -> Arc<Self> {
        Self::with_clock(config, families, Box::new(Now::read))
    }

    fn with_clock(config: &Config, families: &[Family], clock: Clock) -> Arc<Self> {
        let started = clock().wall;
        Arc::new(Self {
            mode: config.proxy_mode,
            node: config.node_name.clone(),
            configz: crate::config::document(config),
            started,
            flags: config.flags.iter().cloned().collect(),
            profiling: config.serving.profiling,
            slis: zpages::Slis::default(),
            verbosity: OnceLock::new(),
            health: Mutex::new(Health::new(families, config.health_timeout())),
            metrics: Metrics::new(families, config, started),
            checks: Checks::new(config.node_port_addresses == NodePortAddresses::All),
            announcer: OnceLock::new(),
            clock,
        })
    }

    /// For the engine.
    #[must_use]
    pub fn observer(self: &Arc<Self>) -> StatusObserver {
        StatusObserver(Arc::clone(self))
    }

    #[must_use]
    pub const fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The source's counters become part of the metrics.
    pub fn watch_source(&self, stats: Arc<SourceStats>) {
        self.metrics.watch_source(stats);
    }

    /// The kernel's counters become part of the metrics.
    pub fn watch_traffic(&self, source: Box<dyn TrafficSource>) {
        self.metrics.watch_traffic(source);
    }

    /// What was chosen of what the kernel can do, as labels.
    pub fn chose(&self, features: Vec<(&'static str, String)>) {
        self.metrics.chose(features);
    }

    /// Troubles of a Service are announced beside it from now on.
    pub fn announce_through(&self, announcer: Announcer) {
        let _ = self.announcer.set(announcer);
    }

    /// Whether the engine does not come back from its work.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.health().stuck(self.now()).is_some()
    }

    /// How much is logged can be changed over HTTP from now on, where that is served.
    pub fn log_through(&self, set: impl Fn(u32) -> bool + Send + Sync + 'static) {
        let _ = self.verbosity.set(Box::new(set));
    }

    fn set_verbosity(&self, verbosity: u32) -> bool {
        self.verbosity.get().is_some_and(|set| set(verbosity))
    }

    fn announce(&self, announcement: Announcement) {
        if let Some(announcer) = self.announcer.get() {
            announcer.announce(announcement);
        }
    }

    fn now(&self) -> Now {
        (self.clock)()
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        // Every update leaves `Health` whole at each step, so a panic elsewhere in the
        // process does not make it unusable.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says what the start waits for, as long as it does.
async fn remind(status: &Status, first: Duration) {
    let mut pause = first;
    loop {
        tokio::time::sleep(pause).await;
        let Some(awaited) = status.health().awaits() else { return };
        warn!(awaited, "not in service yet: /healthz says 503");
        pause = (pause * 2).min(REMINDER);
    }
}

/// Ends, with the reason, when the engine does not come back from its work: only a new process
/// helps then. No probe can tell without ending daemons that are well, since another process may
/// answer it while kube-proxy still has the port, and since `/livez` is about objects as well.
pub async fn stuck(status: Arc<Status>, every: Duration) -> String {
    loop {
        tokio::time::sleep(every).await;
        let busy = status.health().stuck(status.now());
        if let Some(busy) = busy {
            return format!(
                "the engine has been at one piece of work for {} s: ending, to be started again; \
                 what is programmed stays",
                busy.as_secs()
            );
        }
    }
}

/// A server that `--bind-address-hard-fail` makes fatal.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(
        "{flag}={address} cannot be bound: {source}. Another process may hold the port \
         (ss -ltnp shows which); --bind-address-hard-fail=false makes the daemon go on and \
         try again"
    )]
    Bind { flag: &'static str, address: SocketAddr, source: std::io::Error },
    #[error("server of {flag}={address} ended: {source}")]
    Ended { flag: &'static str, address: SocketAddr, source: std::io::Error },
}

/// Serves until dropped, or until a bind fails that must not.
///
/// # Errors
/// [`ServeError`]; without `--bind-address-hard-fail` only when a listening socket breaks.
pub async fn run(status: Arc<Status>, serving: Serving) -> Result<(), ServeError> {
    let health = server(
        "--healthz-bind-address",
        serving.healthz,
        serving.hard_fail,
        http::health_router(Arc::clone(&status)),
    );
    let metrics = server(
        "--metrics-bind-address",
        serving.metrics,
        serving.hard_fail,
        http::metrics_router(Arc::clone(&status)),
    );
    let reminder = async {
        remind(&status, PATIENCE).await;
        Ok(())
    };
    tokio::try_join!(health, metrics, checks::run(Arc::clone(&status)), reminder)?;
    Ok(())
}

async fn server(
    flag: &'static str,
    address: Option<SocketAddr>,
    hard_fail: bool,
    router: axum::Router,
) -> Result<(), ServeError> {
    let Some(address) = address else {
        return Ok(());
    };
    let listener = bind(flag, address, hard_fail, BIND_RETRY).await?;
    // Of port 0 the kernel has made another.
    let address = listener.local_addr().unwrap_or(address);
    info!(%address, "serving what {flag} asks for");
    axum::serve(listener, router).await.map_err(|source| ServeError::Ended {
        flag,
        address,
        source,
    })
}

async fn bind(
    flag: &'static str,
    address: SocketAddr,
    hard_fail: bool,
    retry: Duration,
) -> Result<TcpListener, ServeError> {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(source) if hard_fail => return Err(ServeError::Bind { flag, address, source }),
            Err(error) => {
                warn!(%address, %error, retry_in = ?retry, "{flag} cannot be bound");
                tokio::time::sleep(retry).await;
            }
        }
    }
}
