//! What `deploy/` runs is a command line that this daemon accepts.

use std::collections::HashMap;

use serde_json::Value as Json;
use serde_yaml_ng::Value;

use super::{Config, NodePortAddresses, ProxyMode, Source};

const DAEMONSET: &str = include_str!("../../../deploy/daemonset.yaml");
/// JSON patches, as kustomize applies them.
const FOR_EBPF: &str = include_str!("../../../deploy/ebpf/daemonset.yaml");
const RBAC: &str = include_str!("../../../deploy/rbac.yaml");
const ENVIRONMENT: &str = include_str!("../../../deploy/daemon.env");

fn pod() -> Value {
    let daemonset: Value = serde_yaml_ng::from_str(DAEMONSET).unwrap();
    daemonset["spec"]["template"]["spec"].clone()
}

pub(super) fn daemonset() -> Json {
    serde_yaml_ng::from_str(DAEMONSET).unwrap()
}

/// The operations of RFC 6902 that are in use there.
pub(super) fn daemonset_for_ebpf() -> Json {
    let mut daemonset = daemonset();
    for patch in serde_yaml_ng::from_str::<Vec<Json>>(FOR_EBPF).unwrap() {
        let (parent, name) = patch["path"].as_str().unwrap().rsplit_once('/').unwrap();
        let parent = daemonset.pointer_mut(parent).unwrap_or_else(|| panic!("{patch}"));
        match (patch["op"].as_str().unwrap(), parent) {
            ("add", Json::Array(list)) if name == "-" => list.push(patch["value"].clone()),
            ("add", Json::Object(map)) => {
                assert_eq!(map.insert(name.to_owned(), patch["value"].clone()), None, "{patch}");
            }
            ("replace", Json::Object(map)) => {
                let old = map.insert(name.to_owned(), patch["value"].clone());
                assert!(old.is_some(), "{patch}");
            }
            other => panic!("{other:?}"),
        }
    }
    daemonset
}

/// `$(NAME)` as the kubelet replaces it.
fn expand(argument: &str, environment: &HashMap<&str, &str>) -> String {
    let mut text = argument.to_owned();
    for (name, value) in environment {
        text = text.replace(&format!("$({name})"), value);
    }
    text
}

/// What the container of this DaemonSet is started with, this mode put in.
fn config_of(daemonset: &Json, mode: &str) -> Config {
    let mut environment: HashMap<&str, &str> = ENVIRONMENT
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_once('=').expect("NAME=value"))
        .collect();
    environment.extend([("NODE_NAME", "node-a"), ("PROXY_MODE", mode)]);
    let mut arguments = vec!["proxy-daemon".to_owned()];
    let container = &daemonset["spec"]["template"]["spec"]["containers"][0];
    for argument in container["args"].as_array().unwrap() {
        arguments.push(expand(argument.as_str().unwrap(), &environment));
    }
    assert!(!arguments.iter().any(|argument| argument.contains("$(")), "{arguments:?}");
    Config::from_args(&arguments, "host").unwrap_or_else(|usage| panic!("{usage}"))
}

#[test]
fn the_daemonset_runs_a_command_line_that_is_accepted() {
    assert!(ENVIRONMENT.contains("\nPROXY_MODE=ipvs\n"));
    let config = config_of(&daemonset(), "ipvs");
    assert_eq!(config.proxy_mode, ProxyMode::Ipvs);
    assert_eq!(config.node_name.to_string(), "node-a");
    assert_eq!(config.node_port_addresses, NodePortAddresses::All);
    assert!(matches!(config.source, Source::Api { kubeconfig: None, master: Some(_) }));
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
}

#[test]
fn the_daemonset_mounts_what_it_names_and_is_not_privileged() {
    let pod = pod();
    let container = &pod["containers"][0];
    let security = &container["securityContext"];
    assert_eq!(security["privileged"], Value::Bool(false));
    assert_eq!(
        security["capabilities"]["add"],
        serde_yaml_ng::from_str::<Value>("[NET_ADMIN]").unwrap()
    );
    let mounted = container["volumeMounts"][0]["mountPath"].as_str().unwrap();
    let root = container["args"]
        .as_sequence()
        .unwrap()
        .iter()
        .find_map(|argument| argument.as_str()?.strip_prefix("--sysctl-root="))
        .unwrap();
    assert_eq!(mounted, format!("{root}/net"), "settings live below {root}/net");
    assert_eq!(pod["volumes"][0]["hostPath"]["path"], Value::from("/proc/sys/net"));
    for (probe, path) in [("livenessProbe", "/livez"), ("readinessProbe", "/healthz")] {
        assert_eq!(container[probe]["httpGet"]["path"], Value::from(path));
        assert_eq!(container[probe]["httpGet"]["port"], Value::from(10256));
    }
}

#[test]
fn the_component_for_ebpf_mode_gives_it_what_it_needs() {
    let daemonset = daemonset_for_ebpf();
    let config = config_of(&daemonset, "ebpf");
    assert_eq!(config.proxy_mode, ProxyMode::Ebpf);
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    let pod = &daemonset["spec"]["template"]["spec"];
    assert_eq!(pod["hostPID"], true);
    let container = &pod["containers"][0];
    let mount_of = |path: &std::path::Path| {
        let mounts = container["volumeMounts"].as_array().unwrap();
        let mount = mounts.iter().find(|mount| mount["mountPath"] == path.to_str().unwrap());
        let name =
            mount.unwrap_or_else(|| panic!("{} is not mounted", path.display()))["name"].clone();
        let volumes = pod["volumes"].as_array().unwrap();
        volumes.iter().find(|volume| volume["name"] == name).unwrap()["hostPath"]["path"].clone()
    };
    assert_eq!(mount_of(&config.bpf_root), "/sys/fs/bpf");
    assert_eq!(mount_of(config.cgroup_root.as_deref().unwrap()), "/sys/fs/cgroup");
    assert_eq!(
        container["securityContext"]["capabilities"],
        serde_json::json!({
            "drop": ["ALL"], "add": ["NET_ADMIN", "BPF", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"]
        })
    );
    assert_eq!(container["securityContext"]["privileged"], false);
}

#[test]
fn it_may_read_what_it_watches_and_write_nothing_but_events() {
    let role: Value = serde_yaml_ng::from_str(RBAC.split("\n---\n").next().unwrap()).unwrap();
    let text = |value: &Value| serde_yaml_ng::to_string(value).unwrap().replace("- ", "");
    let rules: Vec<String> = (role["rules"].as_sequence().unwrap().iter())
        .map(|rule| {
            let parts = ["apiGroups", "resources", "verbs"].map(|part| text(&rule[part]));
            parts.map(|part| part.trim().replace('\n', ",")).join(" ")
        })
        .collect();
    assert_eq!(
        rules,
        [
            "'' services,nodes get,list,watch",
            "discovery.k8s.io endpointslices get,list,watch",
            "networking.k8s.io servicecidrs get,list,watch",
            "events.k8s.io events create",
        ]
    );
}
