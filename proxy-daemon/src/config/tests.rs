//! Each flag: default, accepted forms, refused forms.

use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::model::Node;

fn parse(arguments: &[&str]) -> Result<Config, Usage> {
    Config::from_args([&["proxy-daemon"], arguments].concat(), "Host.Example")
}

pub(super) fn good(arguments: &[&str]) -> Config {
    parse(arguments).unwrap_or_else(|usage| panic!("{arguments:?}: {usage}"))
}

/// The problems as `flag=value`, in order.
pub(super) fn bad(arguments: &[&str]) -> Vec<String> {
    match parse(arguments) {
        Err(Usage::Problems(problems)) => {
            problems.list.iter().map(|p| format!("{}={}", p.name, p.value)).collect()
        }
        other => panic!("{arguments:?}: {other:?}"),
    }
}

/// The whole message about one refused flag.
pub(super) fn message(arguments: &[&str]) -> String {
    parse(arguments).expect_err("must be refused").to_string()
}

fn cidr(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn defaults_are_those_of_kube_proxy() {
    let config = good(&[]);
    assert_eq!(
        config,
        Config {
            proxy_mode: ProxyMode::Ipvs,
            cleanup: false,
            init_only: false,
            write_config_to: None,
            files: vec![],
            source: Source::Api { kubeconfig: None, master: None },
            node_name: NodeName::new("host.example"),
            cluster_cidrs: vec![],
            detect_local: DetectLocal::ClusterCidr,
            bind_address: None,
            node_port_addresses: NodePortAddresses::All,
            localhost_node_ports: true,
            masquerade: Masquerade { all: false, bit: 14 },
            drain_timeout: secs(900),
            ipvs: Ipvs {
                scheduler: "rr".to_owned(),
                sync_period: secs(30),
                min_sync_period: Duration::ZERO,
                strict_arp: false,
                tcp_timeout: None,
                tcp_fin_timeout: None,
                udp_timeout: None,
                exclude_cidrs: vec![],
            },
            conntrack: Conntrack {
                max_per_core: NonZeroU32::new(32_768),
                min: 131_072,
                tcp_established_timeout: Some(secs(86_400)),
                tcp_close_wait_timeout: Some(secs(3_600)),
                tcp_be_liberal: false,
                udp_timeout: None,
                udp_stream_timeout: None,
            },
            serving: Serving {
                healthz: Some("0.0.0.0:10256".parse().unwrap()),
                metrics: Some("127.0.0.1:10249".parse().unwrap()),
                hard_fail: false,
                profiling: false,
            },
            series: SeriesLimits { service_ports: 1000, endpoints: false, endpoint_limit: 1000 },
            logging: Logging { verbosity: 0, format: LogFormat::Text },
            cgroup_root: None,
            socket_opt_outs: Vec::new(),
            devices: Vec::new(),
            xdp: Xdp::Off,
            selection: Selection::Hash,
            direct_server_return: DirectServerReturn::Off,
            direct_server_return_port: 6081,
            map_sizes: MapSizes::default(),
            map_limits: MapSizes::LIMITS,
            bpf_root: PathBuf::from("/sys/fs/bpf"),
            sysctl_root: PathBuf::from("/proc/sys"),
            oom_score_adj: -999,
            inert: vec![],
            kube_proxy_mode: "ipvs".to_owned(),
            flags: config.flags.clone(),
            notes: vec![],
            warnings: config.warnings.clone(),
        }
    );
    assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
    assert_eq!(config.masquerade.mark(), 0x4000);
    assert_eq!(config.health_timeout(), secs(60));
}

#[test]
fn proxy_mode() {
    assert_eq!(good(&["--proxy-mode=ebpf"]).proxy_mode, ProxyMode::Ebpf);
    assert_eq!(good(&["--proxy-mode", "ipvs"]).proxy_mode.to_string(), "ipvs");
    for mode in ["iptables", "nftables"] {
        let text = message(&["--proxy-mode", mode]);
        assert!(text.contains("does not exist here; choose ipvs or ebpf"), "{text}");
    }
    assert_eq!(bad(&["--proxy-mode=IPVS"]), ["--proxy-mode=IPVS"]);
}

#[test]
fn cleanup_takes_any_mode_of_kube_proxys_and_needs_no_cidr() {
    for mode in ["", "iptables", "nftables", "ipvs", "ebpf"] {
        let config = good(&["--cleanup", &format!("--proxy-mode={mode}")]);
        assert!(config.cleanup, "{mode}");
        assert_eq!(config.warnings, Vec::<String>::new(), "{mode}");
    }
    assert_eq!(bad(&["--cleanup", "--proxy-mode=IPVS"]), ["--proxy-mode=IPVS"]);
    assert_eq!(good(&["--cleanup=false"]).warnings.len(), 1);
}

#[test]
fn switches_take_gos_booleans() {
    let strict = |value: &[&str]| good(value).ipvs.strict_arp;
    assert!(strict(&["--ipvs-strict-arp"]));
    assert!(strict(&["--ipvs-strict-arp=true"]));
    assert!(strict(&["--ipvs-strict-arp=1"]));
    assert!(!strict(&["--ipvs-strict-arp=false"]));
    assert!(!strict(&["--ipvs-strict-arp", "--ipvs-strict-arp=F"]), "the last one counts");
    assert!(good(&["--cleanup"]).cleanup);
    assert!(good(&["--masquerade-all"]).masquerade.all);
    assert!(good(&["--bind-address-hard-fail"]).serving.hard_fail);
    assert!(good(&["--conntrack-tcp-be-liberal"]).conntrack.tcp_be_liberal);
    let flags = [
        "--ipvs-strict-arp=yes",
        "--cleanup=yes",
        "--masquerade-all=yes",
        "--bind-address-hard-fail=yes",
        "--conntrack-tcp-be-liberal=yes",
    ];
    for flag in flags {
        assert_eq!(bad(&[flag]), [flag]);
    }
}

#[test]
fn source() {
    assert_eq!(
        good(&["--kubeconfig=/etc/k", "--master", "https://10.0.0.1:6443"]).source,
        Source::Api {
            kubeconfig: Some("/etc/k".into()),
            master: Some("https://10.0.0.1:6443".to_owned())
        }
    );
    assert_eq!(good(&["--manifests", "dir"]).source, Source::Manifests("dir".into()));
    assert_eq!(
        bad(&["--manifests=dir", "--kubeconfig=k", "--master=m"]),
        ["--kubeconfig=k", "--master=m"]
    );
}

#[test]
fn hostname_override() {
    assert_eq!(good(&["--hostname-override= Node-A "]).node_name, NodeName::new("node-a"));
    let refused = Config::from_args(["proxy-daemon"], "").expect_err("no name").to_string();
    assert!(refused.contains("--hostname-override"), "{refused}");
}

#[test]
fn cluster_cidr() {
    assert_eq!(
        good(&["--cluster-cidr=10.244.1.0/16, fd00:10:244::/56"]).cluster_cidrs,
        [cidr("10.244.0.0/16"), cidr("fd00:10:244::/56")],
        "host bits are cleared"
    );
    assert!(good(&["--cluster-cidr=10.0.0.0/8"]).warnings.is_empty());
    for value in ["10.0.0.0", "10.0.0.0/33", "x", "10.0.0.0/8,10.1.0.0/16"] {
        assert_eq!(bad(&["--cluster-cidr", value]), [format!("--cluster-cidr={value}")]);
    }
}

#[test]
fn detect_local_mode() {
    let mut node = Node {
        name: NodeName::new("a"),
        zone: None,
        addresses: vec![],
        pod_cidrs: vec![],
        deleting: false,
        scaling_down: false,
    };
    let cluster = good(&["--cluster-cidr=10.0.0.0/8"]);
    assert_eq!(cluster.local_detect(None), LocalDetect::Cidrs(vec![cidr("10.0.0.0/8")]));
    assert_eq!(good(&[]).local_detect(Some(&node)), LocalDetect::Unknown);

    let by_node = good(&["--detect-local-mode=NodeCIDR", "--cluster-cidr=10.0.0.0/8"]);
    assert_eq!(by_node.local_detect(None), LocalDetect::Unknown);
    assert_eq!(by_node.local_detect(Some(&node)), LocalDetect::Unknown);
    node.pod_cidrs.push(cidr("10.1.0.0/24"));
    assert_eq!(by_node.local_detect(Some(&node)), LocalDetect::Cidrs(vec![cidr("10.1.0.0/24")]));

    let bridge = good(&["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"]);
    assert_eq!(bridge.local_detect(None), LocalDetect::Bridge("cni0".into()));
    let prefix =
        good(&["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=veth"]);
    assert_eq!(prefix.local_detect(None), LocalDetect::InterfacePrefix("veth".into()));

    assert_eq!(bad(&["--detect-local-mode=nodecidr"]), ["--detect-local-mode=nodecidr"]);
    assert_eq!(bad(&["--detect-local-mode=BridgeInterface"]), ["--pod-bridge-interface="]);
    assert_eq!(bad(&["--detect-local-mode=InterfaceNamePrefix"]), ["--pod-interface-name-prefix="]);
    assert_eq!(
        bad(&["--pod-bridge-interface=sixteen-letters-", "--pod-interface-name-prefix=a/b"]),
        ["--pod-bridge-interface=sixteen-letters-", "--pod-interface-name-prefix=a/b"]
    );
}

#[test]
fn nodeport_addresses() {
    let of = |arguments: &[&str]| good(arguments).node_port_addresses;
    assert_eq!(of(&["--nodeport-addresses=primary"]), NodePortAddresses::Primary);
    assert_eq!(
        of(&["--nodeport-addresses=10.0.0.0/8,::1/128", "--nodeport-addresses=127.0.0.0/8"]),
        NodePortAddresses::Cidrs(vec![cidr("10.0.0.0/8"), cidr("::1/128"), cidr("127.0.0.0/8")])
    );
    assert_eq!(of(&["--nodeport-addresses="]), NodePortAddresses::All);
    for value in ["primary,10.0.0.0/8", "10.0.0.1"] {
        assert_eq!(
            bad(&["--nodeport-addresses", value]),
            [format!("--nodeport-addresses={value}")]
        );
    }
}

#[test]
fn masquerade_bit() {
    assert_eq!(good(&["--iptables-masquerade-bit=31"]).masquerade.mark(), 0x8000_0000);
    assert_eq!(good(&["--iptables-masquerade-bit=0"]).masquerade.mark(), 1);
    for value in ["32", "-1", "x"] {
        let flag = format!("--iptables-masquerade-bit={value}");
        assert_eq!(bad(&[&flag]), [flag.as_str()]);
    }
}

#[test]
fn ipvs_scheduler() {
    assert_eq!(good(&["--ipvs-scheduler=mh"]).ipvs.scheduler, "mh");
    assert_eq!(good(&["--ipvs-scheduler="]).ipvs.scheduler, "rr");
    assert_eq!(bad(&["--ipvs-scheduler=W RR"]), ["--ipvs-scheduler=W RR"]);
    assert_eq!(bad(&["--ipvs-scheduler=abcdefghijklmnop"]).len(), 1, "16 letters");
}

#[test]
fn ipvs_periods() {
    let config = good(&["--ipvs-sync-period=1m0s", "--ipvs-min-sync-period=100ms"]);
    assert_eq!(config.ipvs.sync_period, secs(60));
    assert_eq!(config.ipvs.min_sync_period, Duration::from_millis(100));
    assert_eq!(config.health_timeout(), secs(120));
    assert_eq!(bad(&["--ipvs-sync-period=0"]), ["--ipvs-sync-period=0"]);
    assert_eq!(bad(&["--ipvs-min-sync-period=31s"]), ["--ipvs-min-sync-period=31s"]);
    assert_eq!(bad(&["--ipvs-min-sync-period=1"]), ["--ipvs-min-sync-period=1"]);
}

#[test]
fn ipvs_timeouts() {
    let ipvs =
        good(&["--ipvs-tcp-timeout=2h45m", "--ipvs-tcpfin-timeout=1s", "--ipvs-udp-timeout=1.5s"])
            .ipvs;
    assert_eq!(ipvs.tcp_timeout, Some(secs(9_900)));
    assert_eq!(ipvs.tcp_fin_timeout, Some(secs(1)));
    assert_eq!(ipvs.udp_timeout, Some(Duration::from_millis(1_500)));
    for flag in ["--ipvs-tcp-timeout", "--ipvs-tcpfin-timeout", "--ipvs-udp-timeout"] {
        for value in ["-1s", "5", "999ms"] {
            let flag = format!("{flag}={value}");
            assert_eq!(bad(&[&flag]), [flag.as_str()]);
        }
    }
}

#[test]
fn ipvs_exclude_cidrs() {
    assert_eq!(
        good(&["--ipvs-exclude-cidrs=10.0.0.0/8", "--ipvs-exclude-cidrs=fd00::/8"])
            .ipvs
            .exclude_cidrs,
        [cidr("10.0.0.0/8"), cidr("fd00::/8")]
    );
    assert_eq!(bad(&["--ipvs-exclude-cidrs=10.0.0.1"]), ["--ipvs-exclude-cidrs=10.0.0.1"]);
}

#[test]
fn drain_timeout() {
    assert_eq!(good(&["--drain-timeout=0"]).drain_timeout, Duration::ZERO);
    assert_eq!(bad(&["--drain-timeout=soon"]), ["--drain-timeout=soon"]);
}

#[test]
fn conntrack() {
    let limits = |max: &str, min: &str| {
        good(&["--conntrack-max-per-core", max, "--conntrack-min", min]).conntrack
    };
    assert_eq!(limits("32768", "131072").max(2), Some(131_072));
    assert_eq!(limits("32768", "131072").max(8), Some(262_144));
    assert_eq!(limits("0", "131072").max(8), None);
    let timeouts = good(&[
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=10m",
        "--conntrack-udp-timeout=30s",
        "--conntrack-udp-timeout-stream=2m",
    ])
    .conntrack;
    assert_eq!(timeouts.tcp_established_timeout, None);
    assert_eq!(timeouts.tcp_close_wait_timeout, Some(secs(600)));
    assert_eq!(timeouts.udp_timeout, Some(secs(30)));
    assert_eq!(timeouts.udp_stream_timeout, Some(secs(120)));
    let flags = [
        "--conntrack-max-per-core=-1",
        "--conntrack-min=2147483648",
        "--conntrack-tcp-timeout-established=1d",
        "--conntrack-tcp-timeout-close-wait=1d",
        "--conntrack-udp-timeout=1d",
        "--conntrack-udp-timeout-stream=1d",
    ];
    assert_eq!(bad(&flags), flags, "all of them, in one go");
}

#[test]
fn bind_addresses() {
    let serving = good(&["--healthz-bind-address=[::]:1", "--metrics-bind-address="]).serving;
    assert_eq!(serving.healthz, Some("[::]:1".parse().unwrap()));
    assert_eq!(serving.metrics, None);
    let bare = good(&["--healthz-bind-address=::1", "--metrics-bind-address=0.0.0.0"]).serving;
    assert_eq!(bare.healthz, Some("[::1]:10256".parse().unwrap()));
    assert_eq!(bare.metrics, Some("0.0.0.0:10249".parse().unwrap()));
    for flag in ["--healthz-bind-address", "--metrics-bind-address"] {
        for value in ["localhost:1", ":10256", "1.2.3.4:65536"] {
            let flag = format!("{flag}={value}");
            assert_eq!(bad(&[&flag]), [flag.as_str()]);
        }
    }
    let any = good(&["--healthz-bind-address=0.0.0.0:0", "--metrics-bind-address=0.0.0.0:0"]);
    assert_eq!(any.serving.healthz, Some("0.0.0.0:0".parse().unwrap()), "the kernel chooses");
    assert_eq!(any.serving.metrics, any.serving.healthz, "and another one each time");
    let same = ["--healthz-bind-address=127.0.0.1:1", "--metrics-bind-address=127.0.0.1:1"];
    assert_eq!(bad(&same), ["--metrics-bind-address=127.0.0.1:1"]);
}

#[test]
fn logging() {
    use tracing::Level;
    for (arguments, level) in [
        (["-v=2"].as_slice(), Level::INFO),
        (&["-v", "4"], Level::DEBUG),
        (&["-v6"], Level::TRACE),
        (&["--v=5"], Level::DEBUG),
    ] {
        assert_eq!(good(arguments).logging.level(), level, "{arguments:?}");
    }
    assert_eq!(good(&["--logging-format=json"]).logging.format, LogFormat::Json);
    assert_eq!(bad(&["-v=info", "--logging-format=xml"]), ["--v=info", "--logging-format=xml"]);
}

#[test]
fn host() {
    let config = good(&["--cgroup-root=/run/cg", "--sysctl-root=/host/proc/sys"]);
    assert_eq!(config.cgroup_root, Some("/run/cg".into()));
    assert_eq!(config.sysctl_root, PathBuf::from("/host/proc/sys"));
    let config = good(&["--devices=eth0, cali*,", "--bpf-root=/run/bpf"]);
    assert_eq!(config.devices, ["eth0", "cali*"]);
    assert_eq!(config.bpf_root, PathBuf::from("/run/bpf"));
    assert_eq!(bad(&["--sysctl-root="]), ["--sysctl-root="]);
    let config = good(&["--socket-opt-out=kubepods/*, system", "--xdp=native"]);
    assert_eq!(config.socket_opt_outs, ["kubepods/*", "system"]);
    assert_eq!(config.xdp, Xdp::Native);
    assert_eq!(bad(&["--xdp=yes"]), ["--xdp=yes"]);
    assert_eq!(good(&["--ebpf-selection=random"]).selection, Selection::Random);
    assert_eq!(bad(&["--ebpf-selection=rr"]), ["--ebpf-selection=rr"]);
    let direct = good(&["--direct-server-return=accept", "--direct-server-return-port=7000"]);
    assert_eq!(direct.direct_server_return, DirectServerReturn::Accept);
    assert_eq!(direct.direct_server_return_port, 7000);
    assert!(direct.notes.iter().any(|note| note.contains("no effect: it is ebpf mode's")));
    let direct = good(&["--proxy-mode=ebpf", "--direct-server-return=on"]);
    assert_eq!(direct.direct_server_return, DirectServerReturn::On);
    assert_eq!(direct.notes, [""; 0]);
    for wrong in ["--direct-server-return=yes", "--direct-server-return-port=0"] {
        assert_eq!(bad(&[wrong]), [wrong]);
    }
    let sizes = MapSizes { backends: 7, ..MapSizes::default() };
    assert_eq!(good(&["--ebpf-map-sizes=backends=7"]).map_sizes, sizes);
    let sizes = MapSizes { flows: Some(9), sockets: Some(8), ..MapSizes::default() };
    assert_eq!(good(&["--ebpf-map-sizes=flows=9,sockets=8"]).map_sizes, sizes);
    let limits = MapSizes { slots: 9, ..MapSizes::LIMITS };
    assert_eq!(good(&["--ebpf-map-limits=slots=9"]).map_limits, limits);
    for wrong in
        ["--ebpf-map-sizes=backends", "--ebpf-map-sizes=slots=0", "--ebpf-map-limits=flows=1"]
    {
        assert_eq!(bad(&[wrong]), [wrong]);
    }
}

#[test]
fn underscores_stand_for_dashes_in_names_only() {
    let config = good(&["--proxy_mode=ebpf", "--hostname_override=node_a"]);
    assert_eq!(config.proxy_mode, ProxyMode::Ebpf);
    assert_eq!(config.node_name, NodeName::new("node_a"));
}

#[test]
fn all_problems_are_reported_together() {
    let text = message(&["--proxy-mode=iptables", "--ipvs-sync-period=abc", "-v=x"]);
    assert!(text.starts_with("error: 3 flags cannot be used:"), "{text}");
    assert!(text.contains("--ipvs-sync-period=\"abc\": must be a duration"), "{text}");
    let usage = parse(&["-v=x"]).unwrap_err();
    assert_eq!(usage.exit_code(), 2);
}

#[test]
fn unknown_flags_are_named_and_help_is_no_mistake() {
    let usage = parse(&["--ipvs-schedular=rr"]).unwrap_err();
    assert_eq!(usage.exit_code(), 2);
    let text = usage.to_string();
    assert!(text.contains("--ipvs-schedular") && text.contains("--ipvs-scheduler"), "{text}");
    for flag in ["--help", "--version", "-h"] {
        assert_eq!(parse(&[flag]).unwrap_err().exit_code(), 0, "{flag}");
    }
}

#[test]
fn help_teaches() {
    let help = parse(&["--help"]).unwrap_err().to_string();
    for heading in ["What to do:", "Traffic:", "IPVS:", "Connection tracking:", "Examples:"] {
        assert!(help.contains(heading), "{heading} is missing from\n{help}");
    }
    let flags: Vec<_> = command().get_arguments().cloned().collect();
    for flag in flags {
        let name = flag.get_long().expect("every flag has a long name");
        assert!(flag.get_help().is_some(), "--{name} is not explained");
        assert!(
            flag.get_help_heading().is_some() || matches!(name, "help" | "version"),
            "--{name} is under no heading"
        );
    }
}

#[test]
fn flags_in_force_are_all_of_them_with_defaults_and_what_a_file_says() {
    let of = |flags: &[&str], name: &str| {
        let held = good(flags).flags;
        held.into_iter().find(|(held, _)| held == name).map(|(_, value)| value)
    };
    assert_eq!(of(&[], "ipvs-scheduler").as_deref(), Some("rr"));
    assert_eq!(of(&[], "kube-api-qps").as_deref(), Some("5"));
    assert_eq!(of(&["-v=4"], "v").as_deref(), Some("4"));
    assert_eq!(of(&["--profiling"], "profiling").as_deref(), Some("true"));
    assert_eq!(of(&["--cluster-cidr=10.0.0.0/8"], "cluster-cidr").as_deref(), Some("10.0.0.0/8"));
    assert_eq!(of(&[], "help"), None);
    let config = good(&[]);
    assert!(config.flags.len() > 80 && config.flags.is_sorted(), "{}", config.flags.len());
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                mode: ipvs\nipvs: {scheduler: lc}\n";
    std::fs::write(file.path(), text).unwrap();
    let flag = format!("--config={}", file.path().display());
    assert_eq!(of(&[&flag, "--ipvs-scheduler=sh"], "ipvs-scheduler").as_deref(), Some("lc"));
}

#[test]
fn ports_without_address() {
    let serving = |flags: &[&str]| good(flags).serving;
    let bare = serving(&["--healthz-bind-address=192.0.2.1", "--healthz-port=99"]);
    assert_eq!(bare.healthz, Some("192.0.2.1:99".parse().unwrap()));
    let whole = serving(&["--healthz-port=99", "--metrics-port=98"]);
    assert_eq!(whole, good(&[]).serving, "the default address has a port");
    let none = serving(&["--healthz-port=0", "--metrics-port=0"]);
    assert_eq!((none.healthz, none.metrics), (None, None));
    assert_eq!(bad(&["--healthz-port=65536"]), ["--healthz-port=65536"]);
}

#[test]
fn host_and_address() {
    let config = good(&["--bind-address=2001:db8::1", "--oom-score-adj", "-1000"]);
    assert_eq!(config.bind_address, Some("2001:db8::1".parse().unwrap()));
    assert_eq!(config.oom_score_adj, -1000);
    assert_eq!(good(&["--bind-address=::"]).bind_address, None);
    assert_eq!(good(&["--bind-address="]).bind_address, None);
    let flags = ["--bind-address=x", "--oom-score-adj=1001", "--init-only=x"];
    assert_eq!(bad(&flags).len(), 3);
    assert!(good(&["--init-only"]).init_only);
    assert_eq!(good(&["--write-config-to=/x"]).write_config_to, Some("/x".into()));
}

#[test]
fn versions() {
    assert_eq!(message(&["--version"]), concat!("proxy-daemon ", env!("CARGO_PKG_VERSION")));
    assert_eq!(message(&["--version=true"]), message(&["--version"]));
    assert!(message(&["--version=raw"]).contains("\"kubernetes\":\"1.36\""));
    good(&["--version=false"]);
    assert_eq!(bad(&["--version=foo"]), ["--version=foo"]);
}

#[test]
fn durations_as_go_reads_and_writes_them() {
    for (text, nanos, written) in [
        ("0", 0, "0s"),
        ("0s", 0, "0s"),
        ("30s", 30_000_000_000, "30s"),
        ("1m0s", 60_000_000_000, "1m0s"),
        ("90s", 90_000_000_000, "1m30s"),
        ("24h", 86_400_000_000_000, "24h0m0s"),
        ("2h45m", 9_900_000_000_000, "2h45m0s"),
        ("1.5h", 5_400_000_000_000, "1h30m0s"),
        (".5s", 500_000_000, "500ms"),
        ("+1.25ms", 1_250_000, "1.25ms"),
        ("100us", 100_000, "100µs"),
        ("100µs", 100_000, "100µs"),
        ("7ns", 7, "7ns"),
        ("1m0.5s", 60_500_000_000, "1m0.5s"),
        ("0.3333333333333333333h", 1_199_999_999_999, "19m59.999999999s"),
    ] {
        let duration = value::duration(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(duration, Duration::from_nanos(nanos), "{text}");
        assert_eq!(value::format_duration(duration), written, "{text}");
    }
    for text in ["", "5", "s", ".s", "-1s", "1 s", "1d", "1s1", "1..5s", "9999999h", "+"] {
        assert!(value::duration(text).is_err(), "{text:?} must be refused");
    }
}
