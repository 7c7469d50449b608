//! Building the IPVS data plane on real sockets.

use std::path::{Path, PathBuf};

use tracing::{debug, info};

use crate::config::Config;
use crate::dataplane::ipvs::codec::SchedulerName;
use crate::dataplane::ipvs::{IpvsConfig, IpvsPlane, IpvsTraffic, ReadSeams, Seams, Takeover};
use crate::dataplane::kubeproxy::Leftovers;
use crate::kernel::conntrack::NetlinkConntrack;
use crate::kernel::ipset::NetlinkIpSets;
use crate::kernel::links::NetlinkLinks;
use crate::kernel::listeners::Listeners;
use crate::kernel::netlink::{Socket, Subsystem};
use crate::kernel::sysctl::KernelVersion;
use crate::kernel::xtables::XTablesSockets;
use crate::model::Family;

use super::Fatal;

/// Of the reading thread itself, so that it is the table of the right network namespace.
const TABLE: &str = "/proc/thread-self/net/ip_vs";
const PROC_NET: &str = "/proc/thread-self/net";
/// What iptables commands lock. A container sees the host's if it is mounted.
const XTABLES_LOCK: &str = "/run/xtables.lock";

/// The plane, checked to be able to work, and the index of its dummy link.
pub fn plane(config: &Config, families: &[Family]) -> Result<(IpvsPlane<Socket>, u32), Fatal> {
    let mut plane = open(config, families)?;
    let link = plane.check().map_err(|error| error.to_string())?;
    Ok((plane, link))
}

/// What reads the counters, on sockets of its own.
pub fn traffic() -> Result<IpvsTraffic<Socket>, Fatal> {
    let socket = |subsystem| Socket::open(subsystem).map_err(|error| error.to_string());
    let (generic, netfilter) = (socket(Subsystem::Generic)?, socket(Subsystem::Netfilter)?);
    Ok(IpvsTraffic::new(generic, netfilter, PathBuf::from(TABLE)))
}

/// `--cleanup`.
pub fn cleanup(config: &Config) -> Result<(), Fatal> {
    let mut plane = open(config, &Family::ALL)?;
    for what in plane.cleanup().map_err(|error| error.to_string())? {
        info!("{what}");
    }
    Ok(())
}

/// On sockets of their own: they are used by another thread than the engine's.
fn leftovers() -> Result<Leftovers, Fatal> {
    let netfilter = || Socket::open(Subsystem::Netfilter).map_err(|error| error.to_string());
    let xtables = XTablesSockets::open(Path::new(PROC_NET), Path::new(XTABLES_LOCK))
        .map_err(|error| format!("cannot open a socket: {error}"))?;
    let sets = NetlinkIpSets::new(netfilter()?, Path::new("/sys/module"));
    Ok(Leftovers::new(Box::new(netfilter()?), Box::new(xtables), Box::new(sets)))
}

/// kube-proxy listens on these unless told otherwise, and so do we. It has no other mark
/// that could be seen from a container: processes of the node are not visible there.
fn rival() -> Option<String> {
    let listeners = Listeners::at(Path::new("/proc"));
    for (port, what) in [(10256, "healthz"), (10249, "metrics")] {
        match listeners.held_by_others(port) {
            Ok(true) => {
                return Some(format!("another process listens on TCP port {port} ({what})"));
            }
            Ok(false) => {}
            Err(error) => debug!(%error, port, "cannot see who listens"),
        }
    }
    None
}

fn open(config: &Config, families: &[Family]) -> Result<IpvsPlane<Socket>, Fatal> {
    let socket = |subsystem| Socket::open(subsystem).map_err(|error| error.to_string());
    let seams = Seams {
        generic: socket(Subsystem::Generic)?,
        netfilter: socket(Subsystem::Netfilter)?,
        links: Box::new(NetlinkLinks::new(socket(Subsystem::Route)?)),
        conntrack: Box::new(NetlinkConntrack::new(socket(Subsystem::Netfilter)?)),
        kernel: KernelVersion::running().map_err(|error| error.to_string())?,
        reading: ReadSeams {
            generic: socket(Subsystem::Generic)?,
            netfilter: socket(Subsystem::Netfilter)?,
            links: Box::new(NetlinkLinks::new(socket(Subsystem::Route)?)),
            table: PathBuf::from(TABLE),
            table_reads: 0,
        },
        takeover: Takeover::new(leftovers()?, Box::new(rival)),
    };
    let scheduler = SchedulerName::new(&config.ipvs.scheduler)
        .map_err(|error| format!("--ipvs-scheduler: {error}"))?;
    let detection = config.clone();
    let plane = IpvsConfig {
        scheduler,
        families: families.to_vec(),
        masquerade_all: config.masquerade.all,
        masquerade_bit: config.masquerade.bit,
        local_detection: Box::new(move |node| detection.local_detect(node)),
        sysctl_root: config.sysctl_root.clone(),
        strict_arp: config.ipvs.strict_arp,
        tcp_timeout: config.ipvs.tcp_timeout,
        tcp_fin_timeout: config.ipvs.tcp_fin_timeout,
        udp_timeout: config.ipvs.udp_timeout,
        exclude_cidrs: config.ipvs.exclude_cidrs.clone(),
    };
    Ok(IpvsPlane::new(plane, seams))
}
