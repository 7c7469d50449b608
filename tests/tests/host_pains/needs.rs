//! What the daemon needs of the kernel, of its container and of the node's tools.

use std::fs;
use std::path::Path;
use std::slice;

use proxy_tests::binary::binary;
use proxy_tests::confinement::{CGROUP_ROOT, shown};

use super::growth::ways;
use super::node::{LONG, until};
use super::stage::{Client, Stage, spec, tcp};

const ALL: &str = "NET_ADMIN,BPF,PERFMON,SYS_ADMIN,SYS_PTRACE";

/// The daemon with these capabilities and arguments in the root directory of its container, with
/// these places of the node shown to it: what it says when it ends by itself, in failure.
fn refuses(stage: &Stage, capabilities: &str, mounts: &[String], arguments: &[String]) -> String {
    let object = std::env::var_os("PROXY_EBPF_OBJECT").expect("the object");
    let output = stage
        .cluster()
        .node(0)
        .command(binary("confined"))
        .arg(format!("--capabilities={capabilities}"))
        .arg(format!("--mount={}", shown(Path::new(&object), None)))
        .args(mounts.iter().map(|mount| format!("--mount={mount}")))
        .arg(binary("proxy-daemon"))
        .arg("--proxy-mode=ebpf")
        .arg("--sysctl-root=/host/proc/sys")
        .arg("--master=http://127.0.0.1:1")
        .args(arguments)
        .output()
        .expect("the daemon");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{capabilities}: {said}");
    said
}

/// An agent that starts without what it needs, and says in its log what failed as a consequence,
/// looks healthy and does nothing.
#[test]
fn pain_13_what_is_missing_ends_the_daemon_and_is_named() {
    let stage = Stage::without_daemons(&[], None);
    let bpf = stage.bed.bpf_root(0);
    let cgroup = shown(stage.cluster().node(0).node_cgroup(), Some(CGROUP_ROOT));
    // Mounts below it stay writable.
    let directory = shown(stage.bed.directory(), None);
    let shown_to = [directory.clone(), cgroup];
    let at_bpf = format!("--bpf-root={}", bpf.display());
    let at_cgroup = format!("--cgroup-root={CGROUP_ROOT}");
    let both = [at_bpf.clone(), at_cgroup.clone()];
    for (capabilities, missing) in [
        ("BPF,PERFMON", "CAP_NET_ADMIN"),
        ("NET_ADMIN,PERFMON", "CAP_BPF"),
        ("NET_ADMIN,BPF", "CAP_PERFMON"),
    ] {
        let said = refuses(&stage, capabilities, &shown_to, &both);
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains(missing), "without {missing}: {said}");
        assert!(said.lines().count() < 10, "a verifier's log does not help: {said}");
    }
    // Not mounted, and it may not mount it.
    let elsewhere = stage.bed.directory().join("no-bpffs");
    fs::create_dir(&elsewhere).expect("a directory");
    let at_elsewhere = format!("--bpf-root={}", elsewhere.display());
    let said = refuses(&stage, "NET_ADMIN,BPF,PERFMON", &shown_to, &[at_elsewhere, at_cgroup]);
    assert!(said.contains("BPF file system"), "{said}");
    // No cgroup v2 hierarchy at all, and none where it was said to be.
    let mounts = [directory];
    let said = refuses(&stage, ALL, &mounts, slice::from_ref(&at_bpf));
    assert!(said.contains("no cgroup v2 hierarchy is mounted"), "{said}");
    let said = refuses(&stage, ALL, &mounts, &[at_bpf, "--cgroup-root=/proc".to_owned()]);
    assert!(said.contains("no directory of a cgroup v2 hierarchy"), "{said}");
}

/// How the trouble comes about: `pain_18_19` of the guests. The root directory holds the daemon
/// and its libraries.
#[test]
fn pain_18_19_without_any_tool_a_node_is_programmed_and_left_as_it_was() {
    let mut stage = Stage::without_daemons(&[], Some(binary("confined")));
    let links = |stage: &Stage| {
        let list = || run("tc", &["qdisc", "show"]) + &run("nft", &["list", "ruleset"]);
        stage.client(Client::Host).in_netns(list).expect("a namespace")
    };
    let before = links(&stage);
    stage.bed.start_daemons().expect("daemons");
    stage.web(&spec("NodePort"), &[], &[(0, 1), (1, 0)]);
    let ways = ways(&stage);
    for (client, target) in ways {
        stage.until_served(stage.client(client), target);
        stage.must_connect(stage.client(client), &tcp(target, 20));
    }
    stage.bed.start_daemon(0, &["--cleanup".to_owned()]).expect("a daemon that cleans up");
    let mut ended = None;
    until("cleaned up", LONG, || {
        ended = stage.bed.daemon_ended(0).expect("asked");
        ended.is_some()
    });
    assert!(ended.is_some_and(|status| status.success()), "{}", stage.bed.log_tails(20));
    stage.bed.forget_daemon(0);
    assert!(!stage.bed.bpf_root(0).join("proxy-daemon").exists(), "pins stay");
    assert_eq!(links(&stage), before, "of the node");
    let (client, target) = ways[0];
    until("nothing is translated", LONG, || {
        let spec = tcp(target, 1).timeout(std::time::Duration::from_millis(300));
        stage.connect(stage.client(client), &spec).failed() == 1
    });
}

fn run(program: &str, arguments: &[&str]) -> String {
    proxy_tests::node::run(program, arguments)
}
