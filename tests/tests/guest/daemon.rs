//! The daemon against the test API server, on a kernel that has IPVS.

use std::collections::BTreeSet;
use std::process::Command;
use std::thread;
use std::time::Duration;

use proxy_tests::apiserver::Options;

use crate::node::{
    Bed, Clients, FULL_ROUNDS, LONG, SYNCED, load_recorded, plain, serve, table, until, web,
    web_address,
};
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

/// The addresses on the link, as `ip` writes them.
fn on_the_link() -> BTreeSet<String> {
    let shown = Command::new("ip").args(["-o", "addr", "show", "dev", "kube-ipvs0"]).output();
    let text = String::from_utf8_lossy(&shown.expect("ip").stdout).into_owned();
    let address = |line: &str| line.split_whitespace().nth(3).map(ToOwned::to_owned);
    text.lines().filter_map(address).collect()
}

/// kube-proxy deletes the link when it starts in another mode, and with `--cleanup`.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn a_link_that_was_deleted_is_made_anew_and_its_addresses_are_still_services() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        bed.api.store().load_generated(50, 2);
        bed.apply(web(&["10.99.0.11"]));
        let daemon = bed.daemon_with(&["--ipvs-sync-period=3s"]);
        daemon.wait_for("node_dataplane_frontends", LONG, |n| n >= 52.0).expect("programmed");
        // Two families each.
        let rounds = |more: f64| {
            let so_far = daemon.metric(FULL_ROUNDS).expect("metrics").unwrap_or(0.0);
            let wanted = so_far + 2.0 * more;
            daemon.wait_for(FULL_ROUNDS, LONG, |n| n >= wanted).expect("more full rounds");
        };
        let count = |name: &str| daemon.metric(name).expect("metrics").unwrap_or(0.0);
        let seen = || {
            (table(), count("node_dataplane_frontends"), count("node_dataplane_frontend_conflicts"))
        };
        rounds(1.0);
        let (before, addresses) = (seen(), on_the_link());
        assert!(addresses.len() >= 52, "{addresses:?}");
        for time in 1..=2 {
            run("ip", &["link", "del", "kube-ipvs0"]);
            until("the addresses are back", LONG, || on_the_link() == addresses);
            rounds(2.0);
            let operations = count("node_dataplane_ops_total");
            rounds(2.0);
            assert_eq!(seen(), before, "time {time}\n{}", daemon.log());
            assert_eq!(on_the_link(), addresses);
            let later = count("node_dataplane_ops_total");
            assert_eq!(later, operations, "time {time}: it is quiet\n{}", daemon.log());
        }
    });
}
