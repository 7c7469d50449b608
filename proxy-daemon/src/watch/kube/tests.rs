//! The source against a scripted server that speaks just enough HTTP.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;
use crate::model::{Change, Event, Rejected};
use crate::watch::SourceStats;
use crate::watch::announce::Announcer;
use crate::watch::stats::{Cause, ObjectKind};

/// What the server does with one request.
enum Reply {
    Whole(u16, String),
    /// Lines of a watch, then the connection stays open.
    Hold(Vec<String>),
    /// Lines of a watch, then the end.
    End(Vec<String>),
}

type Script = Box<dyn Fn(&str, usize) -> Reply + Send + Sync>;

struct Server {
    requests: Mutex<Vec<String>>,
    /// How often each path was asked, lists and watches apart.
    counts: Mutex<HashMap<(bool, String), usize>>,
    script: Script,
}

const EMPTY: &str =
    r#"{"kind":"List","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}"#;

const SERVICE_CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";

impl Server {
    /// `script` answers for Services (`watch`, how often asked before); the other kinds
    /// are empty and quiet, but for ServiceCIDRs, which it does not have.
    async fn start(script: Script) -> (Arc<Self>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let server =
            Arc::new(Self { requests: Mutex::default(), counts: Mutex::default(), script });
        let shared = Arc::clone(&server);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move { shared.answer(stream).await });
            }
        });
        (server, url)
    }

    async fn answer(&self, mut stream: TcpStream) {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => request.push(byte),
                Err(_) => return,
            }
        }
        let request = String::from_utf8_lossy(&request);
        let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let reply = self.reply(&target);
        let (head, lines, hold) = match reply {
            Reply::Whole(status, body) => {
                let length = body.len();
                (format!("{status} X\r\ncontent-length: {length}\r\n"), vec![body], false)
            }
            Reply::Hold(lines) => ("200 OK\r\n".to_owned(), lines, true),
            Reply::End(lines) => ("200 OK\r\n".to_owned(), lines, false),
        };
        let text = format!(
            "HTTP/1.1 {head}content-type: application/json\r\nconnection: close\r\n\r\n{}",
            lines.join("\n")
        );
        let _ = stream.write_all(text.as_bytes()).await;
        if hold {
            // The last line is complete, and the client stays connected.
            let _ = stream.write_all(b"\n").await;
            std::future::pending::<()>().await;
        }
    }

    fn reply(&self, target: &str) -> Reply {
        self.requests.lock().expect("lock").push(target.to_owned());
        let watch = target.contains("watch=true");
        let path = target.split('?').next().unwrap_or_default().to_owned();
        let nth = {
            let mut counts = self.counts.lock().expect("lock");
            let count = counts.entry((watch, path.clone())).or_default();
            *count += 1;
            *count - 1
        };
        match (path.as_str(), watch) {
            ("/api/v1/services", _) => (self.script)(target, nth),
            (SERVICE_CIDRS, _) => Reply::Whole(404, "404 page not found".to_owned()),
            (_, false) => Reply::Whole(200, EMPTY.to_owned()),
            (_, true) => Reply::Hold(vec![]),
        }
    }

    fn services_requests(&self, watch: bool) -> Vec<String> {
        let requests = self.requests.lock().expect("lock");
        requests
            .iter()
            .filter(|target| target.starts_with("/api/v1/services?"))
            .filter(|target| target.contains("watch=true") == watch)
            .cloned()
            .collect()
    }
}

struct Run {
    server: Arc<Server>,
    events: mpsc::Receiver<Event>,
    stats: Arc<SourceStats>,
}

async fn start(script: impl Fn(&str, usize) -> Reply + Send + Sync + 'static) -> Run {
    let (server, url) = Server::start(Box::new(script)).await;
    let access = Access::open(None, Some(&url)).expect("a client");
    let (sender, events) = mpsc::channel(64);
    let stats = Arc::new(SourceStats::default());
    let (announcer, announced) = Announcer::new();
    let outlet = Outlet { events: sender, stats: Arc::clone(&stats), announcer };
    tokio::spawn(run(access, NodeName::new("node-a"), outlet, announced));
    Run { server, events, stats }
}

impl Run {
    /// The next event about Services, shortened to text.
    async fn next(&mut self) -> String {
        loop {
            let event = timeout(Duration::from_secs(20), self.events.recv())
                .await
                .expect("an event in time")
                .expect("the source runs");
            match event {
                Event::Services(change) => return short(change),
                Event::Rejected(Rejected { name, reason, .. }) => {
                    return format!("rejected {name}: {reason}");
                }
                Event::Slices(_) | Event::Node(_) | Event::ServiceCidrs(_) => {}
            }
        }
    }

    fn failures(&self, cause: Cause) -> u64 {
        self.stats.kind(ObjectKind::Service).failures(cause)
    }
}

fn short(change: Change<crate::model::Service>) -> String {
    match change {
        Change::Applied(service) => format!("applied {}", service.name),
        Change::Gone(name) => format!("gone {name}"),
        Change::Reset { objects, rejected } => {
            let objects: Vec<String> = objects.iter().map(|s| s.name.to_string()).collect();
            let rejected: Vec<String> = rejected.iter().map(ToString::to_string).collect();
            format!("reset [{}] rejected [{}]", objects.join(" "), rejected.join(" "))
        }
    }
}

/// The body of an answer recorded from a real API server.
fn fixture(name: &str) -> String {
    let path = format!("{}/../tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect("a fixture").replace("\r\n", "\n");
    let (_, body) = text.split_once("\n\n").expect("headers and a body");
    body.trim_end().to_owned()
}

fn service(name: &str, version: u32) -> String {
    format!(
        r#"{{"kind":"Service","apiVersion":"v1","metadata":{{"name":"{name}","namespace":"shop","resourceVersion":"{version}"}},"spec":{{"clusterIP":"10.96.0.10","ports":[{{"port":80}}]}}}}"#
    )
}

fn list(version: u32, items: &[String]) -> Reply {
    Reply::Whole(
        200,
        format!(
            r#"{{"kind":"ServiceList","apiVersion":"v1","metadata":{{"resourceVersion":"{version}"}},"items":[{}]}}"#,
            items.join(",")
        ),
    )
}

fn event(kind: &str, object: &str) -> String {
    format!(r#"{{"type":"{kind}","object":{object}}}"#)
}

fn is_watch(target: &str) -> bool {
    target.contains("watch=true")
}

#[tokio::test]
async fn every_kind_gets_its_reset_when_the_api_holds_nothing() {
    let mut run =
        start(|target, _| if is_watch(target) { Reply::Hold(vec![]) } else { list(1, &[]) }).await;
    let mut found = Vec::new();
    for _ in 0..3 {
        let event = timeout(Duration::from_secs(20), run.events.recv()).await;
        found.push(match event.expect("in time").expect("runs") {
            Event::Services(Change::Reset { objects, .. }) if objects.is_empty() => "services",
            Event::Slices(Change::Reset { objects, .. }) if objects.is_empty() => "slices",
            Event::Node(None) => "node",
            other => panic!("{other:?}"),
        });
    }
    found.sort_unstable();
    assert_eq!(found, ["node", "services", "slices"]);
}

#[tokio::test]
async fn pages_are_followed_with_kube_proxys_selectors_and_make_one_reset() {
    let mut run = start(|target, nth| match (is_watch(target), nth) {
        (false, 0) => Reply::Whole(200, fixture("list-services-page1-limit3.http")),
        (false, 1) => Reply::Whole(200, fixture("list-services-page2-limit3.http")),
        (false, _) => list(67783, &[service("last", 7)]),
        (true, _) => Reply::Hold(vec![]),
    })
    .await;
    let expected = "reset [default/kubernetes kube-system/kube-dns shop/api shop/behind-proxy-lb \
                    shop/last] rejected []";
    assert_eq!(run.next().await, expected);
    let lists = run.server.services_requests(false);
    assert_eq!(lists.len(), 3);
    let selector = "labelSelector=%21service.kubernetes.io%2Fheadless%2C\
                    %21service.kubernetes.io%2Fservice-proxy-name";
    assert!(lists.iter().all(|target| target.contains(selector)), "{lists:?}");
    assert!(lists.iter().all(|target| target.contains("limit=500")), "{lists:?}");
    assert!(!lists[0].contains("continue=") && lists[1].contains("continue=eyJ2IjoibWV0"));
    let requests = run.server.requests.lock().expect("lock").clone();
    assert!(requests.iter().any(|target| {
        target.starts_with("/apis/discovery.k8s.io/v1/endpointslices?")
            && target.contains("labelSelector=%21service.kubernetes.io%2Fheadless")
    }));
    assert!(requests.iter().any(|target| {
        target.starts_with("/api/v1/nodes?") && target.contains("metadata.name%3Dnode-a")
    }));
}

#[tokio::test]
async fn one_undecodable_item_fails_neither_the_list_nor_the_watch() {
    let bad = r#"{"metadata":{"name":"bad","namespace":"shop","resourceVersion":"5"},"spec":{"ports":7}}"#;
    let mut run = start(move |target, _| {
        if is_watch(target) {
            Reply::Hold(vec![event("MODIFIED", bad), event("ADDED", &service("next", 9))])
        } else {
            list(4, &[service("web", 3), bad.to_owned()])
        }
    })
    .await;
    assert_eq!(run.next().await, "reset [shop/web] rejected [shop/bad]");
    let reason = run.next().await;
    assert!(reason.starts_with("rejected shop/bad: spec.ports: invalid type"), "{reason}");
    assert!(run.next().await.starts_with("rejected shop/bad"));
    assert_eq!(run.next().await, "applied shop/next");
    let stats = run.stats.kind(ObjectKind::Service);
    assert_eq!((stats.rejected(), stats.lists(), stats.applied()), (2, 1, 2));
    assert!(stats.connected_since().is_some() && stats.last_contact().is_some());
}

#[tokio::test]
async fn recorded_watch_events_arrive_and_a_resumed_watch_goes_on_after_the_bookmark() {
    let mut run = start(|target, nth| match (is_watch(target), nth) {
        (false, _) => list(67331, &[]),
        (true, 0) => {
            Reply::End(fixture("watch-services.http").lines().map(str::to_owned).collect())
        }
        (true, _) => Reply::Hold(vec![event("ADDED", &service("later", 67400))]),
    })
    .await;
    assert_eq!(run.next().await, "reset [] rejected []");
    assert_eq!(run.next().await, "gone shop/proxied");
    assert_eq!(run.next().await, "applied shop/fresh");
    assert_eq!(run.next().await, "applied shop/later");
    let watches = run.server.services_requests(true);
    assert!(
        watches[0].contains("resourceVersion=67331")
            && watches[0].contains("allowWatchBookmarks=true")
    );
    assert!(watches[1].contains("resourceVersion=67335"), "{watches:?}");
    assert_eq!(run.server.services_requests(false).len(), 1);
    assert_eq!(run.stats.kind(ObjectKind::Service).watches(), 2);
}

#[tokio::test]
async fn a_service_that_turns_into_what_is_not_ours_is_gone() {
    let mut run = start(|target, _| {
        if is_watch(target) {
            let headless = service("web", 5).replace("10.96.0.10", "None");
            Reply::Hold(vec![event("MODIFIED", &headless)])
        } else {
            list(4, &[service("web", 3)])
        }
    })
    .await;
    assert_eq!(run.next().await, "reset [shop/web] rejected []");
    assert_eq!(run.next().await, "gone shop/web");
}

/// A list of `a`; a watch answered with `first`; then a list of `b`.
async fn relists_after(first: fn() -> Reply, cause: Cause) {
    let mut run = start(move |target, nth| match (is_watch(target), nth) {
        (false, 0) => list(1, &[service("a", 1)]),
        (false, _) => list(9, &[service("b", 8)]),
        (true, 0) => first(),
        (true, _) => Reply::Hold(vec![]),
    })
    .await;
    assert_eq!(run.next().await, "reset [shop/a] rejected []");
    assert_eq!(run.next().await, "reset [shop/b] rejected []");
    assert_eq!(run.failures(cause), 1);
}

#[tokio::test]
async fn the_410_event_leads_to_a_new_list() {
    relists_after(|| Reply::End(vec![fixture("watch-too-old.http")]), Cause::Expired).await;
}

#[tokio::test]
async fn http_410_leads_to_a_new_list() {
    relists_after(
        || {
            let status = r#"{"kind":"Status","status":"Failure","reason":"Expired","code":410}"#;
            Reply::Whole(410, status.to_owned())
        },
        Cause::Expired,
    )
    .await;
}

#[tokio::test]
async fn a_rubbish_watch_line_leads_to_a_new_list_since_an_event_may_be_lost() {
    relists_after(|| Reply::Hold(vec!["<html>oops</html>".to_owned()]), Cause::Rubbish).await;
}

#[tokio::test]
async fn failures_before_the_list_deliver_nothing_and_are_counted() {
    let mut run = start(|target, nth| match (is_watch(target), nth) {
        (false, 0) => Reply::Whole(401, fixture("list-unauthorized.http")),
        (false, 1) => Reply::Whole(200, "<html>hello</html>".to_owned()),
        (false, 2) => Reply::Whole(500, "panic".to_owned()),
        (false, _) => list(1, &[service("a", 1)]),
        (true, _) => Reply::Hold(vec![]),
    })
    .await;
    assert_eq!(run.next().await, "reset [shop/a] rejected []");
    for cause in [Cause::Unauthorized, Cause::Rubbish, Cause::Status] {
        assert_eq!(run.failures(cause), 1, "{cause:?}");
    }
    assert_eq!(run.stats.kind(ObjectKind::Service).lists(), 1);
}

#[tokio::test]
async fn a_list_cut_in_the_middle_is_begun_anew_and_what_came_of_it_is_not_delivered() {
    let mut run = start(|target, nth| match (is_watch(target), nth) {
        (false, 0) => Reply::Whole(200, fixture("list-services-page1-limit3.http")),
        (false, 1) => Reply::End(vec![r#"{"kind":"ServiceList","items":[{"#.to_owned()]),
        (false, _) => list(1, &[service("a", 1)]),
        (true, _) => Reply::Hold(vec![]),
    })
    .await;
    assert_eq!(run.next().await, "reset [shop/a] rejected []");
}

#[tokio::test]
async fn a_page_token_that_expired_leads_to_a_list_without_pages() {
    let mut run = start(|target, nth| match (is_watch(target), nth) {
        (false, 0) => Reply::Whole(200, fixture("list-services-page1-limit3.http")),
        (false, 1) => Reply::Whole(
            410,
            r#"{"kind":"Status","status":"Failure","reason":"Expired","code":410}"#.to_owned(),
        ),
        (false, _) => list(1, &[service("a", 1)]),
        (true, _) => Reply::Hold(vec![]),
    })
    .await;
    assert_eq!(run.next().await, "reset [shop/a] rejected []");
    let lists = run.server.services_requests(false);
    assert!(lists[1].contains("limit=500") && !lists[2].contains("limit="), "{lists:?}");
}

#[tokio::test]
async fn a_watch_that_keeps_failing_is_given_up_for_a_new_list() {
    let mut run = start(|target, nth| match (is_watch(target), nth) {
        (false, 0) => list(1, &[service("a", 1)]),
        (false, _) => list(9, &[service("b", 8)]),
        (true, 0..5) => Reply::Whole(504, "too large resource version".to_owned()),
        (true, _) => Reply::Hold(vec![]),
    })
    .await;
    assert_eq!(run.next().await, "reset [shop/a] rejected []");
    assert_eq!(run.next().await, "reset [shop/b] rejected []");
    assert_eq!(run.failures(Cause::Status), 5);
}

#[tokio::test]
async fn a_server_without_service_cidrs_is_no_trouble_and_is_not_asked_again_soon() {
    let mut run = start(|target, nth| match (is_watch(target), nth) {
        (false, _) => list(1, &[service("a", 1)]),
        (true, 0) => Reply::End(vec![]),
        (true, _) => Reply::Hold(vec![]),
    })
    .await;
    assert_eq!(run.next().await, "reset [shop/a] rejected []");
    // By then the Services' watch was tried again, after the first delay.
    while run.stats.kind(ObjectKind::Service).watches() < 2 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let stats = run.stats.kind(ObjectKind::ServiceCidr);
    for cause in Cause::ALL {
        assert_eq!(stats.failures(cause), 0, "{cause:?}");
    }
    assert_eq!(stats.connected_since(), None);
    assert!(stats.is_absent() && !run.stats.kind(ObjectKind::Service).is_absent());
    let asked = run.server.requests.lock().expect("lock");
    assert_eq!(asked.iter().filter(|target| target.starts_with(SERVICE_CIDRS)).count(), 1);
}

#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let (_server, url) =
        Server::start(Box::new(
            |target, _| {
                if is_watch(target) { Reply::Hold(vec![]) } else { list(1, &[]) }
            },
        ))
        .await;
    let access = Access::open(None, Some(&url)).expect("a client");
    let (sender, events) = mpsc::channel(64);
    drop(events);
    let stats = Arc::new(SourceStats::default());
    let (announcer, announced) = Announcer::new();
    let outlet = Outlet { events: sender, stats, announcer };
    let done = run(access, NodeName::new("node-a"), outlet, announced);
    timeout(Duration::from_secs(20), done).await.expect("an end");
}
