//! Many connections (or single datagrams), counted by who answered and how they failed.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::server::CLOSE_REQUEST;
use super::{ByServer, BySource, Failure, FailureKind, Greeting, Protocol, runtime, socket};

/// How long a fixed source port is waited for when its last connection is still closing.
const PORT_WAIT: Duration = Duration::from_secs(1);
/// Failures kept word by word; all are counted.
const EXAMPLES: usize = 5;

/// Who ends a connection once it has been greeted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Close {
    /// The server, so that the client's port can be used again at once.
    #[default]
    ServerFirst,
    /// The client, which leaves its port in TIME_WAIT.
    ClientFirst,
}

/// What to send.
#[derive(Debug, Clone)]
pub struct ConnectSpec {
    pub protocol: Protocol,
    pub target: SocketAddr,
    /// Connections in all; for UDP datagrams, each from a socket of its own.
    pub count: usize,
    /// Connections open at one time.
    pub concurrency: usize,
    /// For one connection, from the first packet to the server's greeting.
    pub timeout: Duration,
    /// For all of them; what has not begun by then is not begun.
    pub deadline: Duration,
    /// Source address, and port where that is not 0.
    pub source: Option<SocketAddr>,
    pub close: Close,
}

impl ConnectSpec {
    /// One connection at a time, 2 s for each, 60 s for all.
    pub fn new(protocol: Protocol, target: SocketAddr, count: usize) -> Self {
        Self {
            protocol,
            target,
            count,
            concurrency: 1,
            timeout: Duration::from_secs(2),
            deadline: Duration::from_secs(60),
            source: None,
            close: Close::default(),
        }
    }

    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency.max(1);
        self
    }

    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    pub fn source(mut self, source: SocketAddr) -> Self {
        self.source = Some(source);
        self
    }
}

/// Microseconds from the first packet to the established connection (UDP: to the answer).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Latency {
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

impl Latency {
    fn of(mut sample: Vec<u64>) -> Self {
        sample.sort_unstable();
        let Some(&max_us) = sample.last() else { return Self::default() };
        // The nearest rank, which is always a measured value.
        let rank = |percent: usize| sample[(sample.len() * percent).div_ceil(100).max(1) - 1];
        Self { p50_us: rank(50), p90_us: rank(90), p99_us: rank(99), max_us }
    }
}

/// What became of them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ConnectReport {
    pub attempted: u64,
    pub succeeded: u64,
    pub by_server: ByServer,
    pub by_source: BySource,
    pub failures: BTreeMap<FailureKind, u64>,
    /// The first few failures in words.
    pub examples: Vec<String>,
    pub latency: Latency,
    pub took_ms: u64,
}

impl ConnectReport {
    pub fn failed(&self) -> u64 {
        self.attempted - self.succeeded
    }

    /// Failures of one kind.
    pub fn count(&self, kind: FailureKind) -> u64 {
        self.failures.get(&kind).copied().unwrap_or(0)
    }
}

/// Sends what `spec` says from the calling thread's network namespace, and waits for it.
pub fn connect(spec: &ConnectSpec) -> Result<ConnectReport> {
    let runtime = runtime().context("runtime of a test client")?;
    Ok(runtime.block_on(run(spec)))
}

async fn run(spec: &ConnectSpec) -> ConnectReport {
    let started = Instant::now();
    let mut report = ConnectReport::default();
    let mut sample = Vec::new();
    let attempts = (0..spec.count)
        .take_while(|_| started.elapsed() < spec.deadline)
        .map(|number| attempt(spec, number));
    let mut outcomes = futures::stream::iter(attempts).buffer_unordered(spec.concurrency);
    while let Some(outcome) = outcomes.next().await {
        report.attempted += 1;
        match outcome {
            Ok((greeting, latency)) => {
                report.succeeded += 1;
                *report.by_server.entry(greeting.server).or_default() += 1;
                *report.by_source.entry(greeting.peer.ip()).or_default() += 1;
                sample.push(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
            }
            Err(failure) => {
                *report.failures.entry(failure.kind).or_default() += 1;
                if report.examples.len() < EXAMPLES {
                    report.examples.push(failure.detail);
                }
            }
        }
    }
    report.latency = Latency::of(sample);
    report.took_ms = super::millis(started.elapsed());
    report
}

async fn attempt(spec: &ConnectSpec, number: usize) -> Result<(Greeting, Duration), Failure> {
    let what = format!("{} {}", spec.protocol, spec.target);
    let exchange = async {
        if spec.protocol == Protocol::Udp {
            datagram(spec, number).await
        } else {
            connection(spec).await
        }
    };
    match timeout(spec.timeout, exchange).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Failure::io(&what, &error)),
        Err(_) => Err(Failure::timeout(&what, spec.timeout)),
    }
}

async fn connection(spec: &ConnectSpec) -> io::Result<(Greeting, Duration)> {
    let (stream, latency) = open(spec).await?;
    let mut stream = BufReader::new(stream);
    let greeting = read_greeting(&mut stream).await?;
    if spec.close == Close::ServerFirst {
        stream.write_all(CLOSE_REQUEST).await?;
        // A reset in the closing is no failure of the connection, but anything sent is.
        let mut rest = [0; 1];
        if stream.read(&mut rest).await.unwrap_or(0) != 0 {
            return Err(io::Error::other("the server echoed the request to close"));
        }
    }
    Ok((greeting, latency))
}

/// Waits for a fixed source port that the previous connection has not quite left.
async fn open(spec: &ConnectSpec) -> io::Result<(TcpStream, Duration)> {
    let first = Instant::now();
    loop {
        let started = Instant::now();
        match socket::connected_stream(spec.protocol, spec.target, spec.source).await {
            Ok(stream) => return Ok((stream, started.elapsed())),
            Err(error) if port_is_busy(&error) && first.elapsed() < PORT_WAIT => {
                sleep(Duration::from_millis(1)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

fn port_is_busy(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// The first line a server sends.
pub(super) async fn read_greeting(stream: &mut BufReader<TcpStream>) -> io::Result<Greeting> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_str(&line).map_err(io::Error::other)
}

async fn datagram(spec: &ConnectSpec, number: usize) -> io::Result<(Greeting, Duration)> {
    let socket = socket::connected_udp(spec.target, spec.source)?;
    let text = number.to_string();
    let started = Instant::now();
    match socket.send(text.as_bytes()).await {
        // A filter on the sender's own host took the packet (`nf_hook_slow`). Whether it
        // answers, as one that rejects does, or stays silent shows in what is received.
        Err(error) if error.raw_os_error() == Some(nix::libc::EPERM) => {}
        sent => drop(sent?),
    }
    let mut buffer = [0; 1024];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let greeting: Greeting =
            serde_json::from_slice(&buffer[..length]).map_err(io::Error::other)?;
        // With a fixed source port a late answer to an earlier datagram may come first.
        if greeting.echo == text {
            return Ok((greeting, started.elapsed()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let latency = Latency::of((1..=200).rev().collect());
        assert_eq!(latency, Latency { p50_us: 100, p90_us: 180, p99_us: 198, max_us: 200 });
        assert_eq!(Latency::of(vec![7]).p50_us, 7);
        assert_eq!(Latency::of(Vec::new()), Latency::default());
    }
}
