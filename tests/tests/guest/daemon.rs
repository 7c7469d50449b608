//! The daemon against the test API server, on a kernel that has IPVS.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use proxy_tests::apiserver::Options;

use crate::node::{Bed, Clients, LONG, SYNCED, load_recorded, plain, serve, web, web_address};
use crate::{in_namespace, run, run_with};

/// What kube-proxy's ipvs mode makes of the recorded objects.
pub(crate) const KUBE_PROXY: &str = include_str!("../../fixtures/ipvs-ipvsadm-save.txt");

fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn every_object_of_the_fixtures_becomes_what_the_contract_says() {
    let (found, log) = in_namespace(|| {
        let bed = Bed::new(Options::default());
        load_recorded(&bed.api);
        let daemon = bed.daemon();
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("a first sync");
        daemon
            .wait_for("node_dataplane_frontends", LONG, |n| n > 20.0)
            .expect("the frontends of the fixtures");
        thread::sleep(Duration::from_millis(500));
        (run("ipvsadm", &["-Sn"]), daemon.log())
    });
    // kube-proxy ran on a guest with one address more, and with another IPv6 address.
    let expected: BTreeSet<String> = lines(KUBE_PROXY)
        .into_iter()
        .filter(|line| !line.contains("10.0.2.15"))
        .map(|line| line.replace("fec0::5054:ff:fe12:3456", "fd00:99::2"))
        .chain(hidden_web())
        .collect();
    let found = lines(&found);
    let missing: Vec<_> = expected.difference(&found).collect();
    let extra: Vec<_> = found.difference(&expected).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "missing {missing:#?}\nextra {extra:#?}\n{log}"
    );
}

/// What kube-proxy's ipvs mode has not: `web` keeps its clients at their endpoint across all
/// its external frontends, whose Local set is not the ClusterIP's: that has a virtual server
/// of its own, on a port that no client can reach.
fn hidden_web() -> Vec<String> {
    let mut lines = Vec::new();
    for (port, target) in [(80, 8080), (443, 8443)] {
        let port = port ^ 0x8000;
        for (address, endpoint) in
            [("10.101.40.77", "10.244.0.7"), ("[fd00:10:96::d:bba0]", "[fd00:10:244::7]")]
        {
            lines.push(format!("-A -t {address}:{port} -s rr -p 600"));
            lines.push(format!("-a -t {address}:{port} -r {endpoint}:{target} -m -w 1"));
        }
    }
    lines
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn kill_9_and_restart_under_traffic_lose_nothing_and_write_nothing() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        let _servers = endpoints.map(serve);
        bed.apply(web(&endpoints));
        let mut daemon = bed.daemon();
        daemon.wait_for("node_dataplane_frontends", LONG, |n| n >= 1.0).expect("programmed");
        let clients = Clients::start(web_address());
        let before = run("ipvsadm", &["-Sn"]);
        for _ in 0..2 {
            thread::sleep(Duration::from_secs(1));
            daemon.kill().expect("running until killed");
            thread::sleep(Duration::from_secs(1));
            daemon = bed.daemon();
            daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("synced again");
            let written = daemon.metric("node_dataplane_ops_total").expect("metrics");
            assert_eq!(written.unwrap_or(0.0), 0.0, "writes after a restart\n{}", daemon.log());
            assert_eq!(run("ipvsadm", &["-Sn"]), before);
        }
        println!("2 kills: {}", clients.stop());
    });
}

/// `/proc/net/ip_vs` leaves out as many virtual servers as other namespaces have.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn virtual_servers_of_other_namespaces_hide_none_of_ours() {
    in_namespace(|| {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let other = thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("another namespace");
            let servers: String =
                (1..=40).map(|n| format!("-A -t 192.0.2.{n}:80 -s rr\n")).collect();
            run_with(&servers, "ipvsadm", &["-R"]);
            // The namespace lives as long as this thread.
            let _ = held.recv();
        });
        let bed = Bed::new(plain());
        bed.api.store().load_generated(100, 5);
        let mut daemon = bed.daemon();
        daemon.wait_for("node_dataplane_frontends", LONG, |n| n >= 101.0).expect("programmed");
        daemon.kill().expect("running until killed");
        daemon = bed.daemon();
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("synced again");
        let written = daemon.metric("node_dataplane_ops_total").expect("metrics");
        assert_eq!(written.unwrap_or(0.0), 0.0, "writes after a restart\n{}", daemon.log());
        drop(release);
        other.join().expect("the other namespace");
    });
}
