//! Connections that live through change, and those that must not.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::clients::Client;
use super::context::{Context, external_local, internal_local};
use super::look::{eventually, from, of, who};
use super::service::{Front, Service, Target};
use super::{Case, case};
use crate::traffic::{
    ByServer, ConnectSpec, Greeting, Protocol, StreamChecker, connect, was_ended,
};

pub(super) const CASES: &[Case] = &[
    case("other endpoints come and go, the Service changes: a connection lives", others_change),
    case("the own endpoint terminates and goes: a connection lives", own_endpoint),
    case("affinity and policies change: a connection by a load balancer lives", policies_change),
    case("both policies Local, the own endpoint is the last: a connection lives", last_endpoint),
    case("a removed endpoint gets no new connection, from a reused port either", no_new_ones),
    case("kill -9 and restart: connections live, new ones work meanwhile", crash),
    case("changes made while the daemon was away are programmed", missed_changes),
    case("UDP: a flow to an endpoint that went is released", udp_released),
    case("UDP: a flow to a Local endpoint that went is released", udp_released_local),
    case("UDP: a flow from before the endpoints starts working", udp_before_endpoints),
    case("UDP: a flow from before the Service starts working", udp_before_service),
];

/// Exchanges that a living connection must make before it counts as living.
const ALIVE: u64 = 3;

/// Long connections to every frontend that can have them.
struct Streams(Vec<(String, StreamChecker)>);

impl Streams {
    fn start(cx: &Context<'_>, web: &Service) -> Result<Self> {
        let mut streams = Vec::new();
        for (client, front) in
            [("a3", Front::Cluster), ("node-a", Front::Cluster), ("outside", Front::Balancer)]
        {
            for target in web.at(front) {
                if target.0 != Protocol::Udp {
                    let name = format!("{client} -> {} {}", target.0, target.1);
                    let stream = cx.stream(client, target).with_context(|| name.clone())?;
                    streams.push((name, stream));
                }
            }
        }
        Ok(Self(streams))
    }

    fn lived(self) -> Result<()> {
        // Some more exchanges, on a machine that is slow as well.
        std::thread::sleep(Duration::from_millis(200));
        let mut wrong = Vec::new();
        for (name, stream) in self.0 {
            let report = stream.stop()?;
            if let Some(failure) = report.failure {
                wrong.push(format!("{name}: {failure:?} after {} echoes", report.echoed));
            } else if report.echoed < ALIVE {
                wrong.push(format!("{name}: only {} echoes", report.echoed));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(())
    }
}

fn others_change(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]);
    let one = web.clone().endpoints(&["b0"]);
    cx.program(&[&one])?;
    let streams = Streams::start(cx, &web)?;
    for endpoints in [&["b0", "a0", "b1"][..], &["b0", "b1"], &["a1", "b0"], &["b0"]] {
        cx.program(&[&web.clone().endpoints(endpoints)])?;
        cx.look(&[from(&["a3"]).to(&web.at(Front::Cluster)).answers(endpoints)])?;
    }
    let changed = one
        .clone()
        .with(&json!({"metadata": {"labels": {"changed": "yes"}}}))
        .spec(&json!({"sessionAffinity": "ClientIP"}));
    cx.program(&[&changed])?;
    let two_ports = one.second_ports();
    cx.program(&[&two_ports])?;
    cx.look(&[from(&["a3"]).to(&two_ports.everywhere()).only(&["b0", "b0:8081"])])?;
    streams.lived()
}

fn own_endpoint(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]);
    cx.program(&[&web.clone().endpoints(&["b0"])])?;
    let streams = Streams::start(cx, &web)?;
    for endpoints in [&["b0 terminating", "a0"][..], &["b0 ending", "a0"], &["a0"]] {
        cx.program(&[&web.clone().endpoints(endpoints)])?;
        cx.look(&[from(&["a3", "outside"]).to(&web.everywhere()).answers(&["a0"])])?;
    }
    // With nobody left, new ones are refused and the old one lives on.
    cx.program(&[&web.clone().endpoints(&[])])?;
    cx.look(&[from(&["a3", "outside"]).to(&of(Protocol::Tcp, &web.everywhere())).refused()])?;
    streams.lived()
}

/// Where another virtual server served the client because of affinity, it is needed no more.
fn policies_change(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&["a0"]).spec(&external_local());
    let sticky = web.clone().spec(&json!({"sessionAffinity": "ClientIP"}));
    cx.program(&[&sticky])?;
    let streams = Streams::start(cx, &web)?;
    cx.program(&[&web])?;
    cx.program(&[&sticky])?;
    let cluster = sticky.spec(&json!({"externalTrafficPolicy": "Cluster"}));
    cx.program(&[&cluster])?;
    cx.program(&[&web.clone().spec(&json!({"externalTrafficPolicy": "Cluster"}))])?;
    cx.look(&[from(&["a3", "outside"]).to(&web.everywhere()).answers(&["a0"])])?;
    streams.lived()
}

/// Pods reach all endpoints by the external address; then those of this node are all.
fn last_endpoint(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).spec(&external_local());
    let web = web.spec(&internal_local());
    cx.program(&[&web.clone().endpoints(&["a0", "b0"])])?;
    let mut streams = Vec::new();
    for target in of(Protocol::Tcp, &web.at(Front::Balancer)) {
        // Some are b0's, and end with it in time; whose they are may be drawn.
        for _ in 0..40 {
            let stream = cx.stream("a3", target)?;
            if stream.server() == "a0" {
                streams.push((format!("a3 -> {}", target.1), stream));
                break;
            }
        }
    }
    ensure!(!streams.is_empty(), "of all connections none is a0's");
    cx.program(&[&web.clone().endpoints(&["a0"])])?;
    cx.look(&[from(&["a3"]).to(&web.at(Front::Balancer)).answers(&["a0"])])?;
    Streams(streams).lived()
}

fn no_new_ones(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]);
    cx.program(&[&web.clone().endpoints(&["a0", "b0"])])?;
    let targets = of(Protocol::Tcp, &web.everywhere());
    ensure!(
        from_same_ports(cx, &targets, 6)?.contains_key("a0"),
        "a0 has no connections from the ports that are used again"
    );
    cx.program(&[&web.clone().endpoints(&["b0"])])?;
    let by_server = from_same_ports(cx, &targets, 10)?;
    ensure!(!by_server.contains_key("a0"), "a0 got more from a reused port: {by_server:?}");
    for target in web.everywhere() {
        let by_server = who(cx.cluster(), "a3", target, 20)?;
        ensure!(!by_server.contains_key("a0"), "{target:?}: {by_server:?}");
    }
    Ok(())
}

/// Ports of the client for each target: where ports are hashed, one is always the same
/// endpoint's.
const PORTS: usize = 6;

/// One connection after the other to each target from each of some ports of a client; all
/// must be answered.
fn from_same_ports(cx: &Context<'_>, targets: &[Target], count: usize) -> Result<ByServer> {
    let client = Client::named(cx.cluster(), "a3")?;
    let mut by_server = ByServer::new();
    let targets = targets.iter().flat_map(|target| [target; PORTS]);
    for (port, (protocol, target)) in (41_000..).zip(targets) {
        let source = SocketAddr::new(client.address(target.ip())?, port);
        let spec = ConnectSpec::new(*protocol, *target, count).source(source);
        let spec = spec.timeout(Duration::from_secs(5));
        let report = client.host.in_netns(|| connect(&spec))??;
        ensure!(report.failed() == 0, "{target}: {:?} {:?}", report.failures, report.examples);
        for (server, count) in report.by_server {
            *by_server.entry(server).or_default() += count;
        }
    }
    Ok(by_server)
}

fn crash(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&["a0", "b0"]);
    cx.program(&[&web])?;
    let streams = Streams::start(cx, &web)?;
    let everybody = &["a3", "node-a", "outside"];
    for _ in 0..2 {
        cx.bed.kill_daemon(0)?;
        cx.look(&[from(everybody).to(&web.everywhere()).answers(&["a0", "b0"])])?;
        cx.restart(0, &[])?;
        for target in web.everywhere() {
            who(cx.cluster(), "a3", target, 4)?;
        }
    }
    streams.lived()
}

fn missed_changes(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[]).endpoints(&["a0", "b0"]);
    let gone = cx.service("gone", &[]).endpoints(&["a0"]);
    let new = cx.service("new", &[]).endpoints(&["a1"]);
    cx.program(&[&web, &gone])?;
    cx.look(&[from(&["a3"]).to(&gone.at(Front::Cluster)).answers(&["a0"])])?;
    cx.bed.kill_daemon(0)?;
    cx.apply(&web.clone().endpoints(&["b0", "b1"]))?;
    cx.apply(&new)?;
    cx.delete("Service", "gone")?;
    cx.look(&[from(&["a3"]).to(&gone.at(Front::Cluster)).answers(&["a0"])])?;
    cx.restart(0, &[])?;
    cx.look(&[
        from(&["a3", "outside"]).to(&web.at(Front::Cluster)).answers(&["b0", "b1"]),
        from(&["a3", "outside"]).to(&new.at(Front::Cluster)).answers(&["a1"]),
        from(&["a3", "outside"]).to(&gone.at(Front::Cluster)).nobody(),
    ])
}

/// How soon after a change is programmed a flow must have followed it.
const AT_ONCE: Duration = Duration::from_secs(2);

/// A connected UDP socket, used for one datagram after the other as a resolver would.
struct Flow {
    name: String,
    target: SocketAddr,
    socket: UdpSocket,
}

impl Flow {
    fn open(cx: &Context<'_>, client: &str, (_, target): Target) -> Result<Self> {
        let name = format!("{client} -> UDP {target}");
        let client = Client::named(cx.cluster(), client)?;
        let own = client.address(target.ip())?;
        let socket = client.host.in_netns(|| {
            // A node's address of choice for a VIP is not known beforehand.
            let own = if own.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(own)?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(Duration::from_millis(400)))?;
            std::io::Result::Ok(socket)
        })?;
        Ok(Self { name: name.clone(), target, socket: socket.context(name)? })
    }

    /// To every frontend, from every kind of client.
    fn to_all(cx: &Context<'_>, web: &Service) -> Result<Vec<Self>> {
        let mut flows = Vec::new();
        for target in of(Protocol::Udp, &web.everywhere()) {
            for client in ["a3", "node-a", "outside"] {
                flows.push(Self::open(cx, client, target)?);
            }
        }
        for target in of(Protocol::Udp, &cx.node_ports_of(web, 0)) {
            flows.push(Self::open(cx, "outside", target)?);
        }
        Ok(flows)
    }

    /// Who answers one datagram.
    fn ask(&self) -> Result<String> {
        // The answer to an earlier datagram may have come late.
        self.socket.set_nonblocking(true)?;
        let mut buffer = [0; 1024];
        while self.socket.recv(&mut buffer).is_ok() {}
        self.socket.set_nonblocking(false)?;
        let what = || self.name.clone();
        let sent = self.socket.send(b"?");
        if sent.as_ref().is_err_and(was_ended) {
            self.socket.connect(self.target).with_context(what)?;
        }
        sent.with_context(what)?;
        let length = self.socket.recv(&mut buffer).with_context(what)?;
        Ok(serde_json::from_slice::<Greeting>(&buffer[..length])?.server)
    }
}

/// All flows ask at once; the error names those that do not reach `server` in time.
fn all_reach(flows: &[Flow], server: &str, limit: Duration) -> Result<()> {
    let mut wrong = Vec::new();
    thread::scope(|scope| {
        let asking = |flow: &Flow| {
            let begun = Instant::now();
            eventually(limit, || {
                let answered = flow.ask()?;
                ensure!(answered == server, "{} reaches {answered}", flow.name);
                Ok(())
            })
            .with_context(|| format!("in {:.1} s", begun.elapsed().as_secs_f64()))
        };
        let threads: Vec<_> = flows.iter().map(|flow| scope.spawn(move || asking(flow))).collect();
        for thread in threads {
            if let Ok(Err(error)) = thread.join() {
                wrong.push(format!("{error:#}"));
            }
        }
    });
    ensure!(wrong.is_empty(), "not at {server}: {}", wrong.join("; "));
    Ok(())
}

fn udp_released(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::External, Front::Balancer, Front::NodePort]);
    cx.program(&[&web.clone().endpoints(&["b0"])])?;
    let flows = Flow::to_all(cx, &web)?;
    all_reach(&flows, "b0", Duration::from_secs(10))?;
    // In each of the ways in which an endpoint stops serving; out of use is not one of them.
    for (endpoints, server) in [
        (&["b0 terminating", "a0"][..], "b0"),
        (&["b0 ending", "a0"], "a0"),
        (&["b1"], "b1"),
        (&["a1", "b1 unready"], "a1"),
        (&["b0 terminating", "a1 ending"], "b0"),
    ] {
        cx.program(&[&web.clone().endpoints(endpoints)])?;
        all_reach(&flows, server, AT_ONCE).with_context(|| format!("{endpoints:?}"))?;
    }
    Ok(())
}

fn udp_released_local(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).spec(&external_local());
    cx.program(&[&web.clone().endpoints(&["a0"])])?;
    let mut flows = Vec::new();
    for target in of(Protocol::Udp, &web.at(Front::Balancer)) {
        flows.push(Flow::open(cx, "outside", target)?);
        flows.push(Flow::open(cx, "extra", target)?);
    }
    all_reach(&flows, "a0", Duration::from_secs(10))?;
    cx.program(&[&web.clone().endpoints(&["a0 terminating", "a1"])])?;
    all_reach(&flows, "a0", AT_ONCE)?;
    cx.program(&[&web.clone().endpoints(&["a1"])])?;
    all_reach(&flows, "a1", AT_ONCE)
}

fn udp_before_endpoints(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::External, Front::Balancer, Front::NodePort]);
    cx.program(&[&web])?;
    let flows = Flow::to_all(cx, &web)?;
    for flow in &flows {
        ensure!(flow.ask().is_err(), "{} is answered without endpoints", flow.name);
    }
    cx.program(&[&web.clone().endpoints(&["b0"])])?;
    all_reach(&flows, "b0", AT_ONCE)?;
    // And again after they were gone.
    cx.program(&[&web.clone().endpoints(&[])])?;
    for flow in &flows {
        ensure!(flow.ask().is_err(), "{} is answered without endpoints", flow.name);
    }
    cx.program(&[&web.clone().endpoints(&["a0"])])?;
    all_reach(&flows, "a0", AT_ONCE)
}

fn udp_before_service(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::External, Front::Balancer, Front::NodePort]);
    let flows = Flow::to_all(cx, &web)?;
    thread::scope(|scope| {
        let threads: Vec<_> =
            flows.iter().map(|flow| scope.spawn(|| ensure_silent(flow))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
    })?;
    cx.program(&[&web.clone().endpoints(&["b0"])])?;
    all_reach(&flows, "b0", AT_ONCE)
}

fn ensure_silent(flow: &Flow) -> Result<()> {
    for _ in 0..2 {
        ensure!(flow.ask().is_err(), "{} is answered without a Service", flow.name);
    }
    Ok(())
}
