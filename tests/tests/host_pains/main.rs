//! What users of other proxies suffer from, in ebpf mode, on the kernel of the machine that
//! runs the tests: each row a test of its own (`docs/pains.md`). Needs root, and the object in
//! `PROXY_EBPF_OBJECT`, as `cargo xtask test` passes it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test binary: whatever fails shall end the test"
)]

mod connections;
mod direct;
#[path = "../guest/pains/frontends.rs"]
mod frontends;
mod growth;
mod needs;
mod opt_out;
mod overflow;
mod restart;
mod scale;
#[path = "../guest/pains/stage.rs"]
mod stage;
mod takeover;
mod udp;
mod upgrade;

use proxy_tests::cluster::Sockets;
use proxy_tests::traffic::Protocol;

/// Of the tests that run in both modes.
const MODE: &str = "ebpf";
const SOCKETS: Sockets = Sockets::Everybodys;
/// The machines that build this have no SCTP.
const PROTOCOLS: &[Protocol] = &[Protocol::Tcp, Protocol::Udp];

/// What the shared tests take from those of the guests.
mod node {
    use std::thread;
    use std::time::{Duration, Instant};

    pub const LONG: Duration = Duration::from_secs(60);
    pub const PATIENCE: Duration = Duration::from_secs(5);

    pub fn until(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + timeout;
        while !holds() {
            assert!(Instant::now() < end, "not within {timeout:?}: {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}
