//! More than a map has room for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use proxy_tests::apiserver::Resource;
use proxy_tests::daemon::{Answer, fetch};
use serde_json::json;

use super::node::{LONG, until};
use super::stage::{CLUSTER_IPS, Client, PORT, Stage, TARGET, spec, tcp};

const SECOND_VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 10, 2));

fn get(stage: &Stage, port: u16, path: &str) -> Answer {
    try_get(stage, port, path).expect("an answer")
}

fn try_get(stage: &Stage, port: u16, path: &str) -> anyhow::Result<Answer> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    stage.client(Client::Host).in_netns(|| fetch(address, path)).expect("a namespace")
}

/// None while the daemon does not answer, or has not got as far as this one.
pub fn metric_so_far(stage: &Stage, name: &str) -> Option<u64> {
    let page = try_get(stage, 10249, "/metrics").ok()?.body;
    page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Waits for it: the page is served before the first round is over.
pub fn metric(stage: &Stage, name: &str) -> u64 {
    let mut found = None;
    until(name, LONG, || {
        found = metric_so_far(stage, name);
        found.is_some()
    });
    found.expect("waited for")
}

/// Agents that fail an update half-way leave a Service without endpoints, or log a line and go
/// on as if all were well (cilium/cilium #21310 and its like).
#[test]
fn pain_24_a_full_map_costs_no_service_that_is_there_and_is_told() {
    // `shop/web` takes one backend for each of two protocols and two families, and the API's
    // Service takes one.
    let stage = Stage::new(&[
        "--ebpf-map-sizes=backends=3",
        "--ebpf-map-limits=backends=6",
        "--ipvs-sync-period=2s",
    ]);
    stage.web(&spec("ClusterIP"), &[], &[(1, 0)]);
    let targets = CLUSTER_IPS.map(|ip| SocketAddr::new(ip, PORT));
    let pod = stage.client(Client::Pod);
    targets.iter().for_each(|target| stage.until_served(pod, *target));
    let backends = "node_dataplane_table_entries{table=\"BACKENDS\"}";
    until("the gauge is exact", LONG, || metric(&stage, backends) == 5);
    // It had room for three, and has grown as far as it may.
    assert_eq!(metric(&stage, "node_dataplane_table_capacity{table=\"BACKENDS\"}"), 6);
    assert_eq!(metric(&stage, "node_dataplane_table_growths_total{table=\"BACKENDS\"}"), 1);
    assert!(!stage.bed.log(0).contains("refused an operation"), "{}", stage.bed.log_tails(20));

    let second = |endpoints: &[(usize, usize)]| {
        let addresses: Vec<_> = endpoints
            .iter()
            .map(|&(node, pod)| stage.pod(node, pod).address_like(SECOND_VIP).expect("IPv4"))
            .collect();
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "two", "namespace": "shop"},
            "spec": {
                "clusterIP": SECOND_VIP, "clusterIPs": [SECOND_VIP], "ipFamilies": ["IPv4"],
                "ports": [{"name": "http", "port": PORT, "targetPort": TARGET, "protocol": "TCP"}],
            },
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "two-1", "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "two"},
            },
            "addressType": "IPv4",
            "endpoints": addresses.iter().map(|a| json!({"addresses": [a]})).collect::<Vec<_>>(),
            "ports": [{"name": "http", "port": TARGET, "protocol": "TCP"}],
        });
        stage.bed.apply(service).expect("a Service");
        stage.bed.apply(slice).expect("an EndpointSlice");
    };
    second(&[(0, 1), (1, 1)]);
    until("the daemon says so", LONG, || metric(&stage, "node_dataplane_failing_objects") >= 1);
    assert!(stage.bed.log(0).contains("BACKENDS is full"), "{}", stage.bed.log_tails(20));
    let health = || get(&stage, 10256, "/healthz").status;
    until("the node is unhealthy", LONG, || health() == 503);
    until("an Event says so", LONG, || {
        let events = stage.bed.api().store().all(Resource::EventsEvent);
        events.iter().any(|event| {
            event["reason"] == "ProgrammingFailed"
                && event["regarding"]["kind"] == "Node"
                && event["note"].as_str().is_some_and(|note| note.contains("BACKENDS is full"))
        })
    });
    for target in targets {
        stage.must_connect(pod, &tcp(target, 10));
    }
    // What fits is programmed, and all is well again.
    second(&[(0, 1)]);
    stage.until_served(pod, SocketAddr::new(SECOND_VIP, PORT));
    until("healthy again", LONG, || health() == 200);
    until("the gauge is exact", Duration::from_secs(5), || metric(&stage, backends) == 6);
}
