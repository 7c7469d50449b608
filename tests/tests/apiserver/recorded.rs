//! The recorded answers, asked for again: the objects are made the way they were made on
//! the real server, and the answers must be equal but for what differs from run to run.

use std::net::IpAddr;

use axum::http::{HeaderMap, Method};
use ipnetwork::IpNetwork;
use proxy_tests::apiserver::ApiServer;
use serde_json::{Value, json};

use crate::client::{Client, Next, PATIENCE};
use crate::plain;

const SELECTOR: &str = "labelSelector=%21service.kubernetes.io%2Fheadless%2C\
                        %21service.kubernetes.io%2Fservice-proxy-name";

struct Recorded {
    code: u16,
    headers: Vec<String>,
    lines: Vec<Value>,
}

/// A recorded answer; its body is one document, or a watch's events.
macro_rules! recorded {
    ($name:literal) => {
        parse(include_str!(concat!("../../fixtures/", $name)))
    };
}

fn parse(text: &str) -> Recorded {
    let (head, body) = text.split_once("\n\n").unwrap();
    let mut head = head.lines();
    let code = head.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let mut headers: Vec<String> =
        head.map(|line| line.split_once(':').unwrap().0.to_owned()).collect();
    headers.sort();
    let lines = body.lines().filter(|l| !l.is_empty());
    Recorded { code, headers, lines: lines.map(|l| serde_json::from_str(l).unwrap()).collect() }
}

fn header_names(headers: &HeaderMap) -> Vec<String> {
    // How HTTP/1.1 says what HTTP/2 has no header for.
    let own = ["transfer-encoding", "connection"];
    let names = headers.keys().map(|name| name.as_str().to_owned());
    let mut names: Vec<String> = names.filter(|name| !own.contains(&name.as_str())).collect();
    names.sort();
    names
}

/// Replaces what differs from run to run by its kind.
fn normalise(value: &mut Value) {
    let varying = |key: &str| {
        let keys = ["uid", "resourceVersion", "creationTimestamp", "time", "nodePort"];
        keys.contains(&key) || ["healthCheckNodePort", "generation", "continue"].contains(&key)
    };
    match value {
        Value::Object(map) => {
            for (key, below) in map {
                if varying(key) && !below.is_object() {
                    let kind = if below.is_string() { "text" } else { "number" };
                    *below = json!(format!("({kind} that varies)"));
                }
                normalise(below);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(normalise),
        Value::String(text) => {
            if let Some(range) = allocated(text) {
                *text = format!("(an address of {range})");
            }
        }
        _ => {}
    }
}

/// The range of an address that the server chose.
fn allocated(text: &str) -> Option<IpNetwork> {
    let ip: IpAddr = text.parse().ok()?;
    let ranges = ["10.96.0.0/12", "fd00:10:96::/108"];
    let chosen_by_hand = ["10.96.0.1", "10.96.0.10"].contains(&text);
    let ranges = ranges.map(|range| range.parse::<IpNetwork>().unwrap());
    ranges.into_iter().find(|range| range.contains(ip) && !chosen_by_hand)
}

fn assert_same(mut ours: Value, mut theirs: Value) {
    normalise(&mut ours);
    normalise(&mut theirs);
    if ours != theirs {
        let text = |value: &Value| serde_json::to_string_pretty(value).unwrap();
        let (ours, theirs) = (text(&ours), text(&theirs));
        let at = ours.lines().zip(theirs.lines()).position(|(a, b)| a != b).unwrap_or(0);
        let near = |text: &str| {
            text.lines().skip(at.saturating_sub(12)).take(24).collect::<Vec<_>>().join("\n")
        };
        panic!("line {at}\n--- ours\n{}\n--- recorded\n{}", near(&ours), near(&theirs));
    }
}

/// What `kubectl apply` sent for a recorded object.
fn as_applied(object: &Value) -> Option<Value> {
    const LAST: &str = "kubectl.kubernetes.io/last-applied-configuration";
    let last = object["metadata"]["annotations"][LAST].as_str()?;
    let mut applied: Value = serde_json::from_str(last).unwrap();
    applied["metadata"]["annotations"][LAST] = json!(last);
    Some(applied)
}

async fn apply(client: &Client, path: &str, object: &Value) {
    let path = match object["metadata"]["namespace"].as_str() {
        Some(ns) => path.replace("/v1/", &format!("/v1/namespaces/{ns}/")),
        None => path.to_owned(),
    };
    let path = format!("{path}?fieldManager=kubectl-client-side-apply");
    let reply = client.post(&path, object).await;
    assert_eq!(reply.code, 201, "{}", reply.text);
}

const MERGE: &str = "merge-patch+json";
const STRATEGIC: &str = "strategic-merge-patch+json";

async fn patch(client: &Client, how: &str, path: &str, change: Value) {
    let reply = client.patch(&format!("{path}?fieldManager=kubectl-patch"), how, &change).await;
    assert_eq!(reply.code, 200, "{}", reply.text);
}

/// A server with the recorded objects, made as they were made.
async fn replay() -> (ApiServer, Client) {
    let server = plain();
    let client = Client::new(&server);
    let services = recorded!("list-services.http").lines.remove(0);
    for object in services["items"].as_array().unwrap() {
        if let Some(object) = as_applied(object) {
            apply(&client, "/api/v1/services", &object).await;
        }
    }
    let slices = recorded!("list-endpointslices.http").lines.remove(0);
    for object in slices["items"].as_array().unwrap() {
        if let Some(object) = as_applied(object) {
            apply(&client, "/apis/discovery.k8s.io/v1/endpointslices", &object).await;
        }
    }
    let shop = "/api/v1/namespaces/shop/services";
    let ingress = json!([{"ip": "203.0.113.80"}, {"hostname": "lb.example.com"}]);
    let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
    patch(&client, MERGE, &format!("{shop}/web/status"), status).await;
    let ingress = json!([{"ip": "203.0.113.81", "ipMode": "Proxy"}]);
    let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
    patch(&client, MERGE, &format!("{shop}/behind-proxy-lb/status"), status).await;
    let ports = json!({"spec": {"ports": [{"name": "grpc2", "port": 9001, "targetPort": 9001}]}});
    patch(&client, STRATEGIC, &format!("{shop}/api"), ports).await;
    (server, client)
}

async fn compare(client: &Client, path: &str, theirs: Recorded) {
    let ours = client.get(path).await;
    assert_eq!(ours.code, theirs.code);
    assert_eq!(header_names(&ours.headers), theirs.headers, "headers of {path}");
    assert_eq!(ours.headers["content-type"], "application/json");
    assert_same(ours.json(), theirs.lines[0].clone());
}

#[tokio::test]
async fn lists_are_as_recorded() {
    let (_server, client) = replay().await;
    compare(&client, "/api/v1/services", recorded!("list-services.http")).await;
    let selected = format!("/api/v1/services?{SELECTOR}");
    compare(&client, &selected, recorded!("list-services-selected.http")).await;
    let slices = "/apis/discovery.k8s.io/v1/endpointslices";
    compare(&client, slices, recorded!("list-endpointslices.http")).await;
}

#[tokio::test]
async fn pages_are_as_recorded() {
    let (_server, client) = replay().await;
    let first = recorded!("list-services-page1-limit3.http");
    let token_form = |list: &Value| {
        let token = list["metadata"]["continue"].as_str().unwrap();
        let bytes =
            base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, token);
        let text = String::from_utf8(bytes.unwrap()).unwrap();
        let (head, rest) = text.split_once(r#""rv":"#).unwrap();
        format!("{head}{}", rest.trim_start_matches(|c: char| c.is_ascii_digit()))
    };
    compare(&client, "/api/v1/services?limit=3", first).await;
    let ours = client.get("/api/v1/services?limit=3").await.json();
    let theirs = recorded!("list-services-page1-limit3.http").lines.remove(0);
    assert_eq!(token_form(&ours), token_form(&theirs));
    let token = ours["metadata"]["continue"].as_str().unwrap();
    let second = format!("/api/v1/services?limit=3&continue={token}");
    compare(&client, &second, recorded!("list-services-page2-limit3.http")).await;
    let ours = client.get(&second).await.json();
    let theirs = recorded!("list-services-page2-limit3.http").lines.remove(0);
    assert_eq!(token_form(&ours), token_form(&theirs));
}

#[tokio::test]
async fn a_node_is_as_recorded() {
    let (_server, client) = replay().await;
    let theirs = recorded!("get-node.http");
    apply(&client, "/api/v1/nodes", &as_applied(&theirs.lines[0]).unwrap()).await;
    let addresses = theirs.lines[0]["status"]["addresses"].clone();
    let status = json!({"status": {"addresses": addresses}});
    patch(&client, MERGE, "/api/v1/nodes/node-a/status", status).await;
    let ours = client.get("/api/v1/nodes/node-a").await;
    let (mut ours, mut theirs) = (ours.json(), theirs.lines[0].clone());
    // The real entries know the sets and keyed lists of a Node; nobody reads them.
    for node in [&mut ours, &mut theirs] {
        for entry in node["metadata"]["managedFields"].as_array_mut().unwrap() {
            entry["fieldsV1"] = json!({});
        }
    }
    assert_same(ours, theirs);
}

#[tokio::test]
async fn no_token_and_a_wrong_one_are_answered_as_recorded() {
    let server = plain();
    for token in [None, Some("wrong".to_owned())] {
        let client = Client { token, ..Client::new(&server) };
        compare(&client, "/api/v1/services", recorded!("list-unauthorized.http")).await;
        assert_eq!(client.get("/api/v1/services?watch=true").await.code, 401);
    }
    let anonymous = Client { token: None, ..Client::new(&server) };
    assert_eq!(anonymous.get("/healthz").await.text, "ok");
    assert_eq!(anonymous.get("/version").await.json()["gitVersion"], "v1.36.2");
}

#[tokio::test]
async fn too_old_a_version_is_answered_as_recorded() {
    let (_server, client) = replay().await;
    let theirs = recorded!("watch-too-old.http");
    let mut watch = client.watch("/api/v1/services?watch=true&resourceVersion=1").await;
    assert_eq!(header_names(&watch.headers), theirs.headers);
    let mut ours = watch.event().await;
    let message = ours["object"]["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("too old resource version: 1 ("), "{message}");
    ours["object"]["message"] = theirs.lines[0]["object"]["message"].clone();
    assert_same(ours, theirs.lines[0].clone());
    assert_eq!(watch.next(PATIENCE).await, Next::End);
}

#[tokio::test]
async fn a_watch_list_is_as_recorded() {
    let (_server, client) = replay().await;
    // The recording was made while `fresh` was there and `proxied` was not.
    let theirs = recorded!("watchlist-services.http");
    client.send(Method::DELETE, "/api/v1/namespaces/shop/services/proxied", "", &Value::Null).await;
    create_fresh(&client).await;
    let path = "/api/v1/services?watch=true&sendInitialEvents=true\
                &resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut watch = client.watch(path).await;
    assert_eq!(header_names(&watch.headers), theirs.headers);
    for line in theirs.lines {
        assert_same(watch.event().await, line);
    }
}

/// What `kubectl create service clusterip fresh --tcp=80:8080` sends.
async fn create_fresh(client: &Client) {
    let fresh = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "fresh", "namespace": "shop", "labels": {"app": "fresh"}},
        "spec": {"type": "ClusterIP", "selector": {"app": "fresh"},
                 "ports": [{"name": "80-8080", "protocol": "TCP", "port": 80,
                            "targetPort": 8080}]},
    });
    let path = "/api/v1/namespaces/shop/services?fieldManager=kubectl-create";
    let reply = client.post(path, &fresh).await;
    assert_eq!(reply.code, 201, "{}", reply.text);
}

#[tokio::test]
async fn watches_are_as_recorded() {
    let (server, client) = replay().await;
    let version = server.store().version();
    let query = format!("watch=true&resourceVersion={version}&allowWatchBookmarks=true");
    let query = format!("{query}&timeoutSeconds=3");
    let mut services = client.watch(&format!("/api/v1/services?{query}")).await;
    let slices = "/apis/discovery.k8s.io/v1/endpointslices";
    let mut slices = client.watch(&format!("{slices}?{query}")).await;

    let delete = |path: &'static str| client.send(Method::DELETE, path, "", &Value::Null);
    assert_eq!(delete("/api/v1/namespaces/shop/services/proxied").await.code, 200);
    create_fresh(&client).await;
    let shop = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices";
    assert_eq!(
        delete("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices/orphan").await.code,
        200
    );
    let web = client.get(&format!("{shop}/web-v4")).await.json();
    let mut endpoints = web["endpoints"].clone();
    endpoints[0]["conditions"]["ready"] = json!(false);
    let change = json!({"endpoints": endpoints});
    patch(&client, MERGE, &format!("{shop}/web-v4"), change).await;

    for line in recorded!("watch-services.http").lines {
        assert_same(services.event().await, line);
    }
    assert_eq!(services.next(PATIENCE).await, Next::End);
    for line in recorded!("watch-endpointslices.http").lines {
        assert_same(slices.event().await, line);
    }
    assert_eq!(slices.next(PATIENCE).await, Next::End);
}
