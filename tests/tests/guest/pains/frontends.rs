//! Frontends: addresses of Services, node ports, load-balancer addresses. The same tests run in
//! ipvs mode in guests and in ebpf mode on the host (`tests/host_pains`).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::cluster::Host;
use proxy_tests::traffic::{ConnectSpec, FailureKind, Listen, Protocol, Server};

use crate::PROTOCOLS;

use super::stage::{BALANCER_IPS, CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, ingress, spec, tcp};

const EVERYONE: [Client; 3] = [Client::Pod, Client::Host, Client::Outside];
const ANY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

/// A server of node-a's own on all its addresses, as sshd is.
fn sshd(node: &Host) -> Server {
    let listen: Vec<Listen> = PROTOCOLS
        .iter()
        .copied()
        .flat_map(|protocol| ANY.map(|ip| Listen { protocol, address: SocketAddr::new(ip, 22) }))
        .collect();
    let server = node.in_netns(|| Server::start("sshd", &listen)).expect("a namespace");
    server.expect("a server on all addresses")
}

/// kube-proxy's ipvs mode binds every Service address to an interface of the node, where the
/// node's own servers then answer on every port that is no Service (kubernetes/kubernetes
/// #72236); since 1.26 it refuses those ports in INPUT only, so the node itself still gets
/// through (`pkg/proxy/ipvs/proxier.go`, chain KUBE-IPVS-FILTER).
#[test]
fn pain_08_a_port_of_a_service_address_that_is_no_service_is_refused() {
    let stage = Stage::new(&[]);
    let node = stage.cluster().node(0);
    // Refusals are ICMP messages, of which a client gets a few a second by default.
    let unlimited = [("ipv4/icmp_ratelimit", "0"), ("ipv6/icmp/ratelimit", "0")];
    node.set_sysctls(&unlimited).expect("sysctls of ICMP");
    let _sshd = sshd(node);
    stage.web(&spec("LoadBalancer"), &ingress(&BALANCER_IPS, "VIP"), &[(1, 0)]);
    let addresses: Vec<IpAddr> = CLUSTER_IPS.into_iter().chain(BALANCER_IPS).collect();
    for client in EVERYONE {
        let from = stage.client(client);
        for &ip in &addresses {
            stage.until_served(from, SocketAddr::new(ip, PORT));
        }
    }
    for client in EVERYONE {
        let from = stage.client(client);
        for own in node.addresses() {
            // The server is there, and the node's own address is left alone.
            let report = stage.must_connect(from, &tcp(SocketAddr::new(own, 22), 1));
            assert!(report.by_server.contains_key("sshd"), "{client:?}: {report:?}");
        }
        for &ip in &addresses {
            for port in [22, 81] {
                refused(&stage, client, Protocol::Tcp, SocketAddr::new(ip, port));
            }
            refused(&stage, client, Protocol::Udp, SocketAddr::new(ip, 22));
        }
    }
    for ip in CLUSTER_IPS.into_iter().filter(|_| PROTOCOLS.contains(&Protocol::Sctp)) {
        // To SCTP a port unreachable is no end (`sctp_v4_err` of net/sctp/input.c: a soft
        // error): what shows is that nobody answers.
        let target = SocketAddr::new(ip, 22);
        let spec = ConnectSpec::new(Protocol::Sctp, target, 1).timeout(Duration::from_secs(1));
        let report = stage.connect(stage.client(Client::Pod), &spec);
        assert_eq!(report.succeeded, 0, "SCTP {target}: {report:?}");
    }
}

fn refused(stage: &Stage, client: Client, protocol: Protocol, target: SocketAddr) {
    let spec = ConnectSpec::new(protocol, target, 2).timeout(Duration::from_secs(3));
    let report = stage.connect(stage.client(client), &spec);
    // What the node itself sends is refused before it leaves the socket: for a datagram that
    // is EPERM, which counts as unreachable.
    let at_once = report.count(FailureKind::Refused) + report.count(FailureKind::Unreachable);
    assert_eq!((report.attempted, at_once), (2, 2), "{client:?} {protocol} {target}: {report:?}");
    if protocol == Protocol::Tcp {
        assert_eq!(report.count(FailureKind::Refused), 2, "{client:?} {target}: {report:?}");
    }
}

/// In kube-proxy's ipvs mode a virtual server with policy Local has local endpoints only, for
/// every client: on a node without one, pods and the node itself run into a timeout
/// (kubernetes/kubernetes #75262, and `pkg/proxy/ipvs/proxier.go`, `syncEndpoint` with
/// `onlyNodeLocalEndpoints`).
#[test]
fn pain_09_a_local_load_balancer_address_works_from_a_node_without_endpoints() {
    let stage = Stage::new(&[]);
    let mut spec = spec("LoadBalancer");
    spec["externalTrafficPolicy"] = "Local".into();
    spec["healthCheckNodePort"] = 31_234.into();
    stage.web(&spec, &ingress(&BALANCER_IPS, "VIP"), &[(1, 0)]);
    let endpoint = stage.pod(1, 0).name();
    let outside = stage.client(Client::Outside);
    for (ip, node) in BALANCER_IPS.into_iter().zip(stage.cluster().node(0).addresses()) {
        let target = SocketAddr::new(ip, PORT);
        for client in [Client::Pod, Client::Host] {
            let from = stage.client(client);
            for target in [target, SocketAddr::new(node, NODE_PORT)] {
                stage.until_served(from, target);
                let report = stage.must_connect(from, &tcp(target, 5));
                assert!(report.by_server.contains_key(endpoint), "{client:?}: {report:?}");
            }
        }
        let spec = tcp(target, 2).timeout(Duration::from_secs(1));
        let report = stage.connect(outside, &spec);
        assert_eq!(report.count(FailureKind::Timeout), 2, "dropped at node-a: {report:?}");
    }
    for range in ["203.0.113.64/26", "2001:db8:1::/48"] {
        stage.cluster().route_outside_via(range, 1).expect("a route");
    }
    for ip in BALANCER_IPS {
        let target = SocketAddr::new(ip, PORT);
        stage.until_served(outside, target);
        let report = stage.must_connect(outside, &tcp(target, 5));
        // Where a Service needs a second virtual server for its other set of endpoints, its
        // port (the same with its top bit turned) is for no client.
        let hidden = stage.connect(outside, &tcp(SocketAddr::new(ip, PORT ^ 0x8000), 2));
        assert_eq!(hidden.succeeded, 0, "{hidden:?}");
        let own = outside.address_like(ip).expect("an address");
        assert_eq!(report.by_source, BTreeMap::from([(own, 5)]), "as seen by the endpoint");
    }
}

/// kube-proxy's ipvs mode lists the node's addresses anew at each sync and rebuilds the set of
/// node port addresses from the list; an interface that goes while it is listed, or a list cut
/// short, took node ports away until the next sync (cilium/cilium and kube-proxy trackers have
/// it for pods that come and go). Each interface here has an address, on which node ports
/// begin and end to listen while the one on the node's own address is probed.
#[test]
fn pain_14_a_node_port_is_not_lost_when_interfaces_come_and_go() {
    let stage = Stage::new(&[]);
    stage.web(&spec("NodePort"), &[], &[(1, 0), (0, 1)]);
    let node = stage.cluster().node(0);
    let outside = stage.client(Client::Outside);
    let targets: Vec<SocketAddr> =
        node.addresses().into_iter().map(|ip| SocketAddr::new(ip, NODE_PORT)).collect();
    for &target in &targets {
        stage.until_served(outside, target);
    }
    node.ip_batch(&(1..=FLAPPING).map(add_link).collect::<String>()).expect("interfaces");
    let begun = Instant::now();
    let flaps = thread::scope(|scope| {
        let flapping = scope.spawn(|| {
            let mut flaps = 0;
            while flaps < FLAPS {
                flaps += flap(node);
            }
            flaps
        });
        let mut probes = 0;
        while !flapping.is_finished() {
            for &target in &targets {
                probes += stage.must_connect(outside, &tcp(target, 20)).succeeded;
            }
        }
        println!("{probes} probes of a node port, none failed");
        flapping.join().expect("the flapping thread")
    });
    let per_second = f64::from(flaps) / begun.elapsed().as_secs_f64();
    // 100/s is promised on hardware; the emulated kernel comes to some 20/s.
    println!("{flaps} interfaces came and went, {per_second:.0}/s");
}

/// A few seconds' worth.
const FLAPS: u32 = 120;
/// How many interfaces stay, and are set down and up with an address that goes and comes.
const FLAPPING: u32 = 10;

fn add_link(number: u32) -> String {
    format!(
        "link add flap{number} type veth peer name peer{number}\n\
         addr add 192.0.2.{number}/32 dev flap{number}\n\
         link set flap{number} up\nlink set peer{number} up\n"
    )
}

/// Each interface flaps once, and one more is made and deleted, which takes the kernel longer.
fn flap(node: &Host) -> u32 {
    let mut script = String::new();
    for number in 1..=FLAPPING {
        script += &format!(
            "addr del 192.0.2.{number}/32 dev flap{number}\nlink set flap{number} down\n\
             addr add 192.0.2.{number}/32 dev flap{number}\nlink set flap{number} up\n"
        );
    }
    script += &add_link(FLAPPING + 1);
    script += &format!("link del flap{}\n", FLAPPING + 1);
    node.ip_batch(&script).expect("interfaces");
    FLAPPING + 1
}

/// A proxy that takes every load-balancer address for its own answers in the balancer's place
/// (TLS, PROXY protocol and source ranges are then missing); `ipMode: Proxy` says not to
/// (KEP-1860). The address here is a server's outside of the cluster.
#[test]
fn pain_20_a_load_balancer_with_ip_mode_proxy_sees_the_traffic() {
    let stage = Stage::new(&[]);
    let outside = stage.client(Client::Outside);
    let [v4, v6]: [IpAddr; 2] = [
        Ipv4Addr::new(203, 0, 113, 20).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x20).into(),
    ];
    // It answers pods directly, over the fabric.
    let own = format!(
        "addr add {v4}/32 dev lo\naddr add {v6}/128 dev lo nodad\n\
         route add 10.244.0.0/16 via 10.99.0.1\nroute add fd00:10:244::/56 via fd00:99::1\n"
    );
    outside.ip_batch(&own).expect("the balancer's addresses and routes");
    let listen =
        [v4, v6].map(|ip| Listen { protocol: Protocol::Tcp, address: SocketAddr::new(ip, PORT) });
    let balancer = outside.in_netns(|| Server::start("balancer", &listen)).expect("a namespace");
    let _balancer = balancer.expect("the balancer");

    let mut addresses = ingress(&[v4, v6], "Proxy");
    addresses.extend(ingress(&BALANCER_IPS, "VIP"));
    stage.web(&spec("LoadBalancer"), &addresses, &[(0, 1), (1, 0)]);
    for client in [Client::Pod, Client::Host] {
        let from = stage.client(client);
        for vip in BALANCER_IPS {
            // The Service is programmed, and its other addresses are answered by endpoints.
            let target = SocketAddr::new(vip, PORT);
            stage.until_served(from, target);
            let report = stage.must_connect(from, &tcp(target, 4));
            assert!(!report.by_server.contains_key("balancer"), "{client:?}: {report:?}");
        }
        for ip in [v4, v6] {
            let report = stage.must_connect(from, &tcp(SocketAddr::new(ip, PORT), 4));
            assert_eq!(report.by_server.get("balancer"), Some(&4), "{client:?}: {report:?}");
        }
    }
}
