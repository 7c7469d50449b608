//! The faults do what they are named after, and nothing after they are cleared.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use axum::http::Method;
use proxy_tests::apiserver::{ApiServer, Options, Resource, Verb};
use serde_json::{Value, json};

use crate::client::{Client, Next, PATIENCE};
use crate::{empty, names, plain, service};

const SERVICES: &str = "/api/v1/services";

async fn watch(server: &ApiServer, client: &Client) -> crate::client::Events {
    let from = server.store().version();
    client.watch(&format!("{SERVICES}?watch=true&resourceVersion={from}")).await
}

#[tokio::test]
async fn refused_connections_come_back() {
    let server = ApiServer::start(Options::default()).unwrap();
    let client = Client::new(&server);
    let mut open = watch(&server, &client).await;
    server.faults().set(|f| f.refuse = true);
    assert_eq!(open.next(PATIENCE).await, Next::Broken);
    let begin = Instant::now();
    loop {
        match client.try_get(SERVICES).await {
            Err(error) if format!("{error:#}").contains("refused") => break,
            _ => assert!(begin.elapsed() < PATIENCE, "still accepting"),
        }
    }
    server.faults().clear();
    loop {
        match client.try_get(SERVICES).await {
            Ok(reply) => break assert_eq!(reply.code, 200),
            Err(error) => assert!(begin.elapsed() < PATIENCE, "{error:#}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn connections_and_watches_are_cut() {
    for http2 in [false, true] {
        let server = ApiServer::start(Options::default()).unwrap();
        let client = Client { http2, ..Client::new(&server) };
        let mut first = watch(&server, &client).await;
        server.faults().disconnect_watches();
        assert_eq!(first.next(PATIENCE).await, Next::Broken);
        let mut second = watch(&server, &client).await;
        server.store().apply(service("a")).unwrap();
        assert_eq!(second.brief().await, "ADDED a");
        server.faults().disconnect_all();
        assert_eq!(second.next(PATIENCE).await, Next::Broken);
        assert_eq!(client.get(SERVICES).await.code, 200);
        let begin = Instant::now();
        while server.requests().open_watches(Resource::Service) > 0 {
            assert!(begin.elapsed() < PATIENCE, "a cut watch counts as open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn expired_watches_must_list_anew() {
    let server = empty();
    let client = Client::new(&server);
    let from = server.store().apply(service("a")).unwrap() - 1;
    let mut open = watch(&server, &client).await;
    server.faults().expire_watches();
    let error = open.event().await;
    assert_eq!((&error["type"], &error["object"]["code"]), (&json!("ERROR"), &json!(410)));
    assert_eq!(open.next(PATIENCE).await, Next::End);
    let old = format!("{SERVICES}?watch=true&resourceVersion={from}");
    assert_eq!(client.watch(&old).await.event().await["object"]["reason"], "Expired");
    let mut fresh = watch(&server, &client).await;
    server.store().apply(service("b")).unwrap();
    assert_eq!(fresh.brief().await, "ADDED b");
    server.faults().set(|f| f.expired_watches = true);
    let mut refused = watch(&server, &client).await;
    assert_eq!(refused.event().await["object"]["code"], 410);
}

#[tokio::test]
async fn errors_are_answered_on_demand() {
    let server = plain();
    let client = Client::new(&server);
    server.faults().set(|f| f.unauthorized = true);
    assert_eq!(client.get(SERVICES).await.code, 401);
    server.faults().set(|f| (f.unauthorized, f.internal_errors) = (false, true));
    let reply = client.get(SERVICES).await;
    assert_eq!((reply.code, &reply.json()["reason"]), (500, &json!("InternalError")));
    server.faults().clear();
    let mut open = watch(&server, &client).await;
    server.faults().set(|f| f.rubbish = true);
    let reply = client.get(SERVICES).await;
    assert!(serde_json::from_str::<Value>(&reply.text).is_err(), "{}", reply.text);
    server.store().apply(service("a")).unwrap();
    assert!(matches!(open.next(PATIENCE).await, Next::Rubbish(_)));
    server.faults().clear();
    server.store().apply(service("b")).unwrap();
    assert_eq!(open.brief().await, "ADDED b");
    assert_eq!(client.get(SERVICES).await.code, 200);
}

#[tokio::test]
async fn bodies_come_slowly_and_then_at_once() {
    let server = plain();
    server.store().load_generated(20, 1);
    let client = Client::new(&server);
    let size = client.get(SERVICES).await.text.len();
    let rate = u32::try_from(size).unwrap() * 2;
    server.faults().set(|f| f.bytes_per_second = Some(rate));
    let begin = Instant::now();
    let reply = client.get(SERVICES).await;
    let took = begin.elapsed();
    assert_eq!((reply.code, reply.text.len()), (200, size));
    let fair = Duration::from_millis(350)..Duration::from_secs(4);
    assert!(fair.contains(&took), "half a second's worth took {took:?}");
    server.faults().clear();
    let begin = Instant::now();
    client.get(SERVICES).await;
    assert!(begin.elapsed() < Duration::from_millis(350));
}

#[tokio::test]
async fn a_stall_holds_everything_and_loses_nothing() {
    let server = empty();
    let client = Client::new(&server);
    let mut open = watch(&server, &client).await;
    server.faults().set(|f| f.stall = true);
    server.store().apply(service("a")).unwrap();
    assert_eq!(open.next(Duration::from_millis(200)).await, Next::Silence);
    let get = client.get(SERVICES);
    tokio::pin!(get);
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut get).await.is_err());
    server.faults().clear();
    assert_eq!(names(&get.await.json()), ["a"]);
    assert_eq!(open.brief().await, "ADDED a");
}

#[tokio::test]
async fn lists_are_cut_in_the_middle() {
    for http2 in [false, true] {
        let server = ApiServer::start(Options::default()).unwrap();
        server.store().load_generated(100, 1);
        let client = Client { http2, ..Client::new(&server) };
        server.faults().set(|f| f.cut_lists_after = Some(5000));
        assert!(client.try_get(SERVICES).await.is_err());
        assert_eq!(client.get("/api/v1/namespaces/scale/services/svc-00001").await.code, 200);
        server.faults().clear();
        assert_eq!(client.get(SERVICES).await.code, 200);
    }
}

#[tokio::test]
async fn bookmarks_come_late() {
    let server = plain();
    let client = Client::new(&server);
    server.faults().set(|f| f.delay_bookmarks_ms = 300);
    let begin = Instant::now();
    let path = format!(
        "{SERVICES}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan\
         &allowWatchBookmarks=true"
    );
    let mut watch = client.watch(&path).await;
    assert_eq!(watch.brief().await, "ADDED kubernetes");
    assert_eq!(watch.brief().await, "BOOKMARK -");
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert_eq!(server.requests().count(Resource::Service, Verb::WatchList), 1);
}

/// Ends the process also when the test fails.
struct Process(std::process::Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_process_serves_and_is_switched_over_http() {
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("kubeconfig");
    let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/manifests.yaml");
    let mut child = Command::new(env!("CARGO_BIN_EXE_test-apiserver"))
        .args(["--manifests", manifests, "--generate", "3:2", "--no-tls"])
        .arg("--kubeconfig-out")
        .arg(&kubeconfig)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let _process = Process(child);
    assert!(line.starts_with("test-apiserver ready: http://127.0.0.1:"), "{line}");
    assert!(line.trim_end().ends_with("services=12 endpointslices=12"), "{line}");

    let config: Value =
        serde_yaml_ng::from_str(&std::fs::read_to_string(&kubeconfig).unwrap()).unwrap();
    let url = config["clusters"][0]["cluster"]["server"].as_str().unwrap();
    let token = config["users"][0]["user"]["token"].as_str().map(str::to_owned);
    let address = url.strip_prefix("http://").unwrap().parse().unwrap();
    let client = Client { address, token, ca_pem: None, http2: false };
    assert_eq!(client.get(SERVICES).await.json()["items"].as_array().unwrap().len(), 12);

    let switch = |method: Method, path: &'static str| client.send(method, path, "", &Value::Null);
    let faults = "/testing/faults?internalErrors=true&bytesPerSecond=100000";
    assert_eq!(switch(Method::PUT, faults).await.code, 200);
    assert_eq!(client.get(SERVICES).await.code, 500);
    assert_eq!(switch(Method::PUT, "/testing/faults").await.code, 200);
    assert_eq!(client.get(SERVICES).await.code, 200);
    assert_eq!(switch(Method::PUT, "/testing/faults?nonsense=1").await.code, 400);
    assert_eq!(switch(Method::PUT, "/testing/faults?refuse=true").await.code, 400);
    let counts = client.get("/testing/requests").await.json();
    assert_eq!(counts["requests"]["services"]["List"], 3);
    let stranger = Client { token: None, ..client };
    assert_eq!(stranger.get("/testing/requests").await.code, 401);
}
