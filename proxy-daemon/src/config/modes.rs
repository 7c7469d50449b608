//! Flags of one mode, given in the other: accepted, and said once in the log.

use super::build::Problems;
use super::flags::Flags;
use super::{Config, DirectServerReturn, MapSizes, ProxyMode, Selection, Xdp};

/// Those that were given another value than their default, which has no effect.
pub(super) fn notes(flags: &Flags, config: &Config, problems: &Problems) -> Vec<String> {
    if config.cleanup {
        return Vec::new();
    }
    let idle: Vec<(&'static str, &str, bool)> = match config.proxy_mode {
        ProxyMode::Ipvs => of_ebpf(flags, config),
        ProxyMode::Ebpf => of_ipvs(flags, config),
    };
    let other = match config.proxy_mode {
        ProxyMode::Ipvs => ProxyMode::Ebpf,
        ProxyMode::Ebpf => ProxyMode::Ipvs,
    };
    idle.into_iter()
        .filter(|(.., set)| *set)
        .map(|(flag, value, _)| {
            format!("{}={value} has no effect: it is {other} mode's", problems.name_of(flag))
        })
        .collect()
}

/// Except `--ipvs-exclude-cidrs`, which ebpf mode heeds when it takes a node over from IPVS.
fn of_ipvs<'a>(flags: &'a Flags, config: &Config) -> Vec<(&'static str, &'a str, bool)> {
    let (flags, bit, ipvs) = (&flags.ipvs, &flags.traffic.iptables_masquerade_bit, &config.ipvs);
    vec![
        ("--ipvs-scheduler", flags.ipvs_scheduler.as_str(), ipvs.scheduler != "rr"),
        ("--ipvs-strict-arp", &flags.ipvs_strict_arp, ipvs.strict_arp),
        ("--ipvs-tcp-timeout", &flags.ipvs_tcp_timeout, ipvs.tcp_timeout.is_some()),
        ("--ipvs-tcpfin-timeout", &flags.ipvs_tcpfin_timeout, ipvs.tcp_fin_timeout.is_some()),
        ("--ipvs-udp-timeout", &flags.ipvs_udp_timeout, ipvs.udp_timeout.is_some()),
        ("--iptables-masquerade-bit", bit, config.masquerade.bit != 14),
    ]
}

/// Except `--bpf-root`, where ipvs mode looks for what ebpf mode has left.
fn of_ebpf<'a>(flags: &'a Flags, config: &Config) -> Vec<(&'static str, &'a str, bool)> {
    let flags = &flags.host;
    vec![
        ("--cgroup-root", flags.cgroup_root.as_str(), config.cgroup_root.is_some()),
        ("--socket-opt-out", &flags.socket_opt_out, !config.socket_opt_outs.is_empty()),
        ("--devices", &flags.devices, !config.devices.is_empty()),
        ("--xdp", &flags.xdp, config.xdp != Xdp::Off),
        ("--ebpf-map-sizes", &flags.ebpf_map_sizes, config.map_sizes != MapSizes::default()),
        ("--ebpf-map-limits", &flags.ebpf_map_limits, config.map_limits != MapSizes::LIMITS),
        ("--ebpf-selection", &flags.ebpf_selection, config.selection != Selection::Hash),
        (
            "--direct-server-return",
            &flags.direct_server_return,
            config.direct_server_return != DirectServerReturn::Off,
        ),
        (
            "--direct-server-return-port",
            &flags.direct_server_return_port,
            config.direct_server_return_port != 6081,
        ),
    ]
}
