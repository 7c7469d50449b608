//! Cluster addresses and node ports of Services: given, checked and handed back, as
//! `pkg/registry/core/service/storage/alloc.go` of Kubernetes does it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};

use super::defaults;
use super::resource::Resource;
use super::status::Status;

/// `--service-node-port-range` of the API server by default.
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;
/// The lower part of the range is left to ports that people choose: 2768 / 32.
const NODE_PORTS_CHOSEN: u16 = 86;
/// The same for addresses: at most 256.
const ADDRESSES_CHOSEN: u128 = 256;

/// Something only one Service can have.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Claim {
    Address(IpAddr),
    NodePort(String, u64),
}

/// Who has what.
#[derive(Debug)]
pub struct Allocator {
    /// Service ranges; the first one's family is the cluster's default.
    ranges: Vec<IpNetwork>,
    owners: HashMap<Claim, Arc<str>>,
    held: HashMap<Arc<str>, Vec<Claim>>,
    /// Moves on with every choice, so that runs repeat and choices spread.
    sequence: u64,
}

impl Allocator {
    /// An allocator over the service ranges.
    pub fn new(ranges: Vec<IpNetwork>) -> Self {
        Self { ranges, owners: HashMap::new(), held: HashMap::new(), sequence: 0 }
    }

    /// Gives a Service's spec what it lacks and records what it holds; nothing is
    /// recorded when it cannot have what it asks for.
    pub fn assign(&mut self, key: &str, spec: &mut Value) -> Result<(), Status> {
        let mut claims = Vec::new();
        if defaults::has_cluster_ip(spec) {
            self.addresses(key, spec, &mut claims)?;
        }
        self.node_ports(key, spec, &mut claims)?;
        self.release(key);
        let key: Arc<str> = key.into();
        for claim in &claims {
            self.owners.insert(claim.clone(), key.clone());
        }
        self.held.insert(key, claims);
        Ok(())
    }

    /// Hands back all that a Service holds.
    pub fn release(&mut self, key: &str) {
        for claim in self.held.remove(key).unwrap_or_default() {
            self.owners.remove(&claim);
        }
    }

    fn addresses(
        &mut self,
        key: &str,
        spec: &mut Value,
        claims: &mut Vec<Claim>,
    ) -> Result<(), Status> {
        let mut addresses = strings(&spec["clusterIPs"]);
        if let Some(first) = spec["clusterIP"].as_str().filter(|ip| !ip.is_empty()) {
            match addresses.first_mut() {
                Some(listed) => *listed = first.to_owned(),
                None => addresses.push(first.to_owned()),
            }
        }
        let headless = addresses.first().is_some_and(|ip| ip == "None");
        let families = self.families(spec, &addresses, headless);
        if headless {
            spec["clusterIPs"] = json!(["None"]);
            return Ok(());
        }
        addresses.truncate(families.len());
        for (at, family) in families.iter().enumerate() {
            let claim = match addresses.get(at) {
                Some(text) => self.wanted_address(key, text)?,
                None => self.free_address(key, family)?,
            };
            if let (Claim::Address(ip), true) = (&claim, at >= addresses.len()) {
                addresses.push(ip.to_string());
            }
            claims.push(claim);
        }
        spec["clusterIP"] = json!(addresses.first());
        spec["clusterIPs"] = json!(addresses);
        Ok(())
    }

    /// Decides `ipFamilies` and `ipFamilyPolicy`.
    fn families(&self, spec: &mut Value, addresses: &[String], headless: bool) -> Vec<String> {
        let mut families = strings(&spec["ipFamilies"]);
        if families.is_empty() && !headless {
            families = addresses.iter().filter_map(|ip| ip.parse().ok()).map(family_of).collect();
        }
        let served: Vec<String> = self.ranges.iter().map(|r| family_of(r.ip())).collect();
        if families.is_empty() {
            families.extend(served.first().cloned());
        }
        // A headless Service without a selector may get endpoints of any family.
        let open = headless && spec["selector"].as_object().is_none_or(serde_json::Map::is_empty);
        let policy = match spec["ipFamilyPolicy"].as_str() {
            Some(policy) => policy.to_owned(),
            None if open || families.len() > 1 => "RequireDualStack".to_owned(),
            None => "SingleStack".to_owned(),
        };
        let all = if open { vec!["IPv4".to_owned(), "IPv6".to_owned()] } else { served };
        if policy == "SingleStack" {
            families.truncate(1);
        } else {
            families.extend(all.into_iter().filter(|f| !families.contains(f)).collect::<Vec<_>>());
        }
        spec["ipFamilies"] = json!(families);
        spec["ipFamilyPolicy"] = json!(policy);
        families
    }

    fn wanted_address(&self, key: &str, text: &str) -> Result<Claim, Status> {
        let refuse = |why: &str| {
            let why = format!("Invalid value: [\"{text}\"]: failed to allocate IP {text}: {why}");
            Err(invalid(key, "spec.clusterIPs", &why))
        };
        let Ok(ip) = text.parse::<IpAddr>() else {
            return refuse("not an IP address");
        };
        if !self.ranges.iter().any(|range| range.contains(ip)) {
            return refuse("the provided IP is not in the valid range");
        }
        let claim = Claim::Address(ip);
        if self.taken(key, &claim) {
            return refuse("provided IP is already allocated");
        }
        Ok(claim)
    }

    fn free_address(&mut self, key: &str, family: &str) -> Result<Claim, Status> {
        let none = || invalid(key, "spec.clusterIPs", "failed to allocate IP: range is full");
        let range = *self.ranges.iter().find(|r| family_of(r.ip()) == family).ok_or_else(none)?;
        let size = match range {
            IpNetwork::V4(net) => 1u128 << (32 - net.prefix()),
            IpNetwork::V6(net) => 1u128 << (128 - net.prefix()).min(64),
        };
        let first = ADDRESSES_CHOSEN.min((size / 16).max(16)).min(size / 2);
        let span = size - first - 1;
        let start = u128::from(self.spread()) % span;
        (0..span)
            .map(|step| Claim::Address(offset(range, first + (start + step) % span)))
            .find(|claim| !self.taken(key, claim))
            .ok_or_else(none)
    }

    fn node_ports(
        &mut self,
        key: &str,
        spec: &mut Value,
        claims: &mut Vec<Claim>,
    ) -> Result<(), Status> {
        let allocate = defaults::has_node_ports(spec);
        let mut ports = spec["ports"].take();
        for (at, port) in ports.as_array_mut().into_iter().flatten().enumerate() {
            let protocol = port["protocol"].as_str().unwrap_or("TCP").to_owned();
            let chosen = port["nodePort"].as_u64().filter(|p| *p != 0);
            let field = format!("spec.ports[{at}].nodePort");
            let claim = match chosen {
                Some(number) => self.wanted_port(key, &field, protocol, number)?,
                None if allocate => self.free_port(key, &field, &protocol, claims)?,
                None => continue,
            };
            if let Claim::NodePort(_, number) = &claim {
                port["nodePort"] = json!(number);
            }
            claims.push(claim);
        }
        if ports.is_array() {
            spec["ports"] = ports;
        }
        if defaults::has_health_check(spec) {
            let field = "spec.healthCheckNodePort";
            let claim = match spec["healthCheckNodePort"].as_u64().filter(|p| *p != 0) {
                Some(number) => self.wanted_port(key, field, "TCP".to_owned(), number)?,
                None => self.free_port(key, field, "TCP", claims)?,
            };
            if let Claim::NodePort(_, number) = &claim {
                spec["healthCheckNodePort"] = json!(number);
            }
            claims.push(claim);
        }
        Ok(())
    }

    fn wanted_port(
        &self,
        key: &str,
        field: &str,
        protocol: String,
        number: u64,
    ) -> Result<Claim, Status> {
        if !NODE_PORTS.contains(&u16::try_from(number).unwrap_or(0)) {
            let why = format!(
                "Invalid value: {number}: provided port is not in the valid range. The range of \
                 valid ports is {}-{}",
                NODE_PORTS.start(),
                NODE_PORTS.end()
            );
            return Err(invalid(key, field, &why));
        }
        let claim = Claim::NodePort(protocol, number);
        if self.taken(key, &claim) {
            let why = format!("Invalid value: {number}: provided port is already allocated");
            return Err(invalid(key, field, &why));
        }
        Ok(claim)
    }

    fn free_port(
        &mut self,
        key: &str,
        field: &str,
        protocol: &str,
        claims: &[Claim],
    ) -> Result<Claim, Status> {
        let first = u64::from(NODE_PORTS.start() + NODE_PORTS_CHOSEN);
        let span = u64::from(*NODE_PORTS.end()) + 1 - first;
        let start = self.spread() % span;
        (0..span)
            .map(|step| Claim::NodePort(protocol.to_owned(), first + (start + step) % span))
            .find(|claim| !self.taken(key, claim) && !claims.contains(claim))
            .ok_or_else(|| invalid(key, field, "failed to allocate a nodePort: range is full"))
    }

    fn taken(&self, key: &str, claim: &Claim) -> bool {
        self.owners.get(claim).is_some_and(|owner| **owner != *key)
    }

    /// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): spread well, the same in every run.
    fn spread(&mut self) -> u64 {
        self.sequence = self.sequence.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.sequence;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn offset(range: IpNetwork, by: u128) -> IpAddr {
    match range.network() {
        // `by` is below the size of the range, so it fits the address's width.
        IpAddr::V4(ip) => {
            IpAddr::V4((u32::from(ip) + u32::try_from(by).unwrap_or_default()).into())
        }
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) + by).into()),
    }
}

fn family_of(ip: IpAddr) -> String {
    if ip.is_ipv4() { "IPv4".to_owned() } else { "IPv6".to_owned() }
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

fn invalid(key: &str, field: &str, why: &str) -> Status {
    let name = key.rsplit_once('/').map_or(key, |(_, name)| name);
    Status::invalid(Resource::Service, name, field, why)
}
