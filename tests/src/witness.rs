//! What can be seen of a connection while it is without an answer: for losses so rare that nobody
//! looks when one comes.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::net::if_::if_indextoname;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket,
};
use proxy_daemon::dataplane::ebpf::Tables;
use proxy_ebpf::layout::LAYOUT_VERSION;
use proxy_ebpf::order::Be16;
use proxy_ebpf::parse::TCP;
use proxy_ebpf::verdict::Reason;

use crate::cluster::Host;

/// For the packets that a client sends again, a second apart.
const LONG_ENOUGH: Duration = Duration::from_millis(2500);
const POLL: Duration = Duration::from_millis(5);
/// Packets shown of one place.
const ENOUGH: usize = 60;

/// Looks at some hosts, in the tables of their kernel and at what passes their devices, and into the
/// maps of an ebpf daemon.
#[derive(Debug, Clone)]
pub struct Witness {
    hosts: Arc<Vec<(String, File)>>,
    maps: Option<PathBuf>,
}

impl Witness {
    /// # Errors
    /// A host's network namespace cannot be opened.
    pub fn of(hosts: &[&Host]) -> Result<Self> {
        let open = |host: &&Host| {
            let path = host.netns_path();
            let file = File::open(&path).with_context(|| path)?;
            Ok((host.name().to_owned(), file))
        };
        let hosts: Result<Vec<_>> = hosts.iter().map(open).collect();
        Ok(Self { hosts: Arc::new(hosts?), maps: None })
    }

    /// Into the maps below this `--bpf-root`, too.
    #[must_use]
    pub fn with_maps(self, root: &Path) -> Self {
        let maps = root.join(format!("proxy-daemon/v{LAYOUT_VERSION}/maps"));
        Self { maps: Some(maps), ..self }
    }

    /// Begins to look for what has to do with the port of a client's connection, and with ports
    /// that it is found to have been given on its way.
    #[must_use]
    pub fn look(&self, own: SocketAddr) -> JoinHandle<String> {
        let witness = self.clone();
        thread::spawn(move || {
            let report = witness.report(own.port());
            format!("without an answer, from {own}:\n{report}")
        })
    }

    fn report(&self, port: u16) -> String {
        let mut ports = BTreeSet::from([port]);
        let mut text = self.maps.as_deref().map_or_else(String::new, |maps| {
            programs(maps, port).unwrap_or_else(|error| format!("the maps: {error:#}\n"))
        });
        // Translated, the connection may have another port.
        for (_, netns) in self.hosts.iter() {
            let lines = at(netns, || Ok(tracked(&ports))).unwrap_or_default();
            ports.extend(lines.iter().filter_map(|line| answered_at(line)));
        }
        let _ = writeln!(text, "ports {ports:?}");
        thread::scope(|scope| {
            let looks: Vec<_> = self
                .hosts
                .iter()
                .map(|(name, netns)| (name, scope.spawn(|| at(netns, || host(&ports)))))
                .collect();
            for (name, look) in looks {
                let found = match look.join() {
                    Ok(Ok(found)) => found,
                    Ok(Err(error)) => format!("{error:#}\n"),
                    Err(_) => "the look panicked\n".to_owned(),
                };
                let _ = writeln!(text, "{name}:\n{found}");
            }
        });
        text
    }
}

/// On a thread of its own, in this namespace.
fn at<T: Send>(netns: &File, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        inside.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
    })
}

/// Flows of this port, and what was dropped so far.
fn programs(maps: &Path, port: u16) -> Result<String> {
    let tables = Tables::open_at(|name| maps.join(name))?;
    let mut text = String::new();
    for reason in Reason::ALL {
        let count = tables.drops(reason)?;
        if count > 0 {
            writeln!(text, "dropped {}: {count}", reason.name())?;
        }
    }
    let port = Be16::from_host(port);
    for (key, flow) in tables.flows()? {
        let ports = [key.source_port, key.destination_port, flow.to.source_port];
        if ports.contains(&port) || flow.to.destination_port == port {
            writeln!(text, "flow {key:?}: {flow:?}")?;
        }
    }
    Ok(text)
}

/// Entries of connection tracking; of a thread's own namespace, unlike `/proc/net`.
fn tracked(ports: &BTreeSet<u16>) -> Vec<String> {
    lines("nf_conntrack", |line| ports.iter().any(|port| line.contains(&format!("port={port} "))))
}

/// Where the answers of a tracked connection go to: the last port of the line.
fn answered_at(line: &str) -> Option<u16> {
    line.rsplit_once(" dport=")?.1.split_whitespace().next()?.parse().ok()
}

fn lines(file: &str, holds: impl Fn(&str) -> bool) -> Vec<String> {
    let text = fs::read_to_string(Path::new("/proc/thread-self/net").join(file));
    text.unwrap_or_default().lines().filter(|line| holds(line)).map(ToOwned::to_owned).collect()
}

/// What this namespace's kernel says at the beginning and at the end, and packets in between.
fn host(ports: &BTreeSet<u16>) -> Result<String> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let all = SockProtocol::EthAll;
    let capture = socket(AddressFamily::Packet, SockType::Datagram, flags, all)?;
    let mut text = String::new();
    let tables = |text: &mut String| {
        let socket = |line: &str| ports.iter().any(|port| line.contains(&format!(":{port:04X} ")));
        let found =
            [tracked(ports), lines("tcp", socket), lines("tcp6", socket), lines("arp", |_| true)];
        for line in found.concat() {
            let _ = writeln!(text, "  {}", line.trim());
        }
    };
    tables(&mut text);
    let begun = Instant::now();
    let mut packets = 0;
    let mut buffer = [0; 128];
    while begun.elapsed() < LONG_ENOUGH {
        match recvfrom::<LinkAddr>(capture.as_raw_fd(), &mut buffer) {
            Ok((length, from)) => {
                let Some(packet) = packet(&buffer[..length.min(buffer.len())], ports) else {
                    continue;
                };
                packets += 1;
                if packets <= ENOUGH {
                    let index = from.and_then(|from| u32::try_from(from.ifindex()).ok());
                    let device = index.and_then(|index| if_indextoname(index).ok());
                    writeln!(text, "  {:?} {device:?} {packet}", begun.elapsed())?;
                }
            }
            Err(Errno::EAGAIN) => thread::sleep(POLL),
            Err(errno) => return Err(errno).context("a packet socket"),
        }
    }
    writeln!(text, "  {packets} packets; then")?;
    tables(&mut text);
    Ok(text)
}

/// A packet of TCP from or to one of these ports, in words.
fn packet(packet: &[u8], ports: &BTreeSet<u16>) -> Option<String> {
    let (protocol, start, source, destination) = match packet.first()? >> 4 {
        4 => {
            let address =
                |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            (*packet.get(9)?, usize::from(packet[0] & 15) * 4, address(12)?, address(16)?)
        }
        6 => {
            let address = |at: usize| {
                Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?))
            };
            (*packet.get(6)?, 40, address(8)?, address(24)?)
        }
        _ => return None,
    };
    let header = packet.get(start..start + 14)?;
    let number = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    if protocol != TCP || !(ports.contains(&number(0)) || ports.contains(&number(2))) {
        return None;
    }
    let [from, to] = [SocketAddr::new(source, number(0)), SocketAddr::new(destination, number(2))];
    let sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    Some(format!("{from} to {to}, flags {:#04x}, sequence {sequence}", header[13]))
}

#[cfg(test)]
mod tests {
    use proxy_ebpf::fake::frames::Frame;
    use proxy_ebpf::layout::Tuple;

    use super::*;

    #[test]
    fn the_port_that_a_connection_was_given_is_found() {
        let line = "ipv4 2 tcp 6 59 ESTABLISHED src=10.5.0.3 dst=10.6.0.2 sport=40000 dport=8080 \
                    src=10.6.0.2 dst=10.5.0.3 sport=8080 dport=10642 [ASSURED] mark=0 use=2";
        assert_eq!(answered_at(line), Some(10_642));
        assert_eq!(answered_at("ipv4 2 icmp 1 29 src=10.5.0.3 dst=10.6.0.2 type=8"), None);
    }

    #[test]
    fn packets_are_told_by_their_ports() {
        for (source, destination) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
            let address = |text: &str| text.parse::<IpAddr>().unwrap();
            let tuple = Tuple {
                source: address(source).into(),
                destination: address(destination).into(),
                source_port: Be16::from_host(40_000),
                destination_port: Be16::from_host(80),
                protocol: TCP,
                pad: [0; 3],
            };
            let bytes = Frame::new(tuple, b"x").packet();
            let found = packet(&bytes, &BTreeSet::from([40_000])).unwrap();
            let from = SocketAddr::new(address(source), 40_000);
            let to = SocketAddr::new(address(destination), 80);
            assert!(found.starts_with(&format!("{from} to {to}, flags ")), "{found}");
            assert!(packet(&bytes, &BTreeSet::from([40_001])).is_none());
        }
    }
}
