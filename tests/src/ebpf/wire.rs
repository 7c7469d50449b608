//! Real traffic through the programs at devices: a client, a node, a backend on another
//! node and a pod on this one, each in a namespace of its own, joined by veth pairs. Their
//! senders leave checksums and segmentation to the "hardware", as hosts do.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use proxy_daemon::dataplane::ebpf::pins::Pins;
use proxy_daemon::dataplane::ebpf::{self, Attachment, Programs, TcHook};
use proxy_daemon::kernel::links::Frames;
use proxy_ebpf::layout::{
    Backend, BackendId, Config, Device, Flow, Frontend, FrontendId, FrontendKey, ServiceId,
    SlotRange, Timeouts, Tuple, names,
};
use proxy_ebpf::order::Be16;
use proxy_ebpf::parse::{TCP, UDP};
use proxy_ebpf::verdict::Reason;

use super::{CAPACITY, PATIENCE, has_tcx, load, run};
use crate::mounts::hide_mounts;
use crate::tunnel::{self, Tunnel};

/// Name of the link at the node, addresses of the node and of the other end.
pub(super) struct Side {
    pub(super) link: &'static str,
    pub(super) node: [&'static str; 2],
    pub(super) other: [&'static str; 2],
}

pub(super) const CLIENT: Side = Side {
    link: "c0",
    node: ["203.0.113.1", "2001:db8:7::1"],
    other: ["203.0.113.7", "2001:db8:7::7"],
};
pub(super) const REMOTE: Side = Side {
    link: "r0",
    node: ["198.18.0.1", "2001:db8:8::1"],
    other: ["198.18.0.5", "2001:db8:8::5"],
};
pub(super) const POD: Side =
    Side { link: "p0", node: ["10.244.0.1", "fd00:244::1"], other: ["10.244.0.5", "fd00:244::5"] };
pub(super) const VIP: [&str; 2] = ["198.51.100.1", "2001:db8:51::1"];
pub(super) const PORT: u16 = 80;

/// The thread is in the node's.
pub(super) struct Namespaces {
    pub(super) node: File,
    pub(super) client: File,
    pub(super) remote: File,
    pub(super) pod: File,
    /// Links of the node that are tunnels.
    pub(super) tunnels: Vec<(&'static str, Tunnel)>,
}

impl Namespaces {
    pub(super) fn new() -> Result<Self> {
        Self::with_tunnels(&[])
    }

    /// With tunnels instead of veth pairs as these links.
    pub(super) fn with_tunnels(links: &[&str]) -> Result<Self> {
        let node = netns()?;
        let mut tunnels = Vec::new();
        let mut to = |side: &Side| join(&node, side, links.contains(&side.link), &mut tunnels);
        let [client, remote, pod] = [to(&CLIENT)?, to(&REMOTE)?, to(&POD)?];
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
        Ok(Self { node, client, remote, pod, tunnels })
    }

    pub(super) fn is_tunnel(&self, link: &str) -> bool {
        self.tunnels.iter().any(|(name, _)| *name == link)
    }

    /// Does something in another namespace; sockets stay where they are made.
    pub(super) fn at<T>(&self, namespace: &File, action: impl FnOnce() -> Result<T>) -> Result<T> {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        let result = action();
        setns(&self.node, CloneFlags::CLONE_NEWNET)?;
        result
    }
}

pub(super) struct Wire {
    pub(super) net: Namespaces,
    pub(super) programs: Programs,
    attachments: Vec<Attachment>,
    /// Where the maps are that two loads of the programs share.
    _pins: Option<(Pins, tempfile::TempDir)>,
    /// Ids given out so far: of slots and backends, and of frontends.
    used: (u32, u32),
    /// Of the next socket that sends datagrams; below those that the kernel gives by itself.
    ///
    /// A flow lives on while its backend is there. A port that the kernel draws is now and then one
    /// of a socket before, whose flow leads to the backend of that time.
    next_port: u16,
}

fn netns() -> Result<File> {
    Ok(File::open("/proc/thread-self/ns/net")?)
}

/// A namespace joined to `node` by a link, with a default route to it.
fn join(
    node: &File,
    side: &Side,
    by_tunnel: bool,
    tunnels: &mut Vec<(&'static str, Tunnel)>,
) -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNET).context("a new network namespace")?;
    let other = netns()?;
    if by_tunnel {
        let far = tunnel::open("up0")?;
        setns(node, CloneFlags::CLONE_NEWNET)?;
        let near = tunnel::open(side.link)?;
        setns(&other, CloneFlags::CLONE_NEWNET)?;
        tunnels.push((side.link, Tunnel::between([near, far])));
    } else {
        let target = format!("/proc/{}/fd/{}", process::id(), node.as_raw_fd());
        let peer = ["type", "veth", "peer", "name", side.link, "netns", &target];
        run("ip", &[["link", "add", "up0"].as_slice(), &peer].concat())?;
    }
    run("ip", &["link", "set", "lo", "up"])?;
    ends("up0", side.other)?;
    setns(node, CloneFlags::CLONE_NEWNET)?;
    ends(side.link, side.node)?;
    setns(&other, CloneFlags::CLONE_NEWNET)?;
    run("ip", &["-4", "route", "add", "default", "via", side.node[0]])?;
    run("ip", &["-6", "route", "add", "default", "via", side.node[1]])?;
    setns(node, CloneFlags::CLONE_NEWNET)?;
    Ok(other)
}

fn ends(link: &str, addresses: [&str; 2]) -> Result<()> {
    run("ip", &["address", "add", &format!("{}/24", addresses[0]), "dev", link])?;
    run("ip", &["address", "add", &format!("{}/64", addresses[1]), "dev", link, "nodad"])?;
    run("ip", &["link", "set", link, "up"])
}

pub(super) fn index(link: &str) -> Result<u32> {
    Ok(nix::net::if_::if_nametoindex(link)?)
}

impl Wire {
    pub(super) fn new() -> Result<Self> {
        Self::over(Namespaces::new()?, load()?, None)
    }

    /// With tunnels instead of veth pairs as these links.
    pub(super) fn with_tunnels(links: &[&str]) -> Result<Self> {
        hide_mounts()?;
        let directory = tempfile::tempdir()?;
        let pins = Pins::open(&directory.path().join("bpf"))?;
        let object = ebpf::object()?;
        let mut programs = Programs::load_pinned(&object, CAPACITY, &pins)?;
        programs.load_bare(&object, &pins)?;
        Self::over(Namespaces::with_tunnels(links)?, programs, Some((pins, directory)))
    }

    fn over(
        net: Namespaces,
        mut programs: Programs,
        pins: Option<(Pins, tempfile::TempDir)>,
    ) -> Result<Self> {
        let config = Config {
            seed: 1,
            port_low: 50_000,
            port_high: 50_999,
            timeouts: Timeouts::default(),
            ..Config::default()
        };
        programs.tables().set_config(config)?;
        let address = |text: &str| -> Result<_> { Ok(text.parse::<IpAddr>()?.into()) };
        for side in [CLIENT, REMOTE, POD] {
            let [source4, source6] = [address(side.node[0])?, address(side.node[1])?];
            let flags = if net.is_tunnel(side.link) { Device::BARE } else { 0 };
            let device = Device { source4, source6, flags, ..Device::default() };
            programs.tables().set_device(index(side.link)?, device)?;
        }
        Ok(Self {
            net,
            programs,
            attachments: Vec::new(),
            _pins: pins,
            used: (0, 0),
            next_port: 20_000,
        })
    }

    pub(super) fn attach(&mut self, links: &[&str]) -> Result<()> {
        for link in links {
            let bare = self.net.is_tunnel(link);
            let frames = if bare { Frames::Bare } else { Frames::Ethernet };
            let all = [names::TC_EGRESS, names::TC_INGRESS];
            let (hook, attachments) = self.programs.attach_tc_programs(link, frames, &all)?;
            let expected = if has_tcx()? { TcHook::Tcx } else { TcHook::Clsact };
            ensure!(hook == expected, "attached by {hook:?} on a kernel with {expected:?}");
            self.attachments.extend(attachments.into_iter().map(|(_, attachment)| attachment));
        }
        Ok(())
    }

    pub(super) fn at<T>(&self, namespace: &File, action: impl FnOnce() -> Result<T>) -> Result<T> {
        self.net.at(namespace, action)
    }

    /// Both protocols of one address lead to this backend, or to none.
    pub(super) fn frontend(
        &mut self,
        address: &str,
        backend: Option<SocketAddr>,
        flags: u32,
    ) -> Result<()> {
        let (ids, frontends) = self.used;
        let mut range = SlotRange { base: ids, len: 0 };
        if let Some(backend) = backend {
            let local =
                if POD.other.contains(&&*backend.ip().to_string()) { Backend::LOCAL } else { 0 };
            let value = Backend {
                address: backend.ip().into(),
                port: Be16::from_host(backend.port()),
                flags: Backend::IN_USE | local,
                service: ServiceId::new(0),
            };
            self.programs.tables().set_backend(BackendId(ids), value)?;
            self.programs.tables().set_slots(ids, &[BackendId(ids)])?;
            range.len = 1;
        }
        let id = FrontendId(frontends);
        let value = Frontend { node: range, outside: range, id, flags, ..Frontend::default() };
        for protocol in [TCP, UDP] {
            let address = address.parse::<IpAddr>()?.into();
            let key = FrontendKey::new(address, Be16::from_host(PORT), protocol);
            self.programs.tables().set_frontend(key, value)?;
        }
        self.used = (ids + 1, frontends + 1);
        Ok(())
    }

    pub(super) fn last_frontend(&self) -> FrontendId {
        FrontendId(self.used.1.saturating_sub(1))
    }

    pub(super) fn tcp_server(&self, namespace: &File, address: &str) -> Result<TcpListener> {
        let address = address.parse::<IpAddr>()?;
        self.at(namespace, || patiently(|| TcpListener::bind((address, 8080))))
    }

    /// A connection through the frontend: who the server thinks is there, after `sent` bytes
    /// there and back.
    pub(super) fn exchange(
        &self,
        listener: &TcpListener,
        vip: &str,
        sent: usize,
    ) -> Result<IpAddr> {
        self.send(listener, vip, sent, sent)
    }

    /// The same with no more than the first `returned` of them back.
    pub(super) fn send(
        &self,
        listener: &TcpListener,
        vip: &str,
        sent: usize,
        returned: usize,
    ) -> Result<IpAddr> {
        let to = SocketAddr::new(vip.parse()?, PORT);
        let server = listener.try_clone()?;
        let echo = thread::spawn(move || -> Result<IpAddr> {
            let (mut stream, peer) = server.accept()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            ensure!(all.len() == sent, "{} bytes arrived of {sent}", all.len());
            stream.write_all(&all[..returned])?;
            Ok(peer.ip())
        });
        let mut stream = self
            .at(&self.net.client, || Ok(TcpStream::connect_timeout(&to, PATIENCE)?))
            .with_context(|| format!("connect to {to}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let data: Vec<u8> = (0..sent).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect();
        stream.write_all(&data)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut back = Vec::new();
        stream.read_to_end(&mut back).context("the echo")?;
        ensure!(back == data[..returned], "{} bytes came back of {returned}", back.len());
        match echo.join() {
            Ok(peer) => peer,
            Err(_) => bail!("the server panicked"),
        }
    }

    /// A datagram there and back.
    pub(super) fn query(
        &mut self,
        namespace: &File,
        server: &str,
        vip: &str,
        length: usize,
    ) -> Result<IpAddr> {
        let server = server.parse::<IpAddr>()?;
        let server = self.at(namespace, || patiently(|| UdpSocket::bind((server, 8080))))?;
        let client = self.udp_client(vip)?;
        server.set_read_timeout(Some(PATIENCE))?;
        client.send(&vec![7; length])?;
        let mut buffer = vec![0; 65536];
        let port = client.local_addr()?.port();
        let received = server.recv_from(&mut buffer);
        let (got, peer) = received.context("the query").with_context(|| self.seen(port))?;
        ensure!(got == length, "{got} bytes of {length}");
        server.send_to(&buffer[..got], peer)?;
        let received = client.recv(&mut buffer);
        let got = received.context("the reply").with_context(|| self.seen(port))?;
        ensure!(got == length, "{got} bytes back of {length}");
        Ok(peer.ip())
    }

    /// What the programs know of a client's port, and what they have dropped, for whoever has to
    /// find out where a datagram went.
    fn seen(&mut self, port: u16) -> String {
        let tables = self.programs.tables();
        let dropped = |reason: &Reason| match tables.drops(*reason) {
            Ok(0) => None,
            number => Some(format!("{}: {number:?}", reason.name())),
        };
        let dropped: Vec<String> = Reason::ALL.iter().filter_map(dropped).collect();
        let port = Be16::from_host(port);
        let of_port = |(key, flow): &(Tuple, Flow)| {
            [key.source_port, key.destination_port].contains(&port)
                || [flow.to.source_port, flow.to.destination_port].contains(&port)
        };
        let flows = tables.flows().map(|all| all.into_iter().filter(of_port).collect::<Vec<_>>());
        format!("dropped {dropped:?}, flows {flows:?}")
    }

    pub(super) fn udp_client(&mut self, vip: &str) -> Result<UdpSocket> {
        let to = SocketAddr::new(vip.parse()?, PORT);
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let from = SocketAddr::new(any, self.next_port);
        self.next_port += 1;
        let client = self.at(&self.net.client, || Ok(UdpSocket::bind(from)?))?;
        client.connect(to)?;
        client.set_read_timeout(Some(PATIENCE))?;
        Ok(client)
    }
}

/// A socket that was closed holds its port for as long as another thread is just starting a
/// process, which has it too until then.
fn patiently<T>(bind: impl Fn() -> std::io::Result<T>) -> Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match bind() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                thread::sleep(Duration::from_millis(10));
            }
            result => return Ok(result?),
        }
    }
}
