//! What a case works with: addresses of its own, objects that go when it ends, and ways to
//! wait until the daemons have programmed what was asked.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::clients::{Client, bridge_addresses};
use super::look::{self, Look, eventually};
use super::service::{Front, Service, Target, port};
use crate::bed::Bed;
use crate::cluster::{Cluster, Node};
use crate::daemon::{Answer, fetch};
use crate::traffic::{ConnectSpec, Protocol, StreamChecker, StreamSpec, connect};

/// How long the daemons may take to program a change.
const SETTLED: Duration = Duration::from_secs(30);
/// For a fresh daemon: an emulated processor goes through the verifier for half a minute.
pub(super) const RESTARTED: Duration = Duration::from_secs(120);

/// The Service that shows how far the daemons are. Its name sorts behind all others, which
/// is the order within one round of programming.
const MARKER: (&str, &str) = ("zz-marker", "zz-marker");
const MARKER_SERVER: &str = "a0";

pub(super) struct Context<'b> {
    pub bed: &'b mut Bed,
    protocols: &'b [Protocol],
    number: u16,
    cluster_ips: u16,
    externals: u16,
    balancers: u16,
    node_ports: u16,
    applied: BTreeSet<(&'static str, String)>,
    restarted: BTreeSet<usize>,
}

impl<'b> Context<'b> {
    pub(super) fn new(bed: &'b mut Bed, number: u16, protocols: &'b [Protocol]) -> Self {
        Self {
            bed,
            protocols,
            number,
            cluster_ips: 0,
            externals: 0,
            balancers: 0,
            node_ports: 0,
            applied: BTreeSet::new(),
            restarted: BTreeSet::new(),
        }
    }

    pub(super) fn by_sockets(&self) -> bool {
        self.bed.by_sockets()
    }

    pub(super) fn cluster(&self) -> &Cluster {
        self.bed.cluster()
    }

    pub(super) fn node(&self, node: usize) -> &Node {
        self.cluster().node(node)
    }

    pub(super) fn namespace(&self) -> String {
        format!("case-{}", self.number)
    }

    pub(super) fn has_v4(&self) -> bool {
        self.cluster().families().has_v4()
    }

    pub(super) fn has_v6(&self) -> bool {
        self.cluster().families().has_v6()
    }

    fn pair(&self, v4: Ipv4Addr, v6: Ipv6Addr) -> Vec<IpAddr> {
        let v4 = self.has_v4().then_some(IpAddr::V4(v4));
        let v6 = self.has_v6().then_some(IpAddr::V6(v6));
        v4.into_iter().chain(v6).collect()
    }

    /// Cluster addresses that no other Service has, one of each family.
    pub(super) fn cluster_ips(&mut self) -> Vec<IpAddr> {
        self.cluster_ips += 1;
        let [_, case] = self.number.to_be_bytes();
        let [_, nth] = self.cluster_ips.to_be_bytes();
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from_be_bytes([case, nth]));
        // 10.96.0.0/24 is where the API server's own Service is.
        self.pair(Ipv4Addr::new(10, 97, case, nth), v6)
    }

    /// External addresses that no other case has at the same time.
    pub(super) fn external_ips(&mut self) -> Vec<IpAddr> {
        self.externals += 1;
        let nth = self.fresh(self.externals, 8, 250);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 1, 1, 0, 0, 0, nth.into());
        self.pair(Ipv4Addr::new(198, 51, 100, nth), v6)
    }

    /// Addresses of a load balancer.
    pub(super) fn balancer_ips(&mut self) -> Vec<IpAddr> {
        self.balancers += 1;
        let nth = 64 + self.fresh(self.balancers, 4, 60);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 0, 0, 0, nth.into());
        self.pair(Ipv4Addr::new(203, 0, 113, nth), v6)
    }

    /// 1 to `of`, other ones in the next cases.
    fn fresh(&self, nth: u16, per_case: u16, of: u16) -> u8 {
        u8::try_from((self.number * per_case + nth) % of + 1).unwrap_or(1)
    }

    pub(super) fn node_port(&mut self) -> u16 {
        self.node_ports += 1;
        30_100 + self.number * 10 + self.node_ports
    }

    /// A Service with a port of each protocol, on cluster addresses and what `fronts` says.
    pub(super) fn service(&mut self, name: &str, fronts: &[Front]) -> Service {
        let cluster_ips = self.cluster_ips();
        let mut service = Service::new(&self.namespace(), name, cluster_ips);
        service.ports = self.protocols.iter().map(|protocol| port(*protocol)).collect();
        for front in fronts {
            match front {
                Front::Cluster => {}
                Front::External => service.external_ips = self.external_ips(),
                Front::Balancer => service.balancer_ips = self.balancer_ips(),
                Front::NodePort => {
                    let number = self.node_port();
                    for port in &mut service.ports {
                        port.node_port = Some(number);
                    }
                }
            }
        }
        service
    }

    /// Makes or changes an object, which goes when the case ends.
    pub(super) fn apply_object(&mut self, object: Value) -> Result<()> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let kind = match object["kind"].as_str() {
            Some("Service") => "Service",
            Some("EndpointSlice") => "EndpointSlice",
            other => return Err(anyhow!("cases make no {other:?}")),
        };
        self.applied.insert((kind, name));
        self.bed.apply(object)
    }

    pub(super) fn apply_slices(&mut self, service: &Service) -> Result<()> {
        for slice in service.slices(self.bed.cluster())? {
            self.apply_object(slice)?;
        }
        Ok(())
    }

    /// Makes or changes a Service and its slices.
    pub(super) fn apply(&mut self, service: &Service) -> Result<()> {
        self.apply_object(service.object())?;
        self.apply_slices(service)
    }

    /// The same, and waits until it is programmed.
    pub(super) fn program(&mut self, services: &[&Service]) -> Result<()> {
        services.iter().try_for_each(|service| self.apply(service))?;
        self.settle()
    }

    pub(super) fn delete(&mut self, kind: &'static str, name: &str) -> Result<()> {
        self.applied.remove(&(kind, name.to_owned()));
        let deleted = self.bed.api().store().delete(kind, &self.namespace(), name);
        deleted.map(drop).map_err(|status| anyhow!("deleting {kind} {name}: {status}"))
    }

    /// Waits until both daemons have programmed every change made so far. The port of the
    /// marker Service changes together with its slice, so that it answers only once both
    /// watches have come this far.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.settle_within(SETTLED)
    }

    pub(super) fn settle_within(&mut self, limit: Duration) -> Result<()> {
        let (service, slice, target) = self.marker()?;
        self.bed.apply(service)?;
        self.bed.apply(slice)?;
        let spec = ConnectSpec::new(Protocol::Tcp, target, 1).timeout(Duration::from_secs(1));
        for node in self.cluster().nodes() {
            node.in_netns(|| {
                eventually(limit, || {
                    let report = connect(&spec)?;
                    ensure!(report.failed() == 0, "{} is not programmed", node.name());
                    Ok(())
                })
            })??;
        }
        Ok(())
    }

    fn marker(&self) -> Result<(Value, Value, SocketAddr)> {
        let number = u16::try_from(self.bed.api().store().version() % 50_000)? + 10_000;
        let ips = self.pair(
            Ipv4Addr::new(10, 96, 255, 1),
            Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xff01),
        );
        let ip = *ips.first().context("a cluster has a family")?;
        let mut service = Service::new(MARKER.0, MARKER.1, vec![ip]).endpoints(&[MARKER_SERVER]);
        let mut port = port(Protocol::Tcp);
        port.name = format!("at-{number}");
        port.port = number;
        service.ports = vec![port];
        let mut slices = service.slices(self.cluster())?;
        let slice = slices.pop().context("a family has a slice")?;
        Ok((service.object(), slice, SocketAddr::new(ip, number)))
    }

    /// All of these find what they want.
    pub(super) fn look(&self, looks: &[Look]) -> Result<()> {
        look::all(self.cluster(), looks)
    }

    /// The node ports of a Service on the addresses of a node's own interface.
    pub(super) fn node_ports_of(&self, service: &Service, node: usize) -> Vec<Target> {
        service.node_ports(self.node(node).addresses())
    }

    pub(super) fn bridge(&self, node: usize) -> Vec<IpAddr> {
        bridge_addresses(self.cluster(), node)
    }

    /// Sends the outside's traffic to these frontends by the second node.
    pub(super) fn enter_by_second_node(&self, targets: &[Target]) -> Result<()> {
        for (_, address) in targets {
            let prefix = if address.is_ipv4() { 32 } else { 128 };
            self.cluster().route_outside_via(&format!("{}/{prefix}", address.ip()), 1)?;
        }
        Ok(())
    }

    /// Restarts a node's daemon with other flags until the case ends.
    pub(super) fn restart(&mut self, node: usize, flags: &[&str]) -> Result<()> {
        self.restarted.insert(node);
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        self.bed.start_daemon(node, &flags)?;
        self.wait_until_synced(node)
    }

    /// Until a fresh daemon has gone through a whole round; what is programmed keeps
    /// answering meanwhile, so traffic tells nothing of it.
    pub(super) fn wait_until_synced(&mut self, node: usize) -> Result<()> {
        let synced = "kubeproxy_sync_proxy_rules_last_timestamp_seconds{";
        let result = eventually(RESTARTED, || {
            let page = self.get(node, 10249, "/metrics")?.body;
            let done = page.lines().filter(|line| line.starts_with(synced)).any(|line| {
                line.rsplit(' ').next().and_then(|n| n.parse::<f64>().ok()).is_some_and(|n| n > 0.0)
            });
            ensure!(done, "no round is complete");
            Ok(())
        });
        result
            .with_context(|| format!("the daemon after its restart\n{}", self.bed.log_tails(10)))?;
        self.settle()
    }

    /// From the node itself.
    pub(super) fn get(&self, node: usize, port: u16, path: &str) -> Result<Answer> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        self.node(node).in_netns(|| fetch(address, path))?
    }

    /// The sum of a metric over its labels.
    pub(super) fn metric(&self, node: usize, name: &str) -> Result<f64> {
        let page = self.get(node, 10249, "/metrics")?.body;
        let values = page.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            if !rest.starts_with(['{', ' ']) {
                return None;
            }
            rest.rsplit(' ').next()?.parse::<f64>().ok()
        });
        values.reduce(|a, b| a + b).with_context(|| format!("there is no metric {name}"))
    }

    /// A long connection of a client.
    pub(super) fn stream(&self, client: &str, (protocol, target): Target) -> Result<StreamChecker> {
        let client = Client::named(self.cluster(), client)?;
        let spec = StreamSpec {
            protocol,
            timeout: Duration::from_secs(10),
            source: client.source(protocol, target.ip()),
            ..StreamSpec::new(target)
        };
        client.host.in_netns(|| StreamChecker::start(spec))?
    }

    /// Removes what the case made and puts the daemons back to their usual flags.
    pub(super) fn clean_up(mut self) -> Result<()> {
        for (kind, name) in std::mem::take(&mut self.applied) {
            // Some are gone already, which is what is wanted.
            let _ = self.bed.api().store().delete(kind, &self.namespace(), &name);
        }
        for node in std::mem::take(&mut self.restarted) {
            self.bed.start_daemon(node, &[])?;
            self.wait_until_synced(node)?;
        }
        if let Some(node) = (0..2).find(|node| !matches!(self.bed.daemon_ended(*node), Ok(None))) {
            self.bed.forget_daemon(node);
            self.bed.start_daemon(node, &[])?;
            self.wait_until_synced(node)?;
            return Err(anyhow!("the daemon of node {node} ended by itself"));
        }
        Ok(())
    }
}

/// `{"spec": {"externalTrafficPolicy": "Local"}}` and its like.
pub(super) fn external_local() -> Value {
    json!({"externalTrafficPolicy": "Local"})
}

pub(super) fn internal_local() -> Value {
    json!({"internalTrafficPolicy": "Local"})
}
