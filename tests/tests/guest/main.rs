//! Tests that run in a guest, each time on a fresh kernel with nothing configured.
//! `cargo xtask test --only vm` builds and starts them, on each kernel of the matrix.
//!
//! They run one after the other (`--test-threads=1`) in one guest, as root, in its root
//! network namespace unless they make one: each cleans up what it made.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test binary: whatever fails shall end the test"
)]

mod cidrs;
mod codec;
mod config;
mod conformance;
mod daemon;
mod ebpf;
mod kernel;
mod links;
mod node;
mod pains;
mod scale;
mod takeover;
mod udp;

use std::process::{Command, Stdio};

use proxy_tests::cluster::Sockets;
use proxy_tests::traffic::Protocol;

/// Of the tests that run in both modes.
const MODE: &str = "ipvs";
const SOCKETS: Sockets = Sockets::Nobodys;
const PROTOCOLS: &[Protocol] = &[Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// Runs `test` in a network namespace of its own, which goes with its thread, so that
/// tests run side by side and nothing is left behind.
fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    assert_eq!(
        std::env::var("PROXY_VM").as_deref(),
        Ok("1"),
        "this test belongs into a guest: cargo xtask vm"
    );
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
        // IPVS takes no destination in a namespace without a local routing table
        // (`inet_addr_type` in `ip_vs_new_dest`): the loopback address makes one.
        run("ip", &["link", "set", "lo", "up"]);
        test()
    })
    .join()
    .expect("the test in its namespace")
}

/// Output of a command that must succeed, given `input`.
fn run_with(input: &str, program: &str, arguments: &[&str]) -> String {
    use std::io::Write as _;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("its input");
    let output = child.wait_with_output().expect("its output");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

fn run(program: &str, arguments: &[&str]) -> String {
    run_with("", program, arguments)
}
