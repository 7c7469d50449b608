//! The contract of a Service, in each variant of address families: in ipvs mode, and in ebpf mode
//! as far as the kernel matters (`tests/host_conformance.rs` has all variants of that).

use proxy_tests::binary::binary;
use proxy_tests::cluster::Sockets;
use proxy_tests::conformance::{Settings, Variant, run};
use proxy_tests::traffic::Protocol;

fn in_mode(mode: &'static str, variant: Variant, sockets: Sockets, protocols: &[Protocol]) {
    some_in_mode(mode, variant, sockets, protocols, None);
}

/// The cases that `filter` picks, unless the environment does.
fn some_in_mode(
    mode: &'static str,
    variant: Variant,
    sockets: Sockets,
    protocols: &[Protocol],
    filter: Option<&str>,
) {
    let settings = Settings {
        daemon: binary("proxy-daemon"),
        mode,
        sockets,
        xdp: None,
        protocols: protocols.to_vec(),
        filter: std::env::var("PROXY_CASE").ok().or_else(|| filter.map(str::to_owned)),
    };
    if let Err(error) = run(variant, &settings) {
        panic!("{error:#}");
    }
}

const ALL: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

fn ipvs(variant: Variant) {
    in_mode("ipvs", variant, Sockets::Nobodys, &ALL);
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_1_ipv4() {
    ipvs(Variant::Ipv4);
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_2_ipv6() {
    ipvs(Variant::Ipv6);
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_3_dual_stack() {
    ipvs(Variant::Dual);
}

/// Sockets and, for what comes from outside, devices.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_4_ebpf_ipv4() {
    in_mode("ebpf", Variant::Ipv4, Sockets::Everybodys, &[Protocol::Tcp, Protocol::Udp]);
}

/// Pods' packets at the devices: clsact before kernel 6.6.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_5_ebpf_ipv6_by_devices() {
    in_mode("ebpf", Variant::Ipv6, Sockets::OfNodes, &[Protocol::Tcp, Protocol::Udp]);
}

/// SCTP, whose target port differs from the Service's: who sees whom. Not all cases: a socket of
/// a node does not reach what has the node's own address.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_6_ebpf_sctp() {
    some_in_mode("ebpf", Variant::Ipv6, Sockets::OfNodes, &ALL, Some("addresses"));
}
