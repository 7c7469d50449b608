//! Building the eBPF data plane on the real kernel.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tracing::{info, warn};

use super::kubeproxy::{handover, leftovers, rival};
use super::{Fatal, NO_LINK};
use crate::config::{Config, Xdp};
use crate::dataplane::ebpf::pins::Pins;
use crate::dataplane::ebpf::{
    Capacity, EbpfConfig, EbpfPlane, FlowTable, Programs, SocketRelease, Tables, XdpMode, cgroup,
    object,
};
use crate::dataplane::ipvs::LINK;
use crate::dataplane::kubeproxy::Takeover;
use crate::kernel::capabilities::{Capability, has};
use crate::kernel::links::{Links as _, NetlinkLinks};
use crate::kernel::namespace::own_cookie;
use crate::kernel::netlink::{Socket, Subsystem};
use crate::kernel::sockets::AllNamespaces;

/// How often flows that have timed out are removed. The table makes room by itself before;
/// this keeps the gauge honest and ports free.
const SWEEP: Duration = Duration::from_secs(30);

/// The plane, and the index of the link whose addresses are not the node's: a proxy on IPVS may
/// have left one.
pub fn plane(config: &Config) -> Result<(EbpfPlane, u32), Fatal> {
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
    let mut links = NetlinkLinks::new(Socket::open(Subsystem::Route).map_err(|e| text(&e))?);
    let devices = links.devices().map_err(|e| text(&e))?;
    let link = devices.iter().find(|device| device.name == LINK).map_or(NO_LINK, |d| d.index);
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
        handing_over,
    };
    Ok((EbpfPlane::new(config, programs, pins, Box::new(links), sockets, takeover), link))
}

/// With whether connections go through another proxy's translation.
fn takeover(config: &Config) -> Result<(Takeover, Arc<AtomicBool>), Fatal> {
    let handover = handover(config)?;
    let going_on = handover.going_on();
    Ok((Takeover::new(leftovers()?.with_handover(handover), Box::new(rival)), going_on))
}

/// `--cleanup`.
pub fn cleanup(config: &Config) -> Result<(), Fatal> {
    for what in Pins::cleanup(&config.bpf_root).map_err(|error| error.to_string())? {
        info!("removed: {what}");
    }
    if let Some(reason) = rival() {
        info!("what kube-proxy made stays: {reason}");
        return Ok(());
    }
    let done = match (handover(config), leftovers()) {
        (Ok(mut handover), Ok(mut leftovers)) => handover.take_down(&mut leftovers),
        (Err(error), _) | (_, Err(error)) => {
            info!("what another proxy left is not looked for: {error}");
            return Ok(());
        }
    };
    for what in done.map_err(|error| error.to_string())? {
        info!("{what}");
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
