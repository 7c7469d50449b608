//! `--cleanup`: what every mode has programmed, whichever mode is named.

use tracing::{info, warn};

use super::kubeproxy::{handover, leftovers, rival};
use super::{Fatal, ipvs};
use crate::config::Config;
use crate::dataplane::ebpf::pins::Pins;
use crate::dataplane::kubeproxy::Forwarding;

/// The programs first: what comes behind them then stands alone until it goes.
pub fn run(config: &Config) -> Result<(), Fatal> {
    let root = config.bpf_root.display();
    let removed = Pins::cleanup(&config.bpf_root).map_err(|error| {
        format!(
            "{error}. What ebpf mode has left stays, and so does all else: end the daemon that is \
             named, if one is; or run this as user 0 with the BPF file system mounted writable at \
             --bpf-root={root}"
        )
    })?;
    if !Pins::mounted(&config.bpf_root) {
        info!(
            "no BPF file system is seen at --bpf-root={root}: nothing of ebpf mode is looked for"
        );
    } else if removed.is_empty() {
        info!("nothing of ebpf mode is at --bpf-root={root}");
    }
    for what in removed {
        info!("removed: {what}");
    }
    let mut plane = match ipvs::to_take_down(config) {
        Ok(plane) => plane,
        // A kernel without netfilter has nothing else of ours.
        Err(error) => {
            warn!(error, "IPVS, and what another proxy left, is not looked for");
            return Ok(());
        }
    };
    for what in plane.cleanup(Forwarding::Remove).map_err(|error| error.to_string())? {
        info!("{what}");
    }
    // While kube-proxy is alive connections may need it.
    if rival().is_none() {
        let released = handover(config)?.release(&mut leftovers()?);
        released.map_err(|error| error.to_string())?;
    }
    Ok(())
}
