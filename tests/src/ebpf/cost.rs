//! What the programs cost, for the benchmark: a packet at a device, a connect, a change of the
//! maps. Measured with nobody beside; nothing is asserted.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nix::libc::linger;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt,
};
use proxy_daemon::dataplane::ebpf::{self, Capacity, Programs};
use proxy_ebpf::device::Hook;
use proxy_ebpf::fake::frames::Frame;
use proxy_ebpf::layout::config::client;
use proxy_ebpf::layout::{
    Backend, BackendId, Config, Device, Flow, Frontend, FrontendId, FrontendKey, ServiceId,
    SlotRange, Timeouts, Tuple,
};
use proxy_ebpf::order::Be16;
use proxy_ebpf::parse::{TCP, tcp};

use super::in_netns;
use super::packets::link;
use crate::cluster::ClusterCgroup;

/// Endpoints of each Service.
pub const ENDPOINTS: u32 = 10;

/// Each packet takes a hop: from 255 down.
const HOPS: u32 = 200;

/// Of these, so many until everything that they need is in the processor's caches.
const FIRST: u32 = 20;

/// A Service's address by its number.
fn vip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a60_0000 + 1 + number)
}

fn range(service: u32) -> SlotRange {
    SlotRange { base: service * ENDPOINTS, len: ENDPOINTS }
}

/// Programs with so many Services, the endpoints of each at 127.0.0.1 and on.
fn filled(services: u32) -> Result<Programs> {
    let mut programs = Programs::load(&ebpf::object()?, Capacity::default())?;
    for service in 0..services {
        switch(&mut programs, service, 0)?;
    }
    Ok(programs)
}

/// What a change of all endpoints writes: backends, slots, the frontend.
fn switch(programs: &mut Programs, service: u32, shift: u32) -> Result<()> {
    let id = ServiceId::new(service.into());
    let tables = programs.tables();
    let SlotRange { base, len } = range(service);
    let backends: Vec<(BackendId, Backend)> = (0..len)
        .map(|number| {
            let address = Ipv4Addr::from_bits(0x7f00_0001 + number + shift);
            let backend = Backend {
                address: IpAddr::V4(address).into(),
                port: Be16::from_host(8080),
                flags: Backend::IN_USE,
                service: id,
            };
            (BackendId(base + number), backend)
        })
        .collect();
    tables.set_backends(&backends)?;
    let ids: Vec<BackendId> = backends.iter().map(|(id, _)| *id).collect();
    tables.set_slots(base, &ids)?;
    let key = FrontendKey::new(IpAddr::V4(vip(service)).into(), Be16::from_host(80), TCP);
    let set = range(service);
    let value = Frontend {
        node: set,
        outside: set,
        id: FrontendId(service),
        service: id,
        ..Frontend::default()
    };
    Ok(tables.set_frontend(key, value)?)
}

/// Microseconds to write one Service with [`ENDPOINTS`] into the maps, `count` samples.
///
/// # Errors
/// The programs do not load.
pub fn map_update(services: u32, count: u32) -> Result<Vec<f64>> {
    let mut programs = filled(services)?;
    (0..count)
        .map(|nth| {
            let start = Instant::now();
            switch(&mut programs, nth % services, 1 + nth % 2)?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        })
        .collect()
}

/// Nanoseconds of a packet in the kernel's test run.
#[derive(Debug, Default)]
pub struct Packets {
    /// To a load-balancer address whose endpoint is on another node, of a known flow: translated, with the
    /// next hop's address, and sent on.
    pub forwarded: Vec<f64>,
    /// The same without the first [`FIRST`] of a sample.
    pub further: Vec<f64>,
    /// To no Service: looked at and let through.
    pub foreign: Vec<f64>,
}

/// At one hook, `count` samples of 200 packets each.
///
/// # Errors
/// The programs do not load, or do something else with the packets.
pub fn packets(hook: Hook, services: u32, count: u32) -> Result<Packets> {
    in_netns(|| {
        let ifindex = link()?;
        let mut programs = filled(services)?;
        let node = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
        programs.tables().set_config(Config {
            source4: node.into(),
            port_low: 50_000,
            port_high: 65_535,
            timeouts: Timeouts::default(),
            ..Config::default()
        })?;
        programs.tables().set_prefix(node.into(), 128, client::NODE)?;
        let device = Device { flags: Device::XDP_TX, ..Device::default() };
        programs.tables().set_device(ifindex, device)?;
        let outside = Ipv4Addr::new(203, 0, 113, 7);
        // Of a load balancer: what becomes of the packet must be for another machine both times.
        let frontend = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 80));
        let request = tuple((outside.into(), 40_000), (frontend, 80));
        let translated = tuple((node, 50_001), (Ipv4Addr::new(10, 244, 1, 5).into(), 8080));
        // The packet stays translated between two runs: the one flow makes the other's.
        for (from, to) in [(request, translated), (translated, request)] {
            let flags = Flow::FORWARD | Flow::REPLIED;
            let flow = Flow { to, flags, seen: 1, ..Flow::default() };
            programs.tables().set_flow(&from, &flow)?;
        }
        let frame =
            |tuple| Frame { tcp_flags: tcp::ACK, ttl: 255, ..Frame::new(tuple, &[0; 10]) }.bytes();
        let other = tuple((outside.into(), 40_000), (Ipv4Addr::new(10, 244, 9, 9).into(), 80));
        let (next, redirect) = if hook == Hook::Xdp { (2, 3) } else { (u32::MAX, 7) };
        let mut found = Packets::default();
        let mut time = |tuple, wanted, packets| {
            let (returned, took) = programs.time(hook, ifindex, &frame(tuple), packets)?;
            ensure!(returned == wanted, "{hook:?} returned {returned}, not {wanted}");
            Ok(took.as_secs_f64() * 1e9)
        };
        for nth in 0..count + 5 {
            let first = time(request, redirect, FIRST)?;
            let all = time(request, redirect, HOPS)?;
            let foreign = time(other, next, HOPS)?;
            if nth >= 5 {
                found.forwarded.push(all);
                let (first, all) = (first * f64::from(FIRST), all * f64::from(HOPS));
                found.further.push((all - first) / f64::from(HOPS - FIRST));
                found.foreign.push(foreign);
            }
        }
        Ok(found)
    })
}

fn tuple(source: (IpAddr, u16), destination: (IpAddr, u16)) -> Tuple {
    Tuple {
        source: source.0.into(),
        destination: destination.0.into(),
        source_port: Be16::from_host(source.1),
        destination_port: Be16::from_host(destination.1),
        protocol: TCP,
        pad: [0; 3],
    }
}

/// Microseconds of `connect(2)` over the loopback device, in blocks: one after the other.
#[derive(Debug, Default)]
pub struct Connects {
    /// To the endpoint, by a socket that no program sees.
    pub without: Vec<Vec<f64>>,
    /// To the endpoint, by a socket that the programs see.
    pub direct: Vec<Vec<f64>>,
    /// To the Service.
    pub service: Vec<Vec<f64>>,
}

/// Of each kind `blocks` blocks of `length` connects, interleaved.
///
/// # Errors
/// The programs do not load or attach, or a connection fails.
pub fn connects(services: u32, blocks: usize, length: usize) -> Result<Connects> {
    let cgroup = ClusterCgroup::create(true)?;
    let inside = cgroup.child("inside")?;
    in_netns(|| {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8080))?;
        // Longer than a block is: who accepts does not disturb who connects more than needed.
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
        thread::spawn(move || listener.incoming().for_each(drop));
        let mut programs = filled(services)?;
        let _attached = programs.attach_sockets(&inside)?;
        let direct = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080);
        let service = SocketAddrV4::new(vip(services / 2), 80);
        let mut found = Connects::default();
        for nth in 0..blocks + 1 {
            for (target, cgroup, samples) in [
                (direct, None, &mut found.without),
                (direct, Some(&inside), &mut found.direct),
                (service, Some(&inside), &mut found.service),
            ] {
                let block = thread::scope(|scope| {
                    let block = || {
                        if let Some(cgroup) = cgroup {
                            // 0 is this thread.
                            std::fs::write(cgroup.join("cgroup.threads"), "0")?;
                        }
                        (0..length + 20).map(|_| one_connect(target)).collect::<Result<Vec<_>>>()
                    };
                    scope.spawn(block).join().unwrap_or_else(|e| std::panic::resume_unwind(e))
                })
                .with_context(|| target.to_string())?;
                if nth > 0 {
                    samples.push(block.into_iter().skip(20).collect());
                }
            }
        }
        Ok(found)
    })
}

fn one_connect(target: SocketAddrV4) -> Result<f64> {
    let client = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Closed by a reset, it leaves nothing behind that holds a port.
    setsockopt(&client, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?;
    let address = SockaddrIn::from(target);
    let start = Instant::now();
    connect(client.as_raw_fd(), &address)?;
    Ok(start.elapsed().as_secs_f64() * 1e6)
}
