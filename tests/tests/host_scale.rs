//! What a change, and a scrape, cost in ebpf mode, at any number of Services, on the kernel of the
//! machine that runs the tests. Needs root, and the object in `PROXY_EBPF_OBJECT`, as
//! `cargo xtask test` passes it.

#![allow(clippy::expect_used, reason = "a test binary: whatever fails shall end the test")]

use std::fs;
use std::sync::{Mutex, PoisonError};

use nix::mount::{MntFlags, umount2};
use proxy_tests::cluster::ClusterCgroup;
use proxy_tests::mounts::hide_mounts;
use proxy_tests::node::in_namespace;
use proxy_tests::scale;

/// To make a threaded cgroup all threads of the process leave theirs: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs `test` with arguments for a daemon in ebpf mode.
fn in_ebpf_mode(test: impl FnOnce(&[&str]) + Send + 'static) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let cgroup = ClusterCgroup::create(true).expect("a cgroup");
    let members = cgroup.path().to_owned();
    in_namespace(move || {
        hide_mounts().expect("mounts of its own");
        // 0 is this thread: its clients' sockets are those that the programs see.
        fs::write(members.join("cgroup.threads"), "0").expect("the thread in the cgroup");
        let bpf = tempfile::tempdir().expect("a directory");
        test(&[
            "--proxy-mode=ebpf",
            &format!("--bpf-root={}", bpf.path().display()),
            &format!("--cgroup-root={}", members.display()),
        ]);
        umount2(bpf.path(), MntFlags::MNT_DETACH).expect("the daemon mounted it");
    });
    drop(cgroup);
}

#[test]
fn an_endpoint_update_is_a_handful_of_writes_however_many_services_there_are() {
    in_ebpf_mode(|arguments| {
        let row = scale::measure(arguments);
        println!("{row}");
        let requests = row.requests_of_a_change();
        assert!(requests <= 8.0, "{requests} writes for one change of endpoints");
    });
}

/// Without traffic there is nothing to tell of Services that are more than may have series; with
/// room for all, all are there.
#[test]
fn a_scrape_shows_no_more_series_than_it_may() {
    in_ebpf_mode(|arguments| {
        let few = [arguments, &["--service-metrics-limit=10"]].concat();
        let scrapes = scale::scrapes(&few);
        println!("{scrapes}");
        assert_eq!((scrapes.service_lines, scrapes.endpoint_lines), (1, 0), "all in one");
    });
    for with_endpoints in [false, true] {
        in_ebpf_mode(move |arguments| {
            let limits = ["--service-metrics-limit=100000", "--endpoint-metrics-limit=1000000"];
            let endpoints = ["--endpoint-metrics"];
            let more: &[&str] = if with_endpoints { &endpoints } else { &[] };
            let scrapes = scale::scrapes(&[arguments, &limits, more].concat());
            println!("{scrapes}");
            assert!(scrapes.service_lines > 300, "{scrapes}");
            assert_eq!(scrapes.endpoint_lines > 3000, with_endpoints, "{scrapes}");
        });
    }
}
