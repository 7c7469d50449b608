//! Datagrams at a steady rate over one flow: who answers, when that changes, what is lost.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use tokio::net::UdpSocket;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{ByServer, Greeting, millis, runtime, socket, was_ended};

/// How long after the last datagram an answer may still come.
const GRACE: Duration = Duration::from_secs(1);

/// What to send.
#[derive(Debug, Clone)]
pub struct RateSpec {
    pub target: SocketAddr,
    pub per_second: u32,
    /// The sender ends by itself after this.
    pub duration: Duration,
    pub source: Option<SocketAddr>,
    /// The socket has no peer: each datagram names the target, and an answer from anywhere else
    /// counts as an error.
    pub unconnected: bool,
}

impl RateSpec {
    /// From one connected socket, so from one port, for at most 10 minutes.
    pub fn new(target: SocketAddr, per_second: u32) -> Self {
        let duration = Duration::from_secs(600);
        Self { target, per_second, duration, source: None, unconnected: false }
    }

    #[must_use]
    pub fn unconnected(self) -> Self {
        Self { unconnected: true, ..self }
    }
}

/// From when on a server answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub after_ms: u64,
    pub server: String,
}

/// What became of the datagrams.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RateReport {
    pub sent: u64,
    pub answered: u64,
    pub by_server: ByServer,
    /// ICMP errors heard and sends that failed.
    pub errors: u64,
    /// When, since the start, the first and the last datagram without answer was sent.
    pub first_lost_ms: Option<u64>,
    pub last_lost_ms: Option<u64>,
    /// Each time another server answered than before, the first one included.
    pub changes: Vec<Change>,
}

impl RateReport {
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }
}

/// A sender on a thread of its own, in the network namespace of the thread that started it.
#[derive(Debug)]
pub struct UdpRate {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<RateReport>>,
}

impl UdpRate {
    pub fn start(spec: RateSpec) -> Result<Self> {
        let runtime = runtime().context("runtime of a datagram sender")?;
        let socket = runtime.block_on(async {
            if spec.unconnected {
                socket::unconnected_udp(spec.target, spec.source)
            } else {
                socket::connected_udp(spec.target, spec.source)
            }
        });
        let socket = socket.with_context(|| format!("UDP socket to {}", spec.target))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name(format!("datagrams {}", spec.target))
            .spawn(move || runtime.block_on(run(&spec, &socket, &stopped)))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends the sending, waits for late answers and reports.
    pub fn stop(mut self) -> Result<RateReport> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a sender ends once")?;
        thread.join().map_err(|_| anyhow!("the datagram sender's thread panicked"))
    }
}

impl Drop for UdpRate {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// When each datagram was sent, and whether it was answered.
#[derive(Debug, Default)]
struct Log {
    sent: Vec<(Duration, bool)>,
    report: RateReport,
}

impl Log {
    fn answer(&mut self, reply: &io::Result<Greeting>, now: Duration) {
        let Ok(greeting) = reply else {
            self.report.errors += 1;
            return;
        };
        let number = greeting.echo.parse::<usize>();
        let Some(entry) = number.ok().and_then(|number| self.sent.get_mut(number)) else { return };
        // A datagram answered twice counts once.
        if std::mem::replace(&mut entry.1, true) {
            return;
        }
        let report = &mut self.report;
        report.answered += 1;
        *report.by_server.entry(greeting.server.clone()).or_default() += 1;
        if report.changes.last().is_none_or(|last| last.server != greeting.server) {
            let server = greeting.server.clone();
            report.changes.push(Change { after_ms: millis(now), server });
        }
    }

    fn finish(mut self) -> RateReport {
        let lost = || self.sent.iter().filter(|(_, answered)| !answered).map(|(at, _)| millis(*at));
        self.report.first_lost_ms = lost().next();
        self.report.last_lost_ms = lost().next_back();
        self.report.sent = self.sent.len() as u64;
        self.report
    }
}

async fn run(spec: &RateSpec, socket: &UdpSocket, stop: &AtomicBool) -> RateReport {
    let started = Instant::now();
    let mut log = Log::default();
    let mut ticks = interval(Duration::from_secs(1) / spec.per_second.max(1));
    // After a stall the rate goes on; a burst would measure the burst.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stop.load(Ordering::Relaxed) && started.elapsed() < spec.duration {
        tokio::select! {
            _ = ticks.tick() => {
                let number = log.sent.len().to_string();
                log.sent.push((started.elapsed(), false));
                let sent = if spec.unconnected {
                    socket.send_to(number.as_bytes(), spec.target).await
                } else {
                    socket.send(number.as_bytes()).await
                };
                if let Err(error) = sent {
                    log.report.errors += 1;
                    if was_ended(&error) && socket.connect(spec.target).await.is_err() {
                        log.report.errors += 1;
                    }
                }
            }
            reply = receive(spec, socket) => log.answer(&reply, started.elapsed()),
        }
    }
    let late = async {
        while log.sent.iter().any(|(_, answered)| !answered) {
            let reply = receive(spec, socket).await;
            log.answer(&reply, started.elapsed());
        }
    };
    // Elapsing means that the rest is lost.
    let _ = timeout(GRACE, late).await;
    log.finish()
}

async fn receive(spec: &RateSpec, socket: &UdpSocket) -> io::Result<Greeting> {
    let mut buffer = [0; 1024];
    let (length, from) = socket.recv_from(&mut buffer).await?;
    if spec.unconnected && from != spec.target {
        return Err(io::Error::other(format!("an answer from {from}")));
    }
    serde_json::from_slice(&buffer[..length]).map_err(io::Error::other)
}
