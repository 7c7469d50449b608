//! The kernel's connection tracking, as the `--conntrack-*` flags want it.

use std::time::Duration;

use tracing::{info, warn};

use crate::config::{Config, ProxyMode};
use crate::kernel::sysctl::Sysctls;

const MAX: &str = "net/netfilter/nf_conntrack_max";

/// In either mode, as kube-proxy does in all of its: sets what is configured; what cannot be set
/// is said and gone without, since a container often may not and the node's own setting is then in
/// force.
pub fn apply(config: &Config) {
    let sysctls = Sysctls::at(&config.sysctl_root);
    if config.proxy_mode == ProxyMode::Ebpf && sysctls.is_missing(MAX) {
        // Its connections are not the kernel's, which may track none; ipvs mode needs it.
        info!("the kernel tracks no connections here: nothing for --conntrack-* to set");
        return;
    }
    let cores =
        std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
    let conntrack = &config.conntrack;
    let seconds = |time: Option<Duration>| time.map(|time| time.as_secs().to_string());
    let settings = [
        (MAX, conntrack.max(cores).map(|max| max.to_string())),
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn either_mode_sets_what_is_asked_where_connections_are_tracked() {
        for mode in ["ipvs", "ebpf"] {
            let root = tempfile::tempdir().unwrap();
            let directory = root.path().join("net/netfilter");
            let config = Config::from_args(
                [
                    "proxy-daemon".to_owned(),
                    format!("--proxy-mode={mode}"),
                    format!("--sysctl-root={}", root.path().display()),
                    "--conntrack-max-per-core=1".to_owned(),
                    "--conntrack-min=5000".to_owned(),
                    "--conntrack-udp-timeout=30s".to_owned(),
                ],
                "a",
            )
            .unwrap();
            // Nothing is there, and nothing is made.
            apply(&config);
            assert!(!directory.exists());
            fs::create_dir_all(&directory).unwrap();
            let files = ["nf_conntrack_max", "nf_conntrack_udp_timeout"];
            for file in files {
                fs::write(directory.join(file), "1\n").unwrap();
            }
            apply(&config);
            let set = files.map(|file| fs::read_to_string(directory.join(file)).unwrap());
            assert_eq!(set, ["5000", "30"], "{mode}");
        }
    }
}
