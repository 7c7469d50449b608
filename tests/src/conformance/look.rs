//! Looking who answers: every look repeats until it finds what it wants or gives up.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::clients::{Client, node_addresses};
use super::service::Target;
use crate::cluster::Cluster;
use crate::traffic::{ConnectReport, ConnectSpec, FailureKind, Protocol, connect};

/// How long a look goes on wanting.
const PATIENCE: Duration = Duration::from_secs(12);
const PAUSE: Duration = Duration::from_millis(40);
/// For one connection, on an emulated machine that may stall.
const ANSWER: Duration = Duration::from_secs(3);
/// Without any answer for this long the packet was dropped. An answer takes milliseconds,
/// and the second SYN of a TCP client leaves after one second.
const SILENCE: Duration = Duration::from_millis(1400);
/// Connections until everybody must have answered: with three endpoints chosen at random
/// one is missed once in a thousand million times.
const ENOUGH: usize = 60;
/// Looks at one time.
const WIDTH: usize = 12;

/// What a client shall find.
#[derive(Debug, Clone)]
enum Want {
    /// Each of these servers, and nobody else.
    Answers(BTreeSet<String>),
    /// Some of these, at least one.
    Only(BTreeSet<String>),
    /// TCP reset, or ICMP unreachable.
    Refused,
    /// Silence.
    Dropped,
    /// Nobody answers: silence, or nobody has the address.
    Nobody,
}

/// What the server shall see as the client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Client,
    /// An address of the client's node or, from outside, of this node.
    Node(Option<usize>),
}

/// A client's look at some frontends.
#[derive(Debug, Clone)]
pub(super) struct Look {
    from: Vec<String>,
    to: Vec<Target>,
    want: Want,
    seen: Option<Seen>,
}

/// Begins a look: `from(&["a3", "outside"]).to(&targets).answers(&["a0"])`.
pub(super) fn from(clients: &[&str]) -> Look {
    let from = clients.iter().map(|&client| client.to_owned()).collect();
    Look { from, to: Vec::new(), want: Want::Nobody, seen: None }
}

impl Look {
    pub(super) fn to(mut self, targets: &[Target]) -> Self {
        self.to = targets.to_vec();
        self
    }

    fn want(self, want: Want) -> Self {
        Self { want, ..self }
    }

    pub(super) fn answers(self, servers: &[&str]) -> Self {
        self.want(Want::Answers(names(servers)))
    }

    pub(super) fn only(self, servers: &[&str]) -> Self {
        self.want(Want::Only(names(servers)))
    }

    pub(super) fn refused(self) -> Self {
        self.want(Want::Refused)
    }

    pub(super) fn dropped(self) -> Self {
        self.want(Want::Dropped)
    }

    pub(super) fn nobody(self) -> Self {
        self.want(Want::Nobody)
    }

    pub(super) fn seen_as_itself(self) -> Self {
        Self { seen: Some(Seen::Client), ..self }
    }

    /// As its own node, or for clients outside as the first one, by which they come in.
    pub(super) fn seen_as_node(self) -> Self {
        Self { seen: Some(Seen::Node(None)), ..self }
    }

    pub(super) fn seen_as_node_number(self, node: usize) -> Self {
        Self { seen: Some(Seen::Node(Some(node))), ..self }
    }
}

fn names(servers: &[&str]) -> BTreeSet<String> {
    servers.iter().map(|&server| server.to_owned()).collect()
}

/// One client and one frontend.
struct Job<'j> {
    client: &'j str,
    target: Target,
    look: &'j Look,
}

/// All of these, side by side; the error names every one that did not find what it wanted.
pub(super) fn all(cluster: &Cluster, looks: &[Look]) -> Result<()> {
    let mut jobs = Vec::new();
    for look in looks {
        ensure!(!look.from.is_empty() && !look.to.is_empty(), "a look at nothing: {look:?}");
        for client in &look.from {
            jobs.extend(look.to.iter().map(|&target| Job { client, target, look }));
        }
    }
    let mut wrong = Vec::new();
    for some in jobs.chunks(WIDTH) {
        thread::scope(|scope| {
            let threads: Vec<_> =
                some.iter().map(|job| (job, scope.spawn(|| job.repeat(cluster)))).collect();
            for (job, thread) in threads {
                let result = thread.join().unwrap_or_else(|_| bail!("the look panicked"));
                if let Err(error) = result {
                    let (protocol, address) = job.target;
                    wrong.push(format!("{} -> {protocol} {address}: {error:#}", job.client));
                }
            }
        });
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

impl Job<'_> {
    fn repeat(&self, cluster: &Cluster) -> Result<()> {
        let client = Client::named(cluster, self.client)?;
        client.host.in_netns(|| {
            let started = Instant::now();
            loop {
                match self.once(cluster, &client) {
                    Err(error) if started.elapsed() > PATIENCE => return Err(error),
                    Err(_) => thread::sleep(PAUSE),
                    Ok(()) => return Ok(()),
                }
            }
        })?
    }

    fn once(&self, cluster: &Cluster, client: &Client<'_>) -> Result<()> {
        match &self.look.want {
            Want::Answers(servers) => self.answered(cluster, client, servers, true),
            Want::Only(servers) => self.answered(cluster, client, servers, false),
            Want::Refused => self.fails(client, &[FailureKind::Refused], ANSWER),
            Want::Dropped => self.fails(client, &[FailureKind::Timeout], SILENCE),
            Want::Nobody => {
                self.fails(client, &[FailureKind::Timeout, FailureKind::Unreachable], SILENCE)
            }
        }
    }

    fn connect(&self, client: &Client<'_>, count: usize, wait: Duration) -> Result<ConnectReport> {
        connect_from(client, self.target, count, wait)
    }

    fn answered(
        &self,
        cluster: &Cluster,
        client: &Client<'_>,
        servers: &BTreeSet<String>,
        each: bool,
    ) -> Result<()> {
        let mut by_server: BTreeMap<String, u64> = BTreeMap::new();
        let mut attempts = 0;
        while attempts < ENOUGH {
            let report = self.connect(client, servers.len().max(2), ANSWER)?;
            attempts += servers.len().max(2);
            ensure!(report.failed() == 0, "{}", failures(&report));
            for (server, count) in report.by_server {
                ensure!(servers.contains(&server), "{server} answers, not only {servers:?}");
                *by_server.entry(server).or_default() += count;
            }
            for address in report.by_source.into_keys() {
                self.seen_rightly(cluster, client, address)?;
            }
            if !each || by_server.len() == servers.len() {
                return Ok(());
            }
        }
        bail!("of {servers:?} only these answer: {by_server:?}")
    }

    fn seen_rightly(&self, cluster: &Cluster, client: &Client<'_>, seen: IpAddr) -> Result<()> {
        match self.look.seen {
            None => {}
            Some(Seen::Client) => {
                let own = client.address(seen)?;
                ensure!(seen == own, "seen as {seen} and not as itself, {own}");
            }
            Some(Seen::Node(node)) => {
                let nodes = node.map_or_else(
                    || client.node_addresses(cluster),
                    |node| node_addresses(cluster, node),
                );
                ensure!(nodes.contains(&seen), "seen as {seen} and not as one of {nodes:?}");
            }
        }
        Ok(())
    }

    fn fails(&self, client: &Client<'_>, kinds: &[FailureKind], wait: Duration) -> Result<()> {
        let report = self.connect(client, 1, wait)?;
        let as_wanted: u64 = kinds.iter().map(|kind| report.count(*kind)).sum();
        ensure!(
            as_wanted == report.attempted,
            "want {kinds:?}, but {}",
            if report.failed() == 0 {
                format!("{:?} answer", report.by_server)
            } else {
                failures(&report)
            }
        );
        Ok(())
    }
}

/// From the client's namespace, in which the caller's thread must be.
pub(super) fn connect_from(
    client: &Client<'_>,
    (protocol, address): Target,
    count: usize,
    wait: Duration,
) -> Result<ConnectReport> {
    let mut spec = ConnectSpec::new(protocol, address, count).timeout(wait);
    spec.source = client.source(protocol, address.ip());
    connect(&spec).with_context(|| format!("{protocol} {address}"))
}

fn failures(report: &ConnectReport) -> String {
    format!("{:?}: {}", report.failures, report.examples.first().map_or("", String::as_str))
}

/// Who answers `count` connections of one client; nothing is repeated.
pub(super) fn who(
    cluster: &Cluster,
    client: &str,
    target: Target,
    count: usize,
) -> Result<BTreeMap<String, u64>> {
    let client = Client::named(cluster, client)?;
    let report = client.host.in_netns(|| connect_from(&client, target, count, ANSWER))??;
    let to = format!("{} {}", target.0, target.1);
    ensure!(report.failed() == 0, "{} -> {to}: {}", client.host.name(), failures(&report));
    Ok(report.by_server)
}

/// Those of one protocol.
pub(super) fn of(protocol: Protocol, targets: &[Target]) -> Vec<Target> {
    targets.iter().copied().filter(|target| target.0 == protocol).collect()
}

/// All but SCTP, whose sockets take an ICMP message for something that may pass
/// (`sctp_v4_err` in `net/sctp/input.c`).
pub(super) fn refusable(targets: &[Target]) -> Vec<Target> {
    targets.iter().copied().filter(|target| target.0 != Protocol::Sctp).collect()
}

/// Repeats `attempt` until it succeeds or `limit` is over, which its last error ends.
pub(super) fn eventually<T>(limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match attempt() {
            Err(error) if started.elapsed() > limit => return Err(error),
            Err(_) => thread::sleep(PAUSE),
            Ok(value) => return Ok(value),
        }
    }
}
