//! What a cold start, a change, a resync and rest cost, at any number of Services.

use std::time::{Duration, Instant};

use proxy_tests::daemon::Daemon;
use proxy_tests::traffic::Held;

use crate::in_namespace;
use crate::node::{
    Bed, FULL_ROUNDS, LONG, PATIENCE, from_environment, plain, scale, serve, until, web,
    web_address,
};

const COLD: Duration = Duration::from_secs(1_500);
/// Long enough that no resync falls into most changes.
const RESYNC: Duration = Duration::from_secs(20);
const REQUESTS: &str = "node_dataplane_netlink_requests_total";
const DUMPS: &str = "node_dataplane_netlink_dumps_total";

/// Counters of the daemon at one moment.
#[derive(Debug, Clone, Copy)]
struct Moment {
    at: Instant,
    cpu: Duration,
    requests: f64,
    dumps: f64,
    resyncs: f64,
}

impl Moment {
    fn of(daemon: &Daemon) -> Self {
        let read = |name| daemon.metric(name).expect("metrics").unwrap_or(0.0);
        Self {
            at: Instant::now(),
            cpu: daemon.cpu().expect("cpu"),
            requests: read(REQUESTS),
            dumps: read(DUMPS),
            // Counted for each of two families.
            resyncs: read(FULL_ROUNDS) / 2.0,
        }
    }
}

#[derive(Debug)]
struct Change {
    took: Duration,
    /// CPU time and requests, unless a resync came in between, which has its own.
    cost: Option<(Duration, f64)>,
}

/// Switches the Service from one endpoint to the other and back: the time until a connection
/// is answered by the new one.
fn changes(bed: &Bed, daemon: &Daemon, count: usize) -> Vec<Change> {
    let endpoints = ["10.99.0.11", "10.99.0.12"];
    let _servers = endpoints.map(serve);
    let mut changes = Vec::new();
    for number in 0..count + 1 {
        let to = endpoints[number % 2];
        let before = Moment::of(daemon);
        let start = Instant::now();
        bed.apply(web(&[to]));
        until("the change", LONG, || {
            Held::open(web_address(), PATIENCE).is_ok_and(|held| held.server() == to)
        });
        let took = start.elapsed();
        // What the daemon does afterwards belongs to the change as well.
        std::thread::sleep(Duration::from_millis(200));
        let after = Moment::of(daemon);
        // The first switch may be none.
        if number > 0 {
            let alone = after.resyncs == before.resyncs && after.dumps == before.dumps;
            let cost = (after.cpu.saturating_sub(before.cpu), after.requests - before.requests);
            changes.push(Change { took, cost: alone.then_some(cost) });
        }
    }
    changes
}

/// A resync in which nothing had changed.
fn resync(daemon: &Daemon) -> (f64, Duration) {
    let wait = |resyncs: f64| {
        until("a resync", COLD, || Moment::of(daemon).resyncs >= resyncs);
        Moment::of(daemon)
    };
    let before = wait(Moment::of(daemon).resyncs + 1.0);
    let after = wait(before.resyncs + 1.0);
    (after.dumps - before.dumps, after.cpu.saturating_sub(before.cpu))
}

/// Prints a row of Markdown; the guest is emulated, so only counts and ratios between sizes
/// mean anything elsewhere.
///
/// `PROXY_SCALE=44000 PROXY_ENDPOINTS=6 PROXY_UPDATES=20` chooses another size.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn an_endpoint_update_is_a_handful_of_requests_however_many_services_there_are() {
    in_namespace(|| {
        let (services, endpoints) = (scale(1_000), from_environment("PROXY_ENDPOINTS", 10));
        let bed = Bed::new(plain());
        bed.api.store().load_generated(services, endpoints);
        bed.apply(web(&["10.99.0.11"]));
        let begun = Instant::now();
        let period = format!("--ipvs-sync-period={}s", RESYNC.as_secs());
        let daemon = bed.daemon_with(&[&period]);
        // default/kubernetes, the generated ones, and ours.
        let all = services as f64 + 2.0;
        daemon.wait_for("node_dataplane_frontends", COLD, |n| n >= all).expect("all Services");
        until("the first comparison", COLD, || Moment::of(&daemon).resyncs >= 1.0);
        let cold = Moment::of(&daemon);
        let changes = changes(&bed, &daemon, from_environment("PROXY_UPDATES", 6));
        let (dumps, resync_cpu) = resync(&daemon);
        let mut took: Vec<Duration> = changes.iter().map(|change| change.took).collect();
        took.sort_unstable();
        let (median, worst) = (took[took.len() / 2], took[took.len() - 1]);
        let costs: Vec<_> = changes.iter().filter_map(|change| change.cost).collect();
        let cpu: Duration = costs.iter().map(|(cpu, _)| cpu).sum();
        let requests = costs.iter().map(|(_, requests)| *requests).fold(0.0, f64::max);
        let mib = daemon.resident().expect("memory") as f64 / f64::from(1 << 20);
        println!(
            "| Services x endpoints | cold start s | its CPU s | its requests | change ms: median \
             | worst of {} | its CPU ms | its requests, most | idle resync: dumps | its CPU ms | \
             resident MiB |",
            changes.len()
        );
        println!(
            "| {services} x {endpoints} | {:.1} | {:.1} | {} | {:.0} | {:.0} | {:.1} | {requests} \
             | {dumps} | {:.0} | {mib:.0} |",
            (cold.at - begun).as_secs_f64(),
            cold.cpu.as_secs_f64(),
            cold.requests,
            median.as_secs_f64() * 1e3,
            worst.as_secs_f64() * 1e3,
            cpu.as_secs_f64() * 1e3 / costs.len() as f64,
            resync_cpu.as_secs_f64() * 1e3,
        );
        assert!(!costs.is_empty(), "a resync came with every change");
        assert!(requests <= 6.0, "{requests} requests for one change of endpoints");
    });
}
