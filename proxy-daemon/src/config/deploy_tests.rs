//! What `deploy/` runs is a command line that this daemon accepts.

use std::collections::{BTreeSet, HashMap};
use std::process::Command;

use k8s_openapi::api::apps::v1::DaemonSet;
use serde_json::Value as Json;
use serde_yaml_ng::Value;

use super::{Config, NodePortAddresses, ProxyMode, Source};

const DAEMONSET: &str = include_str!("../../../deploy/daemonset.yaml");
/// JSON patches, as kustomize applies them.
const FOR_EBPF: &str = include_str!("../../../deploy/ebpf/daemonset.yaml");
const RBAC: &str = include_str!("../../../deploy/rbac.yaml");
const UNIT: &str = include_str!("../../../deploy/systemd/node-dataplane.service");
const UNIT_FOR_EBPF: &str = include_str!("../../../deploy/systemd/ebpf.conf");
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
    let probe = &container["readinessProbe"]["httpGet"];
    assert_eq!(probe["path"], Value::from("/healthz"));
    assert_eq!(probe["port"], Value::from(10256));
    // /livez fails when an object does; to end the daemon then would leave all others unprogrammed.
    assert!(container.get("livenessProbe").is_none());
}

/// What a profile for containers would forbid, and the type of the API knows the fields.
#[test]
fn security_modules_let_ebpf_mode_write_its_pins() {
    let security = |daemonset: &Json| {
        let typed: DaemonSet = serde_json::from_value(daemonset.clone()).unwrap();
        assert_eq!(&serde_json::to_value(&typed).unwrap(), daemonset, "unknown fields");
        let mut pod = typed.spec.unwrap().template.spec.unwrap();
        pod.containers.remove(0).security_context.unwrap()
    };
    let ebpf = security(&daemonset_for_ebpf());
    assert_eq!(ebpf.app_armor_profile.unwrap().type_, "Unconfined");
    assert_eq!(ebpf.se_linux_options.unwrap().type_.as_deref(), Some("spc_t"));
    let ipvs = security(&daemonset());
    assert!(ipvs.app_armor_profile.is_none() && ipvs.se_linux_options.is_none());
    // The runtimes' AppArmor profile denies to write below /proc/sys; ipvs mode has it elsewhere.
    let root = config_of(&daemonset(), "ipvs").sysctl_root;
    assert!(!root.starts_with("/proc"), "{}", root.display());
}

/// The values of a setting, all lines of it together.
fn unit_values<'a>(unit: &'a str, name: &str) -> Vec<&'a str> {
    let lines = unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    lines.flat_map(str::split_whitespace).collect()
}

#[test]
fn the_systemd_unit_gives_each_mode_what_its_pod_has() {
    let capabilities = |daemonset: &Json| -> BTreeSet<String> {
        let add =
            daemonset.pointer("/spec/template/spec/containers/0/securityContext/capabilities/add");
        let add = add.unwrap().as_array().unwrap().iter();
        add.map(|name| format!("CAP_{}", name.as_str().unwrap())).collect()
    };
    let of = |units: &[&str]| -> BTreeSet<String> {
        let all = units.iter().flat_map(|unit| unit_values(unit, "CapabilityBoundingSet"));
        all.map(str::to_owned).collect()
    };
    assert_eq!(of(&[UNIT]), capabilities(&daemonset()));
    assert_eq!(of(&[UNIT, UNIT_FOR_EBPF]), capabilities(&daemonset_for_ebpf()));
    assert_eq!(unit_values(UNIT_FOR_EBPF, "SystemCallFilter"), ["bpf", "setns"]);
    // Else five quick ends are the last ones.
    assert_eq!(unit_values(UNIT, "StartLimitIntervalSec"), ["0"]);
    assert_eq!(unit_values(UNIT, "Restart"), ["always"]);
}

/// As systemd reads it, where there is one: it tells what it does not know and goes on.
#[test]
fn systemd_knows_every_setting_of_the_unit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("node-dataplane.service");
    // Neither the daemon nor its manual page is installed here.
    let unit = UNIT.replace("/usr/bin/proxy-daemon", "/bin/true");
    let unit: Vec<&str> = unit.lines().filter(|line| !line.starts_with("Documentation=")).collect();
    std::fs::write(&path, unit.join("\n")).unwrap();
    let drop_ins = directory.path().join("node-dataplane.service.d");
    std::fs::create_dir(&drop_ins).unwrap();
    std::fs::write(drop_ins.join("ebpf.conf"), UNIT_FOR_EBPF).unwrap();
    let mut verify = Command::new("systemd-analyze");
    let path_of_units = format!("{}:", directory.path().display());
    verify.arg("verify").arg(&path).env("SYSTEMD_UNIT_PATH", path_of_units);
    if let Ok(output) = verify.output() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let about: Vec<&str> =
            said.lines().filter(|line| line.contains("node-dataplane.service")).collect();
        assert!(output.status.success() && about.is_empty(), "{said}");
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
