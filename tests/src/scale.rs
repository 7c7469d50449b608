//! What a cold start, a change, a resync and rest cost, at any number of Services.

#![allow(clippy::expect_used, clippy::panic, reason = "what fails shall end the test")]

use std::fmt;
use std::time::{Duration, Instant};

use crate::daemon::{Daemon, Page};
use crate::node::{
    Bed, FULL_ROUNDS, LONG, PATIENCE, from_environment, plain, scale, serve, web, web_address,
};
use crate::traffic::Held;

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
        Self::soon(what, Duration::from_millis(500), holds)
    }

    fn soon(what: &str, pause: Duration, holds: impl Fn(Self) -> bool) -> Self {
        let end = Instant::now() + COLD;
        loop {
            let now = Self::now();
            if holds(now) {
                return now;
            }
            assert!(Instant::now() < end, "not within {COLD:?}: {what}");
            std::thread::sleep(pause);
        }
    }
}

#[derive(Debug)]
struct Change {
    took: Duration,
    /// CPU time and requests, unless a resync came in between, which has its own.
    cost: Option<(Duration, f64)>,
}

/// Of the Service that changes.
const ENDPOINTS: [&str; 2] = ["10.99.0.11", "10.99.0.12"];

/// Switches the Service from one endpoint to the other and back: the time until a connection
/// is answered by the new one.
fn changes(bed: &Bed, daemon: &Daemon, count: usize) -> Vec<Change> {
    let mut changes = Vec::new();
    for number in 0..count + 1 {
        let to = ENDPOINTS[number % 2];
        let before = Moment::now();
        let (start, cpu) = (Instant::now(), daemon.cpu().expect("cpu"));
        bed.apply(web(&[to]));
        while !is_answered_by(to) {
            assert!(start.elapsed() < LONG, "the change has no effect");
            std::thread::sleep(Duration::from_millis(1));
        }
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

fn is_answered_by(server: &str) -> bool {
    let Ok(held) = Held::open(web_address(), PATIENCE) else { return false };
    let is = held.server() == server;
    // Draining ends with the connections, and what is measured next waits for that.
    held.reset().expect("a reset");
    is
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

/// What was measured, as a row of Markdown.
#[derive(Debug)]
pub struct Row {
    services: usize,
    endpoints: usize,
    cold: (Duration, Duration, f64),
    changes: Vec<Change>,
    resync: (f64, Duration),
    resident: u64,
}

/// In the calling thread's network namespace, with the daemon in the mode that `arguments` say.
///
/// `PROXY_SCALE=44000 PROXY_ENDPOINTS=6 PROXY_UPDATES=20 PROXY_RESYNC_SECONDS=60` chooses
/// another size, and a period in which no resync falls into a change.
pub fn measure(arguments: &[&str]) -> Row {
    let (services, endpoints) = (scale(1_000), from_environment("PROXY_ENDPOINTS", 10));
    let bed = Bed::new(plain());
    bed.api.store().load_generated(services, endpoints);
    // A new address of the node later on would have every Service compared.
    let _servers = ENDPOINTS.map(serve);
    bed.apply(web(&[ENDPOINTS[0]]));
    let begun = Instant::now();
    // From the end of one resync to the start of the next.
    let period = Duration::from_secs(from_environment("PROXY_RESYNC_SECONDS", 10) as u64);
    let sync_period = format!("--ipvs-sync-period={}s", period.as_secs());
    let mut arguments = arguments.to_vec();
    arguments.push(&sync_period);
    let daemon = bed.daemon_with(&arguments);
    // default/kubernetes, the generated ones, and ours.
    let all = services as f64 + 2.0;
    daemon.wait_for("node_dataplane_frontends", COLD, |n| n >= all).expect("all Services");
    let pause = Duration::from_millis(50);
    let cold = Moment::soon("the first comparison", pause, |moment| moment.resyncs >= 1.0);
    let cold = (begun.elapsed(), daemon.cpu().expect("cpu"), cold.requests);
    // A cold start may take longer than the period: then a resync is due, and the changes shall
    // begin when it has ended.
    let before = Moment::now();
    Moment::when("a resync", |moment| moment.resyncs > before.resyncs);
    let changes = changes(&bed, &daemon, from_environment("PROXY_UPDATES", 6));
    let resync = resync(&daemon, period);
    let resident = daemon.resident().expect("memory");
    Row { services, endpoints, cold, changes, resync, resident }
}

/// What scrapes cost and show.
#[derive(Debug)]
pub struct Scrapes {
    services: usize,
    endpoints: usize,
    /// With traffic metrics of their own.
    pub service_lines: usize,
    pub endpoint_lines: usize,
    bytes: usize,
    cpu: Duration,
    reading: Duration,
    resident: u64,
}

/// Of a daemon that programs so many Services, as [`measure`] says.
pub fn scrapes(arguments: &[&str]) -> Scrapes {
    const COUNT: u32 = 5;
    let (services, endpoints) = (scale(300), from_environment("PROXY_ENDPOINTS", 10));
    let bed = Bed::new(plain());
    bed.api.store().load_generated(services, endpoints);
    let mut arguments = arguments.to_vec();
    // No resync is to come in between.
    arguments.push("--ipvs-sync-period=600s");
    let daemon = bed.daemon_with(&arguments);
    let all = services as f64 + 1.0;
    daemon.wait_for("node_dataplane_frontends", COLD, |n| n >= all).expect("all Services");
    Moment::when("the first comparison", |moment| moment.resyncs >= 1.0);
    std::thread::sleep(Duration::from_secs(3));
    Page::fetch().expect("a page");
    let mut cpu = Duration::ZERO;
    let mut page = None;
    for _ in 0..COUNT {
        std::thread::sleep(Duration::from_millis(1200));
        let before = daemon.cpu().expect("cpu");
        page = Some(Page::fetch().expect("a page"));
        cpu += daemon.cpu().expect("cpu").saturating_sub(before);
    }
    let page = page.expect("COUNT is more than 0");
    let lines = |name: &str| page.lines(name).count();
    Scrapes {
        services,
        endpoints,
        service_lines: lines("node_dataplane_service_connections_total"),
        endpoint_lines: lines("node_dataplane_endpoint_connections_total"),
        bytes: page.len(),
        cpu: cpu / COUNT,
        reading: Duration::from_secs_f64(
            page.sum("node_dataplane_traffic_reading_seconds").unwrap_or(0.0),
        ),
        resident: daemon.resident().expect("memory"),
    }
}

impl fmt::Display for Scrapes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        write!(
            f,
            "{} x {}: {} Service ports and {} endpoints with series: {} KiB, CPU {:.1} ms, of which \
             the kernel's counters take {:.1} ms; resident {:.0} MiB",
            self.services,
            self.endpoints,
            self.service_lines.saturating_sub(1),
            self.endpoint_lines.saturating_sub(1),
            self.bytes / 1024,
            ms(self.cpu),
            ms(self.reading),
            self.resident as f64 / f64::from(1 << 20),
        )
    }
}

impl Row {
    /// The most that one change of endpoints took.
    pub fn requests_of_a_change(&self) -> f64 {
        let costs: Vec<_> = self.changes.iter().filter_map(|change| change.cost).collect();
        assert!(!costs.is_empty(), "a resync came with every change");
        costs.iter().map(|(_, requests)| *requests).fold(0.0, f64::max)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut took: Vec<Duration> = self.changes.iter().map(|change| change.took).collect();
        took.sort_unstable();
        let costs: Vec<_> = self.changes.iter().filter_map(|change| change.cost).collect();
        let count = u32::try_from(costs.len()).unwrap_or(1).max(1);
        let mean = costs.iter().map(|(cpu, _)| *cpu).sum::<Duration>() / count;
        let mut cpu: Vec<Duration> = costs.iter().map(|(cpu, _)| *cpu).collect();
        cpu.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let (dumps, resync_cpu) = self.resync;
        writeln!(
            f,
            "| Services x endpoints | cold start s | its CPU s | its requests | change ms: median \
             | worst of {} | its CPU ms: median | mean | its requests, most | idle resync: dumps | its CPU ms | \
             resident MiB |",
            took.len()
        )?;
        write!(
            f,
            "| {} x {} | {:.1} | {:.1} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {} | {dumps} | {:.0} | {:.0} |",
            self.services,
            self.endpoints,
            self.cold.0.as_secs_f64(),
            self.cold.1.as_secs_f64(),
            self.cold.2,
            ms(took[took.len() / 2]),
            ms(took[took.len() - 1]),
            ms(cpu[cpu.len() / 2]),
            ms(mean),
            self.requests_of_a_change(),
            ms(resync_cpu),
            self.resident as f64 / f64::from(1 << 20),
        )
    }
}
