//! What kube-proxy calls its chains and sets: `pkg/proxy/ipvs/{proxier,ipset}.go` and
//! `pkg/proxy/iptables/proxier.go` of Kubernetes.
//!
//! Names are matched whole. Other programs also begin theirs with `KUBE-` (the kubelet,
//! kube-router), and those are not touched.

use crate::model::{Family, Protocol};

/// Tables of iptables that kube-proxy has chains in.
pub const TABLES: [&str; 3] = ["filter", "nat", "mangle"];

/// The table of its nftables mode, one for each family (`kubeProxyTable` of
/// `pkg/proxy/nftables/proxier.go`).
pub const OWN_TABLE: &str = "kube-proxy";

/// The chain of kube-proxy's that accepts forwarded packets where the policy would not.
pub const FORWARD: &str = "KUBE-FORWARD";

/// Chains that built-in chains jump to.
const ENTRIES: [&str; 9] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-NODE-PORT",
    "KUBE-POSTROUTING",
    FORWARD,
    "KUBE-PROXY-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];

/// Chains that only those lead to, or nothing at all.
///
/// `KUBE-MARK-MASQ` and `KUBE-POSTROUTING` were the kubelet's as well until Kubernetes
/// 1.28. A kubelet that old makes them again within a minute and needs them for nothing.
const INNER: [&str; 4] =
    ["KUBE-MARK-MASQ", "KUBE-LOAD-BALANCER", "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-PROXY-CANARY"];

/// Chains of one Service port or endpoint each, in iptables mode.
const HASHED: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-SEP-", "KUBE-FW-"];
/// Characters of base 32 behind them.
const HASH_LENGTH: usize = 16;

/// Sets whose members are frontends: address, protocol and port.
pub const FRONTEND_SETS: [&str; 6] = [
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-LOCAL",
    "KUBE-NODE-PORT-SCTP-HASH",
];

/// Sets whose members are node ports of one protocol.
pub const NODE_PORT_SETS: [(&str, Protocol); 3] = [
    ("KUBE-NODE-PORT-TCP", Protocol::Tcp),
    ("KUBE-NODE-PORT-UDP", Protocol::Udp),
    // Until Kubernetes 1.14.
    ("KUBE-NODE-PORT-SCTP", Protocol::Sctp),
];

const OTHER_SETS: [&str; 10] = [
    "KUBE-LOOP-BACK",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-NODE-PORT-LOCAL-SCTP",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
];

/// `IPSET_MAXNAMELEN` less the NUL: kube-proxy cuts the names of its IPv6 sets there.
const SET_NAME: usize = 31;

/// A chain that a built-in chain jumps to.
#[must_use]
pub fn is_entry(chain: &str) -> bool {
    ENTRIES.contains(&chain)
}

#[must_use]
pub fn is_chain(chain: &str) -> bool {
    let hashed = |prefix: &str| {
        chain.strip_prefix(prefix).is_some_and(|hash| {
            let base32 = |byte: u8| matches!(byte, b'A'..=b'Z' | b'2'..=b'7');
            hash.len() == HASH_LENGTH && hash.bytes().all(base32)
        })
    };
    is_entry(chain) || INNER.contains(&chain) || HASHED.iter().any(|prefix| hashed(prefix))
}

/// The name of a set in this family.
#[must_use]
pub fn set_name(name: &str, family: Family) -> String {
    match family {
        Family::V4 => name.to_owned(),
        Family::V6 => {
            let mut name = name.replacen("KUBE-", "KUBE-6-", 1);
            name.truncate(SET_NAME);
            name
        }
    }
}

#[must_use]
pub fn is_set(set: &str) -> bool {
    let node_ports = NODE_PORT_SETS.iter().map(|(name, _)| name);
    let mut names = FRONTEND_SETS.iter().chain(node_ports).chain(&OTHER_SETS);
    names.any(|name| Family::ALL.iter().any(|family| set_name(name, *family) == set))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETS: &str = include_str!("../../../../tests/fixtures/ipvs-ipset-save.txt");
    const CHAINS: &str = include_str!("../../../../tests/fixtures/ipvs-iptables-save.txt");

    #[test]
    fn every_set_and_chain_of_a_recorded_kube_proxy_is_known() {
        let sets: Vec<_> = SETS
            .lines()
            .filter_map(|line| line.strip_prefix("create ")?.split(' ').next())
            .collect();
        assert_eq!(sets.len(), 34);
        assert!(sets.iter().all(|set| is_set(set)), "{sets:?}");
        let chains: Vec<_> = CHAINS
            .lines()
            .filter_map(|line| line.strip_prefix(":KUBE-")?.split(' ').next())
            .collect();
        assert_eq!(chains.len(), 11);
        assert!(chains.iter().all(|chain| is_chain(&format!("KUBE-{chain}"))), "{chains:?}");
    }

    #[test]
    fn names_of_others_are_not_taken_for_kube_proxys() {
        for chain in [
            "KUBE-FIREWALL",
            "KUBE-KUBELET-CANARY",
            "KUBE-IPTABLES-HINT",
            "KUBE-MARK-DROP",
            "KUBE-NWPLCY-ABCDEFGHIJKLMNOP",
            "KUBE-SVC-OFMINE",
            "KUBE-SVC-abcdefghijklmnop",
            "KUBE-SERVICES-2",
            "INPUT",
        ] {
            assert!(!is_chain(chain), "{chain}");
        }
        for set in ["KUBE-MINE", "KUBE-CLUSTER-IP-2", "KUBE-6-", "kube-cluster-ip"] {
            assert!(!is_set(set), "{set}");
        }
        assert!(is_chain("KUBE-SEP-XU2LMO3KCRL34AJP"));
        assert!(is_set("KUBE-6-LOAD-BALANCER-SOURCE-CID"), "cut at 31 characters");
    }
}
