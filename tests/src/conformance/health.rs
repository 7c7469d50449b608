//! What is served over HTTP.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::context::{Context, external_local};
use super::look::{eventually, from};
use super::service::Front;
use super::{Case, case};
use crate::apiserver::Resource;
use crate::bed::node_object;
use crate::daemon::{Answer, fetch};
use crate::traffic::Protocol;

pub(super) const CASES: &[Case] = &[
    case("/healthz and /livez: bodies and headers", bodies),
    case("/healthz and not /livez fails when the Node goes", node_goes),
    case("health-check node port: status, body, weight", health_check_node_port),
    case("a health-check node port that is taken: an Event beside the Service", taken_port),
    case(":10249 has /metrics, /healthz, /proxyMode, /configz, on loopback only", metrics_server),
];

const SOON: Duration = Duration::from_secs(10);

fn json_of(answer: &Answer) -> Result<Value> {
    let kind = answer.header("content-type").unwrap_or_default();
    ensure!(kind.starts_with("application/json"), "content type {kind:?}");
    let sniffing = answer.header("x-content-type-options");
    ensure!(sniffing == Some("nosniff"), "x-content-type-options is {sniffing:?}");
    serde_json::from_str(&answer.body).with_context(|| format!("body {:?}", answer.body))
}

fn bodies(cx: &mut Context<'_>) -> Result<()> {
    cx.settle()?;
    eventually(SOON, || {
        for (path, for_node) in [("/healthz", true), ("/livez", false)] {
            let answer = cx.get(0, 10256, path)?;
            ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
            let body = json_of(&answer)?;
            for field in ["lastUpdated", "currentTime"] {
                let time = body[field].as_str().unwrap_or_default();
                ensure!(time.starts_with("20") && time.ends_with('Z'), "{path}: {field} {time:?}");
            }
            ensure!(body["healthy"] == true, "{path}: {body}");
            let eligible = for_node.then_some(&Value::Bool(true));
            ensure!(body.get("nodeEligible") == eligible, "{path}: nodeEligible in {body}");
            for family in families(cx) {
                ensure!(body["status"][family]["healthy"] == true, "{path}: {family} in {body}");
            }
        }
        Ok(())
    })?;
    // Load balancers ask from outside.
    for ip in cx.node(0).addresses().into_iter().filter(IpAddr::is_ipv4) {
        let address = SocketAddr::new(ip, 10256);
        let answer = cx.cluster().outside()?.in_netns(|| fetch(address, "/healthz"))??;
        ensure!(answer.status == 200, "from outside: {}", answer.status);
    }
    ensure!(cx.get(0, 10256, "/else")?.status == 404, "an unknown path is found");
    Ok(())
}

fn families(cx: &Context<'_>) -> Vec<&'static str> {
    let v4 = cx.has_v4().then_some("IPv4");
    let v6 = cx.has_v6().then_some("IPv6");
    v4.into_iter().chain(v6).collect()
}

fn statuses(cx: &Context<'_>, healthz: u16, eligible: bool) -> Result<()> {
    eventually(SOON, || {
        let answer = cx.get(0, 10256, "/healthz")?;
        ensure!(answer.status == healthz, "healthz {} {}", answer.status, answer.body);
        let body = json_of(&answer)?;
        ensure!(body["nodeEligible"] == eligible, "{body}");
        let livez = cx.get(0, 10256, "/livez")?;
        ensure!(livez.status == 200, "livez {} {}", livez.status, livez.body);
        Ok(())
    })
}

fn node_goes(cx: &mut Context<'_>) -> Result<()> {
    let node = node_object(cx.node(0), cx.cluster().families());
    let mut tainted = node.clone();
    tainted["spec"]["taints"] =
        json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    let mut deleting = node.clone();
    deleting["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let web = cx.service("web", &[Front::NodePort]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    cx.restart(0, &["--nodeport-addresses=primary"])?;
    let own = cx.node_ports_of(&web, 0);
    statuses(cx, 200, true)?;
    let gone = |cx: &mut Context<'_>| {
        for object in [tainted, deleting] {
            cx.bed.apply(object)?;
            statuses(cx, 503, false).context("tainted, or being deleted")?;
            // Fields of the server's that a change cannot take away go with the object.
            let _ = cx.bed.api().store().delete("Node", "", cx.node(0).name());
            statuses(cx, 503, false).context("gone")?;
            // It has seen that by now, and nothing that works stops.
            cx.settle()?;
            cx.look(&[from(&["a3", "outside"]).to(&own).answers(&["a0", "b0"])])?;
            cx.bed.apply(node.clone())?;
            statuses(cx, 200, true).context("back")?;
        }
        Ok(())
    };
    let result = gone(cx);
    let _ = cx.bed.api().store().delete("Node", "", cx.node(0).name());
    cx.bed.apply(node_object(cx.node(0), cx.cluster().families()))?;
    cx.settle()?;
    result
}

fn check_port(cx: &mut Context<'_>) -> u16 {
    cx.node_port() + 1000
}

fn health_check_node_port(cx: &mut Context<'_>) -> Result<()> {
    let port = check_port(cx);
    let web = cx.service("web", &[Front::Balancer]).spec(&external_local());
    let web = web.spec(&json!({"healthCheckNodePort": port}));
    let two = web.clone().endpoints(&["a0", "a1", "a2 unready"]);
    cx.program(&[&two])?;
    let namespace = cx.namespace();
    let ask = |cx: &Context<'_>, node: usize, local: u64, path: &str| {
        let address = SocketAddr::new(cx.node(node).addresses()[0], port);
        eventually(SOON, || {
            let answer = cx.cluster().outside()?.in_netns(|| fetch(address, path))??;
            let status = if local > 0 { 200 } else { 503 };
            ensure!(answer.status == status, "node {node}: {} {}", answer.status, answer.body);
            let expected = json!({
                "service": {"namespace": namespace, "name": "web"},
                "localEndpoints": local, "serviceProxyHealthy": true,
            });
            ensure!(json_of(&answer)? == expected, "node {node}: {}", answer.body);
            let weight = answer.header("x-load-balancing-endpoint-weight");
            ensure!(weight == Some(local.to_string().as_str()), "node {node}: weight {weight:?}");
            Ok(())
        })
    };
    ask(cx, 0, 2, "/")?;
    ask(cx, 0, 2, "/any/path")?;
    ask(cx, 1, 0, "/")?;
    cx.program(&[&web.clone().endpoints(&["b0"])])?;
    ask(cx, 0, 0, "/")?;
    ask(cx, 1, 1, "/")?;
    // Without the policy there is no such port.
    let cluster =
        web.spec(&json!({"externalTrafficPolicy": "Cluster", "healthCheckNodePort": null}));
    cx.program(&[&cluster])?;
    let targets: Vec<_> = cx
        .node(0)
        .addresses()
        .into_iter()
        .map(|ip| (Protocol::Tcp, SocketAddr::new(ip, port)))
        .collect();
    cx.look(&[from(&["outside"]).to(&targets).refused()])
}

fn taken_port(cx: &mut Context<'_>) -> Result<()> {
    let port = check_port(cx);
    let holder = cx.node(0).in_netns(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))??;
    let web = cx.service("web", &[Front::Balancer]).spec(&external_local());
    let web = web.spec(&json!({"healthCheckNodePort": port})).endpoints(&["a0"]);
    cx.program(&[&web])?;
    let namespace = cx.namespace();
    eventually(SOON, || {
        let events = cx.bed.api().store().all(Resource::EventsEvent);
        let told = events.iter().filter(|event| {
            event["reason"] == "FailedToStartServiceHealthcheck"
                && event["regarding"]["namespace"] == *namespace
                && event["regarding"]["kind"] == "Service"
                && event["note"].as_str().is_some_and(|note| note.contains(&port.to_string()))
        });
        // By the node whose port is taken, not by the other one.
        ensure!(told.count() == 1, "Events: {events:?}");
        Ok(())
    })?;
    // Once the port is free it is served.
    drop(holder);
    let address = SocketAddr::new(cx.node(0).addresses()[0], port);
    eventually(Duration::from_secs(45), || {
        let answer = cx.cluster().outside()?.in_netns(|| fetch(address, "/"))??;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
        Ok(())
    })
}

fn metrics_server(cx: &mut Context<'_>) -> Result<()> {
    let mode = cx.get(0, 10249, "/proxyMode")?;
    ensure!(mode.body.trim() == cx.bed.mode(), "proxyMode {:?}", mode.body);
    let health = cx.get(0, 10249, "/healthz")?;
    ensure!(health.status == 200, "healthz {}", health.status);
    let config: Value = serde_json::from_str(&cx.get(0, 10249, "/configz")?.body)?;
    ensure!(config.as_object().is_some_and(|map| !map.is_empty()), "configz {config}");
    let metrics = cx.get(0, 10249, "/metrics")?;
    ensure!(metrics.body.contains("kubeproxy_sync_proxy_rules_duration_seconds"), "metrics");
    let targets: Vec<_> = cx
        .node(0)
        .addresses()
        .into_iter()
        .map(|ip| (Protocol::Tcp, SocketAddr::new(ip, 10249)))
        .collect();
    cx.look(&[from(&["outside", "a3"]).to(&targets).refused()])
}
