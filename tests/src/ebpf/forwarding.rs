//! Real traffic through the programs at devices, as the namespaces of [`super::wire`] send it.

#![allow(clippy::needless_range_loop, reason = "a family indexes the names of all sides")]

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, bind, send, socket};
use proxy_daemon::kernel::links::{Links as _, NetlinkLinks};
use proxy_daemon::kernel::netlink::{Socket, Subsystem};
use proxy_ebpf::fake::frames::Frame;
use proxy_ebpf::layout::{Frontend, Tuple};
use proxy_ebpf::order::Be16;
use proxy_ebpf::parse::UDP;

use super::capture::Capture;
use super::wire::{CLIENT, POD, PORT, REMOTE, VIP, Wire};
use super::{PATIENCE, in_netns, older_than, run};

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
