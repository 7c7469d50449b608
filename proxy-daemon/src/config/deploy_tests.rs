//! What `deploy/` runs is a command line that this daemon accepts.

use std::collections::HashMap;

use serde_yaml_ng::Value;

use super::{Config, NodePortAddresses, ProxyMode, Source};

const DAEMONSET: &str = include_str!("../../../deploy/daemonset.yaml");
const RBAC: &str = include_str!("../../../deploy/rbac.yaml");
const ENVIRONMENT: &str = include_str!("../../../deploy/daemon.env");

fn pod() -> Value {
    let daemonset: Value = serde_yaml_ng::from_str(DAEMONSET).unwrap();
    daemonset["spec"]["template"]["spec"].clone()
}

/// `$(NAME)` as the kubelet replaces it.
fn expand(argument: &str, environment: &HashMap<&str, &str>) -> String {
    let mut text = argument.to_owned();
    for (name, value) in environment {
        text = text.replace(&format!("$({name})"), value);
    }
    text
}

#[test]
fn the_daemonset_runs_a_command_line_that_is_accepted() {
    let mut environment: HashMap<&str, &str> = ENVIRONMENT
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_once('=').expect("NAME=value"))
        .collect();
    environment.insert("NODE_NAME", "node-a");
    let mut arguments = vec!["proxy-daemon".to_owned()];
    for argument in pod()["containers"][0]["args"].as_sequence().unwrap() {
        arguments.push(expand(argument.as_str().unwrap(), &environment));
    }
    assert!(!arguments.iter().any(|argument| argument.contains("$(")), "{arguments:?}");
    let config = Config::from_args(&arguments, "host").unwrap_or_else(|usage| panic!("{usage}"));
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
