//! The way of a flow's packets is remembered for a moment. What changes in the kernel's own
//! tables, or in ours, is followed all the same.

use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_daemon::dataplane::ebpf::Programs;
use proxy_ebpf::device::Hook;
use proxy_ebpf::fake::frames::{Frame, check};
use proxy_ebpf::layout::{
    Backend, BackendId, Config, Device, Flow, FrontendId, ServiceId, Timeouts, Tuple,
};
use proxy_ebpf::order::Be16;
use proxy_ebpf::parse::{TCP, UDP, tcp};

use super::packets::{DEVICE, FAMILIES, GATEWAY, MTU, Names, OWN, ip, link};
use super::{in_netns, load, older_than, run};

/// Of `fast::TICKS` where they are longest, at 100 a second, and as much again.
const VALID: Duration = Duration::from_millis(500);

const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 3];
const NEW: [u8; 6] = [2, 0, 0, 0, 0, 4];

/// A program at one hook, and a flow of one family and protocol that is sent on there.
struct Sender {
    programs: Programs,
    ifindex: u32,
    hook: Hook,
    names: Names,
    from: Tuple,
    to: Tuple,
}

/// What becomes of a packet.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// To this Ethernet address, as the flow says.
    Sent([u8; 6]),
    /// By the program, but not as the flow's packets are: turned back with an error.
    Answered,
    Passed,
    Dropped,
}

impl Sender {
    fn new(hook: Hook, names: Names, protocol: u8) -> Result<Self> {
        let ifindex = nix::net::if_::if_nametoindex(DEVICE)?;
        let tuple = |source: (&str, u16), destination: (&str, u16)| -> Result<Tuple> {
            Ok(Tuple {
                source: ip(source.0)?,
                destination: ip(destination.0)?,
                source_port: Be16::from_host(source.1),
                destination_port: Be16::from_host(destination.1),
                protocol,
                pad: [0; 3],
            })
        };
        let client = format!("{}7", names.clients);
        let backend = format!("{}5", names.backends);
        let from = tuple((&client, 40_000), (names.node, 80))?;
        let to = tuple((names.node, 50_001), (&backend, 8080))?;
        let mut sender = Self { programs: load()?, ifindex, hook, names, from, to };
        let tables = sender.programs.tables();
        tables.set_config(Config {
            port_low: 50_000,
            port_high: 65_535,
            timeouts: Timeouts::default(),
            ..Config::default()
        })?;
        let device = Device { flags: Device::XDP_TX, mac: OWN, ..Device::default() };
        tables.set_device(ifindex, device)?;
        sender.backend(Backend::IN_USE)?;
        sender.flow(to)?;
        Ok(sender)
    }

    fn backend(&mut self, flags: u16) -> Result<()> {
        let (address, port) = (self.to.destination, self.to.destination_port);
        let backend = Backend { address, port, flags, service: ServiceId::new(1) };
        Ok(self.programs.tables().set_backend(BackendId(1), backend)?)
    }

    fn flow(&mut self, to: Tuple) -> Result<()> {
        self.flow_as(to, Flow::FORWARD | Flow::REPLIED)
    }

    /// Seen long ago.
    fn flow_as(&mut self, to: Tuple, flags: u32) -> Result<()> {
        let (backend, frontend) = (BackendId(1), FrontendId(1));
        let flow = Flow { to, seen: 1, backend, frontend, flags, pad: 0 };
        Ok(self.programs.tables().set_flow(&self.from, &flow)?)
    }

    fn is_seen(&mut self) -> Result<bool> {
        let flows = self.programs.tables().flows()?;
        Ok(flows.iter().any(|(key, flow)| *key == self.from && flow.seen > 1))
    }

    fn send(&mut self, payload: usize) -> Result<Seen> {
        self.send_as(payload, tcp::ACK)
    }

    fn send_as(&mut self, payload: usize, tcp_flags: u8) -> Result<Seen> {
        let frame = Frame { tcp_flags, ..Frame::new(self.from, &vec![7; payload]) };
        let mut bytes = frame.bytes();
        bytes[..6].copy_from_slice(&OWN);
        let (returned, made) = self.programs.test_run(self.hook, self.ifindex, &bytes)?;
        let (pass, drop) = if self.hook == Hook::Xdp { (2, 1) } else { (u32::MAX, 2) };
        if returned == pass {
            ensure!(made == bytes, "changed, and passed");
            return Ok(Seen::Passed);
        }
        if returned == drop {
            return Ok(Seen::Dropped);
        }
        check(&made).map_err(anyhow::Error::msg)?;
        let ttl = if self.hook == Hook::Egress { frame.ttl } else { frame.ttl - 1 };
        let expected = Frame { ttl, ..frame.with(self.to) }.bytes();
        let (receiver, rest) = made.split_first_chunk::<6>().context("no frame")?;
        if rest[6..] == expected[12..] {
            ensure!(rest[..6] == OWN, "from {:02x?}", &rest[..6]);
            return Ok(Seen::Sent(*receiver));
        }
        Ok(Seen::Answered)
    }

    /// Now, and again at once, when the way is known.
    fn sends(&mut self, payload: usize, expected: &Seen, what: &str) -> Result<()> {
        for nth in ["first", "second"] {
            let seen = self.send(payload)?;
            let (hook, protocol) = (self.hook, self.from.protocol);
            ensure!(
                seen == *expected,
                "{what}, {hook:?}, {protocol}, {}: the {nth} is {seen:?}, not {expected:?}",
                self.names.node
            );
        }
        Ok(())
    }
}

fn hex(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn neighbour(address: &str, mac: [u8; 6]) -> Result<()> {
    run("ip", &["neigh", "replace", address, "lladdr", &hex(mac), "dev", DEVICE])
}

fn route(names: Names, gateway: &str, mtu: u16) -> Result<()> {
    let family = if names.bits == 0 { "-6" } else { "-4" };
    let mtu = mtu.to_string();
    let to = ["route", "replace", "default", "via", gateway, "dev", DEVICE];
    // One that is not locked the kernel does not heed where it forwards IPv4.
    let mtu = ["mtu", "lock", &mtu];
    run("ip", &[&[family][..], &to[..], &mtu[..]].concat())
}

/// Another gateway of the same network.
fn other_gateway(names: Names) -> Result<String> {
    let address: IpAddr = ip(names.gateway)?.into();
    Ok(match address {
        IpAddr::V4(_) => "192.0.2.9".to_owned(),
        IpAddr::V6(_) => "2001:db8::9".to_owned(),
    })
}

/// A neighbour that moves, another gateway, a smaller MTU: each followed a moment later. An
/// endpoint that is gone and another flow of the same tuple: at once.
///
/// # Errors
/// The change that was not followed.
pub fn follows_changes() -> Result<()> {
    in_netns(|| {
        link()?;
        // Before kernel 5.14 a run at XDP cannot be told its device.
        let xdp = (!older_than(5, 14)?).then_some(Hook::Xdp);
        for hook in xdp.into_iter().chain([Hook::Ingress, Hook::Egress]) {
            for names in FAMILIES {
                neighbour(&other_gateway(names)?, OTHER)?;
                let mut senders = Vec::new();
                for protocol in [TCP, UDP] {
                    senders.push(Sender::new(hook, names, protocol)?);
                }
                network(&mut senders, names)?;
                for sender in &mut senders {
                    flows(sender)?;
                }
            }
        }
        Ok(())
    })
}

fn network(senders: &mut [Sender], names: Names) -> Result<()> {
    let other = other_gateway(names)?;
    let mut all = |payload, expected: &Seen, what: &str| {
        senders.iter_mut().try_for_each(|sender| sender.sends(payload, expected, what))
    };
    all(1200, &Seen::Sent(GATEWAY), "as it was")?;
    neighbour(names.gateway, NEW)?;
    thread::sleep(VALID);
    all(1200, &Seen::Sent(NEW), "the neighbour has another address")?;
    route(names, &other, MTU)?;
    thread::sleep(VALID);
    all(1200, &Seen::Sent(OTHER), "another gateway")?;
    route(names, &other, 1280)?;
    thread::sleep(VALID);
    all(200, &Seen::Sent(OTHER), "short enough")?;
    for sender in &mut *senders {
        let long = sender.send(1400)?;
        let expected = if sender.hook == Hook::Xdp { Seen::Passed } else { Seen::Answered };
        ensure!(long == expected, "{:?}: longer than the route takes: {long:?}", sender.hook);
        ensure!(sender.send(200)? == Seen::Sent(OTHER), "short ones go on");
    }
    route(names, names.gateway, MTU)?;
    neighbour(names.gateway, GATEWAY)?;
    thread::sleep(VALID);
    Ok(())
}

/// A flow whose packets go the short way is known to live all the same, and so is one of replies
/// that are left alone where they come in.
fn lives(sender: &mut Sender) -> Result<()> {
    sender.flow(sender.to)?;
    ensure!(sender.send(10)? == Seen::Sent(GATEWAY) && sender.is_seen()?, "sent on, and not seen");
    if sender.hook == Hook::Ingress {
        sender.flow_as(sender.to, Flow::REPLY | Flow::REPLIED)?;
        ensure!(sender.send(10)? == Seen::Passed && sender.is_seen()?, "left alone, and not seen");
        sender.flow(sender.to)?;
    }
    Ok(())
}

/// What is in our own tables counts for the next packet.
fn flows(sender: &mut Sender) -> Result<()> {
    sender.sends(10, &Seen::Sent(GATEWAY), "back again")?;
    lives(sender)?;
    let first = sender.to;
    let port = Be16::from_host(50_002);
    sender.to = Tuple { source_port: port, ..first };
    sender.flow(sender.to)?;
    sender.sends(10, &Seen::Sent(GATEWAY), "another flow")?;
    sender.to = first;
    sender.flow(first)?;
    sender.sends(10, &Seen::Sent(GATEWAY), "the first one")?;
    if sender.from.protocol == UDP {
        sender.backend(0)?;
        // No frontend has that address: the datagram is nobody's now.
        sender.sends(10, &Seen::Passed, "its endpoint is gone")?;
        ensure!(sender.programs.tables().flows()?.is_empty(), "its flow is still there");
    } else {
        // It ends, and all but a new connection goes on to be acknowledged.
        let end = sender.send_as(10, tcp::ACK | tcp::RST)?;
        ensure!(end == Seen::Sent(GATEWAY), "its end: {end:?}");
        sender.sends(10, &Seen::Sent(GATEWAY), "after its end")?;
        let flows = sender.programs.tables().flows()?;
        ensure!(flows.iter().any(|(_, flow)| flow.flags & Flow::RESET != 0), "{flows:?}");
    }
    Ok(())
}
