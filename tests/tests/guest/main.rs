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
mod counters;
mod daemon;
mod ebpf;
mod kernel;
mod links;
mod pains;
mod scale;
mod takeover;
mod udp;

use proxy_tests::cluster::Sockets;
use proxy_tests::node::{self, run, run_with};
use proxy_tests::traffic::Protocol;

/// Of the tests that run in both modes.
const MODE: &str = "ipvs";
const SOCKETS: Sockets = Sockets::Nobodys;
const PROTOCOLS: &[Protocol] = &[Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// Runs `test` in a network namespace of its own, on a kernel that nobody else uses.
fn in_namespace<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    assert_eq!(
        std::env::var("PROXY_VM").as_deref(),
        Ok("1"),
        "this test belongs into a guest: cargo xtask vm"
    );
    node::in_namespace(test)
}
