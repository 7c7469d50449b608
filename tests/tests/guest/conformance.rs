//! The contract of a Service, in each variant of address families: in ipvs mode, and in ebpf mode
//! as far as the kernel matters (`tests/host_conformance.rs` has all variants of that).

use proxy_tests::binary::binary;
use proxy_tests::cluster::Sockets;
use proxy_tests::conformance::{Settings, Variant, run};
use proxy_tests::traffic::Protocol;

fn settings(mode: &'static str, sockets: Sockets, protocols: &[Protocol]) -> Settings {
    Settings {
        daemon: binary("proxy-daemon"),
        mode,
        sockets,
        xdp: None,
        protocols: protocols.to_vec(),
        filter: std::env::var("PROXY_CASE").ok(),
    }
}

fn conforms(variant: Variant, settings: &Settings) {
    if let Err(error) = run(variant, settings) {
        panic!("{error:#}");
    }
}

const ALL: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

fn ipvs(variant: Variant) {
    conforms(variant, &settings("ipvs", Sockets::Nobodys, &ALL));
}

fn ebpf(sockets: Sockets) -> Settings {
    settings("ebpf", sockets, &[Protocol::Tcp, Protocol::Udp])
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
    conforms(Variant::Ipv4, &ebpf(Sockets::Everybodys));
}

/// Pods' packets at the devices: clsact before kernel 6.6.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_5_ebpf_ipv6_by_devices() {
    conforms(Variant::Ipv6, &ebpf(Sockets::OfNodes));
}

/// SCTP, whose target port differs from the Service's: who sees whom. Not all cases: a socket of
/// a node does not reach what has the node's own address.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_6_ebpf_sctp() {
    let all = settings("ebpf", Sockets::OfNodes, &ALL);
    let filter = all.filter.clone().or_else(|| Some("addresses".to_owned()));
    conforms(Variant::Ipv6, &Settings { filter, ..all });
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_7_ebpf_dual_stack() {
    conforms(Variant::Dual, &ebpf(Sockets::Everybodys));
}

/// With a program at XDP where packets of other machines come in.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn conformance_8_ebpf_xdp() {
    conforms(Variant::Dual, &Settings { xdp: Some("native"), ..ebpf(Sockets::OfNodes) });
}
