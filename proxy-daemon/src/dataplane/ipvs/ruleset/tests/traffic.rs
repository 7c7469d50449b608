//! What packets meet. Where IPVS would translate, a destination NAT rule at the usual
//! priority stands in for it: the machine that runs this need not have ip_vs.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::sched::{CloneFlags, unshare};

use super::{Set, config, in_namespace, ip, open, run};
use crate::dataplane::ipvs::ruleset::{Element, ElementKey, Operation, Ruleset, read_refusals};
use crate::kernel::netlink::{Socket, Subsystem};
use crate::model::{Family, HostPort, LocalDetect, Protocol};

/// Enough for a SYN that was lost to be sent again (after 1 s), little enough to wait for
/// an answer that does not come.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A thread in a network namespace of its own; it ends with this.
struct Peer {
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
    thread: i32,
}

impl Peer {
    fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, thread) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (needs root)");
            ready.send(nix::unistd::gettid().as_raw()).unwrap();
            queue.into_iter().for_each(|job| job());
        });
        Self { jobs, thread: thread.recv().unwrap() }
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.jobs.send(Box::new(move || done.send(job()).unwrap())).unwrap();
        result.recv().expect("the peer's job")
    }

    /// A link to it from this thread's namespace, and its default route.
    fn link(&self, name: &'static str, net: &Net) {
        let thread = self.thread.to_string();
        run("ip", &["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", &thread]);
        run("ip", &["addr", "add", &net.subnet(net.router), "dev", name, "nodad"]);
        run("ip", &["link", "set", name, "up"]);
        let (address, router) = (net.subnet(net.peer), net.router);
        self.run(move || {
            run("ip", &["link", "set", "lo", "up"]);
            run("ip", &["addr", "add", &address, "dev", "eth0", "nodad"]);
            run("ip", &["link", "set", "eth0", "up"]);
            run("ip", &["route", "add", "default", "via", router]);
            // Neighbour discovery may begin before the other side is up.
            let up = (0..20).any(|_| {
                connect(router, 9).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
            });
            assert!(up, "no way to {router}");
        });
    }

    fn listen(&self, port: u16) -> TcpListener {
        self.run(move || listen(port))
    }

    fn connect(&self, address: &'static str, port: u16) -> std::io::Result<TcpStream> {
        self.run(move || connect(address, port))
    }
}

/// One link's addresses.
struct Net {
    router: &'static str,
    peer: &'static str,
    prefix: u8,
}

impl Net {
    fn subnet(&self, address: &str) -> String {
        format!("{address}/{}", self.prefix)
    }
}

struct Addresses {
    family: &'static str,
    vip: &'static str,
    /// Of ClusterIPs: `vip` is in it.
    service_cidr: &'static str,
    node: &'static str,
    client: Net,
    server: Net,
    forwarding: &'static str,
}

const V4: Addresses = Addresses {
    family: "ip",
    vip: "10.96.0.1",
    service_cidr: "10.96.0.0/16",
    node: "192.0.2.1",
    client: Net { router: "10.1.0.1", peer: "10.1.0.2", prefix: 24 },
    server: Net { router: "10.2.0.1", peer: "10.2.0.2", prefix: 24 },
    forwarding: "/proc/sys/net/ipv4/ip_forward",
};
const V6: Addresses = Addresses {
    family: "ip6",
    vip: "fd00:96::1",
    service_cidr: "fd00:96::/112",
    node: "2001:db8::1",
    client: Net { router: "fd01::1", peer: "fd01::2", prefix: 64 },
    server: Net { router: "fd02::1", peer: "fd02::2", prefix: 64 },
    forwarding: "/proc/sys/net/ipv6/conf/all/forwarding",
};

/// On all addresses of both families.
fn listen(port: u16) -> TcpListener {
    TcpListener::bind((ip("::"), port)).unwrap()
}

fn connect(address: &str, port: u16) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::new(ip(address), port), PATIENCE)
}

#[track_caller]
fn assert_refused(result: std::io::Result<TcpStream>) {
    let kind = result.expect_err("a connection was to be refused").kind();
    assert_eq!(kind, ErrorKind::ConnectionRefused);
}

#[track_caller]
fn assert_unanswered(result: std::io::Result<TcpStream>) {
    let kind = result.expect_err("a connection was to stay unanswered").kind();
    assert_eq!(kind, ErrorKind::TimedOut);
}

/// Who the other end says it is talking to.
fn accept_from(listener: &TcpListener) -> IpAddr {
    listener.accept().unwrap().1.ip().to_canonical()
}

fn change(ruleset: &mut Ruleset<Socket>, operation: Operation, elements: &[Element]) {
    let changes: Vec<_> = elements.iter().map(|element| (operation, *element)).collect();
    assert!(ruleset.apply(&changes).unwrap().iter().all(Result::is_ok));
}

fn add(ruleset: &mut Ruleset<Socket>, elements: &[Element]) {
    change(ruleset, Operation::Add, elements);
}

fn remove(ruleset: &mut Ruleset<Socket>, elements: &[Element]) {
    change(ruleset, Operation::Delete, elements);
}

fn own_address(address: &str) {
    run("ip", &["addr", "add", address, "dev", "lo", "nodad"]);
    // The kernel finishes IPv6 addresses in the background.
    let usable = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        UdpSocket::bind((ip(address), 0)).is_ok()
    });
    assert!(usable, "{address} never became an own address");
}

/// A UDP client learns from the ICMP error that nobody is there.
fn udp_error(address: &str, port: u16) -> ErrorKind {
    let any = if address.contains(':') { "::" } else { "0.0.0.0" };
    let socket = UdpSocket::bind((ip(any), 0)).unwrap();
    socket.connect((ip(address), port)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // The sender itself is told EPERM when the packet is stopped on its way out.
    let _ = socket.send(b"x");
    let received = socket.recv(&mut [0; 8]);
    received.expect_err("no answer was to come").kind()
}

fn refused(family: Family) -> std::collections::BTreeMap<&'static str, u64> {
    read_refusals(&mut Socket::open(Subsystem::Netfilter).unwrap(), family).unwrap()
}

fn refusals(
    addresses: &Addresses,
    connect: impl Fn(&'static str, u16) -> std::io::Result<TcpStream>,
) {
    let Addresses { vip, node, .. } = *addresses;
    own_address(vip);
    own_address(node);
    let mut ruleset = open();
    ruleset.ensure(&config()).unwrap();
    let listener = listen(8022);
    let tcp = |set, address, port| Element::port(set, ip(address), Protocol::Tcp, port);
    let early = connect(vip, 8022).expect("nothing speaks against it yet");
    let (mut other_end, _) = listener.accept().unwrap();

    add(&mut ruleset, &[Element::vip(ip(vip))]);
    assert_refused(connect(vip, 8022));
    connect(node, 8022).expect("not a Service address");
    add(&mut ruleset, &[tcp(Set::Frontends, vip, 8022)]);
    connect(vip, 8022).expect("a frontend: IPVS takes it from here");
    let udp = Element::port(Set::Frontends, ip(vip), Protocol::Udp, 8023);
    add(&mut ruleset, &[udp]);
    assert_refused(connect(vip, 8023));
    remove(&mut ruleset, &[tcp(Set::Frontends, vip, 8022)]);
    assert_refused(connect(vip, 8022));

    add(&mut ruleset, &[tcp(Set::Drop, vip, 8022), tcp(Set::Drop, node, 8022)]);
    assert_unanswered(connect(vip, 8022));
    assert_unanswered(connect(node, 8022));
    remove(&mut ruleset, &[tcp(Set::Drop, node, 8022)]);
    add(&mut ruleset, &[tcp(Set::Reject, node, 8022)]);
    assert_refused(connect(node, 8022));

    let counted = refused(Family::of(ip(vip)));
    assert_eq!((counted["unused_port"], counted["no_endpoint"]), (3, 1), "{counted:?}");
    // Who meets silence asks again.
    assert!(counted["no_local_endpoint"] >= 2, "{counted:?}");
    assert_eq!(counted["source_range"], 0, "{counted:?}");

    // A connection from before all this lives.
    other_end.write_all(b"still there").unwrap();
    let mut text = [0; 11];
    (&early).read_exact(&mut text).unwrap();
    assert_eq!(&text, b"still there");
}

fn from_the_host(addresses: &'static Addresses) {
    in_namespace(|| {
        refusals(addresses, connect);
        let vip = addresses.vip;
        let mut ruleset = open();
        ruleset.ensure(&config()).unwrap();
        let bound = UdpSocket::bind((ip("::"), 8024)).unwrap();
        assert_eq!(udp_error(vip, 8024), ErrorKind::ConnectionRefused);
        add(&mut ruleset, &[Element::port(Set::Drop, ip(vip), Protocol::Udp, 8024)]);
        assert_eq!(udp_error(vip, 8024), ErrorKind::WouldBlock);
        drop(bound);
    });
}

fn from_outside(addresses: &'static Addresses) {
    in_namespace(|| {
        let client = Peer::new();
        client.link("client", &addresses.client);
        refusals(addresses, |address, port| client.connect(address, port));
        let vip = addresses.vip;
        let kind = client.run(move || udp_error(vip, 8025));
        assert_eq!(kind, ErrorKind::ConnectionRefused);
    });
}

/// Whose address an endpoint sees.
fn sources(addresses: &'static Addresses) {
    in_namespace(|| {
        let Addresses { family, vip, ref client, ref server, .. } = *addresses;
        let (outside, endpoint) = (Peer::new(), Peer::new());
        outside.link("client", client);
        endpoint.link("server", server);
        std::fs::write(addresses.forwarding, "1").unwrap();
        let (left, right) = if family == "ip6" { ("[", "]") } else { ("", "") };
        run(
            "nft",
            &[&format!(
                "add table {family} stand-in ; \
             add chain {family} stand-in pre {{ type nat hook prerouting priority dstnat; }} ; \
             add rule {family} stand-in pre {family} daddr {vip} tcp dport 80 dnat to {left}{}{right}:8080 ; \
             add rule {family} stand-in pre {family} daddr {vip} tcp dport 81 dnat to {left}{}{right}:8081 ; \
             add chain {family} stand-in out {{ type nat hook output priority -100; }} ; \
             add rule {family} stand-in out {family} daddr {vip} tcp dport 80 dnat to {left}{}{right}:8080",
                server.peer, client.peer, server.peer,
            )],
        );
        let mut ruleset = open();
        ruleset.ensure(&config()).unwrap();
        let listener = endpoint.listen(8080);
        let seen = || {
            let stream = outside.connect(vip, 80).unwrap();
            let from = accept_from(&listener);
            drop(stream);
            from
        };
        let frontend = |set| Element::port(set, ip(vip), Protocol::Tcp, 80);

        assert_eq!(seen(), ip(client.peer), "no rule asks for more");
        add(&mut ruleset, &[frontend(Set::Masquerade)]);
        assert_eq!(seen(), ip(server.router), "an external frontend");
        remove(&mut ruleset, &[frontend(Set::Masquerade)]);
        add(&mut ruleset, &[frontend(Set::ClusterIps)]);
        assert_eq!(seen(), ip(server.router), "a ClusterIP reached from outside");
        for (local_detect, expected) in [
            (LocalDetect::Cidrs(vec![client.subnet(client.router).parse().unwrap()]), client.peer),
            (LocalDetect::InterfacePrefix("cli".into()), client.peer),
            (LocalDetect::InterfacePrefix("serv".into()), server.router),
            (LocalDetect::Bridge("client".into()), client.peer),
            (LocalDetect::Bridge("clien".into()), server.router),
            (LocalDetect::Unknown, client.peer),
        ] {
            let detection = format!("{local_detect:?}");
            let config = super::RulesetConfig { local_detect, ..config() };
            ruleset.ensure(&config).unwrap();
            assert_eq!(seen(), ip(expected), "{detection}");
            let all = super::RulesetConfig { masquerade_all: true, ..config };
            ruleset.ensure(&all).unwrap();
            assert_eq!(seen(), ip(server.router), "{detection} and masquerade all");
        }

        // The host, whose source is the address itself when that is local.
        own_address(vip);
        let elements = [frontend(Set::ClusterIps), frontend(Set::Frontends), Element::vip(ip(vip))];
        add(&mut ruleset, &elements[1..]);
        connect(vip, 80).unwrap();
        assert_eq!(accept_from(&listener), ip(server.router));
        remove(&mut ruleset, &elements[..1]);
        connect(vip, 80).unwrap();
        assert_eq!(accept_from(&listener), ip(server.router), "from one of our addresses");
        hairpin(&mut ruleset, &outside, addresses);
    });
}

/// Whom a redirect leads elsewhere, and whom a guarded frontend lets through.
fn redirects(addresses: &'static Addresses) {
    in_namespace(|| {
        let Addresses { vip, ref client, ref server, .. } = *addresses;
        let (outside, endpoint) = (Peer::new(), Peer::new());
        outside.link("client", client);
        endpoint.link("server", server);
        std::fs::write(addresses.forwarding, "1").unwrap();
        let mut ruleset = open();
        ruleset.ensure(&config()).unwrap();
        own_address(vip);
        let _listener = endpoint.listen(8080);
        let to = HostPort::new(ip(server.peer), 8080);
        let redirect = |set, to| {
            let key =
                ElementKey::Redirect { address: ip(vip), protocol: Protocol::Tcp, port: 80, to };
            Element { set, key }
        };
        assert_refused(outside.connect(vip, 80));

        add(&mut ruleset, &[redirect(Set::ShortCircuit, to)]);
        assert_refused(outside.connect(vip, 80));
        connect(vip, 80).expect("the host is inside");
        let pods = LocalDetect::Cidrs(vec![client.subnet(client.router).parse().unwrap()]);
        ruleset.ensure(&super::RulesetConfig { local_detect: pods, ..config() }).unwrap();
        outside.connect(vip, 80).expect("now it is a pod");
        ruleset.ensure(&config()).unwrap();
        assert_refused(outside.connect(vip, 80));

        let elsewhere = redirect(Set::Shared, HostPort::new(ip(server.peer), 9));
        add(&mut ruleset, &[elsewhere]);
        assert_refused(outside.connect(vip, 80));
        change(&mut ruleset, Operation::Replace, &[redirect(Set::Shared, to)]);
        outside.connect(vip, 80).expect("everybody");

        let guarded = Element::port(Set::Guarded, ip(vip), Protocol::Tcp, 80);
        add(&mut ruleset, &[guarded]);
        assert_unanswered(outside.connect(vip, 80));
        let range = |text: &str| {
            let from = text.parse::<IpNetwork>().unwrap();
            let key =
                ElementKey::Range { address: ip(vip), protocol: Protocol::Tcp, port: 80, from };
            Element { set: Set::Allowed, key }
        };
        let own = range(&format!("{}/{}", client.peer, if vip.contains(':') { 128 } else { 32 }));
        add(&mut ruleset, &[own]);
        outside.connect(vip, 80).expect("in range");
        // A wider range in place of the narrow one, in one transaction.
        let wide = if vip.contains(':') { "fd01::/16" } else { "10.0.0.0/8" };
        let results =
            ruleset.apply(&[(Operation::Delete, own), (Operation::Add, range(wide))]).unwrap();
        assert_eq!(results, [Ok(()), Ok(())]);
        outside.connect(vip, 80).expect("in the wider range");
        let kept: Vec<Element> = ruleset.elements().unwrap().into_iter().collect();
        assert!(
            kept.contains(&range(wide)) && kept.contains(&redirect(Set::Shared, to)),
            "{kept:?}"
        );

        remove(&mut ruleset, &[redirect(Set::Shared, HostPort::new(ip(vip), 0))]);
        // One that is there no more, beside one that is.
        let both = [redirect(Set::Shared, to), redirect(Set::ShortCircuit, to)];
        remove(&mut ruleset, &both);
        remove(&mut ruleset, &[guarded]);
        assert_refused(connect(vip, 80));
    });
}

/// The client is its own endpoint.
fn hairpin(ruleset: &mut Ruleset<Socket>, pod: &Peer, addresses: &Addresses) {
    let Addresses { vip, ref client, .. } = *addresses;
    let listener = pod.listen(8081);
    assert_unanswered(pod.connect(vip, 81));
    let endpoint = Element::port(Set::Hairpin, ip(client.peer), Protocol::Tcp, 8081);
    add(ruleset, &[endpoint]);
    pod.connect(vip, 81).unwrap();
    assert_eq!(accept_from(&listener), ip(client.router));
}

/// Another host has the address, and the way there leads through here.
fn unused_cluster_ips(addresses: &'static Addresses) {
    in_namespace(|| {
        let Addresses { vip, service_cidr, ref client, ref server, .. } = *addresses;
        let (outside, elsewhere) = (Peer::new(), Peer::new());
        outside.link("client", client);
        elsewhere.link("server", server);
        std::fs::write(addresses.forwarding, "1").unwrap();
        run("ip", &["route", "add", service_cidr, "via", server.peer]);
        elsewhere.run(move || own_address(vip));
        let listener = elsewhere.listen(8080);
        let mut ruleset = open();
        ruleset.ensure(&config()).unwrap();
        let early = outside.connect(vip, 8080).expect("nothing speaks against it yet");
        let (mut other_end, _) = listener.accept().unwrap();
        connect(vip, 8080).expect("from the host neither");

        let cidrs = ["10.200.0.0/16", "fd00:200::/112", service_cidr];
        let service_cidrs = cidrs.map(|cidr| cidr.parse().unwrap()).to_vec();
        let with_cidrs = super::RulesetConfig { service_cidrs, ..config() };
        ruleset.ensure(&with_cidrs).unwrap();
        assert_unanswered(outside.connect(vip, 8080));
        assert_unanswered(connect(vip, 8080));
        let counted = refused(Family::of(ip(vip)));
        assert!(counted["unused_address"] >= 2, "{counted:?}");
        outside.connect(server.peer, 8080).expect("not a Service address");
        connect(server.peer, 8080).expect("not a Service address");
        add(&mut ruleset, &[Element::vip(ip(vip))]);
        outside.connect(vip, 8080).expect("a Service has it");
        remove(&mut ruleset, &[Element::vip(ip(vip))]);
        other_end.write_all(b"still there").unwrap();
        outside.run(move || (&early).read_exact(&mut [0; 11])).expect("from before all this");

        ruleset.ensure(&config()).unwrap();
        outside.connect(vip, 8080).expect("no range any more");
    });
}

#[test]
fn cluster_ips_of_no_service_are_dropped_v4() {
    unused_cluster_ips(&V4);
}

#[test]
fn cluster_ips_of_no_service_are_dropped_v6() {
    unused_cluster_ips(&V6);
}

#[test]
fn the_host_is_refused_v4() {
    from_the_host(&V4);
}

#[test]
fn the_host_is_refused_v6() {
    from_the_host(&V6);
}

#[test]
fn outside_clients_are_refused_v4() {
    from_outside(&V4);
}

#[test]
fn outside_clients_are_refused_v6() {
    from_outside(&V6);
}

#[test]
fn sources_are_masqueraded_where_asked_v4() {
    sources(&V4);
}

#[test]
fn sources_are_masqueraded_where_asked_v6() {
    sources(&V6);
}

#[test]
fn redirects_and_source_ranges_hold_for_whom_they_are_meant_v4() {
    redirects(&V4);
}

#[test]
fn redirects_and_source_ranges_hold_for_whom_they_are_meant_v6() {
    redirects(&V6);
}
