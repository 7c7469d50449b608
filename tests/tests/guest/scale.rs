//! What a cold start, a change, a resync and rest cost, at any number of Services.

use std::time::{Duration, Instant};

use proxy_tests::daemon::{Daemon, Page};
use proxy_tests::traffic::Held;

use crate::in_namespace;
use crate::node::{
    Bed, FULL_ROUNDS, LONG, PATIENCE, from_environment, plain, scale, serve, until, web,
    web_address,
};

const COLD: Duration = Duration::from_secs(1_500);
const REQUESTS: &str = "node_dataplane_netlink_requests_total";
const DUMPS: &str = "node_dataplane_netlink_dumps_total";
const DRAINING: &str = "node_dataplane_draining_backends";

/// Counters of the daemon at one moment.
#[derive(Debug, Clone, Copy, Default)]
struct Moment {
    requests: f64,
    dumps: f64,
    resyncs: f64,
    draining: f64,
}

impl Moment {
    fn now() -> Self {
        // A scrape in the middle of a cold start may come too early for the first.
        let Ok(page) = Page::fetch() else { return Self::default() };
        let read = |name| page.sum(name).unwrap_or(0.0);
        Self {
            requests: read(REQUESTS),
            dumps: read(DUMPS),
            // Counted for each of two families.
            resyncs: read(FULL_ROUNDS) / 2.0,
            draining: read(DRAINING),
        }
    }

    /// Looks seldom: a scrape costs the daemon, too.
    fn when(what: &str, holds: impl Fn(Self) -> bool) -> Self {
        let end = Instant::now() + COLD;
        loop {
            let now = Self::now();
            if holds(now) {
                return now;
            }
            assert!(Instant::now() < end, "not within {COLD:?}: {what}");
            std::thread::sleep(Duration::from_millis(500));
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
        let before = Moment::now();
        let (start, cpu) = (Instant::now(), daemon.cpu().expect("cpu"));
        bed.apply(web(&[to]));
        until("the change", LONG, || {
            Held::open(web_address(), PATIENCE).is_ok_and(|held| held.server() == to)
        });
        let took = start.elapsed();
        // What the daemon does afterwards belongs to the change as well.
        std::thread::sleep(Duration::from_millis(200));
        let cpu = daemon.cpu().expect("cpu").saturating_sub(cpu);
        let after = Moment::now();
        // The first switch may be none.
        if number > 0 {
            let alone = after.resyncs == before.resyncs && after.dumps == before.dumps;
            let cost = (cpu, after.requests - before.requests);
            changes.push(Change { took, cost: alone.then_some(cost) });
        }
    }
    changes
}

/// A resync in which nothing had changed: its dumps, and CPU time beyond that of rest.
fn resync(daemon: &Daemon, period: Duration) -> (f64, Duration) {
    let quiet = Moment::when("drained", |moment| moment.draining == 0.0);
    let before = Moment::when("a resync", |moment| moment.resyncs > quiet.resyncs);
    let cpu = daemon.cpu().expect("cpu");
    std::thread::sleep(period.mul_f32(0.9));
    let at_rest = daemon.cpu().expect("cpu").saturating_sub(cpu);
    let after = Moment::when("a resync", |moment| moment.resyncs > before.resyncs);
    let cpu = daemon.cpu().expect("cpu").saturating_sub(cpu);
    (after.dumps - before.dumps, cpu.saturating_sub(at_rest.mul_f32(1.0 / 0.9)))
}

/// Prints a row of Markdown; the guest is emulated, so only counts and ratios between sizes
/// mean anything elsewhere.
///
/// `PROXY_SCALE=44000 PROXY_ENDPOINTS=6 PROXY_UPDATES=20 PROXY_RESYNC_SECONDS=60` chooses
/// another size, and a period in which no resync falls into a change.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn an_endpoint_update_is_a_handful_of_requests_however_many_services_there_are() {
    in_namespace(|| {
        let (services, endpoints) = (scale(1_000), from_environment("PROXY_ENDPOINTS", 10));
        let bed = Bed::new(plain());
        bed.api.store().load_generated(services, endpoints);
        bed.apply(web(&["10.99.0.11"]));
        let begun = Instant::now();
        // From the end of one resync to the start of the next.
        let period = Duration::from_secs(from_environment("PROXY_RESYNC_SECONDS", 10) as u64);
        let daemon = bed.daemon_with(&[&format!("--ipvs-sync-period={}s", period.as_secs())]);
        // default/kubernetes, the generated ones, and ours.
        let all = services as f64 + 2.0;
        daemon.wait_for("node_dataplane_frontends", COLD, |n| n >= all).expect("all Services");
        let cold = Moment::when("the first comparison", |moment| moment.resyncs >= 1.0);
        let (cold_time, cold_cpu) = (begun.elapsed(), daemon.cpu().expect("cpu"));
        let changes = changes(&bed, &daemon, from_environment("PROXY_UPDATES", 6));
        let (dumps, resync_cpu) = resync(&daemon, period);
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
            cold_time.as_secs_f64(),
            cold_cpu.as_secs_f64(),
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
