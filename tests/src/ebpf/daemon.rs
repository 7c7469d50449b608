//! The daemon in ebpf mode, from manifests: what it programs, and what lives on when it
//! dies, comes back, and takes everything down.

#![allow(clippy::needless_range_loop, reason = "a family indexes the names of all sides")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::net::if_::if_nametoindex;

use super::wire::{CLIENT, Namespaces, POD, REMOTE};
use super::{Cgroup, has_tcx, in_netns, run, succeeds};
use crate::binary::binary;
use crate::daemon::{Daemon, Page};
use crate::mounts::hide_mounts;

pub(super) const EXTERNAL: [&str; 2] = ["198.51.100.1", "2001:db8:51::1"];
pub(super) const CLUSTER: [&str; 2] = ["10.96.0.10", "fd00:96::a"];
const NODE_PORT: u16 = 30080;
const PATIENCE: Duration = Duration::from_secs(90);

pub(super) struct Bed {
    pub(super) net: Namespaces,
    directory: tempfile::TempDir,
    pub(super) cgroup: Cgroup,
    /// The backends' end of the last connection.
    accepted: Accepted,
}

type Accepted = Arc<Mutex<Option<TcpStream>>>;

impl Bed {
    pub(super) fn new(net: Namespaces) -> Result<Self> {
        hide_mounts()?;
        let directory = tempfile::tempdir()?;
        fs::create_dir(directory.path().join("manifests"))?;
        let accepted = Accepted::default();
        let bed = Self { net, directory, cgroup: Cgroup::new("daemon")?, accepted };
        bed.write("service.yaml", SERVICE)?;
        for family in 0..2 {
            for (name, namespace, side) in
                [("remote", &bed.net.remote, &REMOTE), ("pod", &bed.net.pod, &POD)]
            {
                let address: IpAddr = side.other[family].parse()?;
                let listener = bed.net.at(namespace, || Ok(TcpListener::bind((address, 8080))?))?;
                serve(listener, name, Arc::clone(&bed.accepted));
            }
        }
        Ok(bed)
    }

    pub(super) fn write(&self, name: &str, text: &str) -> Result<()> {
        // Whole or not at all: the daemon reads whatever is there.
        let part = self.directory.path().join(name);
        fs::write(&part, text)?;
        Ok(fs::rename(part, self.directory.path().join("manifests").join(name))?)
    }

    /// Endpoints of both families at these sides.
    pub(super) fn endpoints(&self, sides: &[(&str, &str)]) -> Result<()> {
        let mut text = String::new();
        for (family, kind) in ["IPv4", "IPv6"].into_iter().enumerate() {
            text += &format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  \
                 name: web-{}\n  namespace: default\n  labels: {{kubernetes.io/service-name: web}}\n\
                 addressType: {kind}\nports: [{{name: http, port: 8080, protocol: TCP}}]\nendpoints:\n",
                kind.to_lowercase()
            );
            for (side, node) in sides {
                let side = if *side == "pod" { &POD } else { &REMOTE };
                text += &format!(
                    "- {{addresses: [\"{}\"], conditions: {{ready: true}}, nodeName: {node}}}\n",
                    side.other[family]
                );
            }
        }
        self.write("slices.yaml", &text)
    }

    fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.directory.path().join(name).display().to_string();
        vec![
            format!("--bpf-root={}", path("bpf")),
            format!("--cgroup-root={}", self.cgroup.0.display()),
            format!("--manifests={}", path("manifests")),
            "--hostname-override=node-a".into(),
            "--cluster-cidr=10.244.0.0/16,fd00:244::/56".into(),
            "--healthz-bind-address=127.0.0.1:10256".into(),
            "-v=4".into(),
        ]
    }

    fn start(&self) -> Result<Daemon> {
        self.start_with(&[])
    }

    pub(super) fn start_with(&self, more: &[&str]) -> Result<Daemon> {
        let arguments = self.arguments();
        let flag = |argument: &str| argument.split('=').next().map(str::to_owned);
        let is_other = |argument: &&str| more.iter().all(|more| flag(more) != flag(argument));
        let mut arguments: Vec<&str> =
            arguments.iter().map(String::as_str).filter(is_other).collect();
        arguments.extend(more);
        Daemon::start_in("ebpf", &binary("proxy-daemon"), self.directory.path(), &arguments)
    }

    /// Who answers a connection from outside.
    pub(super) fn ask(&self, address: &str, port: u16) -> Result<String> {
        let (mut stream, name) = self.open(address, port)?;
        exchange(&mut stream)?;
        Ok(name)
    }

    fn open(&self, address: &str, port: u16) -> Result<(TcpStream, String)> {
        let to = SocketAddr::new(address.parse()?, port);
        let timeout = Duration::from_secs(2);
        let mut stream =
            self.net.at(&self.net.client, || Ok(TcpStream::connect_timeout(&to, timeout)?))?;
        stream.set_read_timeout(Some(timeout))?;
        let mut name = [0; 6];
        stream.read_exact(&mut name)?;
        Ok((stream, String::from_utf8_lossy(&name).trim().to_owned()))
    }

    /// Waits until connections from outside end where they should, and nowhere else.
    pub(super) fn settles(&self, daemon: &Daemon, expected: &[&str]) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let answers: Vec<String> = (0..12)
                .map(|_| self.ask(EXTERNAL[0], 80).unwrap_or_else(|error| error.to_string()))
                .collect();
            let all = answers.iter().all(|answer| expected.contains(&&**answer));
            if all && expected.iter().all(|name| answers.iter().any(|answer| answer == name)) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("answers {answers:?}, expected {expected:?}\n{}", daemon.log());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Where the daemon has pinned its maps.
    pub(super) fn maps(&self) -> Result<PathBuf> {
        let path = self.directory.path().join("bpf/proxy-daemon");
        let version = fs::read_dir(path)?.next().context("no layout is pinned")??;
        Ok(version.path().join("maps"))
    }

    fn pins(&self, what: &str) -> usize {
        let path = self.directory.path().join("bpf/proxy-daemon");
        fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|version| fs::read_dir(version.path().join(what)).ok())
            .map(Iterator::count)
            .sum()
    }
}

/// Says who it is, then echoes.
fn serve(listener: TcpListener, name: &'static str, accepted: Accepted) {
    // Ends with the test process: a thread that waits in accept cannot be told to.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            *accepted.lock().unwrap_or_else(PoisonError::into_inner) = stream.try_clone().ok();
            thread::spawn(move || {
                let mut stream = stream;
                let _ = write!(stream, "{name:6}");
                let mut buffer = [0; 64];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    let mut buffer = [0; 5];
    stream.write_all(b"hello")?;
    stream.read_exact(&mut buffer)?;
    ensure!(&buffer == b"hello", "{buffer:?}");
    Ok(())
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default, uid: web}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00:96::a']
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  externalIPs: [198.51.100.1, '2001:db8:51::1']
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080, protocol: TCP}]
---
apiVersion: v1
kind: Node
metadata: {name: node-a}
status:
  addresses:
  - {type: InternalIP, address: 203.0.113.1}
  - {type: InternalIP, address: '2001:db8:7::1'}
";

/// # Errors
/// What differed.
pub fn daemon() -> Result<()> {
    in_netns(|| {
        let bed = Bed::new(Namespaces::new()?)?;
        let tracks = Path::new(ESTABLISHED).exists();
        let daemon = bed.start()?;
        from_start_to_end(&bed, daemon)?;
        if tracks {
            let seconds = fs::read_to_string(ESTABLISHED)?;
            ensure!(seconds.trim() == "86400", "{ESTABLISHED}: {seconds}");
        }
        Ok(())
    })
}

/// Five days unless somebody sets it; `--conntrack-tcp-timeout-established` says one.
const ESTABLISHED: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";

/// The same where clients come by a tunnel and the other node is behind another one: devices
/// whose packets have no link header. The maps are too small at first, so that the programs are
/// exchanged while they are in use.
///
/// # Errors
/// What differed.
pub fn bare_daemon() -> Result<()> {
    in_netns(|| {
        let bed = Bed::new(Namespaces::with_tunnels(&[CLIENT.link, REMOTE.link])?)?;
        // Once: each growth has the kernel verify five programs, which takes an emulated one 20 s.
        let daemon = bed.start_with(&["--ebpf-map-sizes=frontends=8"])?;
        bed.endpoints(&[("pod", "node-a")])?;
        bed.settles(&daemon, &["pod"])?;
        // What found room is served before that.
        let end = Instant::now() + PATIENCE;
        while !daemon.log().contains("grown") {
            ensure!(Instant::now() < end, "nothing grew\n{}", daemon.log());
            thread::sleep(Duration::from_millis(100));
        }
        let log = daemon.log();
        ensure!(log.contains(r#"frames="Bare" port=false replaced=true"#), "{log}");
        from_start_to_end(&bed, daemon)
    })
}

/// A node goes from ebpf mode to ipvs mode, on a kernel with IPVS: the programs go once IPVS stands in
/// their place, and not under a daemon that lives.
///
/// # Errors
/// What differed.
pub fn ipvs_after_ebpf() -> Result<()> {
    in_netns(|| {
        let bed = Bed::new(Namespaces::new()?)?;
        let mut ebpf = bed.start()?;
        bed.endpoints(&[("remote", "node-b")])?;
        bed.settles(&ebpf, &["remote"])?;
        let arguments = bed.arguments();
        let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        arguments.push("--ipvs-sync-period=2s");
        let program = binary("proxy-daemon");
        let ipvs = Daemon::start_in("ipvs", &program, bed.directory.path(), &arguments)?;
        let alive = format!("another daemon in ebpf mode runs here: process {}, `", ebpf.id());
        let end = Instant::now() + PATIENCE;
        while !ipvs.log().contains(&alive) {
            ensure!(Instant::now() < end, "the daemon that lives is not named\n{}", ipvs.log());
            bed.ask(EXTERNAL[0], 80).context("while both run")?;
            thread::sleep(Duration::from_millis(100));
        }
        ensure!(bed.pins("links") > 0, "links are gone under a daemon that lives");
        ebpf.kill()?;
        // Its tables still say the other one.
        bed.endpoints(&[("pod", "node-a")])?;
        let end = Instant::now() + PATIENCE;
        let mut cut = 0;
        while bed.directory.path().join("bpf/proxy-daemon").exists() {
            ensure!(Instant::now() < end, "pins are left\n{}", ipvs.log());
            // The one connection that the programs translate as they go is cut, and no new one.
            if let Err(error) = bed.ask(EXTERNAL[0], 80) {
                cut += 1;
                ensure!(cut == 1, "{error}, after another one, while the programs go");
            }
            thread::sleep(Duration::from_millis(20));
        }
        bed.settles(&ipvs, &["pod"])?;
        for family in 0..2 {
            let answer = bed.ask(EXTERNAL[family], 80)?;
            ensure!(answer == "pod", "{answer}");
        }
        // Servers of this test hold the namespace, and virtual servers the module, which another
        // test takes out of the kernel.
        drop(ipvs);
        run("ipvsadm", &["-C"])
    })
}

/// Connections that end make room for new ones, and one that is silent is not among them: when it
/// is the server that speaks after thousands of others, the client hears it.
///
/// # Errors
/// What differed.
pub fn many_connections() -> Result<()> {
    const CONNECTIONS: u32 = 1_500;
    in_netns(|| {
        let bed = Bed::new(Namespaces::new()?)?;
        // Room for a fifth of them.
        let daemon = bed.start_with(&["--ebpf-map-sizes=flows=300"])?;
        bed.endpoints(&[("remote", "node-b")])?;
        bed.settles(&daemon, &["remote"])?;
        let room = Page::fetch()?.sum_where("node_dataplane_table_capacity", "FLOWS");
        ensure!(room == Some(600.0), "room for {room:?} entries");
        let node_port = (CLIENT.node[0], NODE_PORT);
        let (mut idle, _) = bed.open(node_port.0, node_port.1)?;
        let server = bed.accepted.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut server = server.context("nobody accepted")?;
        let mut refused = 0;
        for _ in 0..CONNECTIONS {
            // A full table drops the first packet, which comes again after a second.
            let mut tries = 0;
            while let Err(error) = bed.ask(node_port.0, node_port.1) {
                refused += 1;
                tries += 1;
                ensure!(tries < 5, "{error}\n{}", daemon.log());
            }
        }
        println!("{CONNECTIONS} connections, {refused} tried again");
        idle.set_read_timeout(Some(Duration::from_secs(5)))?;
        server.write_all(b"after all")?;
        let mut heard = [0; 9];
        idle.read_exact(&mut heard).with_context(|| format!("cut\n{}", daemon.log()))?;
        ensure!(&heard == b"after all", "{heard:?}");
        exchange(&mut idle)
    })
}

/// Programs that somebody else takes off are attached again by the next look at the kernel.
///
/// # Errors
/// What differed.
pub fn taken_off() -> Result<()> {
    in_netns(|| {
        let bed = Bed::new(Namespaces::new()?)?;
        let daemon = bed.start_with(&["--ipvs-sync-period=1s"])?;
        bed.endpoints(&[("remote", "node-b")])?;
        bed.settles(&daemon, &["remote"])?;
        let links = bed.pins("links");
        let times = |what: &str| daemon.log().matches(what).count();
        if has_tcx()? {
            // A link that nobody holds is taken off.
            let index = if_nametoindex(CLIENT.link)?;
            let directory = bed.maps()?.with_file_name("links");
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                if name.starts_with("tc_") && name.contains(&format!("-{index}-")) {
                    fs::remove_file(&path)?;
                }
            }
        } else {
            run("tc", &["qdisc", "del", "dev", CLIENT.link, "clsact"])?;
        }
        let end = Instant::now() + PATIENCE;
        while times("attached again") == 0 {
            ensure!(Instant::now() < end, "nothing is put back\n{}", daemon.log());
            thread::sleep(Duration::from_millis(100));
        }
        bed.settles(&daemon, &["remote"])?;
        bed.ask(CLIENT.node[0], NODE_PORT)?;
        ensure!(bed.pins("links") == links, "{} links, before {links}", bed.pins("links"));
        // What is there is left alone by the looks that follow.
        thread::sleep(Duration::from_secs(4));
        ensure!(times("attached again") == 1, "again and again\n{}", daemon.log());
        Ok(())
    })
}

/// A client of a ClusterIP is masqueraded when it is outside the cluster, and where nothing tells
/// that of its family it is not, as with kube-proxy.
///
/// # Errors
/// What differed.
pub fn detection() -> Result<()> {
    in_netns(|| {
        let bed = Bed::new(Namespaces::new()?)?;
        bed.endpoints(&[("pod", "node-a")])?;
        let all = "--cluster-cidr=10.244.0.0/16,fd00:244::/56";
        let cases = [
            (all, [true, true]),
            ("--cluster-cidr=10.244.0.0/16", [true, false]),
            ("--cluster-cidr=", [false, false]),
        ];
        for (cidrs, masquerades) in cases {
            let mut daemon = bed.start_with(&[cidrs])?;
            bed.settles(&daemon, &["pod"])?;
            for family in 0..2 {
                let own: IpAddr = CLIENT.other[family].parse()?;
                let end = Instant::now() + PATIENCE;
                // What the daemon before this one has programmed may still be there.
                loop {
                    let (_stream, _) = bed.open(CLUSTER[family], 80)?;
                    let server = bed.accepted.lock().unwrap_or_else(PoisonError::into_inner).take();
                    let seen = server.context("nobody accepted")?.peer_addr()?.ip();
                    if (seen != own) == masquerades[family] {
                        break;
                    }
                    ensure!(
                        Instant::now() < end,
                        "{cidrs} {own}: seen as {seen}\n{}",
                        daemon.log()
                    );
                    thread::sleep(Duration::from_millis(100));
                }
            }
            daemon.kill()?;
        }
        Ok(())
    })
}

fn from_start_to_end(bed: &Bed, mut daemon: Daemon) -> Result<()> {
    bed.endpoints(&[("remote", "node-b"), ("pod", "node-a")])?;
    bed.settles(&daemon, &["remote", "pod"])?;
    for family in 0..2 {
        for (address, port) in [(EXTERNAL[family], 80), (CLIENT.node[family], NODE_PORT)] {
            let answer = bed.ask(address, port);
            answer.with_context(|| format!("{address} {port}\n{}", daemon.log()))?;
        }
        // In the socket, from the node.
        let dial = format!(
            "exec 3<>/dev/tcp/{}/80 && read -t 5 -N 6 name <&3 && [ -n \"$name\" ]",
            CLUSTER[family]
        );
        succeeds(&bed.cgroup.bash(&dial)?).with_context(|| CLUSTER[family].to_owned())?;
    }
    // An unused port of the Service's address is refused.
    let output = bed.cgroup.bash("LC_ALL=C exec 3<>/dev/tcp/10.96.0.10/81")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(error.contains("Connection refused"), "{error}");

    lives_on(bed, &mut daemon)?;
    taken_down(bed, daemon)
}

/// Connections live through death, restart and the removal of their endpoint's fellow.
fn lives_on(bed: &Bed, daemon: &mut Daemon) -> Result<()> {
    let mut open: Vec<(TcpStream, String)> = Vec::new();
    // A hash of ports that the kernel draws decides: once in 256 times all of 8 are the other's.
    while open.len() < 8 || !open.iter().any(|(_, name)| name == "remote") {
        ensure!(open.len() < 64, "none of {} is to the endpoint that will be removed", open.len());
        open.push(bed.open(EXTERNAL[0], 80)?);
    }
    let links = bed.pins("links");
    ensure!(links >= 8, "{links} links are pinned");
    for _ in 0..3 {
        daemon.kill()?;
        for _ in 0..20 {
            bed.ask(EXTERNAL[0], 80).context("while no daemon runs")?;
        }
        *daemon = bed.start()?;
        for _ in 0..50 {
            bed.ask(EXTERNAL[0], 80).context("while a daemon starts")?;
            thread::sleep(Duration::from_millis(10));
        }
        bed.settles(daemon, &["remote", "pod"])?;
    }
    ensure!(bed.pins("links") == links, "{} links, before {links}", bed.pins("links"));
    bed.endpoints(&[("pod", "node-a")])?;
    bed.settles(daemon, &["pod"])?;
    for (stream, name) in &mut open {
        exchange(stream).with_context(|| format!("a connection to {name} was cut"))?;
    }
    // A second daemon does not fight the first.
    let second = Command::new(binary("proxy-daemon"))
        .arg("--proxy-mode=ebpf")
        .args(bed.arguments())
        .output()?;
    let error = String::from_utf8_lossy(&second.stderr);
    let first = format!("another daemon in ebpf mode runs here: process {}, `", daemon.id());
    ensure!(!second.status.success() && error.contains(&first), "{error}");
    Ok(())
}

/// A Service that goes is gone, and `--cleanup` leaves nothing, whichever mode is named with it;
/// but not under a daemon that lives.
fn taken_down(bed: &Bed, mut daemon: Daemon) -> Result<()> {
    bed.endpoints(&[])?;
    let end = Instant::now() + PATIENCE;
    loop {
        let error = bed.ask(EXTERNAL[0], 80).err().map(|error| error.to_string());
        if error.as_deref().is_some_and(|error| error.contains("refused")) {
            break;
        }
        ensure!(Instant::now() < end, "without endpoints: {error:?}\n{}", daemon.log());
        thread::sleep(Duration::from_millis(100));
    }
    let cleanup = || {
        Command::new(binary("proxy-daemon"))
            .args(["--proxy-mode=iptables", "--cleanup"])
            .args(bed.arguments())
            .output()
    };
    let refused = cleanup()?;
    let error = String::from_utf8_lossy(&refused.stderr);
    let alive = format!("another daemon in ebpf mode runs here: process {}, `", daemon.id());
    ensure!(!refused.status.success() && error.contains(&alive), "{error}");
    ensure!(bed.pins("links") > 0, "links are gone under a daemon that lives");
    daemon.kill()?;
    succeeds(&cleanup()?)?;
    // Nothing is left at the devices either (clsact has no pins to tell).
    for link in [CLIENT.link, REMOTE.link, POD.link] {
        for direction in ["ingress", "egress"] {
            let output =
                Command::new("tc").args(["filter", "show", "dev", link, direction]).output()?;
            let filters = String::from_utf8_lossy(&output.stdout);
            ensure!(!filters.contains("tc_"), "left at {link}: {filters}");
        }
    }
    ensure!(bed.pins("links") + bed.pins("maps") == 0, "pins are left");
    ensure!(!Path::new(&bed.directory.path().join("bpf/proxy-daemon")).exists(), "a directory");
    Ok(())
}
