//! Building the IPVS data plane on real sockets.

use std::path::PathBuf;

use crate::config::Config;
use crate::dataplane::ipvs::codec::SchedulerName;
use crate::dataplane::ipvs::{IpvsConfig, IpvsPlane, IpvsTraffic, Predecessor, ReadSeams, Seams};
use crate::dataplane::kubeproxy::Takeover;
use crate::kernel::conntrack::NetlinkConntrack;
use crate::kernel::links::NetlinkLinks;
use crate::kernel::netlink::{Socket, Subsystem};
use crate::kernel::sysctl::KernelVersion;
use crate::model::Family;

use super::kubeproxy::{leftovers, rival};
use super::{Fatal, ebpf};

/// Of the reading thread itself, so that it is the table of the right network namespace.
const TABLE: &str = "/proc/thread-self/net/ip_vs";

/// The plane, checked to be able to work.
pub fn plane(config: &Config, families: &[Family]) -> Result<IpvsPlane<Socket>, Fatal> {
    let mut plane = open(config, families, ebpf::remains(&config.bpf_root))?;
    plane.check().map_err(|error| error.to_string())?;
    Ok(plane)
}

/// What reads the counters, on sockets of its own.
pub fn traffic() -> Result<IpvsTraffic<Socket>, Fatal> {
    let socket = |subsystem| Socket::open(subsystem).map_err(|error| error.to_string());
    let (generic, netfilter) = (socket(Subsystem::Generic)?, socket(Subsystem::Netfilter)?);
    Ok(IpvsTraffic::new(generic, netfilter, PathBuf::from(TABLE)))
}

/// To take down what is there.
pub fn to_take_down(config: &Config) -> Result<IpvsPlane<Socket>, Fatal> {
    open(config, &Family::ALL, Box::new(|| true))
}

fn open(
    config: &Config,
    families: &[Family],
    predecessor: Predecessor,
) -> Result<IpvsPlane<Socket>, Fatal> {
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
        predecessor,
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
