//! A daemon whose maps are laid out otherwise.
//!
//! What another version would have pinned is what this one has, in a directory of another
//! version, with or without what says of each map what it looks like.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::growth::Load;
use super::node::{LONG, until};
use super::overflow::metric_so_far;
use super::stage::{Stage, spec};

const REMOVED: &str = "what another version left is removed";

fn version(stage: &Stage, number: u32) -> PathBuf {
    stage.bed.bpf_root(0).join("proxy-daemon").join(format!("v{number}"))
}

fn ours(stage: &Stage) -> PathBuf {
    version(stage, proxy_ebpf::layout::LAYOUT_VERSION)
}

/// As if the daemon, which does not run, had been of that version.
fn becomes(stage: &Stage, number: u32) {
    fs::rename(ours(stage), version(stage, number)).expect("a BPF file system");
}

/// A map of that version looks otherwise than ours.
fn looks_otherwise(stage: &Stage, number: u32, map: &str) {
    let layout = version(stage, number).join("layout");
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    let all = fs::read_dir(&layout).expect("a directory").map(|entry| entry.unwrap().path());
    let of: Vec<_> = all.filter(|path| name(path).starts_with(&format!("{map}-"))).collect();
    assert_eq!(of.len(), 1, "{of:?}");
    fs::remove_dir(&of[0]).expect("a directory");
    fs::create_dir(layout.join(format!("{map}-{:016x}", 7))).expect("a directory");
}

fn count(stage: &Stage, text: &str) -> usize {
    stage.bed.log(0).matches(text).count()
}

/// Starts the daemon and waits until nothing of the other version is left.
fn upgrade(stage: &mut Stage, load: &mut Load, number: u32) {
    let before = count(stage, REMOVED);
    load.probe(stage, 10);
    stage.bed.start_daemon(0, &[]).expect("a daemon");
    until("the other version is gone", LONG, || {
        load.probe(stage, 5);
        count(stage, REMOVED) > before
    });
    assert!(!version(stage, number).exists());
    std::thread::sleep(Duration::from_millis(300));
    load.probe(stage, 10);
    until("all is programmed", LONG, || {
        metric_so_far(stage, "node_dataplane_failing_objects") == Some(0)
    });
}

#[test]
fn an_upgrade_across_layout_versions_cuts_nothing() {
    let mut stage = Stage::new(&["--ipvs-sync-period=5s"]);
    stage.web(&spec("NodePort"), &[], &[(1, 0), (0, 1)]);
    let mut load = Load::start(&stage);

    // An older one, from before maps had it written beside them what they look like.
    stage.bed.kill_daemon(0).expect("running until killed");
    becomes(&stage, 3);
    let layout = version(&stage, 3).join("layout");
    for entry in fs::read_dir(&layout).expect("a directory") {
        fs::remove_dir(entry.expect("an entry").path()).expect("a directory");
    }
    fs::remove_dir(&layout).expect("a directory");
    upgrade(&mut stage, &mut load, 3);
    let log = stage.bed.log(0);
    let taken = log.lines().find(|line| line.contains("maps of another version")).expect("a line");
    let (taken, left) = taken.split_once("left=").expect("what was left");
    assert!(taken.contains("FLOWS") && taken.contains("BACKENDS"), "{taken}");
    assert!(
        left.contains(r#"[\"CONFIG\", \"LOCALS\", \"AFFINITY\", \"DEVICES\", \"UDP_PEERS\"]"#),
        "{left}"
    );

    // A newer one: a way back.
    stage.bed.kill_daemon(0).expect("running until killed");
    becomes(&stage, 9);
    upgrade(&mut stage, &mut load, 9);

    // One whose service table is of no use: it serves until ours is whole.
    stage.bed.kill_daemon(0).expect("running until killed");
    becomes(&stage, 3);
    looks_otherwise(&stage, 3, "FRONTENDS");
    let waits = "go on until all Services are in the new tables";
    assert_eq!(count(&stage, waits), 0);
    upgrade(&mut stage, &mut load, 3);
    assert_eq!(count(&stage, waits), 1, "{}", stage.bed.log_tails(30));

    let connections = load.end();
    println!("3 upgrades, {connections} new connections, none lost");
}

/// Killed at any moment of an upgrade, the daemon leaves one of the two versions whole.
#[test]
fn a_kill_in_the_middle_of_an_upgrade_cuts_nothing() {
    let mut stage = Stage::new(&["--ipvs-sync-period=5s"]);
    stage.web(&spec("NodePort"), &[], &[(1, 0), (0, 1)]);
    let mut load = Load::start(&stage);
    let mut interrupted = 0;
    for turn in 0..12 {
        stage.bed.kill_daemon(0).expect("running until killed");
        becomes(&stage, 3);
        if turn % 2 == 0 {
            looks_otherwise(&stage, 3, "FRONTENDS");
        }
        let begun = count(&stage, "maps of another version");
        let over = count(&stage, REMOVED);
        stage.bed.start_daemon(0, &[]).expect("a daemon");
        until("it has begun", LONG, || count(&stage, "maps of another version") > begun);
        std::thread::sleep(Duration::from_millis(45) * turn);
        stage.bed.kill_daemon(0).expect("running until killed");
        load.probe(&stage, 10);
        if count(&stage, REMOVED) > over {
            continue_with(&mut stage, &mut load);
            continue;
        }
        interrupted += 1;
        upgrade(&mut stage, &mut load, 3);
    }
    assert!(interrupted >= 4, "{interrupted} of 12 kills came in the middle");
    let connections = load.end();
    println!("{interrupted} of 12 kills in an upgrade, {connections} new connections, none lost");
}

/// The upgrade was over before the kill.
fn continue_with(stage: &mut Stage, load: &mut Load) {
    let before = count(stage, "\"attached\" cgroup");
    stage.bed.start_daemon(0, &[]).expect("a daemon");
    until("the next daemon serves", LONG, || {
        load.probe(stage, 5);
        count(stage, "\"attached\" cgroup") > before
    });
}
