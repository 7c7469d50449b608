//! Building the eBPF data plane on the real kernel.

use std::path::Path;
use std::time::Duration;

use tracing::{info, warn};

use super::Fatal;
use crate::config::{Config, Xdp};
use crate::dataplane::ebpf::pins::Pins;
use crate::dataplane::ebpf::{
    Capacity, EbpfConfig, EbpfPlane, FlowTable, Programs, SocketRelease, Tables, XdpMode, cgroup,
    object,
};
use crate::kernel::capabilities::{Capability, has};
use crate::kernel::links::NetlinkLinks;
use crate::kernel::namespace::own_cookie;
use crate::kernel::netdev::GenericNetdev;
use crate::kernel::netlink::{Socket, Subsystem};
use crate::kernel::sockets::AllNamespaces;

/// How often flows that have timed out are removed. The table makes room by itself before;
/// this keeps the gauge honest and ports free.
const SWEEP: Duration = Duration::from_secs(30);

pub fn plane(config: &Config) -> Result<EbpfPlane, Fatal> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let cgroup = cgroup(config.cgroup_root.as_deref()).map_err(|e| text(&e))?;
    let pins = Pins::open(&config.bpf_root).map_err(|e| text(&e))?;
    let sizes = config.map_sizes;
    let capacity = Capacity {
        frontends: sizes.frontends,
        backends: sizes.backends,
        slots: sizes.slots,
        ..Capacity::default()
    };
    let object = object().map_err(|e| text(&e))?;
    let programs = Programs::load_pinned(&object, capacity, &pins).map_err(|e| text(&e))?;
    let made = capacity.as_made(&pins).map_err(|e| text(&e))?;
    if made != capacity {
        warn!(?made, asked = ?capacity, "the maps keep the size they were made with until --cleanup");
    }
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
        capacity: made,
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
    let generic = Socket::open(Subsystem::Generic).map_err(|e| text(&e))?;
    let links = Box::new(NetlinkLinks::new(socket));
    let netdev = Box::new(GenericNetdev::new(generic));
    Ok(EbpfPlane::new(config, programs, pins, (links, netdev), sockets))
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
