//! What the metrics say of traffic in ipvs mode, beside what was sent and what IPVS says.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::daemon::Page;
use proxy_tests::traffic::{ConnectSpec, Held, Protocol, connect};
use serde_json::json;

use crate::node::{Bed, LONG, PATIENCE, SYNCED, plain, serve, web, web_address};
use crate::{in_namespace, run};

const WEB: &str = "namespace=\"shop\",service=\"web\",port=\"80\",protocol=\"TCP\"";
const CONNECTIONS: &str = "node_dataplane_service_connections_total";
const CURRENT: &str = "node_dataplane_service_current_connections";
const PACKETS: &str = "node_dataplane_service_packets_total";
const BYTES: &str = "node_dataplane_service_bytes_total";
const ENDPOINT_CONNECTIONS: &str = "node_dataplane_endpoint_connections_total";

/// A page that shows everything until now: IPVS brings its counters up to date every two seconds
/// (`estimation_timer`), and scrapes of one second share one reading.
fn page() -> Page {
    thread::sleep(Duration::from_millis(3500));
    Page::fetch().expect("a page")
}

fn of(page: &Page, name: &str, label: &str) -> f64 {
    page.sum_where(name, label).unwrap_or(0.0)
}

/// Connections, packets in and out, bytes in and out of [`web`], as `ipvsadm` has them.
fn as_ipvsadm_has_them() -> Vec<f64> {
    let text = run("ipvsadm", &["-Ln", "--stats", "--exact", "-t", "10.96.0.80:80"]);
    let line = text.lines().find(|line| line.starts_with("TCP")).expect("the virtual server");
    line.split_whitespace().skip(2).map(|word| word.parse().expect("a number")).collect()
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn traffic_is_counted_as_ipvs_counts_it() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        let _servers = endpoints.map(serve);
        bed.apply(web(&endpoints));
        let mut daemon = bed.daemon_with(&["--endpoint-metrics"]);
        daemon.wait_for("node_dataplane_frontends", LONG, |n| n >= 1.0).expect("programmed");
        let spec = ConnectSpec::new(Protocol::Tcp, web_address(), 40).timeout(PATIENCE);
        let report = connect(&spec).expect("connections");
        assert_eq!(report.succeeded, 40, "{report:?}");
        let held = Held::open(web_address(), PATIENCE).expect("one that stays");

        let seen = page();
        assert_eq!(of(&seen, CONNECTIONS, WEB), 41.0);
        assert_eq!(of(&seen, ENDPOINT_CONNECTIONS, WEB), 41.0);
        for endpoint in endpoints {
            let label = format!("{WEB},endpoint=\"{endpoint}:8080\"");
            assert!(of(&seen, ENDPOINT_CONNECTIONS, &label) >= 20.0, "rr shares evenly");
        }
        assert_eq!(of(&seen, CURRENT, &format!("{WEB},state=\"active\"")), 1.0);
        let direction =
            |name, direction: &str| of(&seen, name, &format!("{WEB},direction=\"{direction}\""));
        let ours = vec![
            of(&seen, CONNECTIONS, WEB),
            direction(PACKETS, "in"),
            direction(PACKETS, "out"),
            direction(BYTES, "in"),
            direction(BYTES, "out"),
        ];
        assert_eq!(ours, as_ipvsadm_has_them());
        drop(held);

        // Refusals are counted by the rules, and all of it goes on without the daemon.
        let unused = "10.96.0.80:81".parse().expect("an address");
        for _ in 0..3 {
            TcpStream::connect_timeout(&unused, PATIENCE).expect_err("an unused port");
        }
        daemon.kill().expect("running until killed");
        assert_eq!(connect(&spec).expect("connections").succeeded, 40);
        daemon = bed.daemon();
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("synced again");
        let seen = page();
        assert_eq!(of(&seen, CONNECTIONS, WEB), 81.0, "over a restart");
        let unused = "reason=\"unused_port\"";
        assert_eq!(of(&seen, "node_dataplane_drops_total", unused), 3.0);
        a_frontend_that_goes_takes_nothing_with_it(&bed, &daemon.log());
        deleted_by_hand(&bed);
    });
}

fn a_frontend_that_goes_takes_nothing_with_it(bed: &Bed, log: &str) {
    let with = |external: &[&str]| {
        bed.apply([json!({"kind": "Service", "apiVersion": "v1",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.80", "externalIPs": external,
                "ports": [{"port": 80, "targetPort": 8080}]}})]);
    };
    let until = |frontends: f64| {
        let end = Instant::now() + LONG;
        while page().sum("node_dataplane_frontends") != Some(frontends) {
            assert!(Instant::now() < end, "{frontends} frontends\n{log}");
        }
    };
    let before = page();
    let frontends = before.sum("node_dataplane_frontends").expect("frontends");
    with(&["198.51.100.80"]);
    until(frontends + 1.0);
    let external = "198.51.100.80:80".parse().expect("an address");
    let spec = ConnectSpec::new(Protocol::Tcp, external, 5).timeout(PATIENCE);
    assert_eq!(connect(&spec).expect("connections").succeeded, 5);
    assert_eq!(of(&page(), CONNECTIONS, WEB), of(&before, CONNECTIONS, WEB) + 5.0);
    with(&[]);
    until(frontends);
    assert_eq!(of(&page(), CONNECTIONS, WEB), of(&before, CONNECTIONS, WEB) + 5.0, "it keeps them");
}

/// What somebody removes is found to be missing, and is put back.
fn deleted_by_hand(_: &Bed) {
    let divergent = |page: &Page| page.sum("node_dataplane_divergent_objects");
    let repaired = |page: &Page| of(page, "node_dataplane_repaired_objects_total", "");
    let before = page();
    assert_eq!((divergent(&before), repaired(&before)), (Some(0.0), 0.0), "at rest");
    run("ipvsadm", &["-d", "-t", "10.96.0.80:80", "-r", "10.99.0.11:8080"]);
    let end = Instant::now() + LONG;
    while repaired(&page()) == 0.0 {
        assert!(Instant::now() < end, "nobody noticed");
    }
    let after = page();
    assert_eq!((divergent(&after), repaired(&after)), (Some(0.0), 1.0), "put right");
}
