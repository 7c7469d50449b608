//! What a change costs in ebpf mode, at any number of Services, on the kernel of the machine
//! that runs the tests. Needs root, and the object in `PROXY_EBPF_OBJECT`, as
//! `cargo xtask test` passes it.

#![allow(clippy::expect_used, reason = "a test binary: whatever fails shall end the test")]

use std::fs;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use proxy_tests::cluster::ClusterCgroup;
use proxy_tests::node::in_namespace;
use proxy_tests::scale;

#[test]
fn an_endpoint_update_is_a_handful_of_writes_however_many_services_there_are() {
    let cgroup = ClusterCgroup::create(true).expect("a cgroup");
    let members = cgroup.path().to_owned();
    in_namespace(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
        // 0 is this thread: its clients' sockets are those that the programs see.
        fs::write(members.join("cgroup.threads"), "0").expect("the thread in the cgroup");
        let bpf = tempfile::tempdir().expect("a directory");
        let row = scale::measure(&[
            "--proxy-mode=ebpf",
            &format!("--bpf-root={}", bpf.path().display()),
            &format!("--cgroup-root={}", members.display()),
        ]);
        umount2(bpf.path(), MntFlags::MNT_DETACH).expect("the daemon mounted it");
        println!("{row}");
        let requests = row.requests_of_a_change();
        assert!(requests <= 8.0, "{requests} writes for one change of endpoints");
    });
    drop(cgroup);
}
