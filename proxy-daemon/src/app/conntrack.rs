//! The kernel's connection tracking, as the `--conntrack-*` flags want it.

use std::time::Duration;

use tracing::{info, warn};

use crate::config::Config;
use crate::kernel::sysctl::Sysctls;

/// Sets what is configured; what cannot be set is said and gone without, since a
/// container often may not and the node's own setting is then in force.
pub fn apply(config: &Config) {
    let sysctls = Sysctls::at(&config.sysctl_root);
    let cores =
        std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
    let conntrack = &config.conntrack;
    let seconds = |time: Option<Duration>| time.map(|time| time.as_secs().to_string());
    let settings = [
        ("net/netfilter/nf_conntrack_max", conntrack.max(cores).map(|max| max.to_string())),
        (
            "net/netfilter/nf_conntrack_tcp_timeout_established",
            seconds(conntrack.tcp_established_timeout),
        ),
        (
            "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
            seconds(conntrack.tcp_close_wait_timeout),
        ),
        (
            "net/netfilter/nf_conntrack_tcp_be_liberal",
            conntrack.tcp_be_liberal.then(|| "1".to_owned()),
        ),
        ("net/netfilter/nf_conntrack_udp_timeout", seconds(conntrack.udp_timeout)),
        ("net/netfilter/nf_conntrack_udp_timeout_stream", seconds(conntrack.udp_stream_timeout)),
    ];
    for (name, value) in settings {
        let Some(value) = value else { continue };
        match sysctls.set_to(name, &value) {
            Ok(true) => info!(sysctl = name, value, "set"),
            Ok(false) => {}
            Err(error) => warn!(%error, wanted = value, "going on without this sysctl"),
        }
    }
}
