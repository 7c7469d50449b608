//! Writes over HTTP, and what becomes of a Service when it is written.

use axum::http::Method;
use proxy_tests::apiserver::{ApiServer, Options, Resource};
use serde_json::{Value, json};

use crate::client::{Client, Reply};
use crate::{empty, names, plain, service};

const TEST: &str = "/api/v1/namespaces/test/services";
const MERGE: &str = "merge-patch+json";

async fn put(client: &Client, path: &str, object: &Value) -> Reply {
    client.send(Method::PUT, path, "application/json", object).await
}

async fn delete(client: &Client, path: &str) -> Reply {
    client.send(Method::DELETE, path, "", &Value::Null).await
}

#[tokio::test]
async fn objects_are_made_read_changed_and_deleted() {
    let server = empty();
    let client = Client::new(&server);
    let made = client.post(TEST, &service("a")).await;
    assert_eq!(made.code, 201);
    let path = format!("{TEST}/a");
    assert_eq!(client.get(&path).await.json(), made.json());
    let again = client.post(TEST, &service("a")).await;
    assert_eq!((again.code, &again.json()["reason"]), (409, &json!("AlreadyExists")));

    let mut object = made.json();
    object["metadata"]["labels"]["x"] = json!("y");
    let changed = put(&client, &path, &object).await;
    assert_eq!(changed.code, 200);
    assert_ne!(
        changed.json()["metadata"]["resourceVersion"],
        object["metadata"]["resourceVersion"]
    );
    assert_eq!(changed.json()["metadata"]["uid"], object["metadata"]["uid"]);
    let stale = put(&client, &path, &object).await;
    assert_eq!((stale.code, &stale.json()["reason"]), (409, &json!("Conflict")));
    let version = server.store().version();
    let nothing = client.patch(&path, MERGE, &json!({"metadata": {"labels": {"x": "y"}}})).await;
    assert_eq!((nothing.code, server.store().version()), (200, version), "no change, no version");

    let gone = delete(&client, &path).await;
    assert_eq!((gone.code, &gone.json()["status"]), (200, &json!("Success")));
    for reply in [client.get(&path).await, delete(&client, &path).await] {
        assert_eq!(reply.code, 404);
        assert_eq!(reply.json()["message"], "services \"a\" not found");
        assert_eq!(reply.json()["details"], json!({"name": "a", "kind": "services"}));
    }
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    let server = empty();
    let client = Client::new(&server);
    let mut elsewhere = service("a");
    elsewhere["metadata"]["namespace"] = json!("other");
    assert_eq!(client.post(TEST, &elsewhere).await.code, 400);
    assert_eq!(client.post(TEST, &json!({"kind": "Node", "apiVersion": "v1"})).await.code, 400);
    assert_eq!(client.post(TEST, &json!({"metadata": {}})).await.code, 400);
    assert_eq!(client.get("/api/v1/pods").await.code, 404);
    assert_eq!(client.get("/apis/apps/v1").await.code, 404);
    assert_eq!(client.post(&format!("{TEST}/a"), &service("a")).await.code, 405);
    server.store().apply(service("a")).unwrap();
    let json_patch = client.patch(&format!("{TEST}/a"), "json-patch+json", &json!([])).await;
    assert_eq!(json_patch.code, 415);
    let protobuf = "application/vnd.kubernetes.protobuf";
    assert_eq!(client.send(Method::POST, TEST, protobuf, &service("b")).await.code, 415);
}

#[tokio::test]
async fn status_is_written_by_its_own_path_only() {
    let server = empty();
    let client = Client::new(&server);
    let mut object = service("a");
    object["spec"]["type"] = json!("LoadBalancer");
    let ingress = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}});
    object["status"] = ingress.clone();
    let made = client.post(TEST, &object).await.json();
    assert_eq!(made["status"], json!({"loadBalancer": {}}));
    let path = format!("{TEST}/a");
    let change = json!({"status": ingress, "spec": {"type": "ClusterIP"}});
    client.patch(&path, MERGE, &json!({"status": ingress})).await;
    assert_eq!(client.get(&path).await.json()["status"], json!({"loadBalancer": {}}));
    let set = client.patch(&format!("{path}/status"), MERGE, &change).await.json();
    assert_eq!(set["spec"]["type"], "LoadBalancer");
    let vip = json!([{"ip": "192.0.2.1", "ipMode": "VIP"}]);
    assert_eq!(set["status"]["loadBalancer"]["ingress"], vip);
    server.store().set_status_lb("test", "a", &json!([{"ip": "192.0.2.2"}])).unwrap();
    let set = client.get(&path).await.json();
    assert_eq!(set["status"]["loadBalancer"]["ingress"][0]["ip"], "192.0.2.2");
}

#[tokio::test]
async fn addresses_and_node_ports_belong_to_one_service() {
    let server = plain();
    let client = Client::new(&server);
    let with = |name: &str, spec: Value| {
        let mut object = service(name);
        for (key, value) in spec.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        object
    };
    let node_port = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30100}]});
    assert_eq!(client.post(TEST, &with("a", json!({"clusterIP": "10.96.0.50"}))).await.code, 201);
    assert_eq!(client.post(TEST, &with("b", node_port.clone())).await.code, 201);
    for (spec, says) in [
        (json!({"clusterIP": "10.96.0.50"}), "already allocated"),
        (json!({"clusterIP": "10.96.0.1"}), "already allocated"),
        (json!({"clusterIP": "192.0.2.1"}), "not in the valid range"),
        (node_port.clone(), "already allocated"),
        (json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 80}]}), "valid range"),
    ] {
        let refused = client.post(TEST, &with("c", spec)).await;
        assert_eq!(refused.code, 422, "{says}");
        let message = refused.json()["message"].as_str().unwrap().to_owned();
        assert!(message.starts_with("Service \"c\" is invalid: spec.") && message.contains(says));
    }
    // What was refused holds nothing, and what is deleted holds nothing any more.
    delete(&client, &format!("{TEST}/a")).await;
    delete(&client, &format!("{TEST}/b")).await;
    assert_eq!(client.post(TEST, &with("c", json!({"clusterIP": "10.96.0.50"}))).await.code, 201);
    assert_eq!(client.post(TEST, &with("d", node_port)).await.code, 201);
    // The same number may serve another protocol.
    let udp = json!({"type": "NodePort",
                     "ports": [{"port": 80, "nodePort": 30100, "protocol": "UDP"}]});
    assert_eq!(client.post(TEST, &with("e", udp)).await.code, 201);
}

#[tokio::test]
async fn a_changed_type_keeps_and_drops_what_it_should() {
    let server = empty();
    let client = Client::new(&server);
    let path = format!("{TEST}/a");
    let made = client.post(TEST, &service("a")).await.json();
    let ip = made["spec"]["clusterIP"].clone();
    let spec = |change: Value| {
        let (client, path) = (&client, &path);
        async move {
            let reply = client.patch(path, MERGE, &json!({"spec": change})).await;
            assert_eq!(reply.code, 200, "{}", reply.text);
            reply.json()["spec"].clone()
        }
    };
    let lb = spec(json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"})).await;
    assert_eq!(lb["clusterIP"], ip);
    assert!(lb["healthCheckNodePort"].as_u64().is_some_and(|p| (30000..32768).contains(&p)));
    let port = lb["ports"][0]["nodePort"].clone();
    assert!(port.is_u64());
    assert_ne!(port, lb["healthCheckNodePort"]);
    assert_eq!(lb["allocateLoadBalancerNodePorts"], true);
    // A client that sends the whole object need not know what was allocated.
    let mut whole = service("a");
    whole["spec"] = json!({"type": "NodePort", "ports": [{"name": "http", "port": 80}]});
    let node = put(&client, &path, &whole).await.json()["spec"].clone();
    assert_eq!((&node["clusterIP"], &node["ports"][0]["nodePort"]), (&ip, &port));
    assert!(node.get("healthCheckNodePort").is_none());
    assert!(node.get("allocateLoadBalancerNodePorts").is_none());
    assert_eq!(node["externalTrafficPolicy"], "Cluster");
    let cluster = spec(json!({"type": "ClusterIP"})).await;
    assert!(cluster["ports"][0].get("nodePort").is_none());
    assert!(cluster.get("externalTrafficPolicy").is_none());
    assert_eq!(cluster["clusterIP"], ip);
    let dual = spec(json!({"ipFamilyPolicy": "PreferDualStack"})).await;
    assert_eq!(dual["ipFamilies"], json!(["IPv4", "IPv6"]));
    assert_eq!(dual["clusterIPs"][0], ip);
    assert!(dual["clusterIPs"][1].as_str().unwrap().starts_with("fd00:10:96::"));
    let single = spec(json!({"ipFamilyPolicy": "SingleStack"})).await;
    assert_eq!(single["clusterIPs"], json!([ip]));
    let external = spec(json!({"type": "ExternalName", "externalName": "x.example"})).await;
    assert!(external.get("clusterIP").is_none() && external.get("ipFamilies").is_none());
    let mut taker = service("b");
    taker["spec"]["clusterIP"] = ip;
    assert_eq!(client.post(TEST, &taker).await.code, 201, "the address is free again");
}

#[tokio::test]
async fn families_follow_the_cluster() {
    let range = |text: &str| text.parse().unwrap();
    let start = |ranges| {
        let options = Options {
            tls: false,
            kubernetes_endpoint: None,
            service_ranges: ranges,
            ..Options::default()
        };
        ApiServer::start(options).unwrap()
    };
    let v6 = start(vec![range("fd00:10:96::/112")]);
    let store = v6.store();
    let mut object = service("a");
    object["spec"]["ipFamilyPolicy"] = json!("PreferDualStack");
    store.apply(object).unwrap();
    let spec = store.get(Resource::Service, "test", "a").unwrap()["spec"].clone();
    assert_eq!(spec["ipFamilies"], json!(["IPv6"]));
    let dual = start(vec![range("fd00:10:96::/112"), range("10.96.0.0/16")]);
    let mut object = service("a");
    object["spec"]["ipFamilies"] = json!(["IPv4"]);
    object["spec"]["ipFamilyPolicy"] = json!("RequireDualStack");
    dual.store().apply(object).unwrap();
    dual.store().apply(service("b")).unwrap();
    let families = |name| {
        dual.store().get(Resource::Service, "test", name).unwrap()["spec"]["ipFamilies"].clone()
    };
    assert_eq!(families("a"), json!(["IPv4", "IPv6"]));
    assert_eq!(families("b"), json!(["IPv6"]));
}

#[tokio::test]
async fn lists_of_ports_merge_by_port() {
    let server = empty();
    let client = Client::new(&server);
    let mut object = service("a");
    object["spec"]["ports"] = json!([{"name": "http", "port": 80}, {"name": "https", "port": 443}]);
    client.post(TEST, &object).await;
    let change = json!({"spec": {
        "$setElementOrder/ports": [{"port": 443}, {"port": 8080}],
        "ports": [{"port": 443, "targetPort": 8443}, {"name": "alt", "port": 8080},
                  {"port": 80, "$patch": "delete"}],
    }});
    let reply = client.patch(&format!("{TEST}/a"), "strategic-merge-patch+json", &change).await;
    let ports = reply.json()["spec"]["ports"].clone();
    assert_eq!(
        ports,
        json!([
            {"name": "https", "port": 443, "protocol": "TCP", "targetPort": 8443},
            {"name": "alt", "port": 8080, "protocol": "TCP", "targetPort": 8080},
        ])
    );
    let apply = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "new"},
                       "spec": {"ports": [{"port": 1}]}});
    let path = format!("{TEST}/new?fieldManager=x");
    assert_eq!(client.patch(&path, "apply-patch+yaml", &apply).await.code, 201);
    assert_eq!(client.patch(&path, "apply-patch+yaml", &apply).await.code, 200);
}

#[tokio::test]
async fn events_are_kept() {
    let server = plain();
    let client = Client::new(&server);
    let core = json!({
        "metadata": {"generateName": "a.", "namespace": "test"}, "reason": "Bad",
        "involvedObject": {"kind": "Service", "name": "a", "namespace": "test"},
    });
    assert_eq!(client.post("/api/v1/namespaces/test/events", &core).await.code, 201);
    assert_eq!(client.post("/api/v1/namespaces/test/events", &core).await.code, 201);
    let events = json!({"metadata": {"name": "b", "namespace": "test"}, "reason": "Worse",
                        "regarding": {"kind": "Node", "name": "n"}, "action": "Sync"});
    let path = "/apis/events.k8s.io/v1/namespaces/test/events";
    assert_eq!(client.post(path, &events).await.code, 201);
    let reasons: Vec<_> = server.store().events().iter().map(|e| e["reason"].clone()).collect();
    assert_eq!(reasons, ["Bad", "Bad", "Worse"]);
    let selected = "/api/v1/events?fieldSelector=involvedObject.name%3Da";
    assert_eq!(client.get(selected).await.json()["items"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn collections_are_deleted_as_selected() {
    let server = empty();
    for name in ["a", "b", "c"] {
        server.store().apply(service(name)).unwrap();
    }
    let client = Client::new(&server);
    delete(&client, &format!("{TEST}?labelSelector=app%21%3Db")).await;
    assert_eq!(names(&client.get(TEST).await.json()), ["b"]);
}

#[tokio::test]
async fn discovery_names_what_is_served() {
    let server = plain();
    let client = Client::new(&server);
    assert_eq!(client.get("/api").await.json()["versions"], json!(["v1"]));
    let groups = client.get("/apis").await.json();
    for group in groups["groups"].as_array().unwrap() {
        let version = group["preferredVersion"]["groupVersion"].as_str().unwrap();
        let list = client.get(&format!("/apis/{version}")).await.json();
        assert_eq!(list["groupVersion"], version);
        for resource in list["resources"].as_array().unwrap() {
            let name = resource["name"].as_str().unwrap();
            if !name.contains('/') {
                assert_eq!(client.get(&format!("/apis/{version}/{name}")).await.code, 200);
            }
        }
    }
    let core = client.get("/api/v1").await.json();
    let list: Vec<_> = core["resources"].as_array().unwrap().iter().map(|r| &r["name"]).collect();
    assert!(list.contains(&&json!("services")) && list.contains(&&json!("services/status")));
}

#[tokio::test]
async fn bad_manifests_are_named() {
    let server = plain();
    let good = "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 1}]}}";
    let error = |text: &str| server.store().load_yaml(text).unwrap_err().to_string();
    assert_eq!(server.store().load_yaml(&format!("{good}\n---\n---\n")).unwrap(), 1);
    assert!(error(&format!("{good}\n---\n{{kind: Nothing}}")).starts_with("document 2: no kind"));
    assert!(error("{kind: [").starts_with("document 1: "));
}
