//! Text of the flags to typed values, every mistake collected.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;

use super::flags::{
    ConntrackFlags, Flags, IpvsFlags, ModeFlags, ServingFlags, SourceFlags, TrafficFlags,
};
use super::modes;
use super::value::{self, Expected};
use super::{
    Config, Conntrack, DetectLocal, DirectServerReturn, Ipvs, LogFormat, Logging, MapSizes,
    Masquerade, NodePortAddresses, ProxyMode, SeriesLimits, Serving, Source, Xdp,
};
use crate::model::{NodeName, Selection};

/// One value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// As the user wrote it: a flag with its dashes, or the path of a field.
    pub name: String,
    pub value: String,
    /// What would be accepted.
    pub expected: Expected,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={:?}: {}", self.name, self.value, self.expected)
    }
}

/// All of them, at least one when it is an error.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problems {
    pub list: Vec<Problem>,
    /// Field of a file by the flag that it stands for.
    fields: HashMap<&'static str, String>,
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.list.len();
        let flags = self.list.iter().filter(|problem| problem.name.starts_with("--")).count();
        let what = match flags {
            0 => "field",
            _ if flags == count => "flag",
            _ => "setting",
        };
        writeln!(f, "error: {count} {what}{} cannot be used:", if count == 1 { "" } else { "s" })?;
        for problem in &self.list {
            writeln!(f, "  {problem}")?;
        }
        f.write_str("proxy-daemon --help explains each flag.")
    }
}

impl Problems {
    pub(super) fn with_fields(fields: HashMap<&'static str, String>) -> Self {
        Self { list: Vec::new(), fields }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How the user wrote it.
    pub(super) fn name_of(&self, flag: &'static str) -> String {
        self.fields.get(flag).cloned().unwrap_or_else(|| flag.to_owned())
    }

    pub(super) fn add(&mut self, name: &str, value: &str, expected: impl Into<Expected>) {
        let name = self.fields.get(name).cloned().unwrap_or_else(|| name.to_owned());
        self.list.push(Problem { name, value: value.to_owned(), expected: expected.into() });
    }

    /// The parsed value, or a placeholder that is never used because a problem was noted.
    fn take<T: Default>(
        &mut self,
        flag: &'static str,
        raw: &str,
        parse: impl FnOnce(&str) -> Result<T, Expected>,
    ) -> T {
        parse(raw).unwrap_or_else(|expected| {
            self.add(flag, raw, expected);
            T::default()
        })
    }

    /// A timeout where 0 leaves the kernel's. The kernel counts in whole seconds.
    fn timeout(&mut self, flag: &'static str, raw: &str) -> Option<Duration> {
        let duration = self.take(flag, raw, |raw| {
            value::duration(raw).and_then(|duration| match duration.as_secs() {
                0 if !duration.is_zero() => {
                    Err("must be 0 (leave the kernel's) or at least 1s".to_owned())
                }
                seconds if u32::try_from(seconds).is_err() => {
                    Err("must be shorter than 136 years".to_owned())
                }
                _ => Ok(duration),
            })
        });
        (!duration.is_zero()).then_some(duration)
    }
}

/// `problems` may hold some already; what was noted on the way there goes into the result.
pub(super) fn build(
    flags: &Flags,
    hostname: &str,
    mut problems: Problems,
    notes: Vec<String>,
    mut warnings: Vec<String>,
) -> Result<Config, Problems> {
    let p = &mut problems;
    let cleanup = p.take("--cleanup", &flags.mode.cleanup, value::boolean);
    let proxy_mode = proxy_mode(p, &flags.mode, cleanup);
    // Where nothing is served nothing is masqueraded either.
    let mut idle = Vec::new();
    let doubts = if cleanup { &mut idle } else { &mut warnings };
    let (detect_local, cluster_cidrs) = local_detection(p, &flags.traffic, doubts);
    let mut config = Config {
        proxy_mode,
        cleanup,
        init_only: p.take("--init-only", &flags.mode.init_only, value::boolean),
        write_config_to: path(&flags.mode.write_config_to),
        files: [&flags.mode.config, &flags.mode.dataplane_config]
            .into_iter()
            .filter_map(|raw| path(raw))
            .collect(),
        source: source(p, &flags.source),
        node_name: node_name(p, &flags.source.hostname_override, hostname),
        cluster_cidrs,
        detect_local,
        bind_address: bind_address(p, &flags.traffic.bind_address),
        node_port_addresses: node_port_addresses(p, &flags.traffic.nodeport_addresses),
        localhost_node_ports: p.take(
            "--iptables-localhost-nodeports",
            &flags.traffic.iptables_localhost_nodeports,
            value::boolean,
        ),
        masquerade: masquerade(p, &flags.traffic),
        drain_timeout: p.take("--drain-timeout", &flags.traffic.drain_timeout, value::duration),
        ipvs: ipvs(p, &flags.ipvs),
        conntrack: conntrack(p, &flags.conntrack),
        serving: serving(p, &flags.serving),
        series: series(p, &flags.serving),
        logging: logging(p, &flags.serving),
        cgroup_root: path(&flags.host.cgroup_root),
        socket_opt_outs: list(&flags.host.socket_opt_out),
        devices: list(&flags.host.devices),
        xdp: p.take("--xdp", &flags.host.xdp, xdp),
        selection: p.take("--ebpf-selection", &flags.host.ebpf_selection, selection),
        direct_server_return: p.take(
            "--direct-server-return",
            &flags.host.direct_server_return,
            direct_server_return,
        ),
        direct_server_return_port: p.take(
            "--direct-server-return-port",
            &flags.host.direct_server_return_port,
            |raw| {
                let port = raw.parse::<u16>().ok().filter(|port| *port > 0);
                port.ok_or_else(|| "must be a port from 1 to 65535".to_owned())
            },
        ),
        map_sizes: p.take("--ebpf-map-sizes", &flags.host.ebpf_map_sizes, |raw| {
            map_sizes(raw, MapSizes::default(), true)
        }),
        map_limits: p.take("--ebpf-map-limits", &flags.host.ebpf_map_limits, |raw| {
            map_sizes(raw, MapSizes::LIMITS, false)
        }),
        bpf_root: p.take("--bpf-root", &flags.host.bpf_root, |raw| {
            path(raw).ok_or_else(|| "must be a directory, for example /sys/fs/bpf".to_owned())
        }),
        sysctl_root: p.take("--sysctl-root", &flags.host.sysctl_root, |raw| {
            path(raw).ok_or_else(|| "must be a directory, for example /proc/sys".to_owned())
        }),
        oom_score_adj: p.take("--oom-score-adj", &flags.host.oom_score_adj, |raw| {
            raw.parse::<i32>()
                .ok()
                .filter(|score| (-1000..=1000).contains(score))
                .ok_or_else(|| "must be a whole number from -1000 to 1000".to_owned())
        }),
        inert: Vec::new(),
        kube_proxy_mode: String::new(),
        flags: Vec::new(),
        notes,
        warnings,
    };
    if !problems.is_empty() {
        return Err(problems);
    }
    config.notes.extend(modes::notes(flags, &config, &problems));
    Ok(config)
}

fn xdp(raw: &str) -> Result<Xdp, Expected> {
    match raw {
        "off" => Ok(Xdp::Off),
        "auto" => Ok(Xdp::Auto),
        "native" => Ok(Xdp::Native),
        "generic" => Ok(Xdp::Generic),
        _ => Err("must be off, auto, native or generic".to_owned()),
    }
}

fn selection(raw: &str) -> Result<Selection, Expected> {
    match raw {
        "hash" => Ok(Selection::Hash),
        "maglev" => Ok(Selection::Maglev),
        "random" => Ok(Selection::Random),
        _ => Err("must be hash, maglev or random".to_owned()),
    }
}

fn direct_server_return(raw: &str) -> Result<DirectServerReturn, Expected> {
    match raw {
        "off" => Ok(DirectServerReturn::Off),
        "accept" => Ok(DirectServerReturn::Accept),
        "on" => Ok(DirectServerReturn::On),
        _ => Err("must be off, accept or on".to_owned()),
    }
}

/// What is not named is as in `sizes`. Not all maps grow: some have no limit but their size.
fn map_sizes(raw: &str, mut sizes: MapSizes, fixed: bool) -> Result<MapSizes, Expected> {
    for part in list(raw) {
        let parsed = part.split_once('=').and_then(|(name, size)| {
            let size = size.parse::<u32>().ok().filter(|size| (1..=1 << 26).contains(size))?;
            *match name {
                "frontends" => &mut sizes.frontends,
                "backends" => &mut sizes.backends,
                "slots" => &mut sizes.slots,
                "flows" if fixed => sizes.flows.insert(size),
                "sockets" if fixed => sizes.sockets.insert(size),
                _ => return None,
            } = size;
            Some(())
        });
        if parsed.is_none() {
            let more = if fixed { ",flows=N,sockets=N" } else { "" };
            return Err(format!(
                "must be like frontends=N,backends=N,slots=N{more}, N up to 67108864"
            ));
        }
    }
    Ok(sizes)
}

fn list(raw: &str) -> Vec<String> {
    raw.split(',').map(str::trim).filter(|one| !one.is_empty()).map(str::to_owned).collect()
}

fn path(raw: &str) -> Option<PathBuf> {
    (!raw.is_empty()).then(|| PathBuf::from(raw))
}

/// Whatever the mode, all modes' are cleaned up.
fn proxy_mode(p: &mut Problems, flags: &ModeFlags, cleanup: bool) -> ProxyMode {
    match flags.proxy_mode.as_str() {
        "" | "iptables" | "nftables" | "kernelspace" | "userspace" if cleanup => ProxyMode::Ipvs,
        "ipvs" => ProxyMode::Ipvs,
        "ebpf" => ProxyMode::Ebpf,
        other => {
            let what = match other {
                "iptables" | "nftables" | "kernelspace" | "userspace" => {
                    "is a mode of kube-proxy that does not exist here; choose ipvs or ebpf"
                }
                "" => "means iptables, which does not exist here; write ipvs or ebpf",
                _ => "must be ipvs or ebpf",
            };
            let of_file = !p.name_of("--proxy-mode").starts_with("--");
            let expected = if of_file && what.starts_with(['i', 'm']) && !what.starts_with("must") {
                format!("{what}, or leave it and give --proxy-mode=ipvs or --proxy-mode=ebpf")
            } else {
                what.to_owned()
            };
            p.add("--proxy-mode", other, expected);
            ProxyMode::Ipvs
        }
    }
}

fn source(p: &mut Problems, flags: &SourceFlags) -> Source {
    let api = Source::Api {
        kubeconfig: path(&flags.kubeconfig),
        master: (!flags.master.is_empty()).then(|| flags.master.clone()),
    };
    let Some(directory) = path(&flags.manifests) else {
        return api;
    };
    for (flag, value) in [("--kubeconfig", &flags.kubeconfig), ("--master", &flags.master)] {
        if !value.is_empty() {
            p.add(flag, value, "cannot be used with --manifests, which replaces the API server");
        }
    }
    Source::Manifests(directory)
}

/// As kubelet and kube-proxy do it: trimmed and in lower case, so that both sides of the
/// comparison with `endpoints[].nodeName` agree.
fn node_name(p: &mut Problems, override_: &str, hostname: &str) -> NodeName {
    let raw = if override_.trim().is_empty() { hostname } else { override_ };
    let name = raw.trim().to_lowercase();
    if name.is_empty() {
        p.add(
            "--hostname-override",
            override_,
            "must be given: the host has no name. It is metadata.name of this Node",
        );
    }
    NodeName::new(&name)
}

fn local_detection(
    p: &mut Problems,
    flags: &TrafficFlags,
    warnings: &mut Vec<String>,
) -> (DetectLocal, Vec<IpNetwork>) {
    let cidrs = p.take("--cluster-cidr", &flags.cluster_cidr, |raw| {
        let cidrs = value::cidrs(raw)?;
        let v4 = cidrs.iter().filter(|cidr| cidr.is_ipv4()).count();
        if v4 > 1 || cidrs.len() - v4 > 1 {
            return Err("must have at most one block of each address family, for example \
                        10.244.0.0/16,fd00:10:244::/56"
                .to_owned());
        }
        Ok(cidrs)
    });
    let bridge = p.take("--pod-bridge-interface", &flags.pod_bridge_interface, value::interface);
    let prefix =
        p.take("--pod-interface-name-prefix", &flags.pod_interface_name_prefix, value::interface);
    let mode = match flags.detect_local_mode.as_str() {
        "" | "ClusterCIDR" => {
            if flags.cluster_cidr.is_empty() {
                warnings.push(format!(
                    "{} is not set: with {}=ClusterCIDR no traffic counts as that of pods, so \
                     none to a cluster IP is masqueraded for coming from outside",
                    p.name_of("--cluster-cidr"),
                    p.name_of("--detect-local-mode"),
                ));
            }
            DetectLocal::ClusterCidr
        }
        "NodeCIDR" => DetectLocal::NodeCidr,
        "BridgeInterface" => {
            if flags.pod_bridge_interface.is_empty() {
                p.add(
                    "--pod-bridge-interface",
                    "",
                    "must name the pods' bridge for --detect-local-mode=BridgeInterface",
                );
            }
            DetectLocal::BridgeInterface(bridge)
        }
        "InterfaceNamePrefix" => {
            if flags.pod_interface_name_prefix.is_empty() {
                p.add(
                    "--pod-interface-name-prefix",
                    "",
                    "must be set for --detect-local-mode=InterfaceNamePrefix",
                );
            }
            DetectLocal::InterfaceNamePrefix(prefix)
        }
        other => {
            p.add(
                "--detect-local-mode",
                other,
                "must be ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix",
            );
            DetectLocal::ClusterCidr
        }
    };
    (mode, cidrs)
}

/// Of kube-proxy's one value for "none" in each family nothing follows.
fn bind_address(p: &mut Problems, raw: &str) -> Option<IpAddr> {
    let address = p.take("--bind-address", raw, |raw| {
        if raw.is_empty() {
            return Ok(None);
        }
        raw.parse::<IpAddr>()
            .map(Some)
            .map_err(|_| "must be an IP address, for example 192.0.2.10".to_owned())
    });
    address.filter(|address| !address.is_unspecified())
}

fn node_port_addresses(p: &mut Problems, raw: &[String]) -> NodePortAddresses {
    const FLAG: &str = "--nodeport-addresses";
    let joined = raw.join(",");
    let items: Vec<&str> = value::items(&joined).collect();
    match items.as_slice() {
        [] => NodePortAddresses::All,
        ["primary"] => NodePortAddresses::Primary,
        items if items.contains(&"primary") => {
            p.add(FLAG, &joined, "must be either primary alone or CIDR blocks");
            NodePortAddresses::All
        }
        _ => NodePortAddresses::Cidrs(p.take(FLAG, &joined, value::cidrs)),
    }
}

fn masquerade(p: &mut Problems, flags: &TrafficFlags) -> Masquerade {
    Masquerade {
        all: p.take("--masquerade-all", &flags.masquerade_all, value::boolean),
        bit: p.take("--iptables-masquerade-bit", &flags.iptables_masquerade_bit, |raw| {
            value::number(raw, 0, 31)
                .and_then(|bit| u8::try_from(bit).map_err(|error| error.to_string()))
        }),
    }
}

fn ipvs(p: &mut Problems, flags: &IpvsFlags) -> Ipvs {
    let before = p.list.len();
    let sync_period = p.take("--ipvs-sync-period", &flags.ipvs_sync_period, |raw| {
        value::duration(raw).and_then(|period| match period {
            Duration::ZERO => Err("must be greater than 0".to_owned()),
            period => Ok(period),
        })
    });
    let min_sync_period =
        p.take("--ipvs-min-sync-period", &flags.ipvs_min_sync_period, value::duration);
    if p.list.len() == before && min_sync_period > sync_period {
        p.add(
            "--ipvs-min-sync-period",
            &flags.ipvs_min_sync_period,
            format!(
                "must not be above {}, which is {}",
                p.name_of("--ipvs-sync-period"),
                flags.ipvs_sync_period
            ),
        );
    }
    Ipvs {
        scheduler: p.take("--ipvs-scheduler", &flags.ipvs_scheduler, value::scheduler),
        sync_period,
        min_sync_period,
        strict_arp: p.take("--ipvs-strict-arp", &flags.ipvs_strict_arp, value::boolean),
        tcp_timeout: p.timeout("--ipvs-tcp-timeout", &flags.ipvs_tcp_timeout),
        tcp_fin_timeout: p.timeout("--ipvs-tcpfin-timeout", &flags.ipvs_tcpfin_timeout),
        udp_timeout: p.timeout("--ipvs-udp-timeout", &flags.ipvs_udp_timeout),
        exclude_cidrs: p.take(
            "--ipvs-exclude-cidrs",
            &flags.ipvs_exclude_cidrs.join(","),
            value::cidrs,
        ),
    }
}

fn conntrack(p: &mut Problems, flags: &ConntrackFlags) -> Conntrack {
    /// Go's flag is an int32.
    const MAX: u32 = i32::MAX.unsigned_abs();
    Conntrack {
        max_per_core: NonZeroU32::new(p.take(
            "--conntrack-max-per-core",
            &flags.conntrack_max_per_core,
            |raw| value::number(raw, 0, MAX),
        )),
        min: p.take("--conntrack-min", &flags.conntrack_min, |raw| value::number(raw, 0, MAX)),
        tcp_established_timeout: p.timeout(
            "--conntrack-tcp-timeout-established",
            &flags.conntrack_tcp_timeout_established,
        ),
        tcp_close_wait_timeout: p
            .timeout("--conntrack-tcp-timeout-close-wait", &flags.conntrack_tcp_timeout_close_wait),
        tcp_be_liberal: p.take(
            "--conntrack-tcp-be-liberal",
            &flags.conntrack_tcp_be_liberal,
            value::boolean,
        ),
        udp_timeout: p.timeout("--conntrack-udp-timeout", &flags.conntrack_udp_timeout),
        udp_stream_timeout: p
            .timeout("--conntrack-udp-timeout-stream", &flags.conntrack_udp_timeout_stream),
    }
}

/// 0 disables, whatever the address says, as in kube-proxy.
fn deprecated_port(p: &mut Problems, flag: &'static str, raw: &str) -> Option<u16> {
    let port = p.take(flag, raw, |raw| value::number(raw, 0, u32::from(u16::MAX)));
    u16::try_from(port).ok().filter(|port| *port > 0)
}

fn serving(p: &mut Problems, flags: &ServingFlags) -> Serving {
    let healthz_port = deprecated_port(p, "--healthz-port", &flags.healthz_port);
    let healthz = p.take("--healthz-bind-address", &flags.healthz_bind_address, |raw| {
        healthz_port.map_or(Ok(None), |port| value::bind_address(raw, port))
    });
    let metrics_port = deprecated_port(p, "--metrics-port", &flags.metrics_port);
    let metrics = p.take("--metrics-bind-address", &flags.metrics_bind_address, |raw| {
        metrics_port.map_or(Ok(None), |port| value::bind_address(raw, port))
    });
    // Port 0 is another one each time.
    if healthz.is_some_and(|address| address.port() > 0) && healthz == metrics {
        p.add(
            "--metrics-bind-address",
            &flags.metrics_bind_address,
            format!("must differ from {}", p.name_of("--healthz-bind-address")),
        );
    }
    let hard_fail =
        p.take("--bind-address-hard-fail", &flags.bind_address_hard_fail, value::boolean);
    let profiling = p.take("--profiling", &flags.profiling, value::boolean);
    Serving { healthz, metrics, hard_fail, profiling }
}

fn series(p: &mut Problems, flags: &ServingFlags) -> SeriesLimits {
    /// A page of more is of no use to anybody.
    const MAX: u32 = 1_000_000;
    let mut limit = |flag, raw: &str| {
        let limit = p.take(flag, raw, |raw| value::number(raw, 0, MAX));
        usize::try_from(limit).unwrap_or(usize::MAX)
    };
    let service_ports = limit("--service-metrics-limit", &flags.service_metrics_limit);
    let endpoint_limit = limit("--endpoint-metrics-limit", &flags.endpoint_metrics_limit);
    let endpoints = p.take("--endpoint-metrics", &flags.endpoint_metrics, value::boolean);
    SeriesLimits { service_ports, endpoints, endpoint_limit }
}

fn logging(p: &mut Problems, flags: &ServingFlags) -> Logging {
    Logging {
        verbosity: p
            .take("--v", &flags.verbosity, |raw| value::number(raw, 0, i32::MAX.unsigned_abs())),
        format: match flags.logging_format.as_str() {
            "text" => LogFormat::Text,
            "json" => LogFormat::Json,
            other => {
                p.add("--logging-format", other, "must be text or json");
                LogFormat::Text
            }
        },
    }
}
