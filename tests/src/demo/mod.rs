//! The demonstration: a cluster, the daemon on its nodes, Services, traffic, and a table.
//!
//! Runs as root on a kernel with IPVS; `cargo xtask demo` brings one.

mod objects;
mod table;

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::apiserver::{ApiServer, Options};
use crate::cluster::{API_SERVER_V4, Cluster, Host, Spawned};
use crate::traffic::{ConnectSpec, Listen, Protocol, Server, StreamChecker, StreamSpec, connect};

use objects::{DemoService, Port, services};
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

/// Everything that runs; dropped in this order.
struct Stage {
    daemons: Vec<Spawned>,
    /// Held for their lives.
    _servers: Vec<Server>,
    api: ApiServer,
    cluster: Cluster,
}

/// Runs the demonstration; says whether everything went well.
pub fn run(settings: &Settings) -> Result<bool> {
    let begun = Instant::now();
    let step = |text: &str| println!("[{:5.1} s] {text}", begun.elapsed().as_secs_f64());
    load_modules();
    fs::create_dir_all(&settings.logs)?;
    step("building a cluster: 2 nodes, 4 pods on each, a client outside; IPv4 and IPv6");
    let mut stage = Stage::build(settings)?;
    step("starting proxy-daemon --proxy-mode=ipvs on node-a and node-b");
    let started = Instant::now();
    stage.start_daemons(settings)?;
    let services = services(&stage.cluster);
    let outcome = demonstrate(&mut stage, &services, settings, started, &step);
    let stopped = stage.daemons.iter_mut().any(|daemon| {
        let ended = daemon.child().try_wait();
        !matches!(ended, Ok(None))
    });
    let good = matches!(outcome, Ok(true)) && !stopped;
    if !good {
        print_logs(&settings.logs);
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
        let cluster = Cluster::builder().nodes(2).pods_per_node(4).outside_client().build()?;
        let listen = SocketAddr::from((API_SERVER_V4, 6443));
        let options = Options { listen, kubernetes_endpoint: Some(listen), ..Options::default() };
        let api = cluster.fabric().in_netns(|| ApiServer::start(options))??;
        api.write_kubeconfig(&settings.logs.join("kubeconfig"), None)?;
        for node in cluster.nodes() {
            apply(&api, objects::node(node, cluster.families()))?;
        }
        let services = services(&cluster);
        let mut servers = Vec::new();
        for pod in cluster.pods() {
            servers.push(serve(pod, &services)?);
        }
        for service in &services {
            for object in service.objects() {
                apply(&api, object)?;
            }
        }
        Ok(Self { daemons: Vec::new(), _servers: servers, api, cluster })
    }

    fn start_daemons(&mut self, settings: &Settings) -> Result<()> {
        for node in self.cluster.nodes() {
            let log = File::create(settings.logs.join(format!("{}.log", node.name())))?;
            let daemon = node
                .command(&settings.daemon)
                .arg("--proxy-mode=ipvs")
                .arg(format!("--hostname-override={}", node.name()))
                .arg(format!("--cluster-cidr={}", self.cluster.families().cluster_cidr()))
                .arg("--kubeconfig")
                .arg(settings.logs.join("kubeconfig"))
                .arg("-v=2")
                .stdout(log.try_clone()?)
                .stderr(log);
            self.daemons.push(daemon.spawn()?);
        }
        Ok(())
    }

    /// A pod that serves nothing at first.
    fn client_pod(&self) -> &Host {
        self.cluster.pod(0, objects::SPARE)
    }

    fn clients(&self) -> Result<Vec<Client<'_>>> {
        Ok(vec![
            Client { kind: "pod", host: self.client_pod() },
            Client { kind: "host", host: self.cluster.node(0) },
            Client { kind: "outside", host: self.cluster.outside()? },
        ])
    }
}

fn apply(api: &ApiServer, object: serde_json::Value) -> Result<()> {
    let what = format!("{} {}", object["kind"], object["metadata"]["name"]);
    match api.store().apply(object) {
        Ok(_) => Ok(()),
        Err(status) => bail!("the API server refuses {what}: {status}"),
    }
}

/// Every pod listens on every port, so that an endpoint can be moved to any of them.
fn serve(pod: &Host, services: &[DemoService]) -> Result<Server> {
    let mut listen = Vec::new();
    for Port { protocol, target, .. } in services.iter().flat_map(|service| &service.ports) {
        for ip in pod.addresses() {
            let address = SocketAddr::new(ip, *target);
            listen.push(Listen { protocol: *protocol, address });
        }
    }
    pod.in_netns(|| Server::start(pod.name(), &listen))?
}

/// Modules that the kernel does not load by itself inside a namespace. What is built in, or
/// truly missing, is for the daemon to judge.
fn load_modules() {
    let modules = ["ip_vs", "ip_vs_rr", "dummy", "nf_tables", "nf_conntrack", "br_netfilter"];
    let _ = Command::new("modprobe").arg("-qa").args(modules).status();
}

/// Asks each frontend until it answers: the daemon is ready when its clients say so.
fn wait_until_served(stage: &mut Stage, services: &[DemoService]) -> Result<()> {
    let deadline = Instant::now() + READY_TIMEOUT;
    for service in services {
        for (target, protocol, kinds) in service.frontends(&stage.cluster) {
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
    for (target, protocol, kinds) in service.frontends(&stage.cluster) {
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
    let new = stage.cluster.pod(1, objects::SPARE);
    let spec = ConnectSpec::new(Protocol::Tcp, web.cluster_ip_v4(0), 1);
    step(&format!("replacing all endpoints of shop/web by {}", new.name()));
    let changed = Instant::now();
    for object in web.moved_to(new).objects().into_iter().filter(|o| o["kind"] == "EndpointSlice") {
        apply(&stage.api, object)?;
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

fn print_logs(directory: &Path) {
    for node in ["node-a", "node-b"] {
        let log = fs::read_to_string(directory.join(format!("{node}.log"))).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        println!("--- the last of {node}'s log");
        for line in &lines[lines.len().saturating_sub(40)..] {
            println!("{line}");
        }
    }
}
