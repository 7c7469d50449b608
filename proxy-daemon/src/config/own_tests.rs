//! What is this daemon's own: its kind of file, and its flags beside kube-proxy's file.

use super::fields::{KUBE_PROXY, OWN, Target};
use super::file_tests::{Effect, HEAD, OWN_HEAD, field, good, refused, written};
use super::*;

/// Of our own kind, in a second document.
const OWN_EFFECTS: &[Effect] = &[
    ("mode", "ebpf", |c| c.proxy_mode == ProxyMode::Ebpf),
    ("manifests", "/m", |c| c.source == Source::Manifests("/m".into())),
    ("drainTimeout", "0s", |c| c.drain_timeout.is_zero()),
    ("cgroupRoot", "/c", |c| c.cgroup_root == Some("/c".into())),
    ("sysctlRoot", "/s", |c| c.sysctl_root.as_os_str() == "/s"),
    ("metrics.serviceLimit", "7", |c| c.series.service_ports == 7),
    ("metrics.endpoints", "true", |c| c.series.endpoints),
    ("metrics.endpointLimit", "0", |c| c.series.endpoint_limit == 0),
    ("ebpf.bpfRoot", "/b", |c| c.bpf_root.as_os_str() == "/b"),
    ("ebpf.devices", "[eth0, 'cali*']", |c| c.devices == ["eth0", "cali*"]),
    ("ebpf.socketOptOut", "[a/*]", |c| c.socket_opt_outs == ["a/*"]),
    ("ebpf.xdp", "generic", |c| c.xdp == Xdp::Generic),
    ("ebpf.selection", "maglev", |c| c.selection == Selection::Maglev),
    ("ebpf.directServerReturn", "on", |c| c.direct_server_return == DirectServerReturn::On),
    // What Helm makes of `on`.
    ("ebpf.directServerReturn", "true", |c| c.direct_server_return == DirectServerReturn::On),
    ("ebpf.directServerReturnPort", "7000", |c| c.direct_server_return_port == 7000),
    ("ebpf.mapSizes", "{slots: 9, backends: 8}", |c| {
        c.map_sizes == MapSizes { slots: 9, backends: 8, ..MapSizes::default() }
    }),
    ("ebpf.mapLimits", "{frontends: 7}", |c| c.map_limits.frontends == 7),
];

#[test]
fn every_field_of_our_own_kind_has_its_effect() {
    let first = HEAD.to_owned() + "mode: ipvs\n";
    let base = good(&first, &[]);
    for (path, value, effect) in OWN_EFFECTS {
        assert!(!effect(&base), "{path}: the test would not notice");
        let document = OWN_HEAD.to_owned() + &field(path, value);
        assert!(effect(&good(&format!("{first}---\n{document}"), &[])), "{path}: second document");
        let own = written(&document);
        let own = format!("--dataplane-config={}", own.path().display());
        let config = Config::from_args(["proxy-daemon", &own], "host").unwrap();
        assert!(effect(&config), "{path}: file of its own");
    }
    for field in OWN {
        assert!(OWN_EFFECTS.iter().any(|(path, ..)| *path == field.path), "{}", field.path);
    }
}

/// All flags of our own, each with a value that is not its default.
const OWN_FLAGS: [&str; 16] = [
    "--bpf-root=/b",
    "--cgroup-root=/c",
    "--devices=eth0",
    "--direct-server-return=on",
    "--direct-server-return-port=7000",
    "--drain-timeout=1m",
    "--ebpf-map-limits=slots=600000",
    "--ebpf-map-sizes=slots=7",
    "--ebpf-selection=random",
    "--endpoint-metrics=true",
    "--endpoint-metrics-limit=8",
    "--manifests=/m",
    "--service-metrics-limit=9",
    "--socket-opt-out=a/*",
    "--sysctl-root=/s",
    "--xdp=native",
];

#[test]
fn flags_of_our_own_stay_in_force_beside_a_file() {
    let text = HEAD.to_owned() + "mode: ebpf\nclusterCIDR: 10.0.0.0/8\n";
    let alone = ["proxy-daemon", "--proxy-mode=ebpf", "--cluster-cidr=10.0.0.0/8"];
    let alone = Config::from_args([&alone, &OWN_FLAGS[..]].concat(), "host").unwrap();
    let beside = good(&text, &OWN_FLAGS);
    assert_eq!(beside.warnings, Vec::<String>::new());
    assert!(beside.same_effect(&alone), "{beside:#?}");
    for flag in OWN_FLAGS {
        assert!(!good(&text, &[]).same_effect(&good(&text, &[flag])), "{flag}");
        let (name, _) = flag.split_once('=').unwrap();
        let field = OWN.iter().find(|f| matches!(f.target, Target::Flag(known) if known == name));
        assert!(field.is_some(), "{name} has no field");
    }
    assert!(refused(&text, &["--xdp=bogus"]).contains("--xdp=\"bogus\": must be off, auto"));
    // The kind of our own goes before them, and says so.
    let own = format!("{text}---\n{OWN_HEAD}ebpf: {{xdp: off, mapSizes: {{slots: 5}}}}\n");
    let config = good(&own, &["--xdp=native"]);
    assert_eq!((config.xdp, config.map_sizes.slots), (Xdp::Off, 5));
    assert_eq!(config.warnings, ["--xdp=native is ignored: ebpf.xdp=off goes before it"]);
    let wrong = refused(&own.replace("slots", "slot"), &[]);
    assert!(wrong.contains("ebpf.mapSizes=\"slot=5\": must be like frontends="), "{wrong}");
}

#[test]
fn every_flag_is_in_one_class() {
    let mut ours = Vec::new();
    for argument in command().get_arguments() {
        let id = argument.get_long().unwrap();
        let classes: Vec<_> = cli::classes(id).collect();
        assert_eq!(classes.len(), 1, "--{id}: {classes:?}");
        if classes == [cli::Class::Ours] {
            ours.push(format!("--{id}"));
        }
    }
    ours.sort();
    let tested = OWN_FLAGS.map(|flag| flag.split_once('=').unwrap().0);
    assert_eq!(ours, tested);
    let documented = include_str!("../../../docs/configuration.md");
    let named = documented.split_once("They have flags (").unwrap().1.split_once(')').unwrap().0;
    let mut named: Vec<&str> = named.split('`').filter(|part| part.starts_with("--")).collect();
    named.sort_unstable();
    assert_eq!(named, tested, "docs/configuration.md names all of them");
    // That file goes before a flag which has a field, and only there can it.
    for field in KUBE_PROXY.iter().chain(OWN) {
        let Target::Flag(flag) = field.target else { continue };
        let class = cli::classes(&flag[2..]).next();
        assert!(!matches!(class, Some(cli::Class::OfNoFile | cli::Class::WithoutField)), "{flag}");
    }
}
