//! The contract of a Service in ebpf mode, on the kernel of the machine that runs the tests.
//! Needs root, and the object in `PROXY_EBPF_OBJECT`, as `cargo xtask test` passes it.

use anyhow::Result;
use proxy_tests::binary::binary;
use proxy_tests::cluster::Sockets;
use proxy_tests::conformance::{Settings, Variant, run};
use proxy_tests::traffic::Protocol;

fn ebpf(variant: Variant, sockets: Sockets, xdp: Option<&'static str>) -> Result<()> {
    run(
        variant,
        &Settings {
            daemon: binary("proxy-daemon"),
            mode: "ebpf",
            sockets,
            xdp,
            // The machines that build this have no SCTP.
            protocols: vec![Protocol::Tcp, Protocol::Udp],
            filter: std::env::var("PROXY_CASE").ok(),
        },
    )
}

#[test]
fn conformance_ebpf_1_ipv4() -> Result<()> {
    ebpf(Variant::Ipv4, Sockets::Everybodys, None)
}

/// Pods whose sockets the programs do not see: their packets are translated at the devices.
#[test]
fn conformance_ebpf_2_ipv6_by_devices() -> Result<()> {
    ebpf(Variant::Ipv6, Sockets::OfNodes, None)
}

#[test]
fn conformance_ebpf_3_dual_stack() -> Result<()> {
    ebpf(Variant::Dual, Sockets::Everybodys, None)
}

/// With a program at XDP where packets of other machines come in.
#[test]
fn conformance_ebpf_4_xdp() -> Result<()> {
    ebpf(Variant::Dual, Sockets::OfNodes, Some("native"))
}
