//! Real traffic through the programs at devices: a client, a node, a backend on another
//! node and a pod on this one, each in a namespace of its own, joined by veth pairs. Their
//! senders leave checksums and segmentation to the "hardware", as hosts do.

#![allow(clippy::needless_range_loop, reason = "a family indexes the names of all sides")]

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use proxy_daemon::dataplane::ebpf::pins::Pins;
use proxy_daemon::dataplane::ebpf::{self, Attachment, Programs, TcHook};
use proxy_daemon::kernel::links::{Frames, Links as _, NetlinkLinks};
use proxy_daemon::kernel::netlink::{Socket, Subsystem};
use proxy_ebpf::fake::frames::{Frame, check, is_partial};
use proxy_ebpf::layout::{
    Backend, BackendId, Config, Device, Flow, Frontend, FrontendId, FrontendKey, ServiceId,
    SlotRange, Timeouts, Tuple, names,
};
use proxy_ebpf::order::Be16;
use proxy_ebpf::parse::{TCP, UDP};
use proxy_ebpf::verdict::Reason;

use super::{CAPACITY, PATIENCE, has_tcx, in_netns, load, older_than, run};
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
const PORT: u16 = 80;

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
        unshare(CloneFlags::CLONE_NEWNS).context("a new mount namespace")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
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

    fn udp_client(&mut self, vip: &str) -> Result<UdpSocket> {
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

/// Frames that come to a namespace from here on.
pub(super) struct Capture {
    socket: OwnedFd,
    /// They have no link header.
    bare: bool,
}

impl Capture {
    pub(super) fn start(wire: &Wire, namespace: &File) -> Result<Self> {
        wire.at(namespace, || {
            let flags = SockFlag::SOCK_NONBLOCK;
            let devices = NetlinkLinks::new(Socket::open(Subsystem::Route)?).devices()?;
            let bare = devices.iter().any(|device| device.frames == Some(Frames::Bare));
            let protocol = SockProtocol::EthAll;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, protocol)?;
            Ok(Self { socket, bare })
        })
    }

    /// Those so far from one of these addresses, each with all of it right or, where that
    /// is left to the "hardware", its checksum right so far: how many of either kind.
    ///
    /// Between veth ends such a checksum is never completed, and what nobody completes
    /// nobody finds wrong: the traffic itself proves nothing about it.
    pub(super) fn verify(&self, from: &[&str]) -> Result<(u32, u32)> {
        let from: Vec<IpAddr> = from.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        let (mut right, mut partial) = (0, 0);
        // With room for the Ethernet header that there may be none of.
        let mut buffer = vec![0; 70_000];
        while let Ok(length) = recv(self.socket.as_raw_fd(), &mut buffer[14..], MsgFlags::empty()) {
            let v6 = buffer[14] >> 4 == 6;
            buffer[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
            let start = if self.bare { 0 } else { 14 };
            let frame = &buffer[start..14 + length];
            if !source(frame).is_some_and(|source| from.contains(&source)) {
                continue;
            }
            if is_partial(frame) {
                partial += 1;
                continue;
            }
            let ended = check(frame).map_err(anyhow::Error::msg);
            ended.with_context(|| format!("{:02x?}", &frame[..length.min(80)]))?;
            right += 1;
        }
        Ok((right, partial))
    }
}

fn source(frame: &[u8]) -> Option<IpAddr> {
    match frame.get(12..14)? {
        [0x08, 0x00] => Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(26..30)?).ok()?)),
        [0x86, 0xdd] => Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(22..38)?).ok()?)),
        _ => None,
    }
}

/// TCP in bulk and UDP, in fragments too, through an external address and the node's own.
///
/// # Errors
/// What differed.
pub fn forwards() -> Result<()> {
    in_netns(|| {
        let mut wire = Wire::new()?;
        wire.attach(&[CLIENT.link, REMOTE.link])?;
        wire.forwards()
    })
}

/// The same by tunnels, whose packets have no link header: at the clients' side, at the
/// backends', at both.
///
/// # Errors
/// What differed.
pub fn bare_forwards() -> Result<()> {
    for tunnels in [&[CLIENT.link][..], &[REMOTE.link], &[CLIENT.link, REMOTE.link]] {
        in_netns(|| {
            let mut wire = Wire::with_tunnels(tunnels)?;
            wire.attach(&[CLIENT.link, REMOTE.link])?;
            wire.forwards()
        })
        .with_context(|| format!("tunnels {tunnels:?}"))?;
    }
    Ok(())
}

impl Wire {
    fn forwards(&mut self) -> Result<()> {
        for family in 0..2 {
            let cases = [
                (&REMOTE, VIP[family], REMOTE.node[family]),
                (&REMOTE, CLIENT.node[family], REMOTE.node[family]),
                (&POD, VIP[family], CLIENT.other[family]),
                (&POD, CLIENT.node[family], CLIENT.other[family]),
            ];
            for (side, vip, peer) in cases {
                let namespace =
                    if side.link == POD.link { &self.net.pod } else { &self.net.remote }
                        .try_clone()?;
                let tunnel = self.net.is_tunnel(CLIENT.link) || self.net.is_tunnel(side.link);
                let backend = side.other[family];
                let address = SocketAddr::new(backend.parse()?, 8080);
                self.frontend(vip, Some(address), Frontend::MASQUERADE_REMOTE)?;
                let what = || format!("{vip} to {backend}");
                let server = self.tcp_server(&namespace, backend)?;
                let requests = Capture::start(self, &namespace)?;
                let replies = Capture::start(self, &self.net.client)?;
                for sent in [1, 3_000_000] {
                    let seen = self.exchange(&server, vip, sent).with_context(what)?;
                    ensure!(seen == peer.parse::<IpAddr>()?, "{}: the client is {seen}", what());
                }
                for (capture, from) in [(requests, peer), (replies, vip)] {
                    let (right, partial) = capture.verify(&[from]).with_context(what)?;
                    // A tunnel has no hardware to leave them to.
                    let usual = if tunnel { right > 5 && partial == 0 } else { partial > 5 };
                    ensure!(
                        usual,
                        "{right} finished, {partial} unfinished checksums from {from}, {}",
                        what()
                    );
                }
                for length in [1, 5000] {
                    let seen = self.query(&namespace, backend, vip, length);
                    let seen = seen.with_context(|| format!("{} {length} bytes", what()))?;
                    ensure!(seen == peer.parse::<IpAddr>()?, "{}: the client is {seen}", what());
                }
            }
        }
        Ok(())
    }
}

/// Refused at once where there is no endpoint, TCP and UDP, whatever the checksum's state.
///
/// # Errors
/// What differed.
pub fn refuses() -> Result<()> {
    in_netns(|| {
        let mut wire = Wire::new()?;
        wire.attach(&[CLIENT.link, REMOTE.link])?;
        wire.refuses()
    })
}

/// The same by a tunnel.
///
/// # Errors
/// What differed.
pub fn bare_refuses() -> Result<()> {
    in_netns(|| {
        let mut wire = Wire::with_tunnels(&[CLIENT.link])?;
        wire.attach(&[CLIENT.link, REMOTE.link])?;
        wire.refuses()
    })
}

impl Wire {
    fn refuses(&mut self) -> Result<()> {
        for vip in VIP {
            self.frontend(vip, None, 0)?;
            let answers = Capture::start(self, &self.net.client)?;
            let begin = Instant::now();
            let to = SocketAddr::new(vip.parse()?, PORT);
            let result =
                self.at(&self.net.client, || Ok(TcpStream::connect_timeout(&to, PATIENCE)))?;
            let error = result.err().context("connected to nobody")?;
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "{vip}: {error}");
            let client = self.udp_client(vip)?;
            client.send(b"query")?;
            let error = client.recv(&mut [0; 9]).err().context("an answer from nobody")?;
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "{vip}: {error}");
            ensure!(begin.elapsed() < Duration::from_secs(2), "{vip}: {:?}", begin.elapsed());
            // The reset is made of a SYN whose checksum was never finished.
            let counted = answers.verify(&[vip])?;
            let expected = if self.net.is_tunnel(CLIENT.link) { (2, 0) } else { (1, 1) };
            ensure!(counted == expected, "{vip}: finished and unfinished answers: {counted:?}");
        }
        Ok(())
    }
}

/// A link behind the node takes less than the client's: the client is told, in both
/// families, and all bytes arrive.
///
/// # Errors
/// What differed.
pub fn path_mtu() -> Result<()> {
    in_netns(|| {
        let mut wire = Wire::new()?;
        wire.attach(&[CLIENT.link, REMOTE.link])?;
        wire.path_mtu()
    })
}

/// The same by tunnels.
///
/// # Errors
/// What differed.
pub fn bare_path_mtu() -> Result<()> {
    for tunnels in [&[CLIENT.link][..], &[REMOTE.link]] {
        in_netns(|| {
            let mut wire = Wire::with_tunnels(tunnels)?;
            wire.attach(&[CLIENT.link, REMOTE.link])?;
            wire.path_mtu()
        })
        .with_context(|| format!("tunnels {tunnels:?}"))?;
    }
    Ok(())
}

impl Wire {
    pub(super) fn path_mtu(&mut self) -> Result<()> {
        // At the node's end only, so that the backend offers segments that are too long.
        run("ip", &["link", "set", REMOTE.link, "mtu", "1300"])?;
        for family in 0..2 {
            let backend = SocketAddr::new(REMOTE.other[family].parse()?, 8080);
            self.frontend(VIP[family], Some(backend), Frontend::MASQUERADE_REMOTE)?;
            let server = self.tcp_server(&self.net.remote, REMOTE.other[family])?;
            // Little comes back: nobody tells the backend that its link takes less.
            self.send(&server, VIP[family], 200_000, 1000).context(VIP[family])?;
            let route = self.at(&self.net.client, || {
                let family = if family == 0 { "-4" } else { "-6" };
                let to = if family == "-4" { VIP[0] } else { VIP[1] };
                let output =
                    process::Command::new("ip").args([family, "route", "get", to]).output()?;
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            })?;
            // Before kernel 5.12 a program is not told how long a packet may be.
            let told = if older_than(5, 12)? { "mtu 1280" } else { "mtu 1300" };
            ensure!(route.contains(told), "the client was not told: {route}");
        }
        Ok(())
    }
}

/// A frame of a VLAN is its own device's, which sees it without the tag.
///
/// # Errors
/// What differed.
pub fn tagged() -> Result<()> {
    in_netns(|| {
        let mut wire = Wire::new()?;
        wire.attach(&[CLIENT.link, REMOTE.link])?;
        let backend = SocketAddr::new(REMOTE.other[0].parse()?, 8080);
        wire.frontend(VIP[0], Some(backend), Frontend::MASQUERADE_REMOTE)?;
        let tuple = |port| -> Result<Tuple> {
            Ok(Tuple {
                source: CLIENT.other[0].parse::<IpAddr>()?.into(),
                destination: VIP[0].parse::<IpAddr>()?.into(),
                source_port: Be16::from_host(port),
                destination_port: Be16::from_host(PORT),
                protocol: UDP,
                pad: [0; 3],
            })
        };
        let sender = wire.at(&wire.net.client, || raw_socket("up0"))?;
        let devices = NetlinkLinks::new(Socket::open(Subsystem::Route)?).devices()?;
        let device = devices.into_iter().find(|device| device.name == CLIENT.link);
        let receiver = device.and_then(|device| device.mac).context("the link's address")?;
        // 0x2005 is VLAN 5, 0x2000 a priority alone.
        for (port, tag, counted) in [(1, Some(0x2005_u16), 0), (2, Some(0x2000), 1), (3, None, 1)] {
            let mut frame = Frame::new(tuple(port)?, b"query").bytes();
            frame[..6].copy_from_slice(&receiver);
            if let Some(tag) = tag {
                let [high, low] = tag.to_be_bytes();
                frame.splice(12..12, [0x81, 0, high, low]);
            }
            let counters = |wire: &mut Wire| {
                let id = wire.last_frontend();
                wire.programs.tables().frontend_counters(id)
            };
            let before = counters(&mut wire)?;
            send(sender.as_raw_fd(), &frame, MsgFlags::empty())?;
            // Received in the sender's own call, or soon after.
            thread::sleep(Duration::from_millis(200));
            let after = counters(&mut wire)?;
            let began = after.connections - before.connections;
            ensure!(began == counted, "{tag:04x?}: {began} flows began, not {counted}");
        }
        Ok(())
    })
}

/// Sends whole frames by a link of this namespace.
fn raw_socket(link: &str) -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None)?;
    let links = nix::ifaddrs::getifaddrs()?.filter(|address| address.interface_name == link);
    let address = links.filter_map(|it| it.address?.as_link_addr().copied()).next();
    bind(socket.as_raw_fd(), &address.with_context(|| format!("no link {link}"))?)?;
    Ok(socket)
}
