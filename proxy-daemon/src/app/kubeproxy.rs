//! What another proxy left, on the real kernel.

use std::fs;
use std::path::Path;

use tracing::debug;

use super::{Fatal, ipvs};
use crate::config::Config;
use crate::dataplane::PlaneError;
use crate::dataplane::ipvs::LINK;
use crate::dataplane::kubeproxy::{Forwarding, Handover, Leftovers, Servers};
use crate::kernel::conntrack::NetlinkConntrack;
use crate::kernel::ipset::NetlinkIpSets;
use crate::kernel::listeners::Listeners;
use crate::kernel::netlink::{Socket, Subsystem};
use crate::kernel::xtables::XTablesSockets;

const PROC_NET: &str = "/proc/thread-self/net";
/// What iptables commands lock. A container sees the host's if it is mounted.
const XTABLES_LOCK: &str = "/run/xtables.lock";

/// On sockets of their own: they are used by another thread than the engine's.
pub fn leftovers() -> Result<Leftovers, Fatal> {
    let netfilter = || Socket::open(Subsystem::Netfilter).map_err(|error| error.to_string());
    let xtables = XTablesSockets::open(Path::new(PROC_NET), Path::new(XTABLES_LOCK))
        .map_err(|error| format!("cannot open a socket: {error}"))?;
    let sets = NetlinkIpSets::new(netfilter()?, Path::new("/sys/module"));
    Ok(Leftovers::new(Box::new(netfilter()?), Box::new(xtables), Box::new(sets)))
}

/// kube-proxy listens on these unless told otherwise, and so do we. It has no other mark
/// that could be seen from a container: processes of the node are not visible there.
pub fn rival() -> Option<String> {
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

/// For data planes besides IPVS.
pub fn handover(config: &Config) -> Result<Handover, Fatal> {
    let netfilter = || Socket::open(Subsystem::Netfilter).map_err(|error| error.to_string());
    let conntrack = Box::new(NetlinkConntrack::new(netfilter()?));
    let servers = Box::new(IpvsServers { config: config.clone() });
    Ok(Handover::new(Box::new(netfilter()?), conntrack, servers, config.drain_timeout))
}

/// Of kube-proxy's ipvs mode, and of ours.
struct IpvsServers {
    config: Config,
}

impl Servers for IpvsServers {
    /// Both have the link. The module is not loaded by looking.
    fn present(&mut self) -> bool {
        let net = Path::new(PROC_NET);
        let devices = fs::read_to_string(net.join("dev")).unwrap_or_default();
        let has_link = devices.lines().any(|line| {
            line.trim_start().strip_prefix(LINK).is_some_and(|rest| rest.starts_with(':'))
        });
        has_link && net.join("ip_vs").exists()
    }

    fn take_down(&mut self, forwarding: Forwarding) -> Result<Vec<String>, PlaneError> {
        let plane = ipvs::to_take_down(&self.config);
        plane.map_err(|error| PlaneError::new("IPVS", error))?.cleanup(forwarding)
    }
}
