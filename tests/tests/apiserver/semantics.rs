//! Lists, pages, versions, selectors and watches, where no answer was recorded.

use std::time::Duration;

use axum::http::{Method, Version};
use proxy_tests::apiserver::{ApiServer, Options, Resource, Verb, generate};
use serde_json::{Value, json};

use crate::client::{Client, Next, PATIENCE};
use crate::{empty, names, plain, service};

const SERVICES: &str = "/api/v1/services";

#[tokio::test]
async fn tls_carries_both_versions_of_http() {
    let server = ApiServer::start(Options::default()).unwrap();
    assert!(server.url().starts_with("https://"));
    for (http2, version) in [(false, Version::HTTP_11), (true, Version::HTTP_2)] {
        let client = Client { http2, ..Client::new(&server) };
        let reply = client.get(SERVICES).await;
        assert_eq!((reply.code, reply.version), (200, version));
        let mut watch = client.watch(&format!("{SERVICES}?watch=1")).await;
        assert_eq!(watch.brief().await, "ADDED kubernetes");
    }
    let other = ApiServer::start(Options::default()).unwrap();
    let stranger = Client { ca_pem: other.ca_pem().map(str::to_owned), ..Client::new(&server) };
    let error = stranger.try_get(SERVICES).await.err().unwrap();
    assert!(format!("{error:#}").contains("certificate"), "{error:#}");
}

#[tokio::test]
async fn selectors_select() {
    let server = empty();
    let objects = [
        ("a", json!({"tier": "web", "env": "prod"})),
        ("b", json!({"tier": "db"})),
        ("c", json!({})),
        ("d", json!({"tier": "", "service.kubernetes.io/headless": ""})),
    ];
    for (name, labels) in objects {
        let mut object = service(name);
        object["metadata"]["labels"] = labels;
        server.store().apply(object).unwrap();
    }
    let client = Client::new(&server);
    for (selector, expected) in [
        ("tier=web", "a"),
        ("tier==db", "b"),
        ("tier!=web", "b c d"),
        ("tier=", "d"),
        ("tier", "a b d"),
        ("!tier", "c"),
        ("tier in (web, db)", "a b"),
        ("tier notin (web,db)", "c d"),
        ("tier in (web,db),!env", "b"),
        ("!service.kubernetes.io/headless", "a b c"),
        ("", "a b c d"),
    ] {
        let query = selector.replace(' ', "%20").replace('=', "%3D").replace('!', "%21");
        let list = client.get(&format!("{SERVICES}?labelSelector={query}")).await.json();
        assert_eq!(names(&list).join(" "), expected, "selector {selector}");
    }
    for (fields, expected) in
        [("metadata.name=b", "b"), ("metadata.name!=b", "a c d"), ("metadata.namespace=x", "")]
    {
        let query = fields.replace('=', "%3D").replace('!', "%21");
        let list = client.get(&format!("{SERVICES}?fieldSelector={query}")).await.json();
        assert_eq!(names(&list).join(" "), expected, "fields {fields}");
    }
    for bad in ["labelSelector=tier%20in%20web", "fieldSelector=spec.nothing%3D1", "limit=x"] {
        assert_eq!(client.get(&format!("{SERVICES}?{bad}")).await.code, 400, "{bad}");
    }
}

/// All pages of a list, with something done between the first and the second.
async fn pages(client: &Client, path: &str, between: impl FnOnce()) -> Vec<Value> {
    let mut pages = vec![client.get(path).await.json()];
    between();
    while let Some(token) = pages.last().unwrap()["metadata"]["continue"].as_str() {
        pages.push(client.get(&format!("{path}&continue={token}")).await.json());
    }
    pages
}

#[tokio::test]
async fn pages_show_one_version_while_objects_change() {
    let server = empty();
    for name in ["a", "b", "c", "d", "e"] {
        server.store().apply(service(name)).unwrap();
    }
    let client = Client::new(&server);
    let before = client.get(SERVICES).await.json();
    let found = pages(&client, "/api/v1/services?limit=2", || {
        let store = server.store();
        store.delete("Service", "test", "d").unwrap();
        store.apply(service("bb")).unwrap();
        store.patch("Service", "test", "c", &json!({"metadata": {"labels": {"x": "y"}}})).unwrap();
    })
    .await;
    let items: Vec<Value> =
        found.iter().flat_map(|page| page["items"].as_array().unwrap().clone()).collect();
    assert_eq!(Value::Array(items), before["items"]);
    let versions: Vec<_> = found.iter().map(|p| &p["metadata"]["resourceVersion"]).collect();
    assert!(versions.iter().all(|v| *v == &before["metadata"]["resourceVersion"]), "{versions:?}");
    let remaining: Vec<_> = found.iter().map(|p| &p["metadata"]["remainingItemCount"]).collect();
    assert_eq!(remaining, [&json!(3), &json!(1), &Value::Null]);
    assert_eq!(names(&client.get(SERVICES).await.json()), ["a", "b", "bb", "c", "e"]);
    assert_eq!(server.requests().count(Resource::Service, Verb::List), 3);
    assert_eq!(server.requests().count(Resource::Service, Verb::Page), 2);
}

#[tokio::test]
async fn an_expired_token_offers_an_inconsistent_rest() {
    let server = empty();
    for name in ["a", "b", "c"] {
        server.store().apply(service(name)).unwrap();
    }
    let client = Client::new(&server);
    let first = client.get("/api/v1/services?limit=1").await.json();
    server.store().apply(service("d")).unwrap();
    server.store().compact();
    let token = first["metadata"]["continue"].as_str().unwrap();
    let expired = client.get(&format!("{SERVICES}?limit=1&continue={token}")).await;
    assert_eq!(expired.code, 410);
    let status = expired.json();
    assert_eq!(status["reason"], "Expired");
    let token = status["metadata"]["continue"].as_str().unwrap();
    let rest = client.get(&format!("{SERVICES}?continue={token}")).await.json();
    assert_eq!(names(&rest), ["b", "c", "d"]);
    let bad = client.get(&format!("{SERVICES}?continue=rubbish")).await;
    assert_eq!(bad.code, 400);
}

#[tokio::test]
async fn versions_of_a_list_mean_what_they_say() {
    let server = empty();
    let client = Client::new(&server);
    let first = server.store().apply(service("a")).unwrap();
    server.store().apply(service("b")).unwrap();
    let newest = server.store().version();
    let list = |query: String| client.get_list(query);
    assert_eq!(list(format!("resourceVersion={first}")).await.unwrap(), ["a", "b"]);
    let exact = format!("resourceVersion={first}&resourceVersionMatch=Exact");
    assert_eq!(list(exact.clone()).await.unwrap(), ["a"]);
    // Any version is answered from the watch cache, which does not page.
    assert_eq!(list("resourceVersion=0&limit=1".to_owned()).await.unwrap(), ["a", "b"]);
    assert_eq!(list(format!("resourceVersion={first}&limit=5")).await.unwrap(), ["a"]);
    let future = format!("resourceVersion={}", newest + 10);
    assert_eq!(list(future).await.unwrap_err(), 504);
    assert_eq!(list("resourceVersionMatch=Exact".to_owned()).await.unwrap_err(), 422);
    server.store().compact();
    assert_eq!(list(exact).await.unwrap_err(), 410);
}

impl Client {
    async fn get_list(&self, query: String) -> Result<Vec<String>, u16> {
        let reply = self.get(&format!("{SERVICES}?{query}")).await;
        if reply.code != 200 {
            return Err(reply.code);
        }
        Ok(names(&reply.json()).into_iter().map(str::to_owned).collect())
    }
}

#[tokio::test]
async fn a_watch_follows_what_its_selector_sees() {
    let server = empty();
    let store = server.store();
    let client = Client::new(&server);
    let from = store.version();
    let path = format!("{SERVICES}?watch=true&resourceVersion={from}&labelSelector=%21hidden");
    let mut watch = client.watch(&path).await;
    store.apply(service("a")).unwrap();
    let hide = |value: Value| json!({"metadata": {"labels": {"hidden": value}}});
    store.patch("Service", "test", "a", &json!({"metadata": {"labels": {"x": "1"}}})).unwrap();
    let hidden = store.patch("Service", "test", "a", &hide(json!("yes"))).unwrap();
    store.patch("Service", "test", "a", &json!({"metadata": {"labels": {"x": "2"}}})).unwrap();
    store.patch("Service", "test", "a", &hide(Value::Null)).unwrap();
    store.patch("Service", "test", "a", &hide(json!("again"))).unwrap();
    store.delete("Service", "test", "a").unwrap();
    store.apply(service("b")).unwrap();
    assert_eq!(watch.brief().await, "ADDED a");
    assert_eq!(watch.brief().await, "MODIFIED a");
    let lost = watch.event().await;
    assert_eq!(lost["type"], "DELETED");
    // The last state that was selected, with the version that lost it.
    assert_eq!(lost["object"]["metadata"]["labels"], json!({"app": "a", "x": "1"}));
    assert_eq!(lost["object"]["metadata"]["resourceVersion"], hidden.to_string());
    assert_eq!(watch.brief().await, "ADDED a");
    assert_eq!(watch.brief().await, "DELETED a");
    assert_eq!(watch.brief().await, "ADDED b");
}

#[tokio::test]
async fn watches_are_narrowed_by_namespace_and_name() {
    let server = empty();
    let client = Client::new(&server);
    let query = format!("watch=true&resourceVersion={}", server.store().version());
    let elsewhere = format!("/api/v1/namespaces/other/services?{query}");
    let mut elsewhere = client.watch(&elsewhere).await;
    let by_name = format!("{SERVICES}?{query}&fieldSelector=metadata.name%3Db");
    let mut by_name = client.watch(&by_name).await;
    let by_path = format!("/api/v1/namespaces/test/services/b?{query}");
    let mut by_path = client.watch(&by_path).await;
    let mut other = service("a");
    other["metadata"]["namespace"] = json!("other");
    for object in [service("a"), service("b"), other] {
        server.store().apply(object).unwrap();
    }
    assert_eq!(elsewhere.event().await["object"]["metadata"]["namespace"], "other");
    assert_eq!(by_name.brief().await, "ADDED b");
    assert_eq!(by_path.brief().await, "ADDED b");
    assert_eq!(by_path.next(Duration::from_millis(100)).await, Next::Silence);
}

#[tokio::test]
async fn bookmarks_carry_the_version_on() {
    let options =
        Options { tls: false, bookmark_interval: Duration::from_millis(50), ..Options::default() };
    let server = ApiServer::start(options).unwrap();
    let client = Client::new(&server);
    let from = server.store().version();
    let query = format!("{SERVICES}?watch=true&resourceVersion={from}");
    let mut without = client.watch(&query).await;
    let mut with = client.watch(&format!("{query}&allowWatchBookmarks=true")).await;
    // A node's change is none of a Service watch's, and still moves its bookmark.
    let node = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n"}});
    let version = json!(server.store().apply(node).unwrap().to_string());
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        let event = with.event().await;
        assert_eq!(event["type"], "BOOKMARK");
        assert!(event["object"]["metadata"].get("annotations").is_none());
        if event["object"]["metadata"]["resourceVersion"] == version {
            break;
        }
        assert!(tokio::time::Instant::now() < end, "no bookmark at {version}");
    }
    assert_eq!(without.next(Duration::from_millis(200)).await, Next::Silence);
}

#[tokio::test]
async fn a_watch_ends_after_its_time() {
    let server = plain();
    let client = Client::new(&server);
    let path = format!("{SERVICES}?watch=true&resourceVersion=0&timeoutSeconds=1");
    let mut watch = client.watch(&path).await;
    assert_eq!(watch.brief().await, "ADDED kubernetes");
    assert_eq!(server.requests().open_watches(Resource::Service), 1);
    let begin = std::time::Instant::now();
    assert_eq!(watch.next(PATIENCE).await, Next::End);
    assert!(begin.elapsed() < Duration::from_secs(3));
    assert_eq!(server.requests().open_watches(Resource::Service), 0);
    let bad = "watch=true&sendInitialEvents=true";
    assert_eq!(client.get(&format!("{SERVICES}?{bad}")).await.code, 422);
}

#[tokio::test]
async fn history_is_bounded() {
    let options =
        Options { tls: false, history: 3, kubernetes_endpoint: None, ..Options::default() };
    let server = ApiServer::start(options).unwrap();
    let client = Client::new(&server);
    let from = server.store().version();
    for name in ["a", "b", "c", "d"] {
        server.store().apply(service(name)).unwrap();
    }
    let watch = |from: u64| format!("{SERVICES}?watch=true&resourceVersion={from}");
    let event = client.watch(&watch(from)).await.event().await;
    assert_eq!((&event["type"], &event["object"]["code"]), (&json!("ERROR"), &json!(410)));
    assert_eq!(client.watch(&watch(from + 1)).await.brief().await, "ADDED b");
}

#[tokio::test]
async fn thousands_of_services_load_at_once() {
    let server = empty();
    let begin = std::time::Instant::now();
    server.store().load_generated(10_000, 10);
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(3), "loading took {took:?}");
    println!("10,000 Services x 10 endpoints loaded in {took:?}");
    let client = Client::new(&server);
    let services = pages(&client, "/api/v1/services?limit=500", || {}).await;
    assert_eq!(services.len(), 20);
    let services: Vec<&Value> =
        services.iter().flat_map(|page| page["items"].as_array().unwrap()).collect();
    let addresses: std::collections::BTreeSet<&str> =
        services.iter().map(|s| s["spec"]["clusterIP"].as_str().unwrap()).collect();
    assert_eq!((services.len(), addresses.len()), (10_000, 10_000));
    let slices = client.get("/apis/discovery.k8s.io/v1/endpointslices").await.json();
    let slices = slices["items"].as_array().unwrap();
    assert_eq!(slices.len(), 10_000);
    let pods: std::collections::BTreeSet<&str> = slices
        .iter()
        .flat_map(|slice| slice["endpoints"].as_array().unwrap())
        .map(|endpoint| endpoint["addresses"][0].as_str().unwrap())
        .collect();
    assert_eq!(pods.len(), 100_000);
    let (service, slice) = (generate::service_name(7), generate::slice_name(7, 0));
    let found = server.store().get(Resource::EndpointSlice, "scale", &slice).unwrap();
    assert_eq!(found["metadata"]["labels"]["kubernetes.io/service-name"], json!(service));
}

#[tokio::test]
async fn generated_objects_are_like_others() {
    let server = empty();
    server.store().load_generated(2, 250);
    let client = Client::new(&server);
    let slices = client.get("/apis/discovery.k8s.io/v1/endpointslices").await.json();
    let counts: Vec<usize> = slices["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|slice| slice["endpoints"].as_array().unwrap().len())
        .collect();
    assert_eq!(counts, [100, 100, 50, 100, 100, 50]);
    // Written back unchanged, they are what defaulting would have made of them.
    for (path, resource) in [
        ("/api/v1/namespaces/scale/services", Resource::Service),
        ("/apis/discovery.k8s.io/v1/namespaces/scale/endpointslices", Resource::EndpointSlice),
    ] {
        let list = client.get(path).await.json();
        let name = names(&list)[0];
        let object = server.store().get(resource, "scale", name).unwrap();
        let path = format!("{path}/{name}");
        let reply = client.send(Method::PUT, &path, "application/json", &object).await;
        assert_eq!(reply.code, 200, "{}", reply.text);
        assert_eq!(reply.json(), object);
    }
    let clash = json!({"spec": {"clusterIP": client.get(
        "/api/v1/namespaces/scale/services/svc-00000").await.json()["spec"]["clusterIP"]}});
    let mut taker = service("taker");
    taker["spec"]["clusterIP"] = clash["spec"]["clusterIP"].clone();
    assert_eq!(client.post("/api/v1/namespaces/test/services", &taker).await.code, 422);
}
