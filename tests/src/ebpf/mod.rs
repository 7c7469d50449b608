//! The eBPF programs with real traffic: each case loads the object, attaches, sends, and
//! compares what arrived with what was counted. The cases run on the machine's kernel
//! (`tests/host_ebpf.rs`) and in the guests.
//!
//! Every case has network namespaces of its own, which end with its thread, and a cgroup
//! of its own. Nothing of the machine's network is touched.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{self, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use proxy_daemon::dataplane::ebpf::{self, Capacity, LoadError, Programs, XdpMode, cgroup};
use proxy_daemon::kernel::netlink::Errno;
use proxy_daemon::kernel::sysctl::KernelVersion;
use proxy_ebpf::layout::{
    Backend, BackendId, Frontend, FrontendCounters, FrontendId, FrontendKey, Mark, ServiceId,
    SlotRange,
};
use proxy_ebpf::order::{Address, Be16};
use proxy_ebpf::parse::{TCP, UDP};
use proxy_ebpf::verdict::Reason;

mod capture;
pub mod cost;
mod counters;
mod daemon;
mod forwarding;
mod own;
mod packets;
mod upgrade;
mod ways;
mod wire;
mod xdp;

pub use counters::counters;
pub use daemon::{bare_daemon, daemon, detection, ipvs_after_ebpf, many_connections, taken_off};
pub use forwarding::{
    bare_forwards, bare_path_mtu, bare_refuses, forwards, path_mtu, refuses, tagged,
};
pub use own::own_connections;
pub use packets::packets;
pub use upgrade::{carries_over, carries_over_from_6};
pub use ways::follows_changes;
pub use xdp::{xdp_forwards, xdp_leaves_the_rest, xdp_path_mtu, xdp_where_frames_are_taken};

const VIP4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1));
const CAPACITY: Capacity = Capacity {
    frontends: 128,
    slots: 64,
    backends: 16,
    flows: 4096,
    affinities: 1024,
    fragments: 1024,
    sockets: 1024,
    prefixes: 64,
    source_ranges: 64,
    devices: 64,
    opt_outs: 64,
    locals: 64,
    counted_frontends: 128,
    counted_backends: 16,
};
/// Longer than any step takes under emulation; only a failing case waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// One `#[test]` for each case, with the attributes given (guest tests are `#[ignore]`d).
#[macro_export]
macro_rules! ebpf_cases {
    ($(#[$attribute:meta])*) => {
        $crate::ebpf_cases! {
            @each [$(#[$attribute])*]
            connect4 connect6 connect6_mapped connect4_udp closed_udp connect_refused
            forwards refuses path_mtu tagged own_connections
            bare_forwards bare_refuses bare_path_mtu bare_daemon
            xdp_forwards xdp_path_mtu xdp_leaves_the_rest xdp_where_frames_are_taken
            packets follows_changes refusals verified_instructions batches carries_over carries_over_from_6
            daemon many_connections taken_off detection counters
        }
    };
    (@each $attributes:tt $($case:ident)+) => {
        $($crate::ebpf_cases! { @one $attributes $case })+
    };
    (@one [$(#[$attribute:meta])*] $case:ident) => {
        #[test]
        $(#[$attribute])*
        fn $case() -> ::anyhow::Result<()> {
            $crate::ebpf::$case()
        }
    };
}

/// Whether the running kernel is older than a release.
///
/// # Errors
/// When it does not say what it is.
pub(crate) fn older_than(major: u32, minor: u32) -> Result<bool> {
    Ok(KernelVersion::running()? < KernelVersion::new(major, minor))
}

fn load() -> Result<Programs> {
    Ok(Programs::load(&ebpf::object()?, CAPACITY)?)
}

/// One more frontend whose set is `backends`; ids, slots and backends in order of calls.
#[derive(Default)]
struct Table {
    frontends: u32,
    slots: u32,
    backends: u32,
}

impl Table {
    fn add(
        &mut self,
        programs: &mut Programs,
        vip: SocketAddr,
        protocol: u8,
        backends: &[SocketAddr],
    ) -> Result<FrontendId> {
        let tables = programs.tables();
        let mut ids = Vec::new();
        for address in backends {
            let id = BackendId(self.backends);
            self.backends += 1;
            let backend = Backend {
                address: address.ip().into(),
                port: Be16::from_host(address.port()),
                flags: Backend::IN_USE,
                service: ServiceId::new(0),
            };
            tables.set_backend(id, backend)?;
            ids.push(id);
        }
        tables.set_slots(self.slots, &ids)?;
        let range = SlotRange { base: self.slots, len: u32::try_from(ids.len())? };
        self.slots += range.len;
        let id = FrontendId(self.frontends);
        self.frontends += 1;
        let key = FrontendKey::new(vip.ip().into(), Be16::from_host(vip.port()), protocol);
        let frontend = Frontend { node: range, outside: range, id, ..Frontend::default() };
        tables.set_frontend(key, frontend)?;
        Ok(id)
    }
}

/// Runs `case` on a thread in a network namespace that ends with it.
fn in_netns<T: Send>(case: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("a new network namespace")?;
            run("ip", &["link", "set", "lo", "up"])?;
            case()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().context(program.to_owned())?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {error}", arguments.join(" "));
    Ok(())
}

/// A cgroup below the root of the v2 hierarchy, removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    const PREFIX: &str = "proxy-ebpf-test-";

    fn new(name: &str) -> Result<Self> {
        let root = cgroup(None)?;
        for entry in fs::read_dir(&root)? {
            let path = entry?.path();
            if Self::is_leftover(&path) {
                fs::remove_dir(&path).with_context(|| format!("left over: {}", path.display()))?;
            }
        }
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{}{}-{name}-{serial}", Self::PREFIX, process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    /// Made by a test process that is no more.
    fn is_leftover(path: &Path) -> bool {
        path.file_name()
            .and_then(|name| name.to_str()?.strip_prefix(Self::PREFIX)?.split('-').next())
            .is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    }

    /// A client in this cgroup: bash, because a cgroup has processes and not threads, and
    /// bash can connect (`/dev/tcp/ADDRESS/PORT`).
    fn bash(&self, script: &str) -> Result<Output> {
        bash(&format!("echo $$ > {}/cgroup.procs || exit 9; {script}", self.0.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

fn bash(script: &str) -> Result<Output> {
    let mut command = Command::new("bash");
    Ok(command.args(["-c", script]).stdin(Stdio::null()).output()?)
}

/// A TCP server of this namespace that counts the connections it accepts and answers
/// each with a line.
struct Server {
    address: SocketAddr,
    accepted: Arc<AtomicU64>,
}

impl Server {
    fn start(address: IpAddr) -> Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        let address = listener.local_addr()?;
        let accepted = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&accepted);
        // Ends with the test process: a thread that waits in accept cannot be told to.
        thread::spawn(move || {
            for stream in listener.incoming() {
                counter.fetch_add(1, Ordering::SeqCst);
                // A client that is gone already is no matter of the server's.
                drop(stream.and_then(|mut stream| stream.write_all(b"hello\n")));
            }
        });
        Ok(Self { address, accepted })
    }

    fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }
}

/// `count` connections one after the other; each must be answered.
fn connects(vip: SocketAddr, count: u32) -> String {
    format!(
        "for i in $(seq {count}); do exec 3<>/dev/tcp/{}/{} && read -t 10 line <&3 && \
         [ \"$line\" = hello ] || exit 1; exec 3<&-; done",
        vip.ip(),
        vip.port()
    )
}

fn succeeds(output: &Output) -> Result<()> {
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "client: {}: {error}", output.status);
    Ok(())
}

/// TCP through connect4: spread over the backends, counted; nobody outside the cgroup is
/// affected, and nobody after detaching.
///
/// # Errors
/// What differed.
pub fn connect4() -> Result<()> {
    connect_tcp("connect4", VIP4, VIP4, Ipv4Addr::LOCALHOST.into())
}

/// The same for IPv6.
///
/// # Errors
/// What differed.
pub fn connect6() -> Result<()> {
    connect_tcp("connect6", VIP6, VIP6, Ipv6Addr::LOCALHOST.into())
}

/// An IPv6 socket that connects to an IPv4 frontend by its mapped address.
///
/// # Errors
/// What differed.
pub fn connect6_mapped() -> Result<()> {
    let IpAddr::V4(v4) = VIP4 else { bail!("VIP4 is IPv4") };
    connect_tcp("mapped", VIP4, v4.to_ipv6_mapped().into(), Ipv4Addr::LOCALHOST.into())
}

fn connect_tcp(name: &str, vip: IpAddr, dialled: IpAddr, local: IpAddr) -> Result<()> {
    const COUNT: u32 = 40;
    in_netns(|| {
        let servers = [Server::start(local)?, Server::start(local)?];
        let mut programs = load()?;
        let vip = SocketAddr::new(vip, 80);
        let backends = servers.each_ref().map(|server| server.address);
        let frontend = Table::default().add(&mut programs, vip, TCP, &backends)?;
        let cgroup = Cgroup::new(name)?;
        let dial = connects(SocketAddr::new(dialled, 80), COUNT);

        let attached = programs.attach_sockets(&cgroup.0)?;
        succeeds(&cgroup.bash(&dial)?)?;
        let accepted = servers.each_ref().map(Server::accepted);
        // One of two random backends never chosen in 40 draws: once in 2^39 runs.
        ensure!(accepted.iter().all(|&n| n > 0), "one backend only: {accepted:?}");
        for (id, accepted) in accepted.into_iter().enumerate() {
            let counters = programs.tables().backend_counters(BackendId(u32::try_from(id)?))?;
            ensure!(counters.connections == accepted, "{counters:?}, accepted {accepted}");
        }
        let expected =
            FrontendCounters { connections: COUNT.into(), ..FrontendCounters::default() };
        let counted = programs.tables().frontend_counters(frontend)?;
        ensure!(counted == expected, "counted {counted:?}, expected {expected:?}");

        ensure!(!bash(&dial)?.status.success(), "a client outside the cgroup was redirected");
        drop(attached);
        ensure!(!cgroup.bash(&dial)?.status.success(), "redirected after detaching");
        let after = programs.tables().frontend_counters(frontend)?;
        ensure!(after == expected, "counted {after:?} after {expected:?}");
        Ok(())
    })
}

/// A connected UDP socket's datagram reaches the backend.
///
/// # Errors
/// What differed.
pub fn connect4_udp() -> Result<()> {
    in_netns(|| {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        server.set_read_timeout(Some(PATIENCE))?;
        let mut programs = load()?;
        let vip = SocketAddr::new(VIP4, 53);
        let frontend = Table::default().add(&mut programs, vip, UDP, &[server.local_addr()?])?;
        let cgroup = Cgroup::new("udp")?;
        let _attached = programs.attach_sockets(&cgroup.0)?;

        succeeds(&cgroup.bash("echo query > /dev/udp/10.96.0.1/53")?)?;
        let mut buffer = [0; 64];
        let length = server.recv(&mut buffer).context("the backend got no datagram")?;
        ensure!(&buffer[..length] == b"query\n", "{:?}", &buffer[..length]);
        let counted = programs.tables().frontend_counters(frontend)?;
        ensure!(counted.connections == 1, "{counted:?}");
        Ok(())
    })
}

/// A connected UDP socket is remembered until it is closed.
///
/// # Errors
/// What differed.
pub fn closed_udp() -> Result<()> {
    let families: [(IpAddr, IpAddr); 2] =
        [(VIP4, Ipv4Addr::LOCALHOST.into()), (VIP6, Ipv6Addr::LOCALHOST.into())];
    in_netns(|| {
        for (vip, local) in families {
            let server = UdpSocket::bind((local, 0))?;
            server.set_read_timeout(Some(PATIENCE))?;
            let mut programs = load()?;
            let backend = server.local_addr()?;
            Table::default().add(&mut programs, SocketAddr::new(vip, 53), UDP, &[backend])?;
            let cgroup = Cgroup::new("closed")?;
            let _attached = programs.attach_sockets(&cgroup.0)?;
            let script = format!(
                "echo $$ > {}/cgroup.procs || exit 9; exec 3<>/dev/udp/{vip}/53; echo query >&3; \
                 read line; true",
                cgroup.0.display()
            );
            let mut client =
                Command::new("bash").args(["-c", &script]).stdin(Stdio::piped()).spawn()?;
            let received = server.recv(&mut [0; 64]);
            let open = programs.tables().udp_peers();
            // It waits for the end of its input.
            drop(client.stdin.take());
            let status = client.wait()?;
            received.with_context(|| format!("{vip}: the backend got no datagram, {status}"))?;
            let open = open?;
            ensure!(open.len() == 1, "{vip}: {open:?}");
            let closed = programs.tables().udp_peers()?;
            ensure!(closed.is_empty(), "{vip}: closed, and remembered: {closed:?}");
        }
        Ok(())
    })
}

/// A frontend without backends refuses at once, with the errno of a refused connection.
///
/// # Errors
/// What differed.
pub fn connect_refused() -> Result<()> {
    in_netns(|| {
        let mut programs = load()?;
        let mut table = Table::default();
        let cgroup = Cgroup::new("refused")?;
        let frontends = [VIP4, VIP6].map(|vip| SocketAddr::new(vip, 80));
        let ids = [
            table.add(&mut programs, frontends[0], TCP, &[])?,
            table.add(&mut programs, frontends[1], TCP, &[])?,
        ];
        let _attached = programs.attach_sockets(&cgroup.0)?;
        for (vip, id) in frontends.into_iter().zip(ids) {
            let output = cgroup.bash(&format!("LC_ALL=C; {}", connects(vip, 1)))?;
            let error = String::from_utf8_lossy(&output.stderr);
            ensure!(error.contains("Connection refused"), "{vip}: {}: {error}", output.status);
            let counted = programs.tables().frontend_counters(id)?;
            ensure!((counted.connections, counted.refused) == (0, 1), "{vip}: {counted:?}");
        }
        let drops = programs.tables().drops(Reason::NoEndpoint)?;
        ensure!(drops == 2, "{drops} drops");
        Ok(())
    })
}

/// The tests' kernels are known: tcx came with 6.6 and none has it carried back.
fn has_tcx() -> Result<bool> {
    Ok(!older_than(6, 6)?)
}

/// What cannot work says why.
///
/// # Errors
/// What differed.
pub fn refusals() -> Result<()> {
    in_netns(|| {
        let mut object = ebpf::object()?.into_owned();
        let mark = Mark::CURRENT.fingerprint.to_le_bytes();
        let place = object.windows(mark.len()).position(|bytes| bytes == mark);
        object[place.context("the object carries no mark")?] ^= 1;
        let Err(error) = Programs::load(&object, CAPACITY) else { bail!("wrong layout loaded") };
        ensure!(matches!(error, LoadError::Layout { .. }), "{error}");

        let mut programs = load()?;
        for result in [
            programs.attach_tc("nonesuch0", true).map(drop),
            programs.attach_xdp("nonesuch0", XdpMode::Auto).map(drop),
        ] {
            let Err(error) = result else { bail!("attached to no interface") };
            ensure!(error.to_string().contains("no such interface"), "{error}");
        }
        let Err(error) = programs.attach_sockets(Path::new("/proc")) else {
            bail!("attached to no cgroup");
        };
        ensure!(error.errno().is_some(), "{error}");
        Ok(())
    })
}

/// The verifier's instruction counts on this kernel, printed one program a line: the table
/// in `docs/ebpf.md` comes from here.
///
/// # Errors
/// The programs do not load, or a count is missing or near the verifier's limit.
pub fn verified_instructions() -> Result<()> {
    const LIMIT: u32 = 1_000_000;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    // The last ones are those for packets without a link header.
    let counts =
        in_netns(|| Ok(wire::Wire::with_tunnels(&[])?.programs.verified_instructions()?))?;
    for (name, count) in counts {
        let Some(count) = count else {
            ensure!(older_than(5, 16)?, "{name}: the kernel does not say");
            println!("{} {name}: kernels before 5.16 do not say", release.trim());
            continue;
        };
        println!("{} {name} {count}", release.trim());
        ensure!(count < LIMIT / 4, "{name}: {count} instructions");
    }
    Ok(())
}

/// Many entries in few system calls, and the same ones by many where the kernel has no batches.
///
/// # Errors
/// What differed.
pub fn batches() -> Result<()> {
    let capacity = Capacity { frontends: 6_000, slots: 10_000, backends: 10_000, ..CAPACITY };
    let mut programs = Programs::load(&ebpf::object()?, capacity)?;
    let tables = programs.tables();
    let address = |n: u32| Address::from(IpAddr::from(Ipv4Addr::from(0x0a00_0000 + n)));
    let port = Be16::from_host(80);
    let of = |n: u32| Backend {
        address: address(n),
        port,
        flags: Backend::IN_CLUSTER_SET,
        ..Backend::default()
    };
    let backends: Vec<_> = (0..5_000).map(|n| (BackendId(2 * n), of(n))).collect();
    tables.set_backends(&backends)?;
    let slots: Vec<_> = backends.iter().map(|(id, _)| *id).collect();
    tables.set_slots(17, &slots)?;
    ensure!(tables.batch_calls() == [0, 2, 2], "written in {:?} calls", tables.batch_calls());
    let key = |n| FrontendKey::new(address(n), port, 6);
    for n in 0..5_000 {
        tables.set_frontend(key(n), Frontend { id: FrontendId(n), ..Frontend::default() })?;
    }
    let read = |tables: &ebpf::Tables| -> Result<_> {
        let mut frontends = tables.frontends()?;
        frontends.sort_unstable_by_key(|(_, frontend)| frontend.id);
        Ok((frontends, tables.slots(17, 5_000)?, tables.backends(BackendId(0), 20_000)?))
    };
    let found = read(tables)?;
    let calls = tables.batch_calls();
    ensure!(calls[0] <= 3 && calls[1..] == [4, 5], "and read in {calls:?} calls");
    let expected = |(n, (found, frontend)): (u32, &(FrontendKey, Frontend))| {
        *found == key(n) && frontend.id == FrontendId(n)
    };
    ensure!(found.0.len() == 5_000 && (0..).zip(&found.0).all(expected), "frontends differ");
    ensure!(found.1 == slots, "slots differ");
    let even = found.2.iter().copied().step_by(2);
    ensure!(
        found.2.len() == 10_000 && even.eq(backends.iter().map(|(_, b)| *b)),
        "backends differ"
    );
    ensure!(found.2.iter().skip(1).step_by(2).all(|b| !b.in_use()), "one too many");
    // No batch is half of what was asked for.
    let beyond = tables.set_slots(9_999, &slots[..2]).map_err(|error| error.errno());
    ensure!(beyond == Err(Some(Errno(nix::errno::Errno::E2BIG as i32))), "{beyond:?}");
    tables.one_by_one();
    ensure!(read(tables)? == found, "one by one they differ");
    let singly = tables.batch_calls();
    ensure!(singly[0] > 10_000 && singly[1] > 5_000 && singly[2] > 10_000, "{singly:?} calls");
    let other: Vec<_> = slots.iter().rev().copied().collect();
    tables.set_slots(17, &other)?;
    ensure!(tables.slots(17, 5_000)? == other, "one by one they are not written");
    Ok(())
}
