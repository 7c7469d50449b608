//! Files: each field, precedence, what is unknown or wrong, and the way back.

use std::io::Write as _;
use std::time::Duration;

use super::fields::{Field, KUBE_PROXY, Target};
use super::*;

pub(super) const HEAD: &str =
    "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
pub(super) const OWN_HEAD: &str =
    "apiVersion: node-dataplane/v1alpha1\nkind: NodeDataplaneConfiguration\n";
pub(super) const KUBEADM: &str = include_str!("fixtures/kubeadm.yaml");
pub(super) const EVERY_FIELD: &str = include_str!("fixtures/every-field.yaml");

pub(super) fn written(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn load(text: &str, arguments: &[&str]) -> Result<Config, Usage> {
    let file = written(text);
    let config = format!("--config={}", file.path().display());
    let arguments = [&["proxy-daemon", &config], arguments].concat();
    let mut loaded = Config::from_args(arguments, "host");
    if let Ok(config) = &mut loaded {
        assert_eq!(config.files, [file.path()]);
        // The rest of a Config does not depend on where the file was.
        config.files.clear();
        for line in config.warnings.iter_mut().chain(&mut config.notes) {
            *line = line.replace(&file.path().display().to_string(), "FILE");
        }
    }
    loaded
}

pub(super) fn good(text: &str, arguments: &[&str]) -> Config {
    load(text, arguments).unwrap_or_else(|usage| panic!("{text}\n{usage}"))
}

pub(super) fn refused(text: &str, arguments: &[&str]) -> String {
    load(text, arguments).expect_err("must be refused").to_string()
}

/// A file in ipvs mode with one more field, given as a YAML flow value.
pub(super) fn with(path: &str, value: &str) -> String {
    let mut text = HEAD.to_owned();
    if path != "mode" {
        text.push_str("mode: ipvs\n");
    }
    text + &field(path, value)
}

/// One field as YAML.
pub(super) fn field(path: &str, value: &str) -> String {
    let mut text = String::new();
    let keys: Vec<&str> = path.split('.').collect();
    for (depth, key) in keys.iter().enumerate() {
        text.push_str(&format!("{}{key}:", "  ".repeat(depth)));
        text.push_str(if depth + 1 == keys.len() { " " } else { "\n" });
    }
    text + value + "\n"
}

pub(super) type Effect = (&'static str, &'static str, fn(&Config) -> bool);

pub(super) fn secs(seconds: u64) -> Option<Duration> {
    Some(Duration::from_secs(seconds))
}

/// Field, value, and what must be so then and only then.
const EFFECTS: &[Effect] = &[
    ("clientConnection.kubeconfig", "/k", |c| {
        c.source == Source::Api { kubeconfig: Some("/k".into()), master: None }
    }),
    ("logging.format", "json", |c| c.logging.format == LogFormat::Json),
    ("logging.verbosity", "5", |c| c.logging.verbosity == 5),
    ("hostnameOverride", " Node-B ", |c| c.node_name == NodeName::new("node-b")),
    ("bindAddress", "192.0.2.7", |c| c.bind_address == Some("192.0.2.7".parse().unwrap())),
    ("healthzBindAddress", "192.0.2.7", |c| {
        c.serving.healthz == Some("192.0.2.7:10256".parse().unwrap())
    }),
    ("metricsBindAddress", "'[::]:1249'", |c| {
        c.serving.metrics == Some("[::]:1249".parse().unwrap())
    }),
    ("bindAddressHardFail", "true", |c| c.serving.hard_fail),
    ("enableProfiling", "true", |c| c.serving.profiling),
    ("mode", "ebpf", |c| c.proxy_mode == ProxyMode::Ebpf),
    ("iptables.masqueradeBit", "0", |c| c.masquerade.bit == 0),
    ("iptables.masqueradeAll", "true", |c| c.masquerade.all),
    ("iptables.localhostNodePorts", "false", |c| !c.localhost_node_ports),
    ("ipvs.syncPeriod", "40s", |c| Some(c.ipvs.sync_period) == secs(40)),
    ("ipvs.minSyncPeriod", "3s", |c| Some(c.ipvs.min_sync_period) == secs(3)),
    ("ipvs.scheduler", "lc", |c| c.ipvs.scheduler == "lc"),
    ("ipvs.excludeCIDRs", "[10.0.0.0/8, 'fd00::/8']", |c| c.ipvs.exclude_cidrs.len() == 2),
    ("ipvs.strictARP", "true", |c| c.ipvs.strict_arp),
    ("ipvs.tcpTimeout", "15m", |c| c.ipvs.tcp_timeout == secs(900)),
    ("ipvs.tcpFinTimeout", "2m", |c| c.ipvs.tcp_fin_timeout == secs(120)),
    ("ipvs.udpTimeout", "5m", |c| c.ipvs.udp_timeout == secs(300)),
    ("detectLocalMode", "NodeCIDR", |c| c.detect_local == DetectLocal::NodeCidr),
    ("clusterCIDR", "10.244.0.0/16", |c| c.cluster_cidrs.len() == 1),
    ("nodePortAddresses", "[primary]", |c| c.node_port_addresses == NodePortAddresses::Primary),
    ("oomScoreAdj", "0", |c| c.oom_score_adj == 0),
    ("conntrack.maxPerCore", "0", |c| c.conntrack.max_per_core.is_none()),
    ("conntrack.min", "0", |c| c.conntrack.min == 0),
    ("conntrack.tcpEstablishedTimeout", "0s", |c| c.conntrack.tcp_established_timeout.is_none()),
    ("conntrack.tcpCloseWaitTimeout", "10m", |c| c.conntrack.tcp_close_wait_timeout == secs(600)),
    ("conntrack.tcpBeLiberal", "true", |c| c.conntrack.tcp_be_liberal),
    ("conntrack.udpTimeout", "30s", |c| c.conntrack.udp_timeout == secs(30)),
    ("conntrack.udpStreamTimeout", "2m", |c| c.conntrack.udp_stream_timeout == secs(120)),
];

/// Fields without an effect, each with a value that is not kube-proxy's default.
pub(super) const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("featureGates", "{A: true}"),
    ("clientConnection.acceptContentTypes", "x"),
    ("clientConnection.contentType", "application/json"),
    ("clientConnection.qps", "7.5"),
    ("clientConnection.burst", "20"),
    ("logging.flushFrequency", "1000"),
    ("logging.vmodule", "[{filePattern: proxier, verbosity: 6}]"),
    ("logging.options.text.splitStream", "true"),
    ("logging.options.text.infoBufferSize", "1Ki"),
    ("logging.options.json.splitStream", "true"),
    ("logging.options.json.infoBufferSize", "512"),
    ("showHiddenMetricsForVersion", "'1.35'"),
    ("iptables.syncPeriod", "31s"),
    ("iptables.minSyncPeriod", "2s"),
    ("nftables.masqueradeBit", "15"),
    ("nftables.masqueradeAll", "true"),
    ("nftables.syncPeriod", "32s"),
    ("nftables.minSyncPeriod", "4s"),
    ("winkernel.networkName", "x"),
    ("winkernel.sourceVip", "x"),
    ("winkernel.enableDSR", "true"),
    ("winkernel.rootHnsEndpointName", "x"),
    ("winkernel.forwardHealthCheckVip", "true"),
    ("configSyncPeriod", "10m"),
    ("portRange", "300-2000"),
    ("windowsRunAsService", "true"),
];

/// Which mode needs them, so they have a test of their own.
const OF_A_MODE: [&str; 2] = ["detectLocal.bridgeInterface", "detectLocal.interfaceNamePrefix"];

#[test]
fn every_field_has_its_effect_or_is_said_to_have_none() {
    let base = good(&(HEAD.to_owned() + "mode: ipvs\n"), &[]);
    for (path, value, effect) in EFFECTS {
        assert!(!effect(&base), "{path}: the test would not notice");
        let config = good(&with(path, value), &[]);
        assert!(effect(&config), "{path}: {value} came to {config:?}");
        assert!(config.notes.is_empty(), "{path}: {:?}", config.notes);
    }
    for (path, value) in WITHOUT_EFFECT {
        let config = good(&with(path, value), &[]);
        assert!(config.same_effect(&base), "{path}");
        let said: Vec<_> = config.notes.iter().filter(|note| note.starts_with(path)).collect();
        assert_eq!(said.len(), 1, "{path}: {:?}", config.notes);
        assert!(said[0].contains("no effect"), "{said:?}");
    }
    for field in KUBE_PROXY {
        let tested = EFFECTS.iter().map(|(path, ..)| *path);
        let tested = tested.chain(WITHOUT_EFFECT.iter().map(|(path, _)| *path)).chain(OF_A_MODE);
        assert_eq!(tested.filter(|path| *path == field.path).count(), 1, "{}", field.path);
    }
}

#[test]
fn zero_values_stand_for_the_default_except_where_go_has_a_pointer() {
    let base = good(&(HEAD.to_owned() + "mode: ipvs\n"), &[]);
    for field in KUBE_PROXY.iter().filter(|field| field.path != "mode") {
        let zeros = match field.shape {
            fields::Shape::Bool => ["false", "null"],
            fields::Shape::Integer | fields::Shape::Float => ["0", "null"],
            fields::Shape::Text | fields::Shape::Word => ["''", "null"],
            fields::Shape::Duration => ["0s", "null"],
            fields::Shape::Flush | fields::Shape::Quantity => ["0", "'0'"],
            fields::Shape::TextList | fields::Shape::Vmodule => ["[]", "null"],
            fields::Shape::Gates | fields::Shape::Numbers => ["{}", "null"],
        };
        for zero in zeros.into_iter().filter(|zero| !field.zero_counts || *zero == "null") {
            let config = good(&with(field.path, zero), &[]);
            assert!(config.same_effect(&base), "{}: {zero}", field.path);
            assert!(config.notes.is_empty(), "{}: {zero}: {:?}", field.path, config.notes);
        }
    }
}

fn kubeadm() -> String {
    file::in_config_map(KUBEADM).unwrap().expect("a ConfigMap").1
}

#[test]
fn kubeadms_default_with_the_mode_on_the_command_line() {
    let config = good(&kubeadm(), &["--proxy-mode=ipvs"]);
    let expected = Config {
        source: Source::Api {
            kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
            master: None,
        },
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        ..Config::from_args(["proxy-daemon"], "host").unwrap()
    };
    assert!(config.same_effect(&expected), "{config:#?}");
    assert_eq!((config.notes, config.warnings), (vec![], vec![]));
    let text = refused(&kubeadm(), &[]);
    assert!(text.contains("mode=\"\": means iptables"), "{text}");
    assert!(text.contains("--proxy-mode=ipvs or --proxy-mode=ebpf"), "{text}");
}

#[test]
fn a_file_with_every_field_set() {
    let config = good(EVERY_FIELD, &[]);
    assert_eq!(config.warnings, Vec::<String>::new());
    // And one of the other mode's.
    assert_eq!(config.notes.len(), WITHOUT_EFFECT.len() + 1, "{:#?}", config.notes);
    for (path, ..) in EFFECTS.iter().filter(|(path, ..)| *path != "mode") {
        let set = tree::documents(EVERY_FIELD).unwrap();
        assert!(set[0].at(path).is_some(), "{path} is not set");
    }
    assert_eq!(config.node_name, NodeName::new("node-b"));
    assert_eq!(config.detect_local, DetectLocal::InterfaceNamePrefix("veth".to_owned()));
    assert_eq!(config.drain_timeout, Duration::from_secs(60));
    assert_eq!(config.conntrack.min, 4096);
    assert_eq!(config.serving.metrics, Some("0.0.0.0:10249".parse().unwrap()));
    let bridge = EVERY_FIELD.replace("Mode: InterfaceNamePrefix", "Mode: BridgeInterface");
    assert_eq!(good(&bridge, &[]).detect_local, DetectLocal::BridgeInterface("cni0".to_owned()));
}

#[test]
fn a_typo_is_named_with_what_is_meant_and_the_rest_counts() {
    let text = HEAD.to_owned()
        + "mode: ipvs\nclusterCidr: 10.0.0.0/8\nipvs: {schedular: lc, scheduler: sh}\n\
           conntrack: {strictARP: true}\nxyzzy: {a: 1}\n";
    let config = good(&text, &[]);
    assert_eq!(config.ipvs.scheduler, "sh");
    let unknown: Vec<_> =
        config.warnings.iter().filter(|warning| warning.contains("no field")).collect();
    assert_eq!(
        unknown,
        [
            "there is no field clusterCidr: it is left out. Is clusterCIDR meant?",
            "there is no field ipvs.schedular: it is left out. Is ipvs.scheduler meant?",
            "there is no field conntrack.strictARP: it is left out. Is ipvs.strictARP meant?",
            "there is no field xyzzy: it is left out.",
        ]
    );
}

#[test]
fn cleanup_with_kubeadms_default_file() {
    let config = good(&kubeadm(), &["--cleanup"]);
    assert!(config.cleanup);
    assert_eq!(config.warnings, Vec::<String>::new());
}

/// kube-proxy's reader follows YAML 1.1.
#[test]
fn yaml_as_kube_proxy_reads_it() {
    let cases: [Effect; 9] = [
        ("ipvs.strictARP", "yes", |c| c.ipvs.strict_arp),
        ("ipvs.strictARP", "on", |c| c.ipvs.strict_arp),
        ("ipvs.strictARP", "Y", |c| c.ipvs.strict_arp),
        ("iptables.localhostNodePorts", "off", |c| !c.localhost_node_ports),
        ("iptables.localhostNodePorts", "No", |c| !c.localhost_node_ports),
        ("iptables.masqueradeBit", "16.0", |c| c.masquerade.bit == 16),
        ("iptables.masqueradeBit", "017", |c| c.masquerade.bit == 15),
        ("conntrack.min", "100_000", |c| c.conntrack.min == 100_000),
        ("oomScoreAdj", "-2e2", |c| c.oom_score_adj == -200),
    ];
    for (path, value, effect) in cases {
        let config = good(&with(path, value), &[]);
        assert!(effect(&config), "{path}: {value} came to {config:?}");
    }
    let gates = good(&with("featureGates", "{A: yes, B: off}"), &[]);
    assert!(gates.notes[0].starts_with("featureGates=A=true,B=false"), "{:?}", gates.notes);
    for (path, value) in [
        ("iptables.masqueradeBit", "14.5"),
        ("iptables.masqueradeBit", "018"),
        ("ipvs.strictARP", "ja"),
        ("clusterCIDR", "1_0"),
    ] {
        assert!(refused(&with(path, value), &[]).contains(path), "{path}: {value}");
    }
    let marked = good(&format!("\u{feff}{HEAD}mode: ipvs\n"), &[]);
    assert_eq!(marked.proxy_mode, ProxyMode::Ipvs);
}

#[test]
fn merge_keys_are_resolved() {
    let text = HEAD.to_owned()
        + "mode: ipvs\niptables: &a {syncPeriod: 45s, minSyncPeriod: 2s}\n\
           nftables: &b {syncPeriod: 50s}\n";
    let periods = |ipvs: &str| {
        let config = good(&format!("{text}ipvs: {ipvs}\n"), &[]);
        let of_others = |w: &String| w.contains("twice") || w.contains("no field");
        assert!(!config.warnings.iter().any(of_others), "{:?}", config.warnings);
        (config.ipvs.sync_period.as_secs(), config.ipvs.min_sync_period.as_secs())
    };
    assert_eq!(periods("{<<: *a}"), (45, 2));
    assert_eq!(periods("{minSyncPeriod: 3s, <<: *a}"), (45, 3), "the section's own goes before");
    assert_eq!(periods("{<<: *a, minSyncPeriod: 3s}"), (45, 3));
    assert_eq!(periods("{<<: [*b, *a]}"), (50, 2), "the first of a list");
    let text = refused(&format!("{text}ipvs: {{<<: 5}}\n"), &[]);
    assert!(text.contains("a merge key (<<) takes a map or a list of maps"), "{text}");
}

#[test]
fn a_key_given_twice_is_named_and_the_last_counts() {
    let config =
        good(&(HEAD.to_owned() + "mode: ipvs\nipvs: {scheduler: lc, scheduler: sh}\n"), &[]);
    assert_eq!(config.ipvs.scheduler, "sh");
    assert!(
        config.warnings.iter().any(|w| w == "ipvs.scheduler is given twice; the last one counts"),
        "{:?}",
        config.warnings
    );
}

#[test]
fn what_cannot_be_used_is_named_by_its_field() {
    for (path, value, expected) in [
        ("mode", "ipvS", "mode=\"ipvS\": must be ipvs or ebpf"),
        ("mode", "iptables", "choose ipvs or ebpf, or leave it and give --proxy-mode=ipvs"),
        ("mode", "nftables", "choose ipvs or ebpf"),
        ("iptables.masqueradeBit", "32", "iptables.masqueradeBit=\"32\": must be a whole number"),
        ("iptables.masqueradeBit", "'14'", "without quotes"),
        ("ipvs.strictARP", "'true'", "ipvs.strictARP=\"true\": must be true or false, without"),
        ("ipvs.syncPeriod", "30", "ipvs.syncPeriod=\"30\": must be a duration with units"),
        ("ipvs.minSyncPeriod", "1m", "must not be above ipvs.syncPeriod, which is 30s"),
        ("ipvs.minSyncPeriod", "-1s", "ipvs.minSyncPeriod=\"-1s\": must not be negative"),
        ("ipvs.excludeCIDRs", "[10.0.0.1]", "ipvs.excludeCIDRs=\"10.0.0.1\""),
        ("ipvs.excludeCIDRs", "10.0.0.0/8", "must be a list of texts"),
        ("clusterCIDR", "10.0.0.0", "clusterCIDR=\"10.0.0.0\""),
        ("clusterCIDR", "'10.0.0.0/8,10.1.0.0/16'", "one block of each address family"),
        ("nodePortAddresses", "[primary, 10.0.0.0/8]", "nodePortAddresses=\"primary,10.0.0.0/8\""),
        ("detectLocalMode", "Magic", "detectLocalMode=\"Magic\""),
        ("detectLocalMode", "BridgeInterface", "must name the pods' bridge"),
        ("bindAddress", "host", "bindAddress=\"host\": must be an IP address"),
        ("healthzBindAddress", "host:1", "healthzBindAddress=\"host:1\""),
        ("metricsBindAddress", "0.0.0.0:10256", "must differ from healthzBindAddress"),
        ("oomScoreAdj", "-1001", "oomScoreAdj=\"-1001\""),
        ("conntrack.min", "-1", "conntrack.min=\"-1\""),
        ("conntrack.udpTimeout", "1d", "conntrack.udpTimeout=\"1d\""),
        ("configSyncPeriod", "-1s", "configSyncPeriod=\"-1s\""),
        ("clientConnection.burst", "-1", "clientConnection.burst=\"-1\""),
        ("showHiddenMetricsForVersion", "x", "showHiddenMetricsForVersion=\"x\""),
        ("portRange", "9-1", "portRange=\"9-1\""),
        ("featureGates", "{A: 1}", "featureGates=\"A=1\": must be names with true or false"),
        ("logging.format", "xml", "logging.format=\"xml\": must be text or json"),
        ("logging.vmodule", "[{verbosity: 1}]", "must be a list of filePattern"),
        ("ipvs", "[]", "ipvs=\"\": must be a section of fields"),
    ] {
        let text = refused(&with(path, value), &[]);
        assert!(text.contains(expected), "{path}: {value}\n{text}");
        assert!(text.starts_with("error: 1 field cannot be used:"), "{text}");
    }
    let two = refused(&(with("ipvs.tcpTimeout", "x") + "oomScoreAdj: x\n"), &["--v=x"]);
    assert!(two.starts_with("error: 3 settings cannot be used:"), "{two}");
}

#[test]
fn what_is_no_configuration_is_said() {
    for (text, expected) in [
        ("", "is empty"),
        ("a: [", "did not find expected"),
        ("- a\n", "is a list; it must be a KubeProxyConfiguration"),
        ("kind: KubeProxyConfiguration\n", "has no apiVersion"),
        (&HEAD.replace("v1alpha1", "v1"), "apiVersion is kubeproxy.config.k8s.io/v1; it must be"),
        (&HEAD.replace("KubeProxy", "Kubelet"), "kind is KubeletConfiguration; it must be"),
        (&format!("{OWN_HEAD}---\n{HEAD}"), "must come first"),
    ] {
        let text = refused(text, &[]);
        assert!(text.contains("--config=") && text.contains(expected), "{text}");
    }
    let absent = Config::from_args(["proxy-daemon", "--config=/nonexistent"], "host").unwrap_err();
    assert!(absent.to_string().contains("--config=\"/nonexistent\": No such file"), "{absent}");
    let more = good(&format!("{HEAD}mode: ipvs\n---\nkind: ConfigMap\n"), &[]);
    assert!(more.warnings[0].contains("kind ConfigMap behind"), "{:?}", more.warnings);
}

#[test]
fn the_file_goes_before_flags_except_for_name_and_log() {
    let text = HEAD.to_owned()
        + "mode: ipvs\nclusterCIDR: 10.0.0.0/8\nhostnameOverride: of-file\nipvs: {scheduler: lc}\n\
           logging: {verbosity: 2, format: json}\n";
    let arguments = [
        "--ipvs-scheduler=sh",
        "--masquerade-all",
        "--hostname-override=of-flag",
        "-v6",
        "--master=https://192.0.2.1",
        "--sysctl-root=/host",
    ];
    let config = good(&text, &arguments);
    assert_eq!(config.ipvs.scheduler, "lc");
    assert!(!config.masquerade.all, "a flag of a field that the file leaves out is ignored too");
    assert_eq!(config.node_name, NodeName::new("of-flag"));
    assert_eq!((config.logging.verbosity, config.logging.format), (6, LogFormat::Json));
    assert_eq!(config.sysctl_root, PathBuf::from("/host"));
    assert!(matches!(config.source, Source::Api { master: Some(_), .. }));
    let mut warnings = config.warnings;
    warnings.sort();
    assert_eq!(
        warnings,
        [
            "--ipvs-scheduler=sh is ignored: --config=FILE goes before it",
            "--masquerade-all=true is ignored: --config=FILE goes before it",
        ]
    );
}

#[test]
fn whose_mode_counts() {
    let mode = |text: &str, arguments: &[&str]| {
        let config = good(&(HEAD.to_owned() + text), arguments);
        let about: Vec<_> = [config.notes, config.warnings].concat();
        let about = about
            .into_iter()
            .filter(|line| line.contains("mode=") && !line.contains("CIDR"))
            .collect::<Vec<_>>();
        (config.proxy_mode, about.join("; "))
    };
    assert_eq!(mode("mode: ebpf\n", &[]), (ProxyMode::Ebpf, String::new()));
    assert_eq!(mode("", &["--proxy-mode=ebpf"]), (ProxyMode::Ebpf, String::new()));
    let (chosen, said) = mode("mode: nftables\n", &["--proxy-mode=ebpf"]);
    assert_eq!(chosen, ProxyMode::Ebpf);
    assert_eq!(said, "mode=nftables is kube-proxy's: --proxy-mode=ebpf decides");
    let (chosen, said) = mode("mode: ipvs\n", &["--proxy-mode=ebpf"]);
    assert_eq!(chosen, ProxyMode::Ipvs);
    assert_eq!(said, "--proxy-mode=ebpf is ignored: mode=ipvs goes before it");
    let own = format!("mode: iptables\n---\n{OWN_HEAD}mode: ebpf\n");
    assert_eq!(mode(&own, &[]), (ProxyMode::Ebpf, String::new()));
}

#[test]
fn a_file_for_nftables_mode_keeps_what_it_means_there() {
    let ipvs = ["--proxy-mode=ipvs"];
    let text = HEAD.to_owned()
        + "mode: nftables\niptables: {masqueradeAll: true, masqueradeBit: 3}\n\
           nftables: {masqueradeBit: 0}\n";
    let config = good(&text, &ipvs);
    assert_eq!(config.masquerade, Masquerade { all: false, bit: 0 });
    assert_eq!(config.node_port_addresses, NodePortAddresses::Primary, "its default there");
    let text = text + "nodePortAddresses: [10.0.0.0/8]\n";
    let config = good(&text.replace("{masqueradeBit: 0}", "{masqueradeAll: true}"), &ipvs);
    assert_eq!(config.masquerade, Masquerade { all: true, bit: 14 });
    assert!(matches!(config.node_port_addresses, NodePortAddresses::Cidrs(_)));
    let iptables = good(&text.replace("mode: nftables", "mode: iptables"), &ipvs);
    assert_eq!(iptables.masquerade, Masquerade { all: true, bit: 3 });
}

#[test]
fn addresses_follow_the_family_of_bind_address() {
    let serving = good(&with("bindAddress", "'::'"), &[]).serving;
    assert_eq!(serving.healthz, Some("[::]:10256".parse().unwrap()));
    assert_eq!(serving.metrics, Some("[::1]:10249".parse().unwrap()));
    let flags = Config::from_args(["proxy-daemon", "--bind-address=::"], "host").unwrap();
    assert_eq!(flags.serving.healthz, Some("0.0.0.0:10256".parse().unwrap()), "as kube-proxy");
}

#[test]
fn a_change_without_effect_is_told_from_one_with() {
    let text = HEAD.to_owned() + "mode: ipvs\nclusterCIDR: 10.0.0.0/8\n";
    let config = good(&text, &[]);
    let noted = good(&(text.clone() + "configSyncPeriod: 20s\nzzz: 1\n"), &[]);
    assert!(!noted.notes.is_empty() && config.same_effect(&noted));
    assert!(!config.same_effect(&good(&(text + "oomScoreAdj: 1\n"), &[])));
}

#[test]
fn check_explains() {
    let explain = |text: &str, mode: &str, strict| {
        let explained = check::explain(text, mode, strict).expect("a configuration");
        (explained.good, explained.text)
    };
    let (good, text) = explain(EVERY_FIELD, "", false);
    assert!(good && text.contains("\n  ipvs.scheduler: lc (--ipvs-scheduler)\n"), "{text}");
    assert!(
        text.contains("\nwithout effect here:\n") && text.contains("portRange=300-2000 has no")
    );
    assert!(text.ends_with("The daemon starts with it."), "{text}");
    let (good, text) = explain(KUBEADM, "", false);
    assert!(
        !good && text.starts_with("the key config.conf of a ConfigMap\ncannot be used:\n  mode")
    );
    assert!(text.ends_with("The daemon refuses it."), "{text}");
    let (good, text) = explain(KUBEADM, "ebpf", false);
    assert!(good && text.contains("clusterCIDR: 10.244.0.0/16 (--cluster-cidr)"), "{text}");
    let typo = HEAD.to_owned() + "mode: ipvs\nclusterCidr: 10.0.0.0/8\n";
    let (good, text) = explain(&typo, "", false);
    assert!(good && text.contains("unknown, left out:\n  there is no field clusterCidr"), "{text}");
    assert!(text.contains("worth a look:\n  clusterCIDR is not set"), "{text}");
    assert!(!explain(&typo, "", true).0, "strict");
    assert!(check::explain("kind: Pod\napiVersion: v1\n", "", false).is_err());
}

#[test]
fn check_is_a_command_with_an_exit_status() {
    let run = |text: &str, arguments: &[&str]| {
        let file = written(text);
        let path = file.path().display().to_string();
        let arguments = [&["proxy-daemon", "config", "check", &path], arguments].concat();
        let usage = Config::from_args(arguments, "host").unwrap_err();
        assert!(matches!(usage, Usage::Print { .. }), "{usage}");
        (usage.exit_code(), usage.to_string().replace(&path, "FILE"))
    };
    let (code, text) = run(EVERY_FIELD, &[]);
    assert!(code == 0 && text.starts_with("FILE: KubeProxyConfiguration\n"), "{text}");
    assert_eq!(run(KUBEADM, &[]).0, 2);
    assert_eq!(run(KUBEADM, &["--proxy-mode=ipvs"]).0, 0);
    let (code, text) = run("kind: Pod\napiVersion: v1\n", &[]);
    assert!(code == 2 && text.starts_with("FILE: apiVersion is v1; it must be"), "{text}");
}

#[test]
fn each_flag_has_at_most_one_field_and_exists() {
    let flags: Vec<String> =
        command().get_arguments().filter_map(|a| Some(format!("--{}", a.get_long()?))).collect();
    let mut seen = std::collections::BTreeSet::new();
    for Field { path, target, .. } in KUBE_PROXY {
        if let Target::Flag(flag) = target {
            assert!(flags.iter().any(|known| known == flag), "{path}: {flag}");
            assert!(seen.insert(flag), "{path}: {flag} has two fields");
        }
    }
}
