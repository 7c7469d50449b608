//! The daemon and its API connection go and come back.

use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::apiserver::Resource;
use proxy_tests::traffic::Held;
use serde_json::json;

use crate::in_namespace;
use crate::node::{
    Bed, Clients, FULL_ROUNDS, LONG, PATIENCE, SYNCED, plain, real_servers, serve, slice, table,
    until, virtual_servers, web, web_address, weight,
};

/// kube-proxy keeps the list of what it drains in memory, and compares real servers by address
/// and port only: after a crash one with weight 0 that is ready again equals what is wanted
/// and stays at 0 (`pkg/proxy/ipvs/proxier.go`, `syncEndpoint`).
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_05_an_endpoint_that_is_ready_again_after_a_crash_gets_its_weight_back() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        let _servers = endpoints.map(serve);
        bed.apply(web(&endpoints));
        let mut daemon = bed.daemon();
        until("programmed", LONG, || weight(endpoints[0]) == Some(1));
        let mut held = Held::open_to(endpoints[0], web_address(), PATIENCE).expect("a connection");
        bed.apply(web(&endpoints[1..]));
        until("draining", LONG, || weight(endpoints[0]) == Some(0));

        daemon.kill().expect("running until killed");
        bed.apply(web(&endpoints));
        let daemon = bed.daemon();
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("a first sync");
        assert_eq!(weight(endpoints[0]), Some(1), "after the first sync\n{}", daemon.log());
        held.echo().expect("the old connection");
        Held::open_to(endpoints[0], web_address(), PATIENCE).expect("a new connection");
    });
}

/// The other half: an endpoint that stays removed is drained on by the next process. Idle, it
/// goes with a poll of the connections (every 5 s) and does not wait for the deadline.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_05_what_a_crash_left_draining_is_drained_to_its_end() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        let _servers = endpoints.map(serve);
        bed.apply(web(&endpoints));
        let mut daemon = bed.daemon_with(&["--drain-timeout=1h"]);
        until("programmed", LONG, || weight(endpoints[0]) == Some(1));
        let held = Held::open_to(endpoints[0], web_address(), PATIENCE).expect("a connection");
        bed.apply(web(&endpoints[1..]));
        until("draining", LONG, || weight(endpoints[0]) == Some(0));

        daemon.kill().expect("running until killed");
        let daemon = bed.daemon_with(&["--drain-timeout=1h"]);
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("a first sync");
        assert_eq!(weight(endpoints[0]), Some(0), "one connection is left");
        // After a reset the kernel keeps its entry for 10 s (`tcp_timeouts` of
        // ip_vs_proto_tcp.c, IP_VS_TCP_S_CLOSE), after an orderly end for 2 minutes.
        held.abort().expect("a reset");
        until("the idle endpoint is gone", LONG, || weight(endpoints[0]).is_none());
    });
}

/// client-go's reflectors deliver what was deleted while a watch was down as the difference to
/// the next list, which kube-proxy has lost more than once (an agent that takes lists for
/// additions never learns of the deletion). Here the API server is away, then has forgotten the
/// version the watch goes on from (HTTP 410). No resync could help: its period is an hour.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_22_what_was_deleted_while_the_watch_was_down_is_gone_at_the_first_sync() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        bed.apply(web(&endpoints));
        bed.apply([service("gone", "10.96.0.81"), slice("gone", &endpoints)]);
        bed.apply([service("empty", "10.96.0.82"), slice("empty", &endpoints)]);
        let daemon = bed.daemon_with(&["--ipvs-sync-period=1h"]);
        until("programmed", LONG, || virtual_servers() == 4);
        let lists = || daemon.metric("node_dataplane_source_lists_total").expect("metrics");
        let before = lists().expect("a counter");

        bed.api.faults().set(|faults| faults.refuse = true);
        let open = |resource| bed.api.requests().open_watches(resource);
        until("the watches are cut", LONG, || {
            open(Resource::Service) + open(Resource::EndpointSlice) == 0
        });
        bed.apply(web(&endpoints[1..]));
        let store = bed.api.store();
        for (resource, name) in [
            (Resource::Service, "gone"),
            (Resource::EndpointSlice, "gone-1"),
            (Resource::EndpointSlice, "empty-1"),
        ] {
            store.remove(resource, "shop", name).expect("an object to delete");
        }
        store.compact();
        thread::sleep(Duration::from_millis(500));
        assert_eq!(virtual_servers(), 4, "nothing goes while the API server is away");
        assert_eq!(weight(endpoints[0]), Some(1));

        let begun = Instant::now();
        bed.api.faults().clear();
        // Services, EndpointSlices and the Node.
        daemon
            .wait_for("node_dataplane_source_lists_total", LONG, |now| now >= before + 3.0)
            .expect("lists made anew");
        let listed = begun.elapsed();
        until("what was deleted is gone", LONG, || {
            virtual_servers() == 3
                && weight(endpoints[0]).unwrap_or(0) == 0
                && real_servers("10.96.0.82:80").values().all(|weight| *weight == 0)
        });
        println!(
            "listed {listed:.1?} after the API server came back, synced {:.1?}",
            begun.elapsed()
        );
        assert_eq!(weight(endpoints[1]), Some(1));
        let failing = daemon.metric("node_dataplane_failing_objects").expect("metrics");
        assert_eq!(failing, Some(0.0), "{}", daemon.log());
    });
}

fn service(name: &str, address: &str) -> serde_json::Value {
    json!({"kind": "Service", "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": address, "ports": [{"port": 80, "targetPort": 8080}]}})
}

/// The table without virtual servers by firewall mark: at its start the daemon makes one, and
/// deletes it, to try the scheduler.
fn lasting() -> Vec<String> {
    table().into_iter().filter(|line| !line.starts_with("-A -f ")).collect()
}

/// Agents that delete what they do not know before their lists are whole take live Services
/// away during every restart; those that flush at start cut every flow. Lists come here in
/// pages, slowly, as from a busy API server, and the kernel is looked at all the while.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_23_kills_in_a_loop_cut_nothing_and_delete_nothing_before_the_lists_are_in() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let endpoints = ["10.99.0.11", "10.99.0.12"];
        let _servers = endpoints.map(serve);
        bed.apply(web(&endpoints));
        // More than one page of 500.
        bed.api.store().load_generated(700, 1);
        let mut daemon = bed.daemon();
        daemon.wait_for("node_dataplane_frontends", LONG, |n| n >= 702.0).expect("all");
        daemon.wait_for(FULL_ROUNDS, LONG, |n| n > 0.0).expect("one full comparison");
        let before = lasting();
        let clients = Clients::start(web_address());
        let mut looks = 0;
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(300));
            daemon.kill().expect("running until killed");
            bed.api.faults().set(|faults| faults.bytes_per_second = Some(150_000));
            daemon = bed.daemon();
            let mut synced = false;
            while !synced {
                synced = daemon.metric(FULL_ROUNDS).ok().flatten().is_some_and(|n| n > 0.0);
                assert_eq!(lasting(), before, "after {looks} looks\n{}", daemon.log());
                looks += 1;
            }
            let written = daemon.metric("node_dataplane_ops_total").expect("metrics");
            assert_eq!(written, Some(0.0), "writes after a restart\n{}", daemon.log());
            bed.api.faults().clear();
        }
        println!("3 kills, {looks} looks at the kernel: {}", clients.stop());
        assert!(looks >= 6, "the lists came too fast to be looked at: {looks} looks");
    });
}
