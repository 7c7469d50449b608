//! What the daemon is given: broken objects, a kernel without IPVS.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::in_namespace;
use crate::node::{
    Bed, LONG, PATIENCE, plain, serve, slice, until, virtual_servers, web, web_address, weight,
};
use proxy_tests::apiserver::Resource;
use proxy_tests::daemon::Page;
use proxy_tests::traffic::Held;

/// The API server takes any 32-bit number for the port of an EndpointSlice. kube-proxy 1.36
/// writes it into the one restore for all Services, which `iptables-restore` and `nft` then
/// refuse as a whole, again and again.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_26_an_impossible_port_costs_no_other_service_its_programming() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let mut expected = 2;
        for (number, port) in [(1, 70_000), (2, -1)] {
            let name = format!("bad-{number}");
            bed.apply([json!({"kind": "Service", "apiVersion": "v1",
                "metadata": {"name": name, "namespace": "shop"},
                "spec": {"clusterIP": format!("10.96.0.9{number}"), "ports": [{"port": 80}]}})]);
            let mut slice = slice(&name, &["10.99.0.11"]);
            slice["ports"][0]["port"] = json!(port);
            bed.apply([slice]);
            expected += 1;
        }
        let _server = serve("10.99.0.11");
        bed.apply(web(&["10.99.0.11"]));
        let daemon = bed.daemon();
        until("all Services are programmed", LONG, || virtual_servers() == expected);
        Held::open(web_address(), PATIENCE).expect("a Service beside the broken ones");

        let page = Page::fetch().expect("metrics");
        let ports = page.sum_where("node_dataplane_rejected_parts_total", r#"part="port""#);
        assert_eq!(ports, Some(2.0), "{}", daemon.log());
        assert_eq!(page.sum("node_dataplane_failing_objects"), Some(0.0));
        let log = daemon.log();
        for (name, port) in [("shop/bad-1-1", "70000"), ("shop/bad-2-1", "-1")] {
            let named = |line: &str| line.contains(name) && line.contains(port);
            assert!(log.lines().any(named), "no line names {name} and {port}\n{log}");
        }
        let event = |slice: &str| {
            bed.api.store().all(Resource::EventsEvent).into_iter().find(|event| {
                event["regarding"]["name"] == *slice && event["reason"] == "PartlyRejected"
            })
        };
        until("Events beside the broken slices", LONG, || {
            event("bad-1-1").is_some() && event("bad-2-1").is_some()
        });
        let event = event("bad-1-1").expect("the Event");
        let note = event["note"].as_str().unwrap_or_default();
        assert!(event["type"] == "Warning" && note.contains("70000"), "{event}");
        let slice = bed.api.store().get(Resource::EndpointSlice, "shop", "bad-1-1");
        let slice = slice.expect("the slice");
        assert_eq!(event["regarding"]["uid"], slice["metadata"]["uid"]);
        // And the next change goes on being programmed.
        bed.apply(web(&["10.99.0.11", "10.99.0.12"]));
        until("a change after it", LONG, || weight("10.99.0.12") == Some(1));
    });
}

/// Keeps the kernel from loading modules until it is dropped (`modprobe_path` of
/// kernel/kmod.c): a helper of the kernel's runs in the first mount namespace, so that hiding
/// /lib/modules from the daemon would not do.
struct NoAutoload(String);

const MODPROBE: &str = "/proc/sys/kernel/modprobe";

impl NoAutoload {
    fn new() -> Self {
        let before = fs::read_to_string(MODPROBE).expect("the path of modprobe");
        fs::write(MODPROBE, "/bin/false").expect("another path");
        Self(before)
    }
}

impl Drop for NoAutoload {
    fn drop(&mut self) {
        // A failure shows in every later test.
        let _ = fs::write(MODPROBE, self.0.trim());
    }
}

fn ipvs_modules() -> Vec<String> {
    let modules = fs::read_to_string("/proc/modules").expect("modules");
    let names = modules.lines().filter_map(|line| line.split(' ').next());
    names.filter(|name| name.starts_with("ip_vs")).map(ToOwned::to_owned).collect()
}

/// Network namespaces of earlier tests may still be on their way out, and hold the modules.
fn unload_ipvs() {
    let end = Instant::now() + LONG;
    loop {
        let loaded = ipvs_modules();
        if loaded.is_empty() {
            return;
        }
        assert!(Instant::now() < end, "in use: {loaded:?}");
        // Schedulers first, they use ip_vs.
        let (core, schedulers): (Vec<_>, Vec<_>) =
            loaded.into_iter().partition(|name| name == "ip_vs");
        for name in schedulers.iter().chain(&core) {
            let _ = Command::new("rmmod").arg(name).output();
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// kube-proxy falls back to another mode, or runs on as "Running" and logs an error with each
/// sync, where the kernel has no IPVS (kubernetes/kubernetes #89729 and many like it).
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_13_a_kernel_without_ipvs_ends_the_daemon_with_the_modules_name() {
    // What the test and the daemon need besides, when this is the first test of a guest.
    let others = ["-a", "veth", "dummy", "nf_tables", "nf_conntrack_netlink", "ip_set"];
    proxy_tests::node::run("modprobe", &others);
    let _no_autoload = NoAutoload::new();
    unload_ipvs();
    in_namespace(|| {
        let bed = Bed::new(plain());
        let mut daemon = bed.daemon();
        let status = daemon.wait(LONG).expect("an end by itself");
        let log = daemon.log();
        assert!(!status.success(), "{status}\n{log}");
        let last = log.lines().last().unwrap_or_default();
        assert!(last.contains("ip_vs") && last.contains("modprobe"), "the last line says {last:?}");
    });
}

/// The same for a scheduler, which is a module of its own.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn pain_13_a_scheduler_the_kernel_lacks_ends_the_daemon_with_the_modules_name() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        let mut daemon = bed.daemon_with(&["--ipvs-scheduler=nosuch"]);
        let status = daemon.wait(LONG).expect("an end by itself");
        let log = daemon.log();
        assert!(!status.success(), "{status}\n{log}");
        let last = log.lines().last().unwrap_or_default();
        assert!(last.contains("ip_vs_nosuch"), "the last line says {last:?}");
    });
}
