//! Building the eBPF data plane on the real kernel.

use std::path::Path;
use std::time::Duration;

use tracing::{info, warn};

use super::Fatal;
use crate::config::{Config, Xdp};
use crate::dataplane::ebpf::pins::Pins;
use crate::dataplane::ebpf::upgrade::{self, CONVERTERS, Upgrade};
use crate::dataplane::ebpf::{
    Capacity, EbpfConfig, EbpfPlane, FlowTable, Limit, Programs, SocketRelease, Tables, XdpMode,
    cgroup, object,
};
use crate::kernel::capabilities::{Capability, has};
use crate::kernel::links::NetlinkLinks;
use crate::kernel::namespace::own_cookie;
use crate::kernel::netlink::{Socket, Subsystem};
use crate::kernel::sockets::AllNamespaces;

/// How often flows that have timed out are removed. The table makes room by itself before;
/// this keeps the gauge honest and ports free.
const SWEEP: Duration = Duration::from_secs(30);

pub fn plane(config: &Config) -> Result<EbpfPlane, Fatal> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let cgroup = cgroup(config.cgroup_root.as_deref()).map_err(|e| text(&e))?;
    let pins = Pins::open(&config.bpf_root).map_err(|e| text(&e))?;
    let (sizes, limit) = (config.map_sizes, config.map_limits);
    let limit = Limit { frontends: limit.frontends, backends: limit.backends, slots: limit.slots };
    let capacity = Capacity {
        frontends: sizes.frontends,
        backends: sizes.backends,
        slots: sizes.slots,
        counted_frontends: limit.frontends,
        counted_backends: limit.backends,
        ..Capacity::default()
    };
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
    sweep(FlowTable::open(&pins).map_err(|e| text(&e))?)?;
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
    let namespace = own_cookie();
    if config.localhost_node_ports && namespace.is_none() {
        info!("node ports do not answer on 127.0.0.1: that takes a kernel from 5.14 on");
    }
    let peers = Tables::open(&pins).map_err(|e| text(&e))?;
    let sockets = SocketRelease::start(peers, AllNamespaces::at(Path::new("/proc")))
        .map_err(|error| format!("cannot start the thread for sockets: {error}"))?;
    let socket = Socket::open(Subsystem::Route).map_err(|e| text(&e))?;
    let detection = config.clone();
    let config = EbpfConfig {
        capacity,
        limit,
        upgrade,
        masquerade_all: config.masquerade.all,
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
        sysctl_root: config.sysctl_root.clone(),
        namespace,
    };
    Ok(EbpfPlane::new(config, programs, pins, Box::new(NetlinkLinks::new(socket)), sockets))
}

/// `--cleanup`.
pub fn cleanup(config: &Config) -> Result<(), Fatal> {
    for what in Pins::cleanup(&config.bpf_root).map_err(|error| error.to_string())? {
        info!("removed: {what}");
    }
    Ok(())
}

fn sweep(mut flows: FlowTable) -> Result<(), Fatal> {
    std::thread::Builder::new()
        .name("flows".into())
        .spawn(move || {
            loop {
                std::thread::sleep(SWEEP);
                if let Err(error) = flows.sweep() {
                    warn!(%error, "flows that have timed out stay for now");
                }
            }
        })
        .map(|_| ())
        .map_err(|error| format!("cannot start the thread for flows: {error}"))
}
