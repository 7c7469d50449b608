//! Building the eBPF data plane on the real kernel.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use proxy_ebpf::layout::Timeouts;
use tracing::{info, warn};

use super::kubeproxy::{handover, leftovers, rival};
use super::{Fatal, Parts};
use crate::config::{Config, DirectServerReturn, Xdp};
use crate::dataplane::ebpf::pins::Pins;
use crate::dataplane::ebpf::upgrade::{self, CONVERTERS, Upgrade};
use crate::dataplane::ebpf::{
    Capacity, DirectReturn, EbpfConfig, EbpfPlane, EbpfTraffic, FlowTable, LAYOUT_VERSION, Limit,
    LoadError, Programs, SocketRelease, Tables, TcHook, XdpMode, cgroup, check_capabilities,
    object,
};
use crate::dataplane::ipvs::Predecessor;
use crate::dataplane::kubeproxy::Takeover;
use crate::kernel::capabilities::{Capability, has};
use crate::kernel::links::NetlinkLinks;
use crate::kernel::namespace::own_cookie;
use crate::kernel::netdev::GenericNetdev;
use crate::kernel::netlink::{Socket, Subsystem};
use crate::kernel::sockets::AllNamespaces;

/// What can be told before anything is started, so that a daemon which cannot work ends at once.
pub fn check(config: &Config) -> Result<(), Fatal> {
    check_capabilities().map_err(|error| error.to_string())?;
    cgroup(config.cgroup_root.as_deref()).map(drop).map_err(|error| error.to_string())
}

/// The plane with all that belongs to it.
pub fn plane(config: &Config) -> Result<Parts<EbpfPlane>, Fatal> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let cgroup = cgroup(config.cgroup_root.as_deref()).map_err(|e| text(&e))?;
    let pins = Pins::open(&config.bpf_root).map_err(|e| text(&e))?;
    let (capacity, limit) = sizes(config);
    let object = object().map_err(|e| text(&e))?;
    upgrade::take_over(&pins).map_err(|e| text(&e))?;
    // They may have grown.
    let capacity = capacity.at_least(&pins).map_err(|e| text(&e))?;
    let mut programs = Programs::load_pinned(&object, capacity, &pins).map_err(|e| text(&e))?;
    let grown = programs.settle(&pins).map_err(|e| text(&e))?;
    if !grown.is_empty() {
        info!(maps = ?grown, "larger than those of the daemon before");
    }
    let upgrade = Upgrade::open(&pins, CONVERTERS).map_err(|e| text(&e))?;
    let flows = FlowTable::open(&pins, timeouts(config)).map_err(|e| text(&e))?;
    let remembered = flows.remembered();
    sweep(flows)?;
    warn_of_namespaces();
    let namespace = own_cookie();
    if config.localhost_node_ports && namespace.is_none() {
        info!("node ports do not answer on 127.0.0.1: that takes a kernel from 5.14 on");
    }
    let peers = Tables::open(&pins).map_err(|e| text(&e))?;
    let sockets = SocketRelease::start(peers, AllNamespaces::at(Path::new("/proc")))
        .map_err(|error| format!("cannot start the thread for sockets: {error}"))?;
    let traffic = EbpfTraffic::open(&pins).map_err(|e| text(&e))?;
    let features = features(config, &programs, &traffic, &cgroup).map_err(|e| text(&e))?;
    info!(?features, "what the kernel can do decided");
    let socket = Socket::open(Subsystem::Route).map_err(|e| text(&e))?;
    let (takeover, handing_over) = match takeover(config) {
        Ok((takeover, going_on)) => (Some(takeover), going_on),
        // A kernel without netfilter has nothing of another proxy's.
        Err(error) => {
            warn!(error, "what another proxy left is not looked for");
            (None, Arc::default())
        }
    };
    let detection = config.clone();
    let config = EbpfConfig {
        capacity,
        limit,
        upgrade,
        masquerade_all: config.masquerade.all,
        selection: config.selection,
        timeouts: timeouts(config),
        local_detection: Box::new(move |node| detection.local_detect(node)),
        cgroup,
        devices: config.devices.clone(),
        opt_outs: config.socket_opt_outs.clone(),
        xdp: match config.xdp {
            Xdp::Off => None,
            Xdp::Auto => Some(XdpMode::Auto),
            Xdp::Native => Some(XdpMode::Native),
            Xdp::Generic => Some(XdpMode::Generic),
        },
        direct: direct_return(config),
        sysctl_root: config.sysctl_root.clone(),
        namespace,
        remembered,
        handing_over,
    };
    let generic = Socket::open(Subsystem::Generic).map_err(|e| text(&e))?;
    let links = Box::new(NetlinkLinks::new(socket));
    let netdev = Box::new(GenericNetdev::new(generic));
    let plane = EbpfPlane::new(config, programs, pins, (links, netdev), sockets, takeover);
    Ok(Parts { plane, traffic: Box::new(traffic), features })
}

/// What is asked of the kernel's connection tracking is asked of ours.
fn timeouts(config: &Config) -> Timeouts {
    let whole = Timeouts::default();
    let or = |asked: Option<Duration>, usual| {
        asked.map_or(usual, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX))
    };
    let asked = &config.conntrack;
    Timeouts {
        tcp_established: or(asked.tcp_established_timeout, whole.tcp_established),
        udp: or(asked.udp_timeout, whole.udp),
        udp_replied: or(asked.udp_stream_timeout, whole.udp_replied),
        ..whole
    }
}

/// What the maps have room for, and what they may grow to.
fn sizes(config: &Config) -> (Capacity, Limit) {
    let (sizes, limit) = (config.map_sizes, config.map_limits);
    let limit = Limit { frontends: limit.frontends, backends: limit.backends, slots: limit.slots };
    let capacity = Capacity {
        frontends: sizes.frontends,
        backends: sizes.backends,
        slots: sizes.slots,
        counted_frontends: limit.frontends,
        counted_backends: limit.backends,
        sockets: sizes.sockets.unwrap_or(Capacity::default().sockets),
        ..Capacity::default()
    };
    (capacity.with_flows(sizes.flows.unwrap_or_else(|| default_flows(config))), limit)
}

fn warn_of_namespaces() {
    let missing: Vec<&str> =
        [(Capability::SysAdmin, "CAP_SYS_ADMIN"), (Capability::SysPtrace, "CAP_SYS_PTRACE")]
            .into_iter()
            .filter_map(|(capability, name)| (!has(capability)).then_some(name))
            .collect();
    if !missing.is_empty() {
        warn!(
            ?missing,
            "UDP sockets of pods that are connected to an endpoint will not be ended when it goes: \
             other network namespaces cannot be entered"
        );
    }
}

fn direct_return(config: &Config) -> DirectReturn {
    DirectReturn {
        accepts: config.direct_server_return != DirectServerReturn::Off,
        sends: config.direct_server_return == DirectServerReturn::On,
        port: config.direct_server_return_port,
    }
}

/// What was chosen of what this kernel can do, and where.
fn features(
    config: &Config,
    programs: &Programs,
    traffic: &EbpfTraffic,
    cgroup: &Path,
) -> Result<Vec<(&'static str, String)>, LoadError> {
    let either = |is: bool, [yes, no]: [&str; 2]| if is { yes } else { no }.to_owned();
    let tc = match Programs::tc_hook()? {
        TcHook::Tcx => "tcx",
        TcHook::Clsact => "clsact",
    };
    Ok(vec![
        ("tc", tc.to_owned()),
        ("refusal", either(programs.sets_retval(), ["set_retval", "port_0"])),
        ("map_reads", either(traffic.in_batches(), ["batch", "single"])),
        ("selection", config.selection.to_string()),
        ("xdp", config.xdp.to_string()),
        ("direct_server_return", config.direct_server_return.to_string()),
        (
            "localhost_node_ports",
            either(config.localhost_node_ports && own_cookie().is_some(), ["true", "false"]),
        ),
        ("cgroup_root", cgroup.display().to_string()),
        ("bpf_root", config.bpf_root.display().to_string()),
        ("map_layout", LAYOUT_VERSION.to_string()),
    ])
}

/// With whether connections go through another proxy's translation.
fn takeover(config: &Config) -> Result<(Takeover, Arc<AtomicBool>), Fatal> {
    let handover = handover(config)?;
    let going_on = handover.going_on();
    Ok((Takeover::new(leftovers()?.with_handover(handover), Box::new(rival)), going_on))
}

/// In ipvs mode: ends ebpf mode's programs, which would go on sending clients to the endpoints of
/// then, once IPVS stands in their place.
pub fn remains(root: &Path) -> Predecessor {
    if Pins::any(root) {
        info!(at = %root.display(), "programs of ebpf mode are attached: they go when IPVS stands");
    } else if !Pins::mounted(root) {
        info!(
            at = %root.display(),
            "no BPF file system is seen: if ebpf mode ran on this node, its programs stay attached"
        );
    }
    let root = root.to_owned();
    Box::new(move || match Pins::cleanup(&root) {
        Ok(removed) => {
            if !removed.is_empty() {
                info!(pins = removed.len(), "removed ebpf mode's programs and maps");
            }
            true
        }
        Err(error) => {
            warn!(
                %error,
                "programs of ebpf mode go on sending clients to the endpoints of then; trying again \
                 at the next resync. End the daemon that is named, if one is, or let this one write \
                 to the BPF file system (--bpf-root={})", root.display()
            );
            false
        }
    })
}

/// As many as the kernel's conntrack takes on such a machine, when that is configured.
fn default_flows(config: &Config) -> u32 {
    /// What kube-proxy asks for at least, and what the kernel has on a machine of some size.
    const CONNTRACK: u32 = 131_072;
    let cores =
        std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
    let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    Capacity::default_flows(config.conntrack.max(cores).unwrap_or(CONNTRACK), memory.unwrap_or(0))
}

/// The machine's memory in bytes, of what `/proc/meminfo` says.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn sweep(mut flows: FlowTable) -> Result<(), Fatal> {
    std::thread::Builder::new()
        .name("flows".into())
        .spawn(move || {
            loop {
                std::thread::sleep(flows.period());
                if let Err(error) = flows.sweep() {
                    warn!(%error, "flows that have timed out stay for now");
                }
            }
        })
        .map(|_| ())
        .map_err(|error| format!("cannot start the thread for flows: {error}"))
}

#[cfg(test)]
mod tests {
    use super::total;

    #[test]
    fn the_machines_memory_is_read() {
        let text = "MemTotal:       24689764 kB\nMemFree:         1000000 kB\n";
        assert_eq!(total(text), Some(24_689_764 << 10));
        assert_eq!(total("MemFree: 1 kB\n"), None);
    }
}
