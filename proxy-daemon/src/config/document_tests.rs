//! What `/configz` shows and `--write-config-to` writes.

use serde_json::{Value, json};

use super::fields::KUBE_PROXY;
use super::file_tests::{EVERY_FIELD, HEAD, OWN_HEAD, WITHOUT_EFFECT, good, with};
use super::*;

/// kube-proxy's document.
fn theirs(config: &Config) -> Value {
    document(config)["kubeproxy.config.k8s.io"].clone()
}

fn at(document: &Value, path: &str) -> Value {
    document.pointer(&format!("/{}", path.replace('.', "/"))).cloned().unwrap_or(Value::Null)
}

#[test]
fn every_field_is_shown_as_it_was_set() {
    let shown = theirs(&good(EVERY_FIELD, &[]));
    let set: Value = serde_yaml_ng::Deserializer::from_str(EVERY_FIELD)
        .next()
        .map(|document| serde::Deserialize::deserialize(document).unwrap())
        .unwrap();
    let written_otherwise = json!({
        "logging.flushFrequency": "1s",
        "logging.options.json.infoBufferSize": "512",
        "metricsBindAddress": "0.0.0.0:10249",
        "hostnameOverride": "node-b",
        // Of the two only the mode's own has a meaning.
        "detectLocal.bridgeInterface": "",
    });
    for field in KUBE_PROXY {
        let expected = written_otherwise.get(field.path).cloned();
        let expected = expected.unwrap_or_else(|| at(&set, field.path));
        assert!(!expected.is_null(), "{} is not set", field.path);
        assert_eq!(at(&shown, field.path), expected, "{}", field.path);
    }
}

#[test]
fn settings_without_effect_are_shown_from_file_and_flag() {
    let base = theirs(&good(&with("mode", "ipvs"), &[]));
    for (path, value) in WITHOUT_EFFECT {
        let config = good(&with(path, value), &[]);
        assert_ne!(at(&theirs(&config), path), at(&base, path), "{path}: {value}");
        assert_eq!(config.inert.len(), 1, "{path}: {:?}", config.inert);
    }
    let flags = ["proxy-daemon", "--kube-api-qps=50", "--profiling", "--config-sync-period=1h"];
    let shown = theirs(&Config::from_args(flags, "a").unwrap());
    assert_eq!(at(&shown, "clientConnection.qps"), json!(50));
    assert_eq!(at(&shown, "enableProfiling"), json!(true));
    assert_eq!(at(&shown, "configSyncPeriod"), json!("1h0m0s"));
}

/// Sections and fields as kube-proxy's own page has them.
#[test]
fn nothing_that_kube_proxy_shows_is_absent() {
    let shown = theirs(&Config::from_args(["proxy-daemon"], "a").unwrap());
    for field in KUBE_PROXY {
        // Go leaves these out while they are empty.
        let absent = ["featureGates", "logging.vmodule", "windowsRunAsService"];
        let absent = absent.contains(&field.path) || field.path.ends_with("splitStream");
        let found = shown.pointer(&format!("/{}", field.path.replace('.', "/"))).is_some();
        assert_eq!(found, !absent, "{}", field.path);
    }
    assert_eq!(at(&shown, "nftables.syncPeriod"), json!("30s"));
    assert_eq!(at(&shown, "iptables.minSyncPeriod"), json!("1s"));
}

#[test]
fn kube_proxys_document_has_a_mode_that_kube_proxy_knows() {
    let modes = |text: &str, arguments: &[&str]| {
        let config = good(&(HEAD.to_owned() + text), arguments);
        let again = good(&yaml(&config).unwrap(), &[]);
        assert!(again.same_effect(&config), "{text}: {again:#?}");
        let own = document(&config)["nodeDataplane"]["mode"].clone();
        (theirs(&config)["mode"].clone(), own)
    };
    let ebpf = ["--proxy-mode=ebpf"];
    assert_eq!(modes("mode: ebpf\n", &[]), (json!(""), json!("ebpf")));
    assert_eq!(modes("", &ebpf), (json!(""), json!("ebpf")));
    assert_eq!(modes("mode: ipvs\n", &[]), (json!("ipvs"), json!("ipvs")));
    let nftables = "mode: nftables\nnftables: {masqueradeBit: 3, masqueradeAll: true}\n";
    assert_eq!(modes(nftables, &ebpf), (json!("nftables"), json!("ebpf")));
    let own = format!("mode: ipvs\n---\n{OWN_HEAD}mode: ebpf\n");
    assert_eq!(modes(&own, &[]), (json!("ipvs"), json!("ebpf")));
    let flags = |mode| theirs(&Config::from_args(["proxy-daemon", mode], "a").unwrap());
    assert_eq!(flags("--proxy-mode=ipvs")["mode"], json!("ipvs"));
    assert_eq!(flags("--proxy-mode=ebpf")["mode"], json!(""));
}

#[test]
fn what_is_written_reads_back_as_the_same() {
    let flags = [
        "--proxy-mode=ebpf",
        "--nodeport-addresses=primary",
        "--drain-timeout=1m",
        "--bpf-root=/a",
        "--cgroup-root=/b",
        "--devices=eth*",
        "--socket-opt-out=c",
        "--xdp=generic",
        "--ebpf-selection=maglev",
        "--direct-server-return=accept",
        "--direct-server-return-port=7000",
        "--ebpf-map-sizes=backends=7,flows=9,sockets=8",
        "--ebpf-map-limits=slots=9",
    ];
    let flags = Config::from_args([&["proxy-daemon"], &flags[..]].concat(), "host").unwrap();
    let every = good(&EVERY_FIELD.replace("hostnameOverride: Node-B", ""), &[]);
    for config in [flags, every] {
        let text = yaml(&config).unwrap();
        let again = good(&text, &[]);
        assert!(config.same_effect(&again), "{text}\n{config:#?}\n{again:#?}");
        assert!(
            again.warnings.iter().all(|w| w.contains("clusterCIDR is not set")),
            "{:?}",
            again.warnings
        );
        let said = |config: &Config| {
            let names = config.notes.iter().filter_map(|note| note.split('=').next());
            names.map(str::to_owned).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(said(&again), said(&config), "what has no effect is kept");
        assert_eq!(again.inert, config.inert);
        assert_eq!(yaml(&again).unwrap(), text);
        assert!(text.contains("hostnameOverride: ''\n"), "it may serve every node: {text}");
        let (_, own) = text.split_once("---\n").unwrap();
        assert!(!own.contains("null"), "{own}");
    }
}
