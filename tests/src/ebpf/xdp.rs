//! Real traffic through the program at XDP. What it has sent on, the node's stack has never
//! seen: a packet socket there shows the rest.

#![allow(clippy::needless_range_loop, reason = "a family indexes the names of all sides")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_daemon::dataplane::ebpf::{Attachment, XdpMode};
use proxy_daemon::kernel::links::{self, Links as _, NetlinkLinks, XdpAttached};
use proxy_daemon::kernel::netdev::{GenericNetdev, NetDevices as _};
use proxy_daemon::kernel::netlink::{Socket, Subsystem};
use proxy_ebpf::layout::{Device, Frontend, FrontendCounters, FrontendId};

use super::capture::Capture;
use super::in_netns;
use super::wire::{CLIENT, POD, REMOTE, Side, VIP, Wire, index};
use crate::offload::like_hardware;

const MODES: [XdpMode; 2] = [XdpMode::Native, XdpMode::Generic];

/// The far end of a link.
const FAR: &str = "up0";

/// With programs at both hooks of the client's and the remote backend's link; at the far ends
/// what a network card and a cable make of packets.
fn wired(mode: XdpMode) -> Result<(Wire, Vec<Attachment>)> {
    let mut wire = Wire::new()?;
    wire.attach(&[CLIENT.link, REMOTE.link])?;
    for namespace in [&wire.net.client, &wire.net.remote] {
        wire.at(namespace, || like_hardware(FAR))?;
    }
    let mut attachments = Vec::new();
    for side in [&CLIENT, &REMOTE] {
        attachments.push(wire.programs.attach_xdp(side.link, mode)?);
        let (attached, flags) = match mode {
            XdpMode::Generic => (XdpAttached::Generic, Device::XDP_GENERIC),
            _ => (XdpAttached::Native, Device::XDP_TAKES),
        };
        ensure!(look_at(side)?.xdp == Some(attached), "{:?}", look_at(side)?);
        set_flags(&mut wire, side, flags)?;
    }
    Ok((wire, attachments))
}

fn set_flags(wire: &mut Wire, side: &Side, flags: u32) -> Result<()> {
    let address = |text: &str| -> Result<_> { Ok(text.parse::<IpAddr>()?.into()) };
    let [source4, source6] = [address(side.node[0])?, address(side.node[1])?];
    let mac = look_at(side)?.mac.context("an Ethernet device without an address")?;
    let device = Device { source4, source6, flags, mac, ..Device::default() };
    Ok(wire.programs.tables().set_device(index(side.link)?, device)?)
}

fn look_at(side: &Side) -> Result<links::Device> {
    let devices = NetlinkLinks::new(Socket::open(Subsystem::Route)?).devices()?;
    let device = devices.into_iter().find(|device| device.name == side.link);
    device.with_context(|| format!("no device {}", side.link))
}

/// TCP in bulk and UDP, in both directions, without the stack; all checksums right at the end.
///
/// # Errors
/// What differed.
pub fn xdp_forwards() -> Result<()> {
    for mode in MODES {
        in_netns(|| {
            let (mut wire, _attachments) = wired(mode)?;
            for family in 0..2 {
                for vip in [VIP[family], CLIENT.node[family]] {
                    forwards(&mut wire, family, vip).with_context(|| format!("{mode:?} {vip}"))?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What is counted when nothing comes any more: a connection's last packets are on their way when
/// both its ends are done with it.
fn settled(wire: &mut Wire, frontend: FrontendId) -> Result<FrontendCounters> {
    let mut last = wire.programs.tables().frontend_counters(frontend)?;
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = wire.programs.tables().frontend_counters(frontend)?;
        if now == last {
            return Ok(now);
        }
        last = now;
    }
}

fn forwards(wire: &mut Wire, family: usize, vip: &str) -> Result<()> {
    let (backend, node) = (REMOTE.other[family], REMOTE.node[family]);
    let address = SocketAddr::new(backend.parse()?, 8080);
    wire.frontend(vip, Some(address), Frontend::MASQUERADE_REMOTE)?;
    let server = wire.tcp_server(&wire.net.remote, backend)?;
    let remote = wire.net.remote.try_clone()?;
    // The first packets wait for the neighbours' addresses.
    wire.exchange(&server, vip, 1)?;
    wire.query(&remote, backend, vip, 1)?;

    let at_node = Capture::start(wire, &wire.net.node)?;
    let requests = Capture::start(wire, &wire.net.remote)?;
    let replies = Capture::start(wire, &wire.net.client)?;
    for sent in [1, 3_000_000] {
        let seen = wire.exchange(&server, vip, sent)?;
        ensure!(seen == node.parse::<IpAddr>()?, "the client is {seen}");
    }
    let frontend = wire.last_frontend();
    let before = settled(wire, frontend)?;
    for length in [1, 1400] {
        wire.query(&remote, backend, vip, length)?;
    }
    let after = settled(wire, frontend)?;
    let counted = |counters: &FrontendCounters| {
        [counters.connections, counters.requests.packets, counters.replies.packets]
    };
    let (before, after) = (counted(&before), counted(&after));
    ensure!(after == before.map(|count| count + 2), "counted {before:?}, then {after:?}");

    for (capture, from) in [(requests, node), (replies, vip)] {
        // The receiver merges most of them, once it has found their checksums right.
        let (right, merged) = capture.verify(&[from])?;
        ensure!(right >= 4, "{right} right, {merged} merged from {from}");
    }
    let passed = at_node.verify(&[CLIENT.other[family], backend])?;
    // One finished checksum in 65536 looks unfinished.
    ensure!(passed.0 + passed.1 <= 3, "{passed:?} packets went by the stack");
    Ok(())
}

/// Packets that the way on does not take are tc's, which tells the sender.
///
/// # Errors
/// What differed.
pub fn xdp_path_mtu() -> Result<()> {
    for mode in MODES {
        in_netns(|| {
            let (mut wire, _attachments) = wired(mode)?;
            wire.path_mtu().with_context(|| format!("{mode:?}"))
        })?;
    }
    Ok(())
}

/// Packets that XDP leaves alone are tc's: everything works as without. To an endpoint of this
/// node; in fragments; with checksums that the sender leaves to the hardware, which XDP must
/// not send on.
///
/// # Errors
/// What differed.
pub fn xdp_leaves_the_rest() -> Result<()> {
    for mode in MODES {
        in_netns(move || {
            let mut wire = Wire::new()?;
            wire.attach(&[CLIENT.link, REMOTE.link])?;
            let mut attachments = Vec::new();
            for side in [&CLIENT, &REMOTE] {
                attachments.push(wire.programs.attach_xdp(side.link, mode)?);
                set_flags(&mut wire, side, Device::XDP_GENERIC)?;
            }
            for family in 0..2 {
                for (side, peer) in [(&POD, CLIENT.other), (&REMOTE, REMOTE.node)] {
                    let backend = side.other[family];
                    let address = SocketAddr::new(backend.parse()?, 8080);
                    wire.frontend(VIP[family], Some(address), Frontend::MASQUERADE_REMOTE)?;
                    let namespace =
                        if side.link == POD.link { &wire.net.pod } else { &wire.net.remote }
                            .try_clone()?;
                    let what = || format!("{mode:?} to {backend}");
                    let server = wire.tcp_server(&namespace, backend)?;
                    let seen = wire.exchange(&server, VIP[family], 100_000).with_context(what)?;
                    ensure!(seen == peer[family].parse::<IpAddr>()?, "the client is {seen}");
                    for length in [1, 5000] {
                        wire.query(&namespace, backend, VIP[family], length).with_context(what)?;
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Where the kernel tells which devices take frames, and where one would lose them: nothing is
/// lost.
///
/// # Errors
/// What differed.
pub fn xdp_where_frames_are_taken() -> Result<()> {
    in_netns(|| {
        let (mut wire, _attachments) = wired(XdpMode::Native)?;
        wire.attach(&[POD.link])?;
        let takers = || GenericNetdev::new(Socket::open(Subsystem::Generic)?).takers();
        let links = [index(CLIENT.link)?, index(REMOTE.link)?, index(POD.link)?];
        let Some(found) = takers()? else {
            // Kernels before 6.3 do not say.
            return Ok(());
        };
        let taken = links.map(|link| found.contains(&link));
        ensure!(taken == [true, true, false], "{taken:?}");

        // The pod's end does not poll: frames for it would be lost.
        let backend = POD.other[0];
        let address = SocketAddr::new(backend.parse()?, 8080);
        wire.frontend(VIP[0], Some(address), Frontend::MASQUERADE_ALL)?;
        let server = wire.tcp_server(&wire.net.pod, backend)?;
        set_flags(&mut wire, &POD, 0)?;
        wire.exchange(&server, VIP[0], 100_000)?;
        set_flags(&mut wire, &POD, Device::XDP_TAKES)?;
        let lost = wire.query(&wire.net.pod.try_clone()?, backend, VIP[0], 100);
        ensure!(lost.is_err(), "frames are not lost: the flag is not needed");
        Ok(())
    })
}
