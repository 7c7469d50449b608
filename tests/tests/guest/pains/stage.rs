//! Two nodes with two pods each, a client outside, the daemon on both nodes, and one Service
//! that is reached by every kind of address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use proxy_tests::bed::{Bed, Settings};
use proxy_tests::binary::binary;
use proxy_tests::cluster::{Cluster, Families, Host};
use proxy_tests::traffic::{ConnectReport, ConnectSpec, Protocol, connect};
use serde_json::{Value, json};

use crate::node::{LONG, PATIENCE, until};
use crate::{MODE, SOCKETS};

pub const PORT: u16 = 80;
pub const TARGET: u16 = 8080;
/// By every pod, and by the Service.
const SERVED: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
pub const NODE_PORT: u16 = 30080;
pub const CLUSTER_IPS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 10, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa01)),
];
/// The outside client reaches them through node-a, unless a test changes that.
pub const BALANCER_IPS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 80)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x80)),
];

/// Who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// A pod of node-a.
    Pod,
    /// node-a itself, as processes with hostNetwork are.
    Host,
    Outside,
}

pub struct Stage {
    pub bed: Bed,
    _directory: tempfile::TempDir,
}

impl Stage {
    /// With servers on all pods, and no Service yet.
    pub fn new(arguments: &[&str]) -> Self {
        let mut stage = Self::without_daemons(arguments, None);
        stage.bed.start_daemons().expect("daemons");
        stage
    }

    /// The same before any daemon was started; they will be by `confined` where it is given.
    pub fn without_daemons(arguments: &[&str], confined: Option<PathBuf>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let settings = Settings {
            daemon: binary("proxy-daemon"),
            confined,
            mode: MODE,
            sockets: SOCKETS,
            families: Families::Dual,
            nodes: 2,
            pods_per_node: 2,
            directory: directory.path().to_owned(),
            arguments: arguments.iter().map(|&one| one.to_owned()).collect(),
        };
        let mut bed = Bed::build(settings).expect("a cluster");
        for (node, pod) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let name = bed.cluster().pod(node, pod).name().to_owned();
            bed.serve((node, pod), &name, &SERVED.map(|protocol| (protocol, TARGET)))
                .expect("a server");
        }
        Self { bed, _directory: directory }
    }

    pub fn cluster(&self) -> &Cluster {
        self.bed.cluster()
    }

    pub fn pod(&self, node: usize, pod: usize) -> &Host {
        self.cluster().pod(node, pod)
    }

    pub fn client(&self, client: Client) -> &Host {
        match client {
            Client::Pod => self.pod(0, 0),
            Client::Host => self.cluster().node(0),
            Client::Outside => self.cluster().outside().expect("a client outside"),
        }
    }

    /// Makes `shop/web` of this spec, or changes it, with endpoints on these pods.
    pub fn web(&self, spec: &Value, balancer: &[Value], endpoints: &[(usize, usize)]) {
        self.web_without_endpoints(spec, balancer);
        self.endpoints(endpoints);
    }

    /// The same, for tests that have endpoints of their own.
    pub fn web_without_endpoints(&self, spec: &Value, balancer: &[Value]) {
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": spec, "status": {"loadBalancer": {"ingress": balancer}},
        });
        self.bed.apply(service).expect("a Service");
    }

    /// Gives `shop/web` other endpoints.
    pub fn endpoints(&self, pods: &[(usize, usize)]) {
        for kind in ["IPv4", "IPv6"] {
            let endpoints: Vec<Value> = pods
                .iter()
                .map(|&(node, pod)| {
                    let host = self.pod(node, pod);
                    let address = host.address_like(CLUSTER_IPS[usize::from(kind == "IPv6")]);
                    json!({
                        "addresses": [address], "nodeName": self.cluster().node(node).name(),
                        "conditions": {"ready": true, "serving": true, "terminating": false},
                    })
                })
                .collect();
            let ports = SERVED.map(|protocol| {
                let number = protocol.to_string();
                json!({"name": number.to_lowercase(), "port": TARGET, "protocol": number})
            });
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("web-{}", kind.to_lowercase()), "namespace": "shop",
                    "labels": {"kubernetes.io/service-name": "web"},
                },
                "addressType": kind, "endpoints": endpoints,
                "ports": ports,
            });
            self.bed.apply(slice).expect("an EndpointSlice");
        }
    }

    pub fn connect(&self, from: &Host, spec: &ConnectSpec) -> ConnectReport {
        let report = from.in_netns(|| connect(spec)).expect("a namespace");
        report.expect("connections that could be tried")
    }

    /// Waits until a TCP frontend answers.
    pub fn until_served(&self, from: &Host, target: SocketAddr) {
        let spec = ConnectSpec::new(Protocol::Tcp, target, 1).timeout(Duration::from_secs(1));
        until(&format!("{target} answers {}", from.name()), LONG, || {
            self.connect(from, &spec).failed() == 0
        });
    }

    /// Connections that must all succeed.
    pub fn must_connect(&self, from: &Host, spec: &ConnectSpec) -> ConnectReport {
        let report = self.connect(from, &spec.clone().timeout(PATIENCE));
        assert_eq!(
            (report.failed(), report.attempted),
            (0, spec.count as u64),
            "{} to {}: {report:?}\n{}",
            from.name(),
            spec.target,
            self.bed.log_tails(30)
        );
        report
    }
}

/// The spec of a dual-stack Service of this type with both ClusterIPs.
pub fn spec(kind: &str) -> Value {
    let ports = SERVED.map(|protocol| {
        let number = protocol.to_string();
        let mut port = json!({"name": number.to_lowercase(), "port": PORT, "targetPort": TARGET});
        port["protocol"] = number.into();
        if kind != "ClusterIP" {
            port["nodePort"] = json!(NODE_PORT);
        }
        port
    });
    json!({
        "type": kind, "clusterIP": CLUSTER_IPS[0], "clusterIPs": CLUSTER_IPS,
        "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"], "ports": ports,
    })
}

/// Load-balancer addresses as a Service's status has them.
pub fn ingress(addresses: &[IpAddr], mode: &str) -> Vec<Value> {
    addresses.iter().map(|ip| json!({"ip": ip, "ipMode": mode})).collect()
}

pub fn tcp(target: SocketAddr, count: usize) -> ConnectSpec {
    ConnectSpec::new(Protocol::Tcp, target, count).timeout(PATIENCE)
}
