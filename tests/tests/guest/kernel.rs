//! What every other guest test relies on: this is the kernel asked for, and it has what
//! the machine that builds the project may lack.

use std::fs;
use std::process::Command;

fn run(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
    assert!(
        out.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn is_the_one_asked_for() {
    let asked = std::env::var("PROXY_VM_KERNEL").expect("set in guests");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.starts_with(&format!("{asked}.")), "asked for {asked}, runs {release}");
}

#[test]
fn has_no_network_but_loopback() {
    let links = run("ip", &["-o", "link", "show", "up"]);
    assert_eq!(links.lines().count(), 1, "{links}");
    assert!(links.contains("LOOPBACK,UP"), "{links}");
}

#[test]
fn loads_ip_vs_with_a_scheduler_by_name() {
    run("modprobe", &["ip_vs"]);
    run("ipvsadm", &["-A", "-t", "192.0.2.1:80", "-s", "wrr"]);
    let services = run("ipvsadm", &["-Sn"]);
    run("ipvsadm", &["-D", "-t", "192.0.2.1:80"]);
    assert_eq!(services.trim(), "-A -t 192.0.2.1:80 -s wrr");
}

#[test]
fn makes_dummy_links() {
    run("ip", &["link", "add", "dev", "probe0", "type", "dummy"]);
    let link = run("ip", &["-d", "-o", "link", "show", "probe0"]);
    run("ip", &["link", "del", "dev", "probe0"]);
    assert!(link.contains(" dummy "), "{link}");
}

#[test]
fn mounts_cgroup2_and_bpf() {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    for mount in [" /sys/fs/cgroup cgroup2 ", " /sys/fs/bpf bpf "] {
        assert!(mounts.contains(mount), "no{mount}in\n{mounts}");
    }
}
