//! The Services of the cases and their EndpointSlices.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::clients::{pod, pod_at};
use super::{SECOND_TARGET_PORT, TARGET_PORT};
use crate::apiserver::merge_patch;
use crate::cluster::Cluster;
use crate::port::Port;
use crate::traffic::Protocol;

/// A protocol, and an address with its port: what a client connects to.
pub(super) type Target = (Protocol, SocketAddr);

/// Kinds of frontends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Front {
    Cluster,
    External,
    Balancer,
    NodePort,
}

/// A Service with its endpoints.
#[derive(Debug, Clone)]
pub(super) struct Service {
    pub namespace: String,
    pub name: String,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    pub balancer_ips: Vec<IpAddr>,
    pub ports: Vec<Port>,
    /// Merged over the Service object (RFC 7386).
    change: Value,
    /// As [`endpoint`] reads them.
    endpoints: Vec<String>,
}

impl Service {
    pub(super) fn new(namespace: &str, name: &str, cluster_ips: Vec<IpAddr>) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            cluster_ips,
            external_ips: Vec::new(),
            balancer_ips: Vec::new(),
            ports: Vec::new(),
            change: json!({}),
            endpoints: Vec::new(),
        }
    }

    /// Replaces the endpoints: `"a0"` is ready; words behind the pod's name change it
    /// (see [`endpoint`]).
    pub(super) fn endpoints(mut self, endpoints: &[&str]) -> Self {
        self.endpoints = endpoints.iter().map(|&text| text.to_owned()).collect();
        self
    }

    /// Merges `change` over the Service object.
    pub(super) fn with(mut self, change: &Value) -> Self {
        merge_patch(&mut self.change, change);
        self
    }

    pub(super) fn spec(self, spec: &Value) -> Self {
        self.with(&json!({"spec": spec}))
    }

    /// Every port once more, at the next number and the pods' second port.
    pub(super) fn second_ports(mut self) -> Self {
        let second: Vec<Port> = self
            .ports
            .iter()
            .map(|port| Port {
                name: format!("{}-2", port.name),
                port: port.port + 1,
                target: SECOND_TARGET_PORT,
                node_port: None,
                ..port.clone()
            })
            .collect();
        self.ports.extend(second);
        self
    }

    /// Frontends of a kind; node ports have addresses of nodes and not of the Service.
    pub(super) fn at(&self, front: Front) -> Vec<Target> {
        match front {
            Front::Cluster => self.targets(&self.cluster_ips),
            Front::External => self.targets(&self.external_ips),
            Front::Balancer => self.targets(&self.balancer_ips),
            Front::NodePort => Vec::new(),
        }
    }

    /// All frontends that are not node ports.
    pub(super) fn everywhere(&self) -> Vec<Target> {
        [Front::Cluster, Front::External, Front::Balancer]
            .into_iter()
            .flat_map(|front| self.at(front))
            .collect()
    }

    fn targets(&self, addresses: &[IpAddr]) -> Vec<Target> {
        let mut targets = Vec::new();
        for port in &self.ports {
            for &ip in addresses {
                targets.push((port.protocol, SocketAddr::new(ip, port.port)));
            }
        }
        targets
    }

    /// The node ports on these addresses.
    pub(super) fn node_ports(&self, addresses: impl IntoIterator<Item = IpAddr>) -> Vec<Target> {
        let mut targets = Vec::new();
        for ip in addresses {
            for port in &self.ports {
                if let Some(number) = port.node_port {
                    targets.push((port.protocol, SocketAddr::new(ip, number)));
                }
            }
        }
        targets
    }

    /// The Service as the API has it.
    pub(super) fn object(&self) -> Value {
        let node_ports = self.ports.iter().any(|port| port.node_port.is_some());
        let kind = match (self.balancer_ips.is_empty(), node_ports) {
            (false, _) => "LoadBalancer",
            (true, true) => "NodePort",
            (true, false) => "ClusterIP",
        };
        let families: Vec<&str> =
            self.cluster_ips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
        let policy = if families.len() > 1 { "RequireDualStack" } else { "SingleStack" };
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": self.namespace, "name": self.name},
            "spec": {
                "type": kind, "clusterIP": self.cluster_ips.first(),
                "clusterIPs": self.cluster_ips, "ipFamilies": families,
                "ipFamilyPolicy": policy,
                "ports": self.ports.iter().map(Port::of_service).collect::<Vec<_>>(),
            },
            "status": {"loadBalancer": {}},
        });
        if !self.external_ips.is_empty() {
            object["spec"]["externalIPs"] = json!(self.external_ips);
        }
        if kind == "LoadBalancer" {
            object["spec"]["allocateLoadBalancerNodePorts"] = json!(node_ports);
            let ingress: Vec<Value> =
                self.balancer_ips.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
            object["status"]["loadBalancer"]["ingress"] = json!(ingress);
        }
        merge_patch(&mut object, &self.change);
        object
    }

    /// One EndpointSlice per family of the Service.
    pub(super) fn slices(&self, cluster: &Cluster) -> Result<Vec<Value>> {
        let of = |v6: bool| {
            let name = format!("{}-{}", self.name, if v6 { "v6" } else { "v4" });
            let endpoints: Vec<&str> = self.endpoints.iter().map(String::as_str).collect();
            self.slice(cluster, &name, v6, &endpoints)
        };
        let has = |v6: bool| self.cluster_ips.iter().any(|ip| ip.is_ipv6() == v6);
        [false, true].into_iter().filter(|v6| has(*v6)).map(of).collect()
    }

    /// A slice of this Service with these endpoints.
    pub(super) fn slice(
        &self,
        cluster: &Cluster,
        name: &str,
        v6: bool,
        endpoints: &[&str],
    ) -> Result<Value> {
        let endpoints: Vec<Value> =
            endpoints.iter().map(|text| endpoint(cluster, text, v6)).collect::<Result<_>>()?;
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                let protocol = port.protocol.to_string();
                json!({"name": port.name, "port": port.target, "protocol": protocol})
            })
            .collect();
        Ok(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": name, "namespace": self.namespace,
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": if v6 { "IPv6" } else { "IPv4" },
            "ports": ports, "endpoints": endpoints,
        }))
    }
}

/// The usual port of a protocol.
pub(super) fn port(protocol: Protocol) -> Port {
    Port::new(&protocol.to_string().to_lowercase(), protocol, 80, TARGET_PORT)
}

/// An endpoint of a slice: the pod's name, and words that say what is odd about it.
/// `terminating` serves while it ends, `ending` does not serve any more, `unready` is
/// neither ready nor serving, `nil` has no conditions at all; `zone=` and `node=` are hints.
pub(super) fn endpoint(cluster: &Cluster, text: &str, v6: bool) -> Result<Value> {
    let mut words = text.split(' ');
    let name = words.next().unwrap_or_default();
    let on = pod(cluster, name)?;
    let address = if v6 { on.ipv6().map(IpAddr::from) } else { on.ipv4().map(IpAddr::from) };
    let conditions = |ready: bool, serving: bool, terminating: bool| json!({"ready": ready, "serving": serving, "terminating": terminating});
    let mut value = json!({
        "addresses": [address],
        "nodeName": cluster.node(pod_at(name)?.0).name(),
        "zone": cluster.node(pod_at(name)?.0).zone(),
        "conditions": conditions(true, true, false),
    });
    for word in words {
        match word.split_once('=') {
            Some(("zone", zone)) => value["hints"]["forZones"] = json!([{"name": zone}]),
            Some(("node", node)) => value["hints"]["forNodes"] = json!([{"name": node}]),
            _ => {
                value["conditions"] = match word {
                    "terminating" => conditions(false, true, true),
                    "ending" => conditions(false, false, true),
                    "unready" => conditions(false, false, false),
                    "nil" => json!({}),
                    // What is unset here counts as serving.
                    "terminating-nil" => json!({"ready": false, "terminating": true}),
                    // And this as not terminating.
                    "serving-nil" => json!({"ready": false, "serving": true}),
                    _ => bail!("{word:?} says nothing about an endpoint"),
                }
            }
        }
    }
    Ok(value)
}
