//! The Kubernetes source against the test API server: everything a real server does to
//! a client, and that the source ends up with what the server holds.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking; clippy sees tests only in #[test] functions"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_daemon::model::{Change, Event, Node, NodeName, Rejected, Service};
use proxy_daemon::watch::Outlet;
use proxy_daemon::watch::announce::Announcer;
use proxy_daemon::watch::kube::{Access, run};
use proxy_daemon::watch::stats::{Cause, KindStats, ObjectKind, SourceStats};
use proxy_tests::apiserver::{ApiServer, Options, Resource, Verb};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;

const MANIFESTS: &str = include_str!("../fixtures/manifests.yaml");
/// Longer than any backoff that a test's few failures lead to.
const PATIENCE: Duration = Duration::from_secs(30);
/// What of the recorded manifests is ours, with the Service of the API itself.
const SERVICES: [&str; 6] = [
    "default/kubernetes",
    "kube-system/kube-dns",
    "shop/api",
    "shop/behind-proxy-lb",
    "shop/web",
    "telco/signalling",
];

/// A source under test, and the picture its events paint.
struct Source {
    events: mpsc::Receiver<Event>,
    stats: Arc<SourceStats>,
    services: BTreeMap<String, Service>,
    /// Endpoints per slice.
    slices: BTreeMap<String, usize>,
    node: Option<Node>,
    service_cidrs: Vec<String>,
    resets: usize,
    rejected: Vec<String>,
    _kubeconfig: tempfile::NamedTempFile,
}

impl Source {
    async fn start(server: &ApiServer) -> Self {
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        server.write_kubeconfig(kubeconfig.path(), None).unwrap();
        Self::by(kubeconfig)
    }

    fn by(kubeconfig: tempfile::NamedTempFile) -> Self {
        let access = Access::open(Some(kubeconfig.path()), None).unwrap();
        let stats = Arc::new(SourceStats::default());
        let (sender, events) = mpsc::channel(16);
        let node = NodeName::new("node-a");
        let (announcer, announced) = Announcer::new();
        let outlet = Outlet { events: sender, stats: Arc::clone(&stats), announcer };
        tokio::spawn(run(access, node, outlet, announced));
        Self {
            events,
            stats,
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            node: None,
            service_cidrs: Vec::new(),
            resets: 0,
            rejected: Vec::new(),
            _kubeconfig: kubeconfig,
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Services(Change::Applied(service)) => {
                self.services.insert(service.name.to_string(), service);
            }
            Event::Services(Change::Gone(name)) => {
                self.services.remove(&name.to_string());
            }
            Event::Services(Change::Reset { objects, rejected }) => {
                let kept: Vec<String> = rejected.iter().map(ToString::to_string).collect();
                self.services.retain(|name, _| kept.contains(name));
                let objects = objects.into_iter();
                self.services.extend(objects.map(|service| (service.name.to_string(), service)));
                self.resets += 1;
            }
            Event::Slices(Change::Applied(slice)) => {
                self.slices.insert(slice.name.to_string(), slice.endpoints.len());
            }
            Event::Slices(Change::Gone(name)) => {
                self.slices.remove(&name.to_string());
            }
            Event::Slices(Change::Reset { objects, .. }) => {
                let objects = objects.into_iter();
                self.slices =
                    objects.map(|slice| (slice.name.to_string(), slice.endpoints.len())).collect();
                self.resets += 1;
            }
            Event::Node(node) => self.node = node,
            Event::ServiceCidrs(Change::Reset { objects, .. }) => {
                let ranges = objects.into_iter().flat_map(|object| object.ranges);
                self.service_cidrs = ranges.map(|range| range.to_string()).collect();
            }
            Event::ServiceCidrs(change) => panic!("only lists are expected: {change:?}"),
            Event::Rejected(Rejected { kind, name, reason }) => {
                self.rejected.push(format!("{kind} {name}: {reason}"));
            }
        }
    }

    /// Takes events until the picture is as wanted.
    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            let left = end.saturating_duration_since(Instant::now());
            // Counters move without an event, so look again soon.
            match timeout(left.min(Duration::from_millis(50)), self.events.recv()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => panic!("the source ended before: {what}"),
                Err(_) if left.is_zero() => panic!(
                    "not in {PATIENCE:?}: {what}; have {:?}, {:?}",
                    self.services.keys(),
                    self.slices
                ),
                Err(_) => {}
            }
        }
    }

    async fn until_unreachable(&mut self, what: &str) {
        self.until(what, |source| source.service_stats().failures(Cause::Unreachable) >= 1).await;
    }

    async fn until_listed(&mut self) {
        self.until("both lists", |source| source.resets >= 2).await;
    }

    fn names(&self) -> Vec<&str> {
        self.services.keys().map(String::as_str).collect()
    }

    fn service_stats(&self) -> &KindStats {
        self.stats.kind(ObjectKind::Service)
    }
}

fn start_server(options: Options) -> ApiServer {
    let server = ApiServer::start(options).unwrap();
    server.store().load_yaml(MANIFESTS).unwrap();
    server
}

fn make_service(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
           "spec": {"ports": [{"port": 80}]}})
}

async fn watching(server: &Arc<ApiServer>) {
    let server = Arc::clone(server);
    let ready = tokio::task::spawn_blocking(move || {
        [Resource::Service, Resource::EndpointSlice]
            .iter()
            .all(|resource| server.wait_for_watches(*resource, 1, PATIENCE))
    });
    assert!(ready.await.unwrap(), "no watches");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_recorded_objects_arrive_over_tls_with_a_token_and_changes_follow() {
    let server = Arc::new(start_server(Options::default()));
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.99.0.2"}]}});
    server.store().apply(node).unwrap();
    let mut source = Source::start(&server).await;
    source.until_listed().await;
    assert_eq!(source.names(), SERVICES);
    let slices: Vec<(&str, usize)> =
        source.slices.iter().map(|(name, endpoints)| (name.as_str(), *endpoints)).collect();
    assert_eq!(
        slices,
        [
            ("default/kubernetes", 1),
            ("kube-system/kube-dns-abc12", 2),
            ("shop/api-1", 1),
            ("shop/api-2", 1),
            ("shop/web-v4", 3),
            ("shop/web-v6", 1),
            ("telco/signalling-1", 1),
        ]
    );
    source.until("the Node", |source| source.node.is_some()).await;

    watching(&server).await;
    server.store().apply(make_service("fresh")).unwrap();
    server.store().delete("Service", "shop", "api").unwrap();
    server.store().delete("EndpointSlice", "shop", "web-v6").unwrap();
    server.store().delete("Node", "", "node-a").unwrap();
    source
        .until("the changes", |source| {
            source.services.contains_key("shop/fresh")
                && !source.services.contains_key("shop/api")
                && !source.slices.contains_key("shop/web-v6")
                && source.node.is_none()
        })
        .await;
    assert_eq!(source.resets, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_that_gives_a_service_away_makes_it_gone() {
    let server = Arc::new(start_server(Options::default()));
    let mut source = Source::start(&server).await;
    source.until_listed().await;
    watching(&server).await;
    let label = json!({"metadata": {"labels":
        {"service.kubernetes.io/service-proxy-name": "other"}}});
    server.store().patch("Service", "shop", "web", &label).unwrap();
    source.until("web is gone", |source| !source.services.contains_key("shop/web")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_services_come_in_pages_as_one_list() {
    let server = start_server(Options::default());
    server.store().load_generated(2000, 2);
    let mut source = Source::start(&server).await;
    source.until_listed().await;
    assert_eq!(source.services.len(), 2000 + SERVICES.len());
    assert_eq!(source.service_stats().lists(), 1);
    // 500 to a page.
    let count = |verb| server.requests().count(Resource::Service, verb);
    assert_eq!((count(Verb::List), count(Verb::Page)), (1, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_is_resumed_from_the_bookmark_and_deletions_meanwhile_are_seen() {
    let server = Arc::new(start_server(Options {
        bookmark_interval: Duration::from_millis(100),
        ..Options::default()
    }));
    let mut source = Source::start(&server).await;
    source.until_listed().await;
    watching(&server).await;
    // Time for bookmarks that move past changes of objects that were not selected.
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.faults().set(|faults| faults.refuse = true);
    // The cut takes its time: a change right after it might still be told.
    source.until_unreachable("the outage is noticed").await;
    server.store().delete("Service", "shop", "web").unwrap();
    server.store().apply(make_service("fresh")).unwrap();
    let failures = source.service_stats().failures(Cause::Unreachable);
    source
        .until("another attempt", |source| {
            source.service_stats().failures(Cause::Unreachable) > failures
        })
        .await;
    assert!(source.services.contains_key("shop/web"), "kept meanwhile");
    assert_eq!(source.service_stats().connected_since(), None);
    server.faults().clear();
    source
        .until("what was missed", |source| {
            !source.services.contains_key("shop/web") && source.services.contains_key("shop/fresh")
        })
        .await;
    assert_eq!(source.resets, 2, "resumed, not listed anew");
    assert!(source.service_stats().connected_since().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_410_a_new_list_shows_the_deletions_missed() {
    let server = Arc::new(start_server(Options::default()));
    let mut source = Source::start(&server).await;
    source.until_listed().await;
    watching(&server).await;
    server.faults().set(|faults| faults.refuse = true);
    source.until_unreachable("the outage is noticed").await;
    server.store().delete("Service", "shop", "web").unwrap();
    server.store().compact();
    server.faults().clear();
    source.until("web is gone", |source| !source.services.contains_key("shop/web")).await;
    source.until("a new list", |source| source.service_stats().lists() == 2).await;
    assert!(source.service_stats().failures(Cause::Expired) >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_expires_in_the_middle_leads_to_a_new_list() {
    let server = Arc::new(start_server(Options::default()));
    let mut source = Source::start(&server).await;
    source.until_listed().await;
    watching(&server).await;
    server.faults().expire_watches();
    source.until("new lists", |source| source.resets >= 4).await;
    assert_eq!(source.names(), SERVICES);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_the_server_are_counted_by_cause_and_nothing_is_lost() {
    for (cause, fault) in [
        (Cause::Unauthorized, json!({"unauthorized": true})),
        (Cause::Status, json!({"internalErrors": true})),
        (Cause::Rubbish, json!({"rubbish": true})),
        (Cause::Expired, json!({"expiredWatches": true})),
    ] {
        let server = Arc::new(start_server(Options::default()));
        let mut source = Source::start(&server).await;
        source.until_listed().await;
        watching(&server).await;
        let fault = serde_json::from_value(fault).unwrap();
        server.faults().set(|faults| *faults = fault);
        server.faults().disconnect_watches();
        // On a quiet watch there is nothing that could be rubbish, and what comes before
        // the watch began would come by list.
        if cause == Cause::Rubbish {
            watching(&server).await;
        }
        server.store().delete("Service", "shop", "web").unwrap();
        source.until(cause.label(), |source| source.service_stats().failures(cause) >= 1).await;
        assert!(source.services.len() >= SERVICES.len() - 1, "{cause:?}");
        server.faults().clear();
        source.until("web is gone", |source| !source.services.contains_key("shop/web")).await;
        assert_eq!(source.services.len(), SERVICES.len() - 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clusters_service_ranges_arrive() {
    let server = start_server(Options::default());
    let mut source = Source::start(&server).await;
    source.until("the ranges", |source| !source.service_cidrs.is_empty()).await;
    assert_eq!(source.service_cidrs, ["10.96.0.0/12", "fd00:10:96::/108"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_at_the_start_is_waited_for() {
    let server = start_server(Options::default());
    server.faults().set(|faults| faults.refuse = true);
    let mut source = Source::start(&server).await;
    source
        .until("a failure", |source| source.service_stats().failures(Cause::Unreachable) >= 1)
        .await;
    assert_eq!(source.resets, 0);
    server.faults().clear();
    source.until_listed().await;
    assert_eq!(source.names(), SERVICES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_cut_in_the_middle_delivers_nothing_until_it_is_whole() {
    let server = start_server(Options::default());
    server.faults().set(|faults| faults.cut_lists_after = Some(3000));
    let mut source = Source::start(&server).await;
    source
        .until("a failure", |source| {
            ObjectKind::ALL[..2].iter().all(|kind| {
                let stats = source.stats.kind(*kind);
                stats.failures(Cause::Unreachable) + stats.failures(Cause::Rubbish) >= 1
            })
        })
        .await;
    assert_eq!((source.resets, source.services.len()), (0, 0));
    server.faults().clear();
    source.until_listed().await;
    assert_eq!(source.names(), SERVICES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_server_is_put_up_with() {
    let server = start_server(Options { managed_fields: false, ..Options::default() });
    server.faults().set(|faults| faults.bytes_per_second = Some(8_000));
    let mut source = Source::start(&server).await;
    source.until_listed().await;
    assert_eq!(source.names(), SERVICES);
    for cause in Cause::ALL {
        assert_eq!(source.service_stats().failures(cause), 0, "{cause:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_undecodable_or_impossible_object_costs_no_other_its_place() {
    let server = Arc::new(start_server(Options::default()));
    let broken = json!({"spec": {"externalIPs": 7}});
    server.store().patch("Service", "shop", "web", &broken).unwrap();
    let port = json!({"ports": [{"name": "http", "port": 70000, "protocol": "TCP"},
                                {"name": "https", "port": 8443, "protocol": "TCP"}]});
    server.store().patch("EndpointSlice", "shop", "web-v4", &port).unwrap();
    let mut source = Source::start(&server).await;
    source.until_listed().await;
    source.until("the rejection", |source| !source.rejected.is_empty()).await;
    assert!(
        source.rejected[0].starts_with("Service shop/web: spec.externalIPs: "),
        "{:?}",
        source.rejected
    );
    assert_eq!(source.services.len(), SERVICES.len() - 1);
    assert_eq!(source.slices["shop/web-v4"], 3);
    let store = server.store();
    let told = |kind: &str, reason: &str, note: &str| {
        store.all(Resource::EventsEvent).into_iter().find(|event| {
            event["regarding"]["kind"] == *kind
                && event["reason"] == *reason
                && event["note"].as_str().is_some_and(|text| text.contains(note))
        })
    };
    source
        .until("Events beside both", |_| {
            told("Service", "Rejected", "spec.externalIPs").is_some()
                && told("EndpointSlice", "PartlyRejected", "70000").is_some()
        })
        .await;
    let event = told("EndpointSlice", "PartlyRejected", "70000").unwrap();
    let slice = store.get(Resource::EndpointSlice, "shop", "web-v4").unwrap();
    assert_eq!(event["regarding"]["uid"], slice["metadata"]["uid"]);
    assert_eq!(event["metadata"]["namespace"], "shop");

    // The same on a watch: it goes on behind the object, and recovery is seen.
    watching(&server).await;
    server.store().patch("Service", "shop", "api", &broken).unwrap();
    let good = json!({"spec": {"externalIPs": null}});
    server.store().patch("Service", "shop", "web", &good).unwrap();
    source.until("web is back", |source| source.services.contains_key("shop/web")).await;
    assert!(source.services.contains_key("shop/api"), "its last good version stays");
    assert_eq!(source.service_stats().rejected(), 2);
}

/// A kubeconfig with paths, in a directory that holds what they name.
struct Files {
    directory: tempfile::TempDir,
    server: String,
}

impl Files {
    fn new(server: &ApiServer) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let files = Self { directory, server: server.url() };
        files.write("ca.crt", server.ca_pem().unwrap());
        files.rotate(server);
        files
    }

    /// As certificates are replaced: by a rename.
    fn write(&self, name: &str, text: &str) {
        let new = self.directory.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, self.directory.path().join(name)).unwrap();
    }

    /// One file after the other, so that for a moment they do not fit.
    fn rotate(&self, server: &ApiServer) {
        let (certificate, key) = server.issue_client().unwrap();
        self.write("client.crt", &certificate);
        self.write("client.key", &key);
    }

    fn kubeconfig(&self) -> tempfile::NamedTempFile {
        let at = |name: &str| self.directory.path().join(name);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster":
                {"server": self.server, "certificate-authority": at("ca.crt")}}],
            "users": [{"name": "test", "user":
                {"client-certificate": at("client.crt"), "client-key": at("client.key")}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config.to_string()).unwrap();
        file
    }
}

fn start_with_client_certificates() -> Arc<ApiServer> {
    let options = Options { token: None, client_certificates: true, ..Options::default() };
    Arc::new(start_server(options))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_certificate_that_was_replaced_before_its_end_is_used_without_an_outage() {
    let server = start_with_client_certificates();
    let files = Files::new(&server);
    let mut source = Source::by(files.kubeconfig());
    source.until_listed().await;
    watching(&server).await;
    let watches = |source: &Source| source.service_stats().watches();
    // Counted when the answer has come.
    source.until("the first watch", |source| watches(source) == 1).await;
    files.rotate(&server);
    source.until("a watch of the new client", |source| watches(source) >= 2).await;
    server.store().delete("Service", "shop", "web").unwrap();
    source.until("web is gone", |source| !source.services.contains_key("shop/web")).await;
    assert_eq!(source.resets, 2, "resumed, not listed anew");
    for cause in Cause::ALL {
        assert_eq!(source.service_stats().failures(cause), 0, "{cause:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_certificate_that_ended_is_an_outage_until_there_is_another() {
    let server = start_with_client_certificates();
    let files = Files::new(&server);
    let mut source = Source::by(files.kubeconfig());
    source.until_listed().await;
    watching(&server).await;
    server.expire_clients();
    server.faults().disconnect_all();
    let failures = |source: &Source| source.service_stats().failures(Cause::Unreachable);
    source.until("refusals", |source| failures(source) >= 3).await;
    server.store().delete("Service", "shop", "web").unwrap();
    server.store().apply(make_service("fresh")).unwrap();
    assert!(source.services.contains_key("shop/web"), "kept meanwhile");
    files.rotate(&server);
    source
        .until("what was missed", |source| {
            !source.services.contains_key("shop/web") && source.services.contains_key("shop/fresh")
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_was_replaced_is_believed() {
    let server = start_with_client_certificates();
    let files = Files::new(&server);
    let other = ApiServer::start(Options::default()).unwrap();
    files.write("ca.crt", other.ca_pem().unwrap());
    let mut source = Source::by(files.kubeconfig());
    source.until_unreachable("a refusal").await;
    files.write("ca.crt", server.ca_pem().unwrap());
    source.until_listed().await;
    assert_eq!(source.names(), SERVICES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_a_scheme_is_spoken_to_over_tls() {
    let server = start_server(Options::default());
    let kubeconfig = tempfile::NamedTempFile::new().unwrap();
    server.write_kubeconfig(kubeconfig.path(), Some(&server.address().to_string())).unwrap();
    let mut source = Source::by(kubeconfig);
    source.until_listed().await;
    assert_eq!(source.names(), SERVICES);
}

/// An HTTP proxy that tells what it was asked to connect to.
async fn proxy() -> (std::net::SocketAddr, mpsc::UnboundedReceiver<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (asked, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let asked = asked.clone();
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(client.read_u8().await?);
                }
                let request = String::from_utf8_lossy(&request).into_owned();
                let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
                let mut server = tokio::net::TcpStream::connect(&target).await?;
                // The test may have ended.
                let _ = asked.send(request);
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    (address, told)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubeconfigs_proxy_is_the_way_to_the_server() {
    let server = start_server(Options::default());
    let (address, mut told) = proxy().await;
    let kubeconfig = tempfile::NamedTempFile::new().unwrap();
    server.write_kubeconfig(kubeconfig.path(), None).unwrap();
    let text = std::fs::read_to_string(kubeconfig.path()).unwrap();
    let mut config: Value = serde_yaml_ng::from_str(&text).unwrap();
    config["clusters"][0]["cluster"]["proxy-url"] = json!(format!("http://{address}"));
    std::fs::write(kubeconfig.path(), config.to_string()).unwrap();
    let mut source = Source::by(kubeconfig);
    source.until_listed().await;
    assert_eq!(source.names(), SERVICES);
    let request = told.recv().await.unwrap();
    assert!(request.starts_with(&format!("CONNECT {} ", server.address())), "{request}");
}
