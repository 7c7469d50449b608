//! Direct server return: a client outside, node-a which it speaks to, and an endpoint on node-b,
//! which answers it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use proxy_tests::cluster::Host;
use proxy_tests::traffic::{StreamChecker, StreamSpec};
use serde_json::json;

use super::node::{LONG, PATIENCE, until};
use super::stage::{BALANCER_IPS, CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, ingress, spec, tcp};

const ACCEPT: &str = "--direct-server-return=accept";
const ON: &str = "--direct-server-return=on";

/// Where they listen.
const TARGET: u16 = 9090;
const LARGE: usize = 3_000_000;

/// `shop/web` with servers of this test, which tell whom they saw, at the addresses of
/// a host of node-b.
struct Served {
    tcp: Vec<TcpListener>,
    udp: Vec<UdpSocket>,
}

impl Served {
    fn start(stage: &Stage, host: &Host) -> Self {
        let mut tcp = Vec::new();
        let mut udp = Vec::new();
        for (family, kind) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let address = host.address_like(CLUSTER_IPS[family]).expect("an address");
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("web-{}", kind.to_lowercase()), "namespace": "shop",
                    "labels": {"kubernetes.io/service-name": "web"},
                },
                "addressType": kind,
                "endpoints": [{
                    "addresses": [address], "nodeName": stage.cluster().node(1).name(),
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                }],
                "ports": [
                    {"name": "tcp", "port": TARGET, "protocol": "TCP"},
                    {"name": "udp", "port": TARGET, "protocol": "UDP"},
                ],
            });
            let bind = || {
                let to = SocketAddr::new(address, TARGET);
                (TcpListener::bind(to).expect("a port"), UdpSocket::bind(to).expect("a port"))
            };
            let (listener, socket) = host.in_netns(bind).expect("a namespace");
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            tcp.push(listener);
            udp.push(socket);
            stage.web_without_endpoints(&spec("LoadBalancer"), &ingress(&BALANCER_IPS, "VIP"));
            stage.bed.apply(slice).expect("an EndpointSlice");
        }
        Self { tcp, udp }
    }

    /// So many bytes there and so many back: whom the server saw.
    fn exchange(&self, from: &Host, to: SocketAddr, up: usize, down: usize) -> IpAddr {
        let listener = &self.tcp[usize::from(to.is_ipv6())];
        let server = listener.try_clone().expect("a socket");
        let served = thread::spawn(move || -> std::io::Result<(IpAddr, usize)> {
            let (mut stream, peer) = server.accept()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            stream.write_all(&data(down))?;
            assert!(all == data(all.len()), "bytes are wrong");
            Ok((peer.ip(), all.len()))
        });
        let mut stream = from
            .in_netns(|| TcpStream::connect_timeout(&to, PATIENCE))
            .expect("a namespace")
            .unwrap_or_else(|error| panic!("{} to {to}: {error}", from.name()));
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        stream.write_all(&data(up)).expect("written");
        stream.shutdown(Shutdown::Write).expect("the end");
        let mut back = Vec::new();
        stream.read_to_end(&mut back).expect("the answer");
        assert!(back == data(down), "{} bytes of {down} from {to}", back.len());
        let (peer, came) = served.join().expect("a server").expect("a connection");
        assert_eq!(came, up, "{to}");
        peer
    }

    /// A datagram there and back, sent again when it is lost: whom the server saw.
    fn query(&self, from: &Host, to: SocketAddr, length: usize) -> IpAddr {
        let server = &self.udp[usize::from(to.is_ipv6())];
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let client = from.in_netns(|| UdpSocket::bind(any)).expect("a namespace").expect("a port");
        client.connect(to).expect("an address");
        client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        server.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
        let mut buffer = vec![0; 65536];
        for _ in 0..5 {
            // The one before may have been too long.
            let _ = client.send(&data(length));
            let Ok((came, peer)) = server.recv_from(&mut buffer) else { continue };
            assert!(buffer[..came] == data(length), "{came} bytes of {length} to {to}");
            server.send_to(&buffer[..came], peer).expect("sent");
            let back = client.recv(&mut buffer).expect("the answer");
            assert!(buffer[..back] == data(length), "{back} bytes of {length} from {to}");
            return peer.ip();
        }
        panic!("no query of {length} bytes came to {to}");
    }

    fn until_served(&self, stage: &Stage, to: SocketAddr) {
        let outside = stage.client(Client::Outside);
        let timeout = Duration::from_millis(500);
        until(&format!("{to} answers"), LONG, || {
            let stream = outside.in_netns(|| TcpStream::connect_timeout(&to, timeout));
            let connected = stream.expect("a namespace").is_ok();
            if connected {
                drop(self.tcp[usize::from(to.is_ipv6())].accept());
            }
            connected
        });
    }
}

fn data(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect()
}

/// By a node port of node-a and by an external address, in both families.
fn targets(stage: &Stage) -> Vec<SocketAddr> {
    let node = stage.cluster().node(0);
    let mut all = Vec::new();
    for (like, balancer) in CLUSTER_IPS.into_iter().zip(BALANCER_IPS) {
        let node = node.address_like(like).expect("an address");
        all.push(SocketAddr::new(node, NODE_PORT));
        all.push(SocketAddr::new(balancer, PORT));
    }
    all
}

/// Bytes that came to a node and that it sent, by the fabric.
fn bytes_of(node: &Host) -> u64 {
    let all = node.in_netns(|| fs::read_to_string("/proc/thread-self/net/dev"));
    let all = all.expect("a namespace").expect("its devices");
    let line = all.lines().find_map(|line| line.trim().strip_prefix("eth0:")).expect("eth0");
    let of = |place| line.split_whitespace().nth(place).and_then(|it| it.parse::<u64>().ok());
    of(0).zip(of(8)).map(|(came, sent)| came + sent).expect("numbers")
}

fn stage(arguments: &[&str]) -> Stage {
    let mut stage = Stage::without_daemons(arguments, None);
    if arguments.iter().any(|argument| argument.starts_with("--xdp")) {
        stage.bed.cluster().finish_frames().expect("links like hardware");
    }
    stage.bed.start_daemons().expect("daemons");
    stage
}

/// The endpoint sees the client, and what it answers does not pass node-a. All that is sent
/// arrives, though no link takes more than another: who sends too much is told.
fn answers_itself(arguments: &[&str]) {
    let stage = stage(arguments);
    let served = Served::start(&stage, stage.pod(1, 0));
    let outside = stage.client(Client::Outside);
    let node = stage.cluster().node(0);
    for to in targets(&stage) {
        served.until_served(&stage, to);
        let client = outside.address_like(to.ip()).expect("an address");
        assert_eq!(served.exchange(outside, to, 1, 1), client, "{to}");
        let before = bytes_of(node);
        assert_eq!(served.exchange(outside, to, 1, LARGE), client, "{to}");
        let passed = bytes_of(node) - before;
        assert!(passed < LARGE as u64 / 5, "{passed} bytes passed node-a: {to}");
        assert_eq!(served.exchange(outside, to, LARGE, 1), client, "{to}");
        for length in [1, 1400, 5000] {
            assert_eq!(served.query(outside, to, length), client, "{to}");
        }
        let route = outside
            .in_netns(|| Command::new("ip").args(["route", "get", &to.ip().to_string()]).output());
        let route = route.expect("a namespace").expect("a route").stdout;
        let route = String::from_utf8_lossy(&route).into_owned();
        let told = if to.is_ipv4() { "mtu 1464" } else { "mtu 1444" };
        assert!(route.contains(told), "the client was not told: {route}");
    }
    // node-b's own processes, by node-a.
    for to in targets(&stage).into_iter().filter(|to| to.port() == NODE_PORT) {
        let own = stage.cluster().node(1);
        let address = own.address_like(to.ip()).expect("an address");
        assert_eq!(served.exchange(own, to, 100_000, 100_000), address, "{to}");
        assert_eq!(served.query(own, to, 100), address, "{to}");
    }
    // Pods are masqueraded as before.
    let to = targets(&stage)[0];
    let seen = served.exchange(stage.pod(0, 0), to, 1, 1);
    assert_ne!(seen, outside.address_like(to.ip()).expect("an address"));
}

#[test]
fn direct_the_endpoint_answers_its_client_itself() {
    answers_itself(&[ON]);
}

#[test]
fn direct_the_endpoint_answers_its_client_itself_by_xdp() {
    answers_itself(&[ON, "--xdp=native"]);
}

#[test]
fn direct_a_process_of_the_other_node_answers_its_client_itself() {
    let stage = stage(&[ON, "--direct-server-return-port=7081"]);
    let served = Served::start(&stage, stage.cluster().node(1));
    let outside = stage.client(Client::Outside);
    for to in targets(&stage) {
        served.until_served(&stage, to);
        let client = outside.address_like(to.ip()).expect("an address");
        assert_eq!(served.exchange(outside, to, LARGE, LARGE), client, "{to}");
        assert_eq!(served.query(outside, to, 1000), client, "{to}");
    }
}

/// Whoever only accepts masquerades, and so does who knows nothing of it; a node that does not
/// accept does not understand one that sends.
#[test]
fn direct_is_rolled_out_in_two_steps() {
    let mut stage = stage(&[]);
    let served = Served::start(&stage, stage.pod(1, 0));
    let to = targets(&stage)[0];
    served.until_served(&stage, to);
    let outside = stage.client(Client::Outside).address_like(to.ip()).expect("an address");
    let node = stage.cluster().node(0).address_like(to.ip()).expect("an address");
    for (steps, seen) in [
        (["", ""], Some(node)),
        (["", ACCEPT], Some(node)),
        ([ACCEPT, ACCEPT], Some(node)),
        ([ACCEPT, ON], Some(node)),
        ([ON, ON], Some(outside)),
        ([ON, ACCEPT], Some(outside)),
        ([ON, ""], None),
        ([ACCEPT, ""], Some(node)),
    ] {
        for (index, argument) in steps.into_iter().enumerate() {
            let before = syncs(&stage, index);
            let arguments: Vec<String> =
                Some(argument).filter(|it| !it.is_empty()).map(String::from).into_iter().collect();
            stage.bed.start_daemon(index, &arguments).expect("a daemon");
            until("the new daemon's programs are attached", LONG, || syncs(&stage, index) > before);
        }
        // The ports of the client are other ones: flows are new.
        match seen {
            Some(seen) => {
                let client = stage.client(Client::Outside);
                assert_eq!(served.exchange(client, to, 1000, 1000), seen, "{steps:?}");
                assert_eq!(served.query(client, to, 1000), seen, "{steps:?}");
            }
            None => {
                let spec = tcp(to, 1).timeout(Duration::from_millis(500));
                let report = stage.connect(stage.client(Client::Outside), &spec);
                assert_eq!(report.failed(), 1, "{steps:?}");
            }
        }
    }
}

fn syncs(stage: &Stage, node: usize) -> usize {
    stage.bed.log(node).matches("\"attached\" cgroup").count()
}

/// Flows are in pinned maps on both nodes.
#[test]
fn direct_kills_of_either_daemon_cut_nothing() {
    let mut stage = stage(&[ON]);
    stage.web(&spec("LoadBalancer"), &ingress(&BALANCER_IPS, "VIP"), &[(1, 0), (1, 1)]);
    let mut streams = Vec::new();
    for to in targets(&stage) {
        let from = stage.client(Client::Outside);
        stage.until_served(from, to);
        let stream = from.in_netns(|| StreamChecker::start(StreamSpec::new(to)));
        streams.push((to, stream.expect("a namespace").expect("a stream")));
    }
    for _ in 0..3 {
        for node in 0..2 {
            let before = syncs(&stage, node);
            stage.bed.kill_daemon(node).expect("running until killed");
            let probe = |stage: &Stage| {
                for to in targets(stage) {
                    stage.must_connect(stage.client(Client::Outside), &tcp(to, 5));
                }
            };
            probe(&stage);
            stage.bed.start_daemon(node, &[]).expect("a daemon");
            until("the new daemon's programs are attached", LONG, || {
                probe(&stage);
                syncs(&stage, node) > before
            });
            probe(&stage);
        }
    }
    for (to, stream) in streams {
        let report = stream.stop().expect("a report");
        assert!(report.failure.is_none() && report.echoed > 50, "{to}: {report:?}");
    }
}
