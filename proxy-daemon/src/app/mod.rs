//! Wiring: from flags to running threads, and the order of starting and stopping.

mod addresses;
mod cleanup;
mod conntrack;
mod ebpf;
mod ipvs;
mod klog;
mod kubeproxy;
mod logging;
mod reload;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use tracing::{debug, error, info, warn};

use crate::config::{self, Config, Logging, ProxyMode, Source};
use crate::dataplane::Dataplane;
use crate::dataplane::traffic::TrafficSource;
use crate::kernel::capabilities::check_net_admin;
use crate::kernel::memory;
use crate::model::{Event, Family, NodeName};
use crate::serve::{self, Status};
use crate::sync::{self, Engine, EngineConfig, Input, NodePortAddresses, Observer};
use crate::watch::announce::{Announced, Announcement, Announcer, Regarding};
use crate::watch::kube::Access;
use crate::watch::manifests::Manifests;
use crate::watch::{self, Outlet, SourceStats};
use logging::Verbosity;

/// Events that wait for the engine. Beyond that the source waits: a first list of tens
/// of thousands of objects is one event, so this is deep enough.
const QUEUE: usize = 1024;

/// A sentence for the user; everything that ends a start comes as one.
type Fatal = String;

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    memory::share_pool();
    let hostname = nix::sys::utsname::uname()
        .map(|uname| uname.nodename().to_string_lossy().into_owned())
        .unwrap_or_default();
    let config = match Config::from_args(std::env::args_os(), &hostname) {
        Ok(config) => config,
        Err(usage) => {
            // Nothing is left to do when standard error is closed.
            let _ = usage.print();
            return ExitCode::from(usage.exit_code());
        }
    };
    let verbosity = logging::start(config.logging);
    for note in &config.notes {
        info!("{note}");
    }
    for warning in &config.warnings {
        warn!("{warning}");
    }
    match run(&Start { config: &config, hostname: &hostname, verbosity: &verbosity }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fatal) => {
            error!("{fatal}");
            ExitCode::FAILURE
        }
    }
}

/// What the daemon was started with.
struct Start<'a> {
    config: &'a Config,
    hostname: &'a str,
    verbosity: &'a Verbosity,
}

/// A data plane, ready to be driven.
struct Parts<D> {
    plane: D,
    traffic: Box<dyn TrafficSource>,
    /// What was chosen of what the kernel can do, for the metrics.
    features: Vec<(&'static str, String)>,
}

fn run(start: &Start<'_>) -> Result<(), Fatal> {
    let config = start.config;
    if let Some(path) = &config.write_config_to {
        let text = config::yaml(config)?;
        std::fs::write(path, text)
            .map_err(|error| format!("--write-config-to={}: {error}", path.display()))?;
        info!(file = %path.display(), "wrote the configuration");
        return Ok(());
    }
    check_net_admin().map_err(|error| error.to_string())?;
    if config.cleanup {
        return cleanup::run(config);
    }
    let families = families();
    match config.proxy_mode {
        ProxyMode::Ipvs => {
            let plane = ipvs::plane(config, &families)?;
            let families = plane.families().to_vec();
            conntrack::apply(config);
            let traffic = Box::new(ipvs::traffic()?);
            let parts = Parts { plane, traffic, features: Vec::new() };
            drive(start, || Ok(parts), families)
        }
        ProxyMode::Ebpf => {
            ebpf::check(config)?;
            conntrack::apply(config);
            let of_plane = config.clone();
            drive(start, move || ebpf::plane(&of_plane), families)
        }
    }
}

/// Runs until stopped. `parts` are made while the first lists come in.
fn drive<D>(
    start: &Start<'_>,
    parts: impl FnOnce() -> Result<Parts<D>, Fatal> + Send + 'static,
    families: Vec<Family>,
) -> Result<(), Fatal>
where
    D: Dataplane + 'static,
{
    let config = start.config;
    if config.init_only {
        drop(parts()?);
        info!("the kernel is prepared; ending, as --init-only asks");
        return Ok(());
    }
    adjust_oom_score(config.oom_score_adj);
    let status = Status::new(config, &families);
    let devices = config.proxy_mode == ProxyMode::Ebpf;
    let listed = addresses::Watched { devices, ipv6: families.contains(&Family::V6) };
    let (inputs, engine_inputs) = sync_channel(QUEUE);
    let (mut observer, of_engine) = (status.observer(), engine_config(config, families));
    let (told, watched) = (Arc::clone(&status), Arc::clone(&status));
    let min_interval = config.ipvs.min_sync_period;
    let (refused, mut refusal) = oneshot::channel();
    let engine = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || match prepared(parts, &mut observer) {
            Ok(Parts { plane, traffic, features }) => {
                told.watch_traffic(traffic);
                told.chose(features);
                drop(told);
                let engine = Engine::new(plane, observer, of_engine, Instant::now());
                sync::run(engine, &engine_inputs, min_interval);
            }
            // Nobody listens when the daemon is ending anyway.
            Err(fatal) => drop(refused.send(fatal)),
        })
        .map_err(|error| format!("cannot start the engine's thread: {error}"))?;
    addresses::watch(inputs.clone(), listed)?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let ended = runtime.block_on(async {
        tokio::select! {
            biased;
            Ok(fatal) = &mut refusal => Err(fatal),
            ended = serve_until_stopped(start, status, inputs.clone()) => ended,
        }
    });
    // Others may notice that the engine is gone before its reason is heard.
    let ended = refusal.try_recv().map_or(ended, Err);
    if watched.is_stuck() {
        // Nobody can wait for its thread; it ends with the process.
        runtime.shutdown_background();
        return ended;
    }
    // What was programmed stays; the next start takes it over.
    if inputs.send(Input::Stop).is_ok() && engine.join().is_err() {
        return Err("the engine ended in a panic".to_owned());
    }
    runtime.shutdown_background();
    ended
}

/// The parts, whose making is work that may not come to an end either.
fn prepared<D>(
    parts: impl FnOnce() -> Result<Parts<D>, Fatal>,
    observer: &mut impl Observer,
) -> Result<Parts<D>, Fatal> {
    observer.busy(Some(Instant::now()));
    let parts = parts();
    observer.busy(None);
    parts
}

/// kube-proxy's.
const DEFAULT_OOM_SCORE: i32 = -999;

/// To lower it takes CAP_SYS_RESOURCE, which the DaemonSet does not give: the kubelet sets
/// it low for the Pod's priority class.
fn adjust_oom_score(score: i32) {
    match std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        Ok(()) => debug!(score, "oom_score_adj set"),
        Err(error) if score == DEFAULT_OOM_SCORE => {
            debug!(score, %error, "oom_score_adj stays as it is");
        }
        Err(error) => warn!(score, %error, "--oom-score-adj: stays as it is"),
    }
}

fn engine_config(config: &Config, families: Vec<Family>) -> EngineConfig {
    EngineConfig {
        node_name: config.node_name.clone(),
        families,
        node_port_addresses: match &config.node_port_addresses {
            config::NodePortAddresses::All => NodePortAddresses::All,
            config::NodePortAddresses::Primary => {
                config.bind_address.map_or(NodePortAddresses::Primary, NodePortAddresses::PrimaryOr)
            }
            config::NodePortAddresses::Cidrs(cidrs) => NodePortAddresses::Cidrs(cidrs.clone()),
        },
        // IPVS cannot send what has a loopback source to another host.
        localhost_node_ports: config.proxy_mode == ProxyMode::Ebpf && config.localhost_node_ports,
        masquerade_all: config.masquerade.all,
        sync_period: config.ipvs.sync_period,
        drain_timeout: config.drain_timeout,
    }
}

/// A kernel without IPv6 has no such file; Services of that family are then left out.
fn families() -> Vec<Family> {
    if std::path::Path::new("/proc/net/if_inet6").exists() {
        Family::ALL.to_vec()
    } else {
        info!("this kernel has no IPv6: only IPv4 Services are programmed");
        vec![Family::V4]
    }
}

async fn serve_until_stopped(
    start: &Start<'_>,
    status: Arc<Status>,
    inputs: SyncSender<Input>,
) -> Result<(), Fatal> {
    let Start { config, hostname, verbosity } = start;
    let (events, received) = mpsc::channel(QUEUE);
    forward(received, inputs)?;
    let stats = Arc::new(SourceStats::default());
    status.watch_source(Arc::clone(&stats));
    let (announcer, announced) = Announcer::new();
    status.announce_through(announcer.clone());
    announcer.announce(starting(&config.node_name));
    let (log, logging) = (Arc::clone(verbosity), config.logging);
    status.log_through(move |verbosity| log(Logging { verbosity, ..logging }));
    let source = source(config, Outlet { events, stats, announcer }, announced);
    let stuck = serve::stuck(Arc::clone(&status), serve::WATCH);
    let servers = serve::run(status, config.serving);
    let read = || Config::from_args(std::env::args_os(), hostname);
    let log = |logging| verbosity(logging);
    tokio::select! {
        ended = source => ended,
        ended = servers => ended.map_err(|error| error.to_string()),
        reason = stuck => Err(reason),
        changed = reload::changed(config, read, log, reload::POLL) => Err(format!(
            "{} changed: ending, to be started again with it; what is programmed stays",
            changed.display()
        )),
        signal = stop_signal() => {
            info!("{signal}: stopping; what is programmed stays");
            Ok(())
        }
    }
}

async fn source(config: &Config, outlet: Outlet, announced: Announced) -> Result<(), Fatal> {
    let node = config.node_name.clone();
    match &config.source {
        Source::Api { kubeconfig, master } => {
            let access = Access::open(kubeconfig.as_deref(), master.as_deref())
                .map_err(|error| error.to_string())?;
            watch::kube::run(access, node, outlet, announced).await;
        }
        Source::Manifests(directory) => {
            let manifests = Manifests::open(directory, node, outlet.stats)
                .map_err(|error| format!("--manifests: {error}"))?;
            manifests.run(outlet.events).await;
        }
    }
    Err("the source of objects ended: the engine is gone".to_owned())
}

/// kube-proxy's Event about its Node.
fn starting(node: &NodeName) -> Announcement {
    Announcement {
        regarding: Regarding::node(node),
        warning: false,
        reason: "Starting",
        action: "StartNodeDataplane",
        note: String::new(),
    }
}

/// From the sources' async world to the engine's thread.
fn forward(mut events: mpsc::Receiver<Event>, inputs: SyncSender<Input>) -> Result<(), Fatal> {
    std::thread::Builder::new()
        .name("events".into())
        .spawn(move || {
            while let Some(event) = events.blocking_recv() {
                if inputs.send(Input::Object(event)).is_err() {
                    return;
                }
            }
        })
        .map(|_| ())
        .map_err(|error| format!("cannot start the event thread: {error}"))
}

async fn stop_signal() -> &'static str {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        warn!("signals cannot be handled: SIGTERM ends the process at once, which is safe too");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
