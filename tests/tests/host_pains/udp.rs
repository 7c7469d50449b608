//! UDP flows, and sockets that are connected to endpoints which go.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::cluster::Host;
use proxy_tests::traffic::{Greeting, RateSpec, UdpRate, was_ended};

use super::node::{LONG, until};
use super::stage::{CLUSTER_IPS, Client, NODE_PORT, PORT, Stage, spec};

/// A socket that is connected once and used for ever, as resolvers have them. When it is ended
/// under its owner, that connects again.
struct Resolver {
    socket: UdpSocket,
    target: SocketAddr,
}

impl Resolver {
    fn open(host: &Host, target: SocketAddr) -> Self {
        let open = || -> std::io::Result<UdpSocket> {
            let own = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(own)?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            Ok(socket)
        };
        let socket = host.in_netns(open).expect("a namespace").expect("a socket");
        Self { socket, target }
    }

    fn ask(&self) -> Option<String> {
        let mut buffer = [0; 1024];
        if let Err(error) = self.socket.send(b"?") {
            if was_ended(&error) {
                self.socket.connect(self.target).expect("the same namespace");
            }
            return None;
        }
        match self.socket.recv(&mut buffer) {
            Ok(length) => Some(serde_json::from_slice::<Greeting>(&buffer[..length]).ok()?.server),
            Err(_) => None,
        }
    }

    fn until_from(&self, server: &str, limit: Duration) -> Duration {
        let begun = Instant::now();
        until(&format!("{server} answers at {}", self.target), limit, || {
            self.ask().as_deref() == Some(server)
        });
        begun.elapsed()
    }
}

fn node_port(stage: &Stage, family: usize) -> SocketAddr {
    let node = stage.cluster().node(0).address_like(CLUSTER_IPS[family]);
    SocketAddr::new(node.expect("an address"), NODE_PORT)
}

/// conntrack keeps sending a flow to an endpoint that is gone for as long as datagrams come.
#[test]
fn pain_04_udp_to_a_removed_endpoint_is_not_blackholed() {
    let stage = Stage::new(&[]);
    stage.web(&spec("NodePort"), &[], &[(1, 0)]);
    let ways: Vec<(Client, SocketAddr)> = (0..2)
        .flat_map(|family| {
            let vip = SocketAddr::new(CLUSTER_IPS[family], PORT);
            [(Client::Pod, vip), (Client::Host, vip), (Client::Outside, node_port(&stage, family))]
        })
        .collect();
    let mut rates = Vec::new();
    for &(client, target) in &ways {
        stage.until_served(stage.client(client), target);
        let start = || UdpRate::start(RateSpec::new(target, 20));
        let rate = stage.client(client).in_netns(start).expect("a namespace");
        rates.push(rate.expect("a sender"));
    }
    let rolls = [[(1, 1)], [(0, 1)], [(1, 0)]];
    for endpoints in rolls {
        thread::sleep(Duration::from_millis(800));
        stage.endpoints(&endpoints);
    }
    thread::sleep(Duration::from_millis(800));
    for (rate, way) in rates.into_iter().zip(ways) {
        let report = rate.stop().expect("a report");
        println!("{way:?}: {} of {} lost", report.lost(), report.sent);
        // An endpoint that goes answers what it still gets: loss is what an ended socket's
        // owner could not send.
        assert!(report.lost() <= 2 * rolls.len() as u64, "{way:?}: {report:?}");
        let servers: Vec<&str> = report.changes.iter().map(|c| c.server.as_str()).collect();
        assert!(servers.len() > rolls.len(), "{way:?} did not follow: {servers:?}");
    }
}

/// Socket-level load balancing translates a connected socket once; it then sends to the endpoint
/// that it got until it is closed, wherever that has gone (cilium/cilium #31012 and before).
#[test]
fn pain_21_a_connected_udp_socket_recovers_in_every_namespace() {
    let stage = Stage::new(&[]);
    stage.web(&spec("NodePort"), &[], &[(1, 0)]);
    let names = [(1, 0), (1, 1), (0, 1)].map(|(n, p)| stage.pod(n, p).name().to_owned());
    let hosts = [stage.pod(0, 0), stage.pod(0, 1), stage.client(Client::Host)];
    let mut resolvers: Vec<Resolver> = hosts
        .iter()
        .flat_map(|host| {
            CLUSTER_IPS.map(|ip| {
                let target = SocketAddr::new(ip, PORT);
                stage.until_served(host, target);
                Resolver::open(host, target)
            })
        })
        .collect();
    resolvers.push(Resolver::open(stage.client(Client::Outside), node_port(&stage, 0)));
    for resolver in &resolvers {
        resolver.until_from(&names[0], LONG);
    }
    for (endpoint, name) in [((1, 1), &names[1]), ((0, 1), &names[2])] {
        stage.endpoints(&[endpoint]);
        let limit = Duration::from_secs(1);
        let took = resolvers.iter().map(|resolver| resolver.until_from(name, limit)).max();
        println!("all have moved to {name}, the last after {took:?}");
    }
}

/// Whatever the node's other sockets do meanwhile: TCP connections and datagrams to Services are
/// remembered as well, and many more of them.
#[test]
fn pain_21_a_connected_udp_socket_recovers_however_many_others_there_were() {
    let stage = Stage::new(&["--ebpf-map-sizes=sockets=256"]);
    stage.web(&spec("NodePort"), &[], &[(1, 0)]);
    let pod = stage.client(Client::Pod);
    let target = SocketAddr::new(CLUSTER_IPS[0], PORT);
    stage.until_served(pod, target);
    let resolver = Resolver::open(pod, target);
    resolver.until_from(stage.pod(1, 0).name(), LONG);
    let others = || {
        for _ in 0..1_000 {
            drop(TcpStream::connect(target).expect("a connection"));
            let short = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            short.connect(target).expect("connected");
            let single = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            single.send_to(b"?", target).expect("sent");
        }
    };
    pod.in_netns(others).expect("a namespace");
    stage.endpoints(&[(1, 1)]);
    resolver.until_from(stage.pod(1, 1).name(), Duration::from_secs(1));
}

/// The other half: the socket was connected when there was no daemon yet that could translate it.
#[test]
fn pain_21_a_udp_socket_from_before_the_daemon_works_and_recovers() {
    let mut stage = Stage::new(&[]);
    stage.web(&spec("NodePort"), &[], &[(1, 0)]);
    let target = SocketAddr::new(CLUSTER_IPS[0], PORT);
    stage.until_served(stage.client(Client::Pod), target);
    stage.bed.start_daemon(0, &["--cleanup".to_owned()]).expect("a daemon that cleans up");
    until("cleaned up", LONG, || stage.bed.daemon_ended(0).expect("asked").is_some());
    stage.bed.forget_daemon(0);
    let hosts = [Client::Pod, Client::Host];
    let open = || hosts.map(|client| Resolver::open(stage.client(client), target));
    let mut resolvers = open();
    // A link that nobody holds is taken off a moment later.
    until("sockets are not translated", LONG, || {
        resolvers = open();
        resolvers.iter().all(|resolver| resolver.ask().is_none())
    });
    stage.bed.start_daemon(0, &[]).expect("a daemon");
    stage.until_served(stage.client(Client::Pod), target);
    let limit = Duration::from_secs(1);
    for resolver in &resolvers {
        resolver.until_from(stage.pod(1, 0).name(), limit);
    }
    stage.endpoints(&[(1, 1)]);
    for resolver in &resolvers {
        resolver.until_from(stage.pod(1, 1).name(), limit);
    }
}
