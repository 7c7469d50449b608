//! The two that are compared: each programs Services, then changes one of them.

use std::fs;
use std::io::{Seek as _, Write as _};
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use proxy_tests::apiserver::generate::{endpoint_address, service_name};
use proxy_tests::apiserver::{ApiServer, Options};
use proxy_tests::daemon::Daemon;
use serde_json::{Value, json};

use crate::iptables::{self, ServicePort};
use crate::network::{Bed, CLUSTER_CIDR, SERVER_PORT};
use crate::record::{Mode, Sent};

/// Nothing may take longer: a peer that hangs shall end the run.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// The Service that changes, and whose rule comes last in a list of rules.
pub const LAST: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(10, 111, 255, 250), 80);
/// The Service whose rule has 62 of 100 others before it.
pub const MIDDLE: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(10, 111, 255, 251), 80);

/// One of the two.
pub trait Peer {
    /// Makes `endpoint` the only endpoint of the Service [`LAST`], or takes away the one it
    /// has. Returns when the clock starts, without waiting for an effect.
    ///
    /// # Errors
    /// When the change cannot be handed in.
    fn change(&mut self, endpoint: Option<SocketAddrV4>) -> Result<Instant>;

    /// Waits until the work for the change is over; its CPU time, user and system.
    ///
    /// # Errors
    /// When the work failed.
    fn settle(&mut self) -> Result<Duration>;
}

/// kube-proxy's iptables mode, without kube-proxy: the input it would write is restored.
#[derive(Debug)]
pub struct Iptables<'a> {
    bed: &'a Bed,
    services: Vec<ServicePort>,
    running: Option<(Child, Duration)>,
}

/// `--noflush --counters` and the lock's timeout are kube-proxy's arguments
/// (`pkg/util/iptables/iptables.go`).
const RESTORE: &str = "iptables-legacy-restore";
const RESTORE_ARGUMENTS: [&str; 4] = ["-w", "5", "--noflush", "--counters"];

impl<'a> Iptables<'a> {
    /// Loads as many Services as generated plus the two probed ones; the time and CPU it
    /// took are of the restore alone.
    ///
    /// # Errors
    /// When the rules are refused.
    pub fn load(
        bed: &'a Bed,
        (count, endpoints): (usize, usize),
        middle: SocketAddrV4,
    ) -> Result<(Self, Duration, Duration)> {
        let mut services: Vec<ServicePort> =
            (0..count).map(|nth| generated(nth, endpoints)).collect();
        services.insert(count * 62 / 100, probed("middle", MIDDLE, Some(middle)));
        services.push(probed("last", LAST, None));
        let mut peer = Self { bed, services, running: None };
        peer.restore(iptables::BASE.to_owned())?;
        peer.settle()?;
        let input = iptables::sync(&peer.services, CLUSTER_CIDR, |_| true);
        let start = peer.restore(input)?;
        let cpu = peer.settle()?;
        Ok((peer, start.elapsed(), cpu))
    }

    fn restore(&mut self, input: String) -> Result<Instant> {
        let before = children()?;
        let (start, child) = self.bed.node.run(move || {
            let mut file = tempfile::tempfile()?;
            file.write_all(input.as_bytes())?;
            file.rewind()?;
            let start = Instant::now();
            let child = Command::new(RESTORE).args(RESTORE_ARGUMENTS).stdin(file).spawn();
            anyhow::Ok((start, child.with_context(|| format!("{RESTORE} (package iptables)"))?))
        })??;
        self.running = Some((child, before));
        Ok(start)
    }
}

impl Peer for Iptables<'_> {
    fn change(&mut self, endpoint: Option<SocketAddrV4>) -> Result<Instant> {
        self.services.pop();
        let changed = probed("last", LAST, endpoint);
        let name = changed.name.clone();
        self.services.push(changed);
        let input = iptables::sync(&self.services, CLUSTER_CIDR, |service| service.name == name);
        self.restore(input)
    }

    fn settle(&mut self) -> Result<Duration> {
        let (mut child, before) = self.running.take().context("no restore was started")?;
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > end {
                child.kill()?;
                bail!("{RESTORE} did not end within {PATIENCE:?}");
            }
            thread::sleep(Duration::from_micros(500));
        };
        if !status.success() {
            bail!("{RESTORE}: {status}");
        }
        Ok(children()?.saturating_sub(before))
    }
}

/// CPU time of all children that have ended. Nothing else may end meanwhile.
fn children() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let time = |value: nix::sys::time::TimeVal| {
        let micros = value.tv_sec() * 1_000_000 + value.tv_usec();
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    };
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

/// As the API server generates it, but for the ClusterIP, which only has to be its own.
fn generated(nth: usize, endpoints: usize) -> ServicePort {
    let first = u32::from_be_bytes([10, 96, 0, 2]);
    ServicePort {
        name: format!("scale/{}:http", service_name(nth)),
        cluster_ip: (first + u32::try_from(nth).unwrap_or(0)).into(),
        port: 80,
        endpoints: (nth * endpoints..(nth + 1) * endpoints)
            .map(|number| SocketAddrV4::new(endpoint_address(number), SERVER_PORT))
            .collect(),
    }
}

fn probed(name: &str, at: SocketAddrV4, endpoint: Option<SocketAddrV4>) -> ServicePort {
    ServicePort {
        name: format!("probe/{name}:http"),
        cluster_ip: *at.ip(),
        port: at.port(),
        endpoints: endpoint.into_iter().collect(),
    }
}

/// This daemon, told by an API server in this process.
#[derive(Debug)]
pub struct Ours {
    api: ApiServer,
    daemon: Arc<Daemon>,
    before: Duration,
}

/// The daemon's own idea of when it is done is not asked for: it gets this long after the
/// effect for whatever it still does, and that counts.
const SETTLED: Duration = Duration::from_millis(500);

impl Ours {
    /// Starts the API server with the Services in it, then the daemon; the time is from the
    /// daemon's start until it says that every Service is programmed, the CPU is its own.
    ///
    /// # Errors
    /// When the daemon does not get there.
    pub fn load(
        bed: &Bed,
        (program, mode): (&Path, Mode),
        (count, endpoints): (usize, usize),
        middle: SocketAddrV4,
    ) -> Result<(Self, Duration, Duration)> {
        let program: PathBuf = program.to_owned();
        let cgroup = bed.cgroup().to_owned();
        bed.node.run(move || {
            let api = ApiServer::start(Options {
                tls: false,
                managed_fields: false,
                kubernetes_endpoint: None,
                ..Options::default()
            })?;
            let objects = [
                json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node-a"},
                    "status": {"addresses": [{"type": "InternalIP", "address": "10.99.0.2"}]}}),
                service("middle", MIDDLE),
                slice("middle", Some(middle)),
                service("last", LAST),
                slice("last", None),
            ];
            for object in objects {
                apply(&api, object)?;
            }
            api.store().load_generated(count, endpoints);
            let directory = tempfile::tempdir()?.keep();
            let kubeconfig = directory.join("kubeconfig");
            api.write_kubeconfig(&kubeconfig, None)?;
            let mut arguments = vec![
                "--hostname-override=node-a".to_owned(),
                format!("--cluster-cidr={CLUSTER_CIDR}"),
                format!("--kubeconfig={}", kubeconfig.display()),
            ];
            if mode == Mode::Ebpf {
                let bpf = directory.join("bpf");
                fs::create_dir(&bpf)?;
                arguments.push(format!("--bpf-root={}", bpf.display()));
                arguments.push(format!("--cgroup-root={}", cgroup.display()));
            }
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let start = Instant::now();
            let daemon = Daemon::start_in(mode.name(), &program, &directory, &arguments)?;
            let wanted = u32::try_from(count + 1)?.into();
            daemon.wait_for("node_dataplane_frontends", PATIENCE, |n| n >= wanted)?;
            let took = start.elapsed();
            thread::sleep(SETTLED);
            let cpu = cpu_of(&daemon)?;
            Ok((Self { api, daemon: Arc::new(daemon), before: cpu }, took, cpu))
        })?
    }

    /// What the daemon wrote to its log.
    #[must_use]
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// What the daemon has asked of the kernel since it started. To ask costs it CPU time.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn sent(&self, bed: &Bed) -> Result<Sent> {
        let daemon = Arc::clone(&self.daemon);
        bed.node.run(move || {
            let read = |name| anyhow::Ok(daemon.metric(name)?.unwrap_or_default());
            Ok(Sent {
                requests: read("node_dataplane_netlink_requests_total")?,
                dumps: read("node_dataplane_netlink_dumps_total")?,
            })
        })?
    }
}

impl Peer for Ours {
    fn change(&mut self, endpoint: Option<SocketAddrV4>) -> Result<Instant> {
        self.before = cpu_of(&self.daemon)?;
        apply(&self.api, slice("last", endpoint))?;
        Ok(Instant::now())
    }

    fn settle(&mut self) -> Result<Duration> {
        thread::sleep(SETTLED);
        Ok(cpu_of(&self.daemon)?.saturating_sub(self.before))
    }
}

/// CPU time of the process, all threads, in nanoseconds (`clock_getcpuclockid(3)`; the
/// ticks of /proc are of 10 ms).
fn cpu_of(daemon: &Daemon) -> Result<Duration> {
    let pid = Pid::from_raw(i32::try_from(daemon.id())?);
    let time = clock_gettime(clock_getcpuclockid(pid).context("the daemon ended")?)?;
    Ok(time.into())
}

fn apply(api: &ApiServer, object: Value) -> Result<()> {
    let kind = object["kind"].to_string();
    match api.store().apply(object) {
        Ok(_) => Ok(()),
        Err(status) => bail!("the test API server refused a {kind}: {status:?}"),
    }
}

fn service(name: &str, at: SocketAddrV4) -> Value {
    json!({"kind": "Service", "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "probe"},
        "spec": {"clusterIP": at.ip(), "ports":
            [{"name": "http", "port": at.port(), "targetPort": SERVER_PORT}]}})
}

fn slice(name: &str, endpoint: Option<SocketAddrV4>) -> Value {
    let endpoints: Vec<Value> = endpoint
        .iter()
        .map(|at| json!({"addresses": [at.ip()], "conditions": {"ready": true}}))
        .collect();
    json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": format!("{name}-1"), "namespace": "probe",
            "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": SERVER_PORT, "protocol": "TCP"}],
        "endpoints": endpoints})
}

/// Loads what both need: modules cannot always load themselves, and loading one would
/// count as work of whoever comes first.
///
/// # Errors
/// When a module cannot be loaded, or there is no `modprobe`.
pub fn modules() -> Result<()> {
    let modules = [
        "veth",
        "dummy",
        "ip_vs",
        "ip_vs_rr",
        "nf_tables",
        "nf_conntrack",
        "nf_nat",
        "iptable_filter",
        "iptable_nat",
        "ipt_REJECT",
        "xt_comment",
        "xt_conntrack",
        "xt_addrtype",
        "xt_mark",
        "xt_MASQUERADE",
        "xt_nat",
        "xt_statistic",
        "xt_tcpudp",
    ];
    for module in modules {
        let status = Command::new("modprobe").arg(module).stdin(Stdio::null()).status();
        if !status.context("modprobe")?.success() {
            bail!("modprobe {module} failed: this wants a guest kernel (cargo xtask bench)");
        }
    }
    Ok(())
}

/// `uname -r`.
///
/// # Errors
/// Without /proc.
pub fn kernel() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

/// The version of the restore program.
///
/// # Errors
/// When it is not installed.
pub fn iptables_version() -> Result<String> {
    let output = Command::new(RESTORE).arg("--version").output();
    let output = output.with_context(|| format!("{RESTORE} (package iptables)"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
