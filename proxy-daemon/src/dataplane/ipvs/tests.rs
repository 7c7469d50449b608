//! The plane over pretended kernel interfaces.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use super::codec::Netmask;
use super::*;
use crate::dataplane::kubeproxy::Leftovers;
use crate::kernel::conntrack::{FakeConntrack, Flow, Tuple};
use crate::kernel::ipset::FakeIpSets;
use crate::kernel::links::FakeLinks;
use crate::kernel::netlink::{FakeNetlink, Message};
use crate::kernel::xtables::FakeXTables;
use crate::model::Protocol;

/// `nlctrl`, which knows the ids of all families.
const CONTROL: u16 = 16;

/// Answers the question for the family's id, and accepts everything else.
pub fn kernel() -> FakeNetlink {
    FakeNetlink::new(|request| {
        if request.kind != CONTROL {
            return Ok(Vec::new());
        }
        let mut payload = vec![1, 2, 0, 0, 6, 0, 1, 0];
        payload.extend_from_slice(&0x21_u16.to_ne_bytes());
        payload.extend_from_slice(&[0, 0]);
        Ok(vec![Message { kind: CONTROL, flags: 0, payload }])
    })
}

fn plane(conntrack: &FakeConntrack) -> IpvsPlane<FakeNetlink> {
    let config = IpvsConfig {
        scheduler: SchedulerName::new("rr").unwrap(),
        families: Family::ALL.to_vec(),
        masquerade_all: false,
        masquerade_bit: ruleset::DEFAULT_MASQUERADE_BIT,
        local_detection: Box::new(|_| LocalDetect::Unknown),
        sysctl_root: PathBuf::from("/nonexistent"),
        strict_arp: false,
        tcp_timeout: None,
        tcp_fin_timeout: None,
        udp_timeout: None,
        exclude_cidrs: Vec::new(),
    };
    let seams = Seams {
        generic: kernel(),
        netfilter: FakeNetlink::default(),
        links: Box::new(FakeLinks::default()),
        conntrack: Box::new(conntrack.clone()),
        kernel: KernelVersion::running().unwrap(),
        reading: ReadSeams {
            generic: kernel(),
            netfilter: FakeNetlink::default(),
            links: Box::new(FakeLinks::default()),
            table: PathBuf::from("/nonexistent"),
            table_reads: 0,
        },
        takeover: Takeover::new(
            Leftovers::new(
                Box::new(FakeNetlink::default()),
                Box::new(FakeXTables::default()),
                Box::new(FakeIpSets::default()),
            ),
            Box::new(|| None),
        ),
        predecessor: Box::new(|| true),
    };
    IpvsPlane::new(config, seams)
}

fn frontend(address: &str, protocol: Protocol) -> FrontendKey {
    let port = NonZeroU16::new(53).unwrap();
    FrontendKey { address: address.parse().unwrap(), protocol, port }
}

fn real(frontend: FrontendKey, at: &str) -> Key {
    Key::RealServer(frontend, at.parse().unwrap())
}

fn create(key: Key) -> Op<Key> {
    let value = match &key {
        Key::RealServer(..) => Value::RealServer(Forward { weight: 1, masquerading: true }),
        Key::VirtualServer(frontend) => Value::VirtualServer(std::sync::Arc::new(ServerConfig {
            scheduler: SchedulerName::new("rr").unwrap(),
            flags: codec::ServiceFlags::default(),
            timeout: 0,
            netmask: Netmask::host(frontend.family()),
        })),
        Key::Element(_) | Key::Redirect(..) | Key::Address(_) => Value::Present,
    };
    Op::Create(key, value)
}

fn flow(to: FrontendKey, endpoint: &str) -> Flow {
    let client: SocketAddr = match to.family() {
        Family::V4 => "10.244.0.9:40000".parse().unwrap(),
        Family::V6 => "[fd00::9]:40000".parse().unwrap(),
    };
    Flow {
        original: Tuple { source: client, destination: SocketAddr::new(to.address, to.port.get()) },
        reply: Tuple { source: endpoint.parse().unwrap(), destination: client },
    }
}

const OLD: &str = "10.244.0.1:5353";
const NEW: &str = "10.244.0.2:5353";

#[test]
fn a_family_that_the_kernel_has_switched_off_is_left_out() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("net/ipv6/conf/kube-ipvs0");
    std::fs::create_dir_all(&directory).unwrap();
    let families = |disabled: Option<&str>| {
        if let Some(disabled) = disabled {
            std::fs::write(directory.join("disable_ipv6"), disabled).unwrap();
        }
        let mut plane = plane(&FakeConntrack::default());
        plane.config.sysctl_root = root.path().to_owned();
        plane.leave_out_disabled();
        plane.families().to_vec()
    };
    assert_eq!(families(None), Family::ALL);
    assert_eq!(families(Some("0\n")), Family::ALL);
    assert_eq!(families(Some("1\n")), [Family::V4]);
}

#[test]
fn a_removed_endpoint_releases_its_udp_flows_with_one_dump() {
    let conntrack = FakeConntrack::default();
    let mut plane = plane(&conntrack);
    let dns = frontend("10.96.0.10", Protocol::Udp);
    let other = frontend("10.96.0.11", Protocol::Udp);
    conntrack.inner().flows = vec![flow(dns, OLD), flow(dns, NEW), flow(other, OLD)];

    let before = plane.work();
    let results = plane.apply(&[create(real(dns, NEW)), Op::Delete(real(dns, OLD))]);
    assert_eq!(results, [Ok(()), Ok(())]);
    assert_eq!(conntrack.inner().flows, [flow(dns, NEW), flow(other, OLD)]);
    assert_eq!(plane.work().dumps - before.dumps, 1);
    let releases = plane.take_releases();
    assert_eq!(releases.len(), 1);
    assert_eq!((releases[0].family, releases[0].released), (Family::V4, Some(1)));
    assert_eq!(plane.take_releases(), []);
}

#[test]
fn a_tcp_change_does_not_look_at_the_table() {
    let conntrack = FakeConntrack::default();
    let mut plane = plane(&conntrack);
    let web = frontend("10.96.0.10", Protocol::Tcp);
    plane.apply(&[create(Key::VirtualServer(web)), create(real(web, NEW))]);
    plane.apply(&[Op::Delete(real(web, NEW)), Op::Delete(Key::VirtualServer(web))]);
    assert_eq!(conntrack.inner().dumps, 0);
    assert_eq!(plane.take_releases(), []);
}

#[test]
fn many_changes_of_one_round_are_one_dump_for_each_family() {
    let conntrack = FakeConntrack::default();
    let mut plane = plane(&conntrack);
    let frontends =
        ["10.96.0.1", "10.96.0.2", "fd00::a:1", "fd00::a:2"].map(|a| frontend(a, Protocol::Udp));
    conntrack.inner().flows = frontends.map(|to| flow(to, &to_self(to))).to_vec();
    let ops: Vec<_> = frontends.map(|to| create(Key::VirtualServer(to))).to_vec();
    plane.apply(&ops);
    assert_eq!(conntrack.inner().dumps, 2);
    assert_eq!(conntrack.inner().flows, [], "they led past the new servers");
}

/// The endpoint of a flow that nobody translated.
fn to_self(frontend: FrontendKey) -> String {
    SocketAddr::new(frontend.address, frontend.port.get()).to_string()
}

#[test]
fn what_fails_costs_nothing_else_and_is_tried_with_the_next_change() {
    let conntrack = FakeConntrack::default();
    let mut plane = plane(&conntrack);
    let dns = frontend("10.96.0.10", Protocol::Udp);
    let web = frontend("10.96.0.10", Protocol::Tcp);
    conntrack.inner().flows = vec![flow(dns, OLD)];
    conntrack.inner().missing = true;
    assert_eq!(plane.apply(&[Op::Delete(real(dns, OLD))]), [Ok(())]);
    assert_eq!(plane.take_releases()[0].released, None);
    assert_eq!(conntrack.inner().flows.len(), 1);

    conntrack.inner().missing = false;
    plane.apply(&[create(real(web, NEW))]);
    assert_eq!(conntrack.inner().flows, []);
    assert_eq!(plane.take_releases()[0].released, Some(1));
    plane.apply(&[create(real(web, OLD))]);
    assert_eq!(plane.take_releases(), []);
}

#[test]
fn what_another_mode_left_is_ended_once() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let mut plane = plane(&FakeConntrack::default());
    let calls = std::sync::Arc::new(AtomicUsize::new(0));
    let count = std::sync::Arc::clone(&calls);
    // It succeeds the second time.
    plane.predecessor = Some(Box::new(move || count.fetch_add(1, Ordering::Relaxed) == 1));
    plane.apply(&[create(real(frontend("10.96.0.10", Protocol::Tcp), NEW))]);
    assert_eq!(calls.load(Ordering::Relaxed), 0, "not before all that is wanted is there");
    for expected in [1, 2, 2] {
        plane.superseded(&HashMap::new());
        assert_eq!(calls.load(Ordering::Relaxed), expected);
    }
}

#[test]
fn without_ipvs_there_is_nothing_to_clean_up() {
    let mut plane = plane(&FakeConntrack::default());
    plane.generic = FakeNetlink::new(|_| Err(Errno(libc::ENOENT)));
    let done = plane.cleanup(crate::dataplane::kubeproxy::Forwarding::Remove).unwrap();
    let nothing = [
        "removed 0 kernel objects of this daemon",
        "removed 0 virtual servers and addresses of kube-proxy",
    ];
    assert_eq!(done[..2], nothing);
    assert!(!done.iter().any(|what| what.contains(LINK)), "{done:?}");
}

#[test]
fn new_service_cidrs_ask_for_new_rules_and_the_same_ones_do_not() {
    let mut plane = plane(&FakeConntrack::default());
    let range: IpNetwork = "10.96.0.0/12".parse().unwrap();
    let mut changed = |service_cidrs: &[IpNetwork]| {
        plane.surroundings_changed(Surroundings { node: None, service_cidrs })
    };
    assert!(!changed(&[]));
    assert!(changed(&[range]));
    assert!(!changed(&[range]));
    assert!(changed(&[]));
}
