//! The contract of a Service in ipvs mode, in each variant of address families.

use proxy_tests::binary::binary;
use proxy_tests::conformance::{Settings, Variant, run};
use proxy_tests::traffic::Protocol;

fn ipvs(variant: Variant) {
    let settings = Settings {
        daemon: binary("proxy-daemon"),
        mode: "ipvs",
        sockets: false,
        protocols: vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp],
        filter: std::env::var("PROXY_CASE").ok(),
    };
    if let Err(error) = run(variant, &settings) {
        panic!("{error:#}");
    }
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
