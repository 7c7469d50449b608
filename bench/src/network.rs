//! A node with two pods, in network namespaces that go with this process.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::unistd::Pid;
use proxy_tests::cluster::ClusterCgroup;

/// The pods' range, kube-proxy's `--cluster-cidr`.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16";
/// Where the server listens on each of its addresses.
pub const SERVER_PORT: u16 = 8080;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread that works in it. Mounts of its own as well: what a program
/// that it starts mounts goes with it.
#[derive(Debug)]
pub struct Namespace {
    jobs: Sender<Job>,
    file: File,
}

impl Namespace {
    fn new(name: &str) -> Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let (ready, made) = channel();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let file = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
                .and_then(|()| {
                    let none: Option<&str> = None;
                    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
                })
                .map_err(std::io::Error::from)
                .and_then(|()| File::open("/proc/thread-self/ns/net"));
            // Nobody waits any more only if the process ends.
            let _ = ready.send(file);
            for job in queue {
                job();
            }
        })?;
        let file = made.recv()?.with_context(|| format!("network namespace of {name}"))?;
        Ok(Self { jobs, file })
    }

    /// Starts `work` in the namespace; the result comes through the channel.
    ///
    /// # Errors
    /// When the thread ended, by a panic in earlier work.
    pub fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Receiver<T>> {
        let (sender, receiver) = channel();
        let job = Box::new(move || drop(sender.send(work())));
        self.jobs.send(job).ok().context("the thread of a namespace ended")?;
        Ok(receiver)
    }

    /// Does `work` in the namespace.
    ///
    /// # Errors
    /// As [`Namespace::start`].
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        self.start(work)?.recv().context("work in a namespace panicked")
    }

    /// A name for `ip link ... netns`, valid while this exists.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    fn ip(&self, script: String) -> Result<()> {
        self.run(move || {
            let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
            if let Some(mut stdin) = ip.stdin.take() {
                stdin.write_all(script.as_bytes())?;
            }
            if !ip.wait()?.success() {
                bail!("ip -batch failed on:\n{script}");
            }
            Ok(())
        })?
    }
}

/// A node, a client in one pod and a server in another.
#[derive(Debug)]
pub struct Bed {
    pub node: Namespace,
    pub client: Namespace,
    server: Namespace,
    /// The client's thread is in it. Removed after the threads have left with the process, by
    /// the next bed.
    cgroup: ClusterCgroup,
}

/// The server's pod has as many addresses as rounds can need: an endpoint that is added
/// shall be one that was not there before.
const SERVER_ADDRESSES: u8 = 200;

/// The `nth` address of the server.
///
/// # Errors
/// When it has no such address.
pub fn server(nth: usize) -> Result<SocketAddrV4> {
    let last = u8::try_from(nth).ok().filter(|nth| *nth < SERVER_ADDRESSES);
    let last = last.with_context(|| format!("more than {SERVER_ADDRESSES} rounds"))?;
    Ok(SocketAddrV4::new(Ipv4Addr::new(10, 244, 2, 10 + last), SERVER_PORT))
}

impl Bed {
    /// Makes namespaces, links, routes and the server.
    ///
    /// # Errors
    /// Without root, veth links, or cgroup v2.
    pub fn new() -> Result<Self> {
        let node = Namespace::new("node")?;
        let client = Namespace::new("client")?;
        let server = Namespace::new("server")?;
        // As on a node: an address, and a route for everything. What is not translated
        // fails at once instead of being lost, so that a probe is answered either way.
        node.ip(format!(
            "link set lo up
             link add eth0 type veth peer name far0
             addr add 10.99.0.2/24 dev eth0
             link set eth0 up
             link set far0 up
             route add default dev eth0
             route add unreachable 10.96.0.0/12
             link add client type veth peer name eth0 netns {}
             link add server type veth peer name eth0 netns {}
             addr add 10.244.1.1/24 dev client
             addr add 10.244.2.1/24 dev server
             link set client up
             link set server up\n",
            client.path(),
            server.path(),
        ))?;
        client.ip(pod("10.244.1.1", std::iter::once("10.244.1.2".to_owned())))?;
        let addresses = (0..SERVER_ADDRESSES).map(|nth| format!("10.244.2.{}", 10 + nth));
        server.ip(pod("10.244.2.1", addresses))?;
        node.run(|| {
            // Every probe gets its ICMP error: by default a client gets one a second.
            let settings = [("ip_forward", "1"), ("icmp_ratelimit", "0"), ("icmp_ratemask", "0")];
            settings.iter().try_for_each(|(key, value)| {
                fs::write(format!("/proc/sys/net/ipv4/{key}"), value)
                    .with_context(|| (*key).to_owned())
            })
        })??;
        let cgroup = ClusterCgroup::create(true)?;
        let threads = cgroup.child("client")?.join("cgroup.threads");
        // 0 is the thread that writes.
        client.run(move || fs::write(threads, "0"))?.context("the client's cgroup")?;
        let bed = Self { node, client, server, cgroup };
        bed.serve()?;
        Ok(bed)
    }

    /// The cgroup that the client's sockets are in.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Has the client on the server's processor from now on. Left to themselves the two are now
    /// on one and now on two, as the kernel finds some other idle, and a connect takes half as long
    /// on one: chance would decide what is compared.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pin_client(&self) -> Result<()> {
        self.client.run(pin)?
    }

    /// Accepts, sends a byte and closes, until the process ends.
    fn serve(&self) -> Result<()> {
        self.server.run(|| {
            in_turn()?;
            let listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], SERVER_PORT)))?;
            // A client that wants only to connect may be gone by then.
            let answer = |mut stream: TcpStream| drop(stream.write_all(b"."));
            thread::spawn(move || listener.incoming().flatten().for_each(answer));
            anyhow::Ok(())
        })?
    }
}

/// What the calling thread does, and what it starts from now on, has one processor, on which none
/// of it interrupts another.
///
/// # Errors
/// When the kernel refuses.
pub fn in_turn() -> Result<()> {
    pin()?;
    give_way()
}

/// The calling thread to the first processor that this process may use, and what it starts too.
fn pin() -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = nix::sched::sched_getaffinity(this)?;
    let mut first = CpuSet::new();
    let usable = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    first.set(usable.context("no processor to run on")?)?;
    sched_setaffinity(this, &first).context("pinning a thread to a processor")
}

/// The calling thread does not interrupt another when it is woken (`SCHED_BATCH`, sched(7)): else
/// a connect lasts, or does not last, until the server has accepted it and answered.
fn give_way() -> Result<()> {
    let thread = nix::unistd::gettid().to_string();
    let status = Command::new("chrt").args(["--batch", "--pid", "0", &thread]).status();
    if !status.context("chrt (package util-linux)")?.success() {
        bail!("chrt --batch --pid 0 {thread} failed");
    }
    Ok(())
}

fn pod(gateway: &str, addresses: impl Iterator<Item = String>) -> String {
    let mut script = String::from("link set lo up\nlink set eth0 up\n");
    for address in addresses {
        script.push_str(&format!("addr add {address}/24 dev eth0\n"));
    }
    script + &format!("route add default via {gateway}\n")
}
