//! The Helm chart, as rendered for three kinds of clusters, and for ebpf mode.
//!
//! The rendered manifests are kept beside the chart, so that they are checked where there is
//! no `helm` too; a digest in their first line tells that the chart is still the same.
//! `cargo xtask generate` renders them again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Deserialize as _;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::deploy_tests::{daemonset, daemonset_for_ebpf};
use super::{Config, ProxyMode, Source};

const CLUSTERS: [&str; 4] = ["plain", "kubeadm", "eks", "ebpf"];
const RENDERED: [&str; 5] = ["plain", "kubeadm", "eks", "ebpf", "monitored"];
const KUBEADM: &str = include_str!("fixtures/kubeadm.yaml");
/// As EKS has it in the ConfigMap kube-proxy-config, shortened.
const EKS: &str = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.0
clientConnection:
  kubeconfig: /var/lib/kube-proxy/kubeconfig
  qps: 5
clusterCIDR: ''
conntrack: {maxPerCore: 32768, min: 131072, tcpCloseWaitTimeout: 1h0m0s}
mode: iptables
metricsBindAddress: 0.0.0.0:10249
oomScoreAdj: -998
";

fn helm_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm")
}

/// FNV-1a of every file's name and content: no security, only "has anything changed".
fn digest(cluster: &str) -> String {
    let directory = helm_dir();
    let chart = directory.join("node-dataplane");
    let mut files = vec![directory.join("values").join(format!("{cluster}.yaml"))];
    for part in [chart.clone(), chart.join("templates")] {
        let entries = std::fs::read_dir(part).unwrap().map(|entry| entry.unwrap().path());
        files.extend(entries.filter(|path| path.is_file()));
    }
    files.sort();
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for path in files {
        let name = path.file_name().unwrap().to_string_lossy().into_owned().into_bytes();
        for byte in name.into_iter().chain(std::fs::read(&path).unwrap()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

/// `None` where there is no helm: in `PATH`, or where `HELM` says.
fn helm(arguments: &[&str]) -> Option<String> {
    let program = std::env::var_os("HELM").unwrap_or_else(|| "helm".into());
    let output = Command::new(program).args(arguments).current_dir(helm_dir()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "helm {arguments:?}: {text}{error}");
    Some(text)
}

fn rendered(cluster: &str) -> String {
    std::fs::read_to_string(helm_dir().join("rendered").join(format!("{cluster}.yaml"))).unwrap()
}

#[test]
fn what_is_rendered_is_of_this_chart() {
    for cluster in RENDERED {
        let values = format!("values/{cluster}.yaml");
        let head = format!("# helm template, {values}, chart {}\n", digest(cluster));
        let place = ["--namespace", "kube-system", "-f", &values];
        let template = [&["template", "node-dataplane", "node-dataplane"], &place[..]].concat();
        if let Some(text) = helm(&template) {
            helm(&["lint", "--strict", "node-dataplane", "-f", &values]);
            let path = helm_dir().join("rendered").join(format!("{cluster}.yaml"));
            if std::env::var_os("PROXY_UPDATE").is_some() {
                std::fs::write(&path, format!("{head}{text}")).unwrap();
            }
            assert_eq!(rendered(cluster), format!("{head}{text}"), "`cargo xtask generate`");
        }
        let first = rendered(cluster).lines().next().unwrap().to_owned();
        assert_eq!(first, head.trim_end(), "`cargo xtask generate`, with helm");
    }
}

fn documents(text: &str) -> BTreeMap<String, Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(text);
    documents
        .map(|document| Option::<Value>::deserialize(document).unwrap())
        .filter_map(|document| {
            let document = document?;
            Some((document["kind"].as_str()?.to_owned(), document))
        })
        .collect()
}

/// As its type, of which nothing is unknown: what the type does not keep was none of its.
fn typed<T: DeserializeOwned + serde::Serialize>(value: &Value) -> T {
    let object: T = serde_json::from_value(value.clone()).unwrap();
    assert_eq!(&serde_json::to_value(&object).unwrap(), value);
    object
}

#[test]
fn each_object_is_of_its_type_without_unknown_fields() {
    for cluster in CLUSTERS {
        let objects = documents(&rendered(cluster));
        assert_eq!(objects.len(), 5, "{cluster}");
        typed::<DaemonSet>(&objects["DaemonSet"]);
        typed::<ConfigMap>(&objects["ConfigMap"]);
        typed::<ServiceAccount>(&objects["ServiceAccount"]);
        typed::<ClusterRole>(&objects["ClusterRole"]);
        typed::<ClusterRoleBinding>(&objects["ClusterRoleBinding"]);
    }
}

#[test]
fn chart_and_kustomization_give_the_same_permissions() {
    let rbac = documents(include_str!("../../../deploy/rbac.yaml"));
    for cluster in CLUSTERS {
        let objects = documents(&rendered(cluster));
        let kustomized = if cluster == "ebpf" { daemonset_for_ebpf() } else { daemonset() };
        assert_eq!(objects["ClusterRole"]["rules"], rbac["ClusterRole"]["rules"], "{cluster}");
        let pod = "/spec/template/spec";
        for part in [
            "containers/0/securityContext",
            "containers/0/readinessProbe",
            "containers/0/resources",
            "volumes/0",
            "tolerations",
            "nodeSelector",
            "hostNetwork",
            "dnsPolicy",
            "priorityClassName",
            "terminationGracePeriodSeconds",
        ] {
            let part = format!("{pod}/{part}");
            let ours = objects["DaemonSet"].pointer(&part);
            assert!(ours.is_some(), "{cluster}: {part}");
            assert_eq!(ours, kustomized.pointer(&part), "{cluster}: {part}");
        }
        let host_pid = format!("{pod}/hostPID");
        assert_eq!(objects["DaemonSet"].pointer(&host_pid), kustomized.pointer(&host_pid));
        // Of the node; where configuration is mounted differs.
        let volumes = |daemonset: &Value| -> Vec<Value> {
            let all = daemonset.pointer(&format!("{pod}/volumes")).unwrap().as_array().unwrap();
            all.iter().filter(|volume| volume["hostPath"].is_object()).cloned().collect()
        };
        assert_eq!(volumes(&objects["DaemonSet"]), volumes(&kustomized), "{cluster}");
    }
}

#[test]
fn the_probe_asks_where_the_daemon_answers() {
    let text = super::file::in_config_map(KUBEADM).unwrap().unwrap().1;
    for (cluster, existing) in [
        ("plain", None),
        ("monitored", None),
        ("kubeadm", Some(("/var/lib/kube-proxy/config.conf", &*text))),
    ] {
        let served = config(cluster, existing).serving.healthz.unwrap();
        let objects = documents(&rendered(cluster));
        let pod = typed::<DaemonSet>(&objects["DaemonSet"]).spec.unwrap().template.spec.unwrap();
        assert!(pod.containers[0].liveness_probe.is_none(), "{cluster}");
        let probe = pod.containers[0].readiness_probe.clone().unwrap().http_get.unwrap();
        let host: IpAddr = probe.host.unwrap().parse().unwrap();
        assert!(host.is_loopback() && host.is_ipv4() == served.is_ipv4(), "{cluster}: {host}");
        assert_eq!(probe.port, IntOrString::Int(served.port().into()), "{cluster}");
    }
}

/// Those that only helm can tell.
#[test]
fn values_that_decide_about_the_probe_and_the_security_modules() {
    let with = |arguments: &[&str]| {
        let template = ["template", "node-dataplane", "node-dataplane"];
        let text = helm(&[&template[..], arguments].concat())?;
        let daemonset = documents(&text).remove("DaemonSet").unwrap();
        Some(daemonset["spec"]["template"].clone())
    };
    let probe = |address: &str| {
        let value = format!("probeAddress={address}");
        let pod = with(&["-f", "values/kubeadm.yaml", "--set-string", &value])?;
        Some(pod["spec"]["containers"][0].get("readinessProbe").cloned())
    };
    // No helm.
    let Some(left_out) = probe("none") else { return };
    assert_eq!(left_out, None);
    for (address, host, port) in [
        ("0.0.0.0", "127.0.0.1", 10256),
        ("[::]:10999", "::1", 10999),
        ("192.0.2.1:1", "192.0.2.1", 1),
        ("2001:db8::1", "2001:db8::1", 10256),
        ("[2001:db8::1]:80", "2001:db8::1", 80),
    ] {
        let get = probe(address).unwrap().unwrap()["httpGet"].clone();
        let expected = serde_json::json!({"host": host, "path": "/healthz", "port": port});
        assert_eq!(get, expected, "{address}");
    }
    // API servers before 1.30 do not know the field.
    let old = with(&["-f", "values/ebpf.yaml", "--kube-version", "1.29.0"]).unwrap();
    let annotation = "container.apparmor.security.beta.kubernetes.io/proxy";
    assert_eq!(old["metadata"]["annotations"][annotation], "unconfined");
    let security = &old["spec"]["containers"][0]["securityContext"];
    assert_eq!(
        (security.get("appArmorProfile"), &security["seLinuxOptions"]["type"]),
        (None, &"spc_t".into())
    );
    let own = "appArmorProfile.type=RuntimeDefault";
    let own = with(&["-f", "values/ebpf.yaml", "--set", own]).unwrap();
    let security = &own["spec"]["containers"][0]["securityContext"];
    assert_eq!(security["appArmorProfile"]["type"], "RuntimeDefault");
}

#[test]
fn metrics_are_found_under_the_job_of_kube_proxy() {
    let objects = documents(&rendered("monitored"));
    let labels = &objects["DaemonSet"]["spec"]["template"]["metadata"]["labels"];
    let served = config("monitored", None).serving.metrics.unwrap();
    assert!(!served.ip().is_loopback(), "{served}");
    let monitor = &objects["PodMonitor"];
    assert_eq!(monitor["apiVersion"], "monitoring.coreos.com/v1");
    assert_eq!(monitor["metadata"]["labels"]["release"], "prometheus");
    let selector = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap();
    assert!(selector.iter().all(|(name, value)| labels[name] == *value), "{selector:?}");
    let [endpoint] = &monitor["spec"]["podMetricsEndpoints"].as_array().unwrap()[..] else {
        panic!("{monitor}")
    };
    assert_eq!((&endpoint["path"], &endpoint["honorLabels"]), (&"/metrics".into(), &true.into()));
    let relabelings = endpoint["relabelings"].as_array().unwrap();
    let to = |label: &str| -> Vec<&str> {
        let of = relabelings.iter().filter(|rule| rule["targetLabel"] == label);
        of.filter_map(|rule| rule["replacement"].as_str()).collect()
    };
    assert_eq!(to("job"), ["kube-proxy"]);
    assert_eq!(to("__address__"), ["$1:10249", "[$1]:10249"]);

    let service = typed::<Service>(&objects["Service"]).spec.unwrap();
    assert_eq!(service.cluster_ip.as_deref(), Some("None"));
    assert!(service.selector.unwrap().iter().all(|(name, value)| labels[name] == **value));
    let port = IntOrString::Int(served.port().into());
    assert_eq!(service.ports.unwrap()[0].target_port, Some(port));
}

/// The daemon's configuration in the Pod: its files are where the manifests mount them.
fn config(cluster: &str, existing: Option<(&str, &str)>) -> Config {
    let directory = tempfile::tempdir().unwrap();
    let objects = documents(&rendered(cluster));
    let mount = |path: &str| {
        let path = directory.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    for (key, text) in objects["ConfigMap"]["data"].as_object().unwrap() {
        std::fs::write(mount(&format!("/etc/node-dataplane/{key}")), text.as_str().unwrap())
            .unwrap();
    }
    if let Some((path, text)) = existing {
        std::fs::write(mount(path), text).unwrap();
    }
    let root = directory.path().display().to_string();
    let container = &objects["DaemonSet"]["spec"]["template"]["spec"]["containers"][0];
    let arguments = container["args"].as_array().unwrap().iter().map(|argument| {
        let argument = argument.as_str().unwrap().replace("$(NODE_NAME)", "node-a");
        match argument.split_once('=') {
            Some((flag, path)) if flag.ends_with("config") => format!("{flag}={root}{path}"),
            _ => argument,
        }
    });
    let arguments = std::iter::once("proxy-daemon".to_owned()).chain(arguments);
    Config::from_args(arguments, "host").unwrap_or_else(|usage| panic!("{cluster}: {usage}"))
}

#[test]
fn the_daemon_starts_with_what_each_cluster_gives_it() {
    let plain = config("plain", None);
    assert_eq!(plain.cluster_cidrs.len(), 1);
    assert!(matches!(plain.source, Source::Api { kubeconfig: None, master: Some(_) }));

    let text = super::file::in_config_map(KUBEADM).unwrap().unwrap().1;
    let kubeadm = config("kubeadm", Some(("/var/lib/kube-proxy/config.conf", &text)));
    let eks = config("eks", Some(("/var/lib/kube-proxy-config/config", EKS)));
    for config in [&kubeadm, &eks] {
        assert!(matches!(config.source, Source::Api { kubeconfig: Some(_), master: None }));
    }
    let ebpf = config("ebpf", None);
    assert_eq!(ebpf.proxy_mode, ProxyMode::Ebpf);
    assert_eq!(ebpf.cgroup_root, Some("/host/sys/fs/cgroup".into()));
    for config in [plain, kubeadm, eks] {
        assert_eq!(config.proxy_mode, ProxyMode::Ipvs);
        assert_eq!(config.node_name.to_string(), "node-a");
        assert_eq!(config.sysctl_root, PathBuf::from("/host/proc/sys"));
        assert_eq!(config.logging.verbosity, 2);
        let about: Vec<_> =
            config.warnings.iter().filter(|warning| !warning.contains("clusterCIDR")).collect();
        assert!(about.is_empty(), "{about:?}");
    }
}

#[test]
fn mounts_are_of_volumes_and_config_files_are_mounted() {
    for cluster in CLUSTERS {
        let objects = documents(&rendered(cluster));
        let pod = typed::<DaemonSet>(&objects["DaemonSet"]).spec.unwrap().template.spec.unwrap();
        let volumes: Vec<_> = pod.volumes.unwrap().into_iter().map(|volume| volume.name).collect();
        let mounts = pod.containers[0].volume_mounts.clone().unwrap();
        assert_eq!(mounts.len(), volumes.len(), "{cluster}");
        assert!(mounts.iter().all(|mount| volumes.contains(&mount.name)), "{cluster}");
        for argument in pod.containers[0].args.as_ref().unwrap() {
            if let Some((_, path)) = argument.split_once("config=") {
                let mounted =
                    mounts.iter().any(|m| path.starts_with(&format!("{}/", m.mount_path)));
                assert!(mounted, "{cluster}: {argument}");
            }
        }
    }
}
