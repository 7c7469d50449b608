//! One long connection that must live through whatever happens to the proxy.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::connect::read_greeting;
use super::{Failure, FailureKind, Greeting, Protocol, millis, runtime, socket};

/// What to keep open.
#[derive(Debug, Clone)]
pub struct StreamSpec {
    pub protocol: Protocol,
    pub target: SocketAddr,
    /// Between one echo and the next line.
    pub interval: Duration,
    /// Without an echo for this long the connection counts as lost.
    pub timeout: Duration,
    /// The checker ends by itself after this.
    pub duration: Duration,
    pub source: Option<SocketAddr>,
}

impl StreamSpec {
    /// A TCP line every 50 ms, lost after 5 s without echo, ended after 10 minutes.
    pub fn new(target: SocketAddr) -> Self {
        Self {
            protocol: Protocol::Tcp,
            target,
            interval: Duration::from_millis(50),
            timeout: Duration::from_secs(5),
            duration: Duration::from_secs(600),
            source: None,
        }
    }
}

/// How the connection fared.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StreamReport {
    pub server: String,
    /// The client's address as the server saw it.
    pub peer: SocketAddr,
    pub sent: u64,
    pub echoed: u64,
    /// How it was lost; `None` while it lived to the end.
    pub failure: Option<Failure>,
    /// The longest time one echo took.
    pub longest_gap_ms: u64,
    pub took_ms: u64,
}

/// A connection kept busy on a thread of its own, in the network namespace of the thread
/// that started it.
#[derive(Debug)]
pub struct StreamChecker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<StreamReport>>,
    greeting: Greeting,
}

impl StreamChecker {
    /// Returns once the server has answered.
    pub fn start(spec: StreamSpec) -> Result<Self> {
        let runtime = runtime().context("runtime of a stream checker")?;
        let opening = async {
            let open = socket::connected_stream(spec.protocol, spec.target, spec.source);
            let mut stream = BufReader::new(open.await?);
            let greeting = read_greeting(&mut stream).await?;
            std::io::Result::Ok((stream, greeting))
        };
        let opened = runtime.block_on(async { timeout(spec.timeout, opening).await });
        let (stream, greeting) = opened
            .with_context(|| format!("{}: no greeting in {:?}", spec.target, spec.timeout))?
            .with_context(|| format!("connect to {}", spec.target))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, seen) = (Arc::clone(&stop), greeting.clone());
        let thread = thread::Builder::new()
            .name(format!("stream {}", spec.target))
            .spawn(move || runtime.block_on(keep_busy(&spec, stream, seen, &stopped)))?;
        Ok(Self { stop, thread: Some(thread), greeting })
    }

    /// Who serves it.
    pub fn server(&self) -> &str {
        &self.greeting.server
    }

    /// Closes the connection and says how it fared.
    pub fn stop(mut self) -> Result<StreamReport> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a stream checker ends once")?;
        thread.join().map_err(|_| anyhow!("the stream checker's thread panicked"))
    }
}

impl Drop for StreamChecker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

async fn keep_busy(
    spec: &StreamSpec,
    mut stream: BufReader<TcpStream>,
    greeting: Greeting,
    stop: &AtomicBool,
) -> StreamReport {
    let started = Instant::now();
    let mut report = StreamReport {
        server: greeting.server,
        peer: greeting.peer,
        sent: 0,
        echoed: 0,
        failure: None,
        longest_gap_ms: 0,
        took_ms: 0,
    };
    while !stop.load(Ordering::Relaxed) && started.elapsed() < spec.duration {
        let sent_at = Instant::now();
        report.sent += 1;
        let echo = exchange(&mut stream, report.sent);
        let outcome = timeout(spec.timeout, echo).await;
        report.longest_gap_ms = report.longest_gap_ms.max(millis(sent_at.elapsed()));
        match outcome {
            Ok(Ok(())) => report.echoed += 1,
            Ok(Err(failure)) => report.failure = Some(failure),
            Err(_) => report.failure = Some(Failure::timeout("echo", spec.timeout)),
        }
        if report.failure.is_some() {
            break;
        }
        sleep(spec.interval).await;
    }
    report.took_ms = millis(started.elapsed());
    report
}

async fn exchange(stream: &mut BufReader<TcpStream>, number: u64) -> Result<(), Failure> {
    let line = format!("{number}\n");
    stream.write_all(line.as_bytes()).await.map_err(|error| Failure::io("send", &error))?;
    let mut echo = String::new();
    let length = stream.read_line(&mut echo).await.map_err(|error| Failure::io("echo", &error))?;
    if length == 0 {
        let detail = String::from("the other end closed the connection");
        return Err(Failure { kind: FailureKind::Closed, detail });
    }
    if echo != line {
        let detail = format!("echo of {number} was {echo:?}");
        return Err(Failure { kind: FailureKind::Local, detail });
    }
    Ok(())
}
