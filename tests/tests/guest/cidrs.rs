//! Addresses of the Service CIDRs that no Service holds.

use std::time::Duration;

use proxy_tests::traffic::{ConnectSpec, FailureKind, Protocol, connect};
use serde_json::json;

use crate::udp::Bed;

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn a_cluster_ip_of_no_service_is_dropped_and_an_unused_port_of_one_is_refused() {
    let service = json!({"kind": "Service", "apiVersion": "v1",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.80", "clusterIPs": ["10.96.0.80", "fd00:10:96::80"],
            "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
            "ports": [{"port": 80}]}});
    let bed = Bed::new([service]);
    let rules = || bed.on_node("nft", &["list", "ruleset"]);
    bed.until("the rules", || rules().matches("chain no-service").count() == 2);
    let clients = [bed.pod(2), bed.node(), bed.outside()];
    let failures = |target: &str, protocol| {
        let target = target.parse().expect("an address");
        let spec = ConnectSpec::new(protocol, target, 1).timeout(Duration::from_secs(2));
        clients.map(|client| {
            let report = client.in_netns(|| connect(&spec)).expect("enter").expect("a report");
            (client.name(), report.failures.into_keys().collect::<Vec<FailureKind>>())
        })
    };
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for (target, expected) in [
            ("10.96.0.80:81", FailureKind::Refused),
            ("[fd00:10:96::80]:81", FailureKind::Refused),
            ("10.96.0.81:80", FailureKind::Timeout),
            ("10.96.255.254:80", FailureKind::Timeout),
            ("[fd00:10:96::81]:80", FailureKind::Timeout),
            // Beyond the ranges the network answers.
            ("198.51.100.99:80", FailureKind::Unreachable),
        ] {
            // "Network unreachable" is a soft error that UDP does not report (`udp_err`).
            if (protocol, expected) == (Protocol::Udp, FailureKind::Unreachable) {
                continue;
            }
            let as_wanted = |failures: &[(&str, Vec<FailureKind>)]| {
                failures.iter().all(|(_, kinds)| *kinds == [expected])
            };
            // One ICMP message may be lost to the kernel's limit on their rate.
            let found = (0..3).map(|_| failures(target, protocol)).find(|f| as_wanted(f));
            let now = || failures(target, protocol);
            assert!(found.is_some(), "{protocol} {target}: not {expected:?} but {:?}", now());
        }
    }
}
