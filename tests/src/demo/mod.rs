//! The demonstration: a cluster, the daemon on its nodes, Services, traffic, and a table.
//!
//! Runs as root: in ebpf mode on any kernel, in ipvs mode on one with IPVS, which
//! `cargo xtask demo` brings.

mod objects;
mod table;

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::bed::{self, Bed};
use crate::cluster::{Families, Host, Sockets};
use crate::traffic::{ConnectSpec, Protocol, StreamChecker, StreamSpec, connect};

use objects::{DemoService, services};
use table::{Row, print_table};

/// How long every frontend may take to answer after the daemons have started.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a changed endpoint may take to get all the traffic.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(15);
/// Connections in a row, all to the new endpoint, that show the change is complete.
const SETTLED: u32 = 20;
const CONCURRENCY: usize = 8;

/// What to demonstrate with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The daemon's program.
    pub daemon: PathBuf,
    /// `--proxy-mode`.
    pub mode: &'static str,
    /// Connections to each frontend from each kind of client.
    pub connections: usize,
    /// Where the daemons' logs go.
    pub logs: PathBuf,
}

/// Who connects.
struct Client<'a> {
    kind: &'static str,
    host: &'a Host,
}

/// The Services are served by every pod.
struct Stage {
    bed: Bed,
}

/// Runs the demonstration; says whether everything went well.
pub fn run(settings: &Settings) -> Result<bool> {
    let begun = Instant::now();
    let step = |text: &str| println!("[{:5.1} s] {text}", begun.elapsed().as_secs_f64());
    step("building a cluster: 2 nodes, 4 pods on each, a client outside; IPv4 and IPv6");
    let mut stage = Stage::build(settings)?;
    step(&format!("starting proxy-daemon --proxy-mode={} on node-a and node-b", settings.mode));
    let started = Instant::now();
    stage.bed.start_daemons()?;
    let services = services(stage.bed.cluster());
    let outcome = demonstrate(&mut stage, &services, settings, started, &step);
    let stopped = stage.bed.a_daemon_ended();
    let good = matches!(outcome, Ok(true)) && !stopped;
    if !good {
        print!("{}", stage.bed.log_tails(40));
    }
    ensure!(!stopped, "a daemon ended by itself; its log is above");
    step(if good { "done: no failures" } else { "FAILED" });
    outcome
}

fn demonstrate(
    stage: &mut Stage,
    services: &[DemoService],
    settings: &Settings,
    started: Instant,
    step: &dyn Fn(&str),
) -> Result<bool> {
    wait_until_served(stage, services)?;
    let ready = started.elapsed().as_secs_f64();
    step(&format!(
        "every frontend answers, {ready:.1} s after the daemons' start; sending traffic"
    ));
    let web = services.iter().find(|service| service.name == "web").context("no Service web")?;
    let held = {
        let spec = StreamSpec::new(web.cluster_ip_v4(0));
        stage.client_pod().in_netns(|| StreamChecker::start(spec))??
    };
    let sending = Instant::now();
    let mut rows = Vec::new();
    for service in services {
        rows.extend(send_to(stage, service, settings.connections)?);
    }
    let total: u64 = rows.iter().map(|row| row.report.attempted).sum();
    let failed: u64 = rows.iter().map(|row| row.report.failed()).sum();
    let took = sending.elapsed().as_secs_f64();
    println!();
    let table_good = print_table(&rows);
    println!();
    step(&format!("{total} connections in {took:.1} s, {failed} failures"));
    let changed = change_an_endpoint(stage, web, step)?;
    let report = held.stop()?;
    let survived = report.failure.is_none() && report.echoed > 0;
    step(&match &report.failure {
        None => format!(
            "one connection to shop/web, opened before all this, lived through it: {} echoes from {}",
            report.echoed, report.server
        ),
        Some(failure) => format!("the long connection was lost: {}", failure.detail),
    });
    Ok(table_good && changed && survived)
}

impl Stage {
    fn build(settings: &Settings) -> Result<Self> {
        let mut bed = Bed::build(bed::Settings {
            daemon: settings.daemon.clone(),
            confined: None,
            mode: settings.mode,
            sockets: Sockets::Everybodys,
            families: Families::Dual,
            nodes: 2,
            pods_per_node: 4,
            directory: settings.logs.clone(),
            arguments: vec!["-v=2".to_owned()],
        })?;
        let services = services(bed.cluster());
        // Every pod listens on every port, so that an endpoint can be moved to any of them.
        let ports: Vec<_> = services
            .iter()
            .flat_map(|service| &service.ports)
            .map(|port| (port.protocol, port.target))
            .collect();
        for node in 0..2 {
            for pod in 0..4 {
                let name = bed.cluster().pod(node, pod).name().to_owned();
                bed.serve((node, pod), &name, &ports)?;
            }
        }
        for object in services.iter().flat_map(DemoService::objects) {
            bed.apply(object)?;
        }
        Ok(Self { bed })
    }

    /// A pod that serves nothing at first.
    fn client_pod(&self) -> &Host {
        self.bed.cluster().pod(0, objects::SPARE)
    }

    fn clients(&self) -> Result<Vec<Client<'_>>> {
        Ok(vec![
            Client { kind: "pod", host: self.client_pod() },
            Client { kind: "host", host: self.bed.cluster().node(0) },
            Client { kind: "outside", host: self.bed.cluster().outside()? },
        ])
    }
}

/// Asks each frontend until it answers: the daemon is ready when its clients say so.
fn wait_until_served(stage: &mut Stage, services: &[DemoService]) -> Result<()> {
    let deadline = Instant::now() + READY_TIMEOUT;
    for service in services {
        for (target, protocol, kinds) in service.frontends(stage.bed.cluster()) {
            for client in stage.clients()?.iter().filter(|client| kinds.contains(&client.kind)) {
                let spec = ConnectSpec::new(protocol, target, 1).timeout(Duration::from_secs(1));
                loop {
                    let report = client.host.in_netns(|| connect(&spec))??;
                    if report.failed() == 0 {
                        break;
                    }
                    if Instant::now() > deadline {
                        let cause = report.examples.first().map_or("", String::as_str);
                        bail!("{} from {}: {cause}", service.name, client.kind);
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }
    Ok(())
}

fn send_to(stage: &Stage, service: &DemoService, connections: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (target, protocol, kinds) in service.frontends(stage.bed.cluster()) {
        for client in stage.clients()?.iter().filter(|client| kinds.contains(&client.kind)) {
            let spec = ConnectSpec::new(protocol, target, connections).concurrency(CONCURRENCY);
            // The guest is emulated: its processors may be a second behind.
            let spec = spec.timeout(Duration::from_secs(5));
            let report = client.host.in_netns(|| connect(&spec))??;
            rows.push(Row {
                service: format!("{}/{}", service.namespace, service.name),
                protocol,
                frontend: target,
                from: client.kind,
                client: client.host.address_like(target.ip()).unwrap_or_else(|| target.ip()),
                endpoints: service.endpoint_names(),
                report,
            });
        }
    }
    Ok(rows)
}

/// Moves shop/web to another pod and connects until all traffic has followed.
fn change_an_endpoint(stage: &Stage, web: &DemoService, step: &dyn Fn(&str)) -> Result<bool> {
    let new = stage.bed.cluster().pod(1, objects::SPARE);
    let spec = ConnectSpec::new(Protocol::Tcp, web.cluster_ip_v4(0), 1);
    step(&format!("replacing all endpoints of shop/web by {}", new.name()));
    let changed = Instant::now();
    for object in web.moved_to(new).objects().into_iter().filter(|o| o["kind"] == "EndpointSlice") {
        stage.bed.apply(object)?;
    }
    let (mut first_new, mut last_old) = (None, Duration::ZERO);
    let (mut in_a_row, mut failures) = (0, 0);
    while in_a_row < SETTLED && changed.elapsed() < CHANGE_TIMEOUT {
        let report = stage.client_pod().in_netns(|| connect(&spec))??;
        let now = changed.elapsed();
        failures += report.failed();
        if report.by_server.contains_key(new.name()) {
            first_new.get_or_insert(now);
            in_a_row += 1;
        } else {
            last_old = now;
            in_a_row = 0;
        }
    }
    let Some(first_new) = first_new.filter(|_| in_a_row >= SETTLED) else {
        step("traffic did not follow the change");
        return Ok(false);
    };
    step(&format!(
        "traffic followed: first connection to the new endpoint {} ms after the change, last to an \
         old one {} ms, {failures} failures",
        first_new.as_millis(),
        last_old.as_millis()
    ));
    Ok(failures == 0)
}
