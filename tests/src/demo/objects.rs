//! The Services of the demonstration, as one would meet them in a small cluster.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::{Value, json};

use crate::cluster::{Cluster, Pod};
use crate::port::Port;
use crate::traffic::Protocol;

/// The pod of each node that is no endpoint at first: on node-a it is the client, on
/// node-b it takes the traffic over.
pub const SPARE: usize = 3;

/// An endpoint: the pod's name, node, zone and addresses.
#[derive(Debug, Clone)]
struct Endpoint {
    name: String,
    node: String,
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

impl Endpoint {
    fn of(pod: &Pod) -> Self {
        // `node-a-pod-2` is a pod of `node-a`.
        let node = pod.name().rsplitn(3, '-').last().unwrap_or_default().to_owned();
        Self { name: pod.name().to_owned(), node, v4: pod.ipv4(), v6: pod.ipv6() }
    }
}

/// A Service with its endpoints.
#[derive(Debug, Clone)]
pub struct DemoService {
    pub namespace: &'static str,
    pub name: &'static str,
    kind: &'static str,
    cluster_ips: (Ipv4Addr, Ipv6Addr),
    external_ips: Vec<IpAddr>,
    balancer_ips: Vec<IpAddr>,
    pub ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
}

/// A frontend to connect to: address, protocol, and from where.
pub type Frontend = (SocketAddr, Protocol, &'static [&'static str]);

/// DNS over UDP and TCP, a web server inside, an API on node ports, a shop front on a load
/// balancer's and an external address. All of them dual-stack.
pub fn services(cluster: &Cluster) -> Vec<DemoService> {
    let pod = |node: usize, pod: usize| Endpoint::of(cluster.pod(node, pod));
    let cluster_ips = |last: u16| {
        let [high, low] = last.to_be_bytes();
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, last);
        (Ipv4Addr::new(10, 96, high, low), v6)
    };
    let service = |namespace, name, kind, last, ports, endpoints| DemoService {
        namespace,
        name,
        kind,
        cluster_ips: cluster_ips(last),
        external_ips: Vec::new(),
        balancer_ips: Vec::new(),
        ports,
        endpoints,
    };
    let dns =
        vec![Port::new("dns", Protocol::Udp, 53, 53), Port::new("dns-tcp", Protocol::Tcp, 53, 53)];
    let web = vec![Port::new("http", Protocol::Tcp, 80, 8080)];
    let grpc = Port { node_port: Some(30900), ..Port::new("grpc", Protocol::Tcp, 9000, 9000) };
    let https = Port { node_port: Some(30443), ..Port::new("https", Protocol::Tcp, 443, 8443) };
    vec![
        service("kube-system", "kube-dns", "ClusterIP", 10, dns, vec![pod(0, 0), pod(1, 0)]),
        service("shop", "web", "ClusterIP", 0x0a01, web, vec![pod(0, 1), pod(1, 0), pod(1, 1)]),
        service("shop", "api", "NodePort", 0x0a02, vec![grpc], vec![pod(0, 2), pod(1, 2)]),
        DemoService {
            external_ips: vec![IpAddr::from([198, 51, 100, 7])],
            balancer_ips: vec![
                IpAddr::from([203, 0, 113, 80]),
                IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x80]),
            ],
            ..service(
                "shop",
                "front",
                "LoadBalancer",
                0x0a03,
                vec![https],
                vec![pod(0, 1), pod(1, 2)],
            )
        },
    ]
}

impl DemoService {
    /// The IPv4 ClusterIP with the port at `index`.
    pub fn cluster_ip_v4(&self, index: usize) -> SocketAddr {
        SocketAddr::from((self.cluster_ips.0, self.ports[index].port))
    }

    pub fn endpoint_names(&self) -> Vec<String> {
        self.endpoints.iter().map(|endpoint| endpoint.name.clone()).collect()
    }

    /// The same Service with one other endpoint.
    pub fn moved_to(&self, pod: &Pod) -> Self {
        Self { endpoints: vec![Endpoint::of(pod)], ..self.clone() }
    }

    /// Every frontend, and who shall try it.
    pub fn frontends(&self, cluster: &Cluster) -> Vec<Frontend> {
        let mut found: Vec<Frontend> = Vec::new();
        let (v4, v6) = self.cluster_ips;
        for port in &self.ports {
            for ip in [IpAddr::from(v4), IpAddr::from(v6)] {
                found.push((SocketAddr::new(ip, port.port), port.protocol, &["pod", "host"]));
            }
            for &ip in self.external_ips.iter().chain(&self.balancer_ips) {
                let target = SocketAddr::new(ip, port.port);
                found.push((target, port.protocol, &["pod", "outside"]));
            }
            if self.kind == "NodePort"
                && let Some(node_port) = port.node_port
            {
                for ip in cluster.node(1).addresses() {
                    let target = SocketAddr::new(ip, node_port);
                    found.push((target, port.protocol, &["pod", "host", "outside"]));
                }
            }
        }
        found
    }

    /// The Service and its EndpointSlices, as the API has them.
    pub fn objects(&self) -> Vec<Value> {
        let ports: Vec<Value> = self.ports.iter().map(Port::of_service).collect();
        let (v4, v6) = self.cluster_ips;
        let balancer: Vec<Value> =
            self.balancer_ips.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
        let mut spec = json!({
            "type": self.kind, "clusterIP": v4, "clusterIPs": [v4, v6],
            "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"], "ports": ports,
        });
        if !self.external_ips.is_empty() {
            spec["externalIPs"] = json!(self.external_ips);
        }
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": spec, "status": {"loadBalancer": {"ingress": balancer}},
        });
        vec![service, self.slice(false), self.slice(true)]
    }

    fn slice(&self, v6: bool) -> Value {
        let (kind, suffix) = if v6 { ("IPv6", "v6") } else { ("IPv4", "v4") };
        let endpoints: Vec<Value> = self
            .endpoints
            .iter()
            .map(|endpoint| {
                let v4 = endpoint.v4.map(IpAddr::from);
                let address = if v6 { endpoint.v6.map(IpAddr::from) } else { v4 };
                json!({
                    "addresses": [address], "nodeName": endpoint.node,
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                })
            })
            .collect();
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                let protocol = port.protocol.to_string();
                json!({"name": port.name, "port": port.target, "protocol": protocol})
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{suffix}", self.name), "namespace": self.namespace,
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": kind, "ports": ports, "endpoints": endpoints,
        })
    }
}
