//! The daemon beside kube-proxy's iptables rules: in a guest, or on this machine's own kernel.

use std::fs;
use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};

use crate::network::{Bed, Namespace, server};
use crate::peer::{self, Iptables, LAST, MIDDLE, Ours, PATIENCE, Peer};
use crate::record::{Cost, Mode, Paths, Peers, Run, Sent, Size, Summary};

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Plan {
    /// The daemon's program
    #[arg(long)]
    daemon: PathBuf,
    /// The daemon's mode
    #[arg(long, value_enum, default_value_t = Mode::Ipvs)]
    mode: Mode,
    /// Numbers of Services
    #[arg(long, value_delimiter = ',', default_value = "10,1000,5000")]
    sizes: Vec<usize>,
    /// Endpoints of each Service
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// Endpoint changes at each size; by default fewer where they take long
    #[arg(long)]
    rounds: Option<usize>,
    /// TCP connects to each target
    #[arg(long, default_value_t = 300)]
    connects: usize,
    /// Blocks of 500 short connections to each target
    #[arg(long, default_value_t = 20)]
    blocks: usize,
    /// Directory for `results.json`
    #[arg(long)]
    out: PathBuf,
}

impl Plan {
    fn rounds(&self, services: usize) -> usize {
        self.rounds.unwrap_or(match services {
            0..=100 => 15,
            101..=2000 => 7,
            _ => 3,
        })
    }
}

/// Runs everything and writes the results.
///
/// # Errors
/// When something cannot be set up, or never takes effect.
pub fn run(plan: &Plan) -> Result<()> {
    fs::create_dir_all(&plan.out).with_context(|| format!("cannot make {}", plan.out.display()))?;
    if plan.mode == Mode::Ipvs {
        peer::modules()?;
    }
    let start = Instant::now();
    let mut sizes = plan.sizes.clone();
    sizes.sort_unstable();
    let mut run = Run {
        mode: plan.mode,
        kernel: peer::kernel()?,
        cpus: std::thread::available_parallelism()?.get(),
        iptables: peer::iptables_version()?,
        endpoints: plan.endpoints,
        ..Run::default()
    };
    for services in sizes {
        let found = size(plan, services);
        run.sizes.push(found.with_context(|| format!("with {services} Services"))?);
        run.seconds = start.elapsed().as_secs_f64();
        // After each size: a run that is ended leaves what it found.
        let text = serde_json::to_string(&run)?;
        fs::write(plan.out.join("results.json"), text)?;
    }
    println!("finished after {:.0} s", run.seconds);
    Ok(())
}

fn size(plan: &Plan, services: usize) -> Result<Size> {
    let scale = (services, plan.endpoints);
    let (bed_a, bed_b) = (Bed::new()?, Bed::new()?);
    println!("{services} Services x {} endpoints", plan.endpoints);
    let (mut a, took, cpu) = Iptables::load(&bed_a, scale, server(0)?)?;
    let iptables = cost(took, cpu);
    println!("  loaded: iptables {:.0} ms, {:.0} ms CPU", iptables.ms, iptables.cpu_ms);
    let name = plan.mode.name();
    let (mut b, took, cpu) = Ours::load(&bed_b, (&plan.daemon, plan.mode), scale, server(0)?)?;
    let ours = cost(took, cpu);
    println!("  loaded: {name} {:.0} ms, {:.0} ms CPU", ours.ms, ours.cpu_ms);
    let load = Peers { iptables, ours };
    let mut update: Peers<Vec<Cost>> = Peers::default();
    let mut sent = Vec::new();
    for round in 1..=plan.rounds(services) {
        let sample = change(&mut a, &bed_a.client, plan.mode, round).context("iptables")?;
        update.iptables.push(sample);
        let before = b.sent(&bed_b)?;
        let ours = change(&mut b, &bed_b.client, plan.mode, round);
        let ours = ours.with_context(|| format!("{name}\n{}", b.log()))?;
        update.ours.push(ours);
        let after = b.sent(&bed_b)?;
        let requests = after.requests - before.requests;
        sent.push(Sent { requests, dumps: after.dumps - before.dumps });
        println!(
            "  change {round}: iptables {:.1} ms, {:.1} ms CPU; {name} {:.1} ms, {:.1} ms CPU, \
             {requests} requests",
            sample.ms, sample.cpu_ms, ours.ms, ours.cpu_ms
        );
    }
    bed_a.pin_client()?;
    bed_b.pin_client()?;
    let connect = connects(&[&bed_a.client, &bed_b.client], plan.connects)?;
    for (name, found) in [("iptables", &connect.iptables), (name, &connect.ours)] {
        let median = |samples: &[f64]| Summary::of(samples.iter().copied()).median;
        let [direct, middle, last] = [&found.direct, &found.middle, &found.last].map(|s| median(s));
        println!(
            "  connect: {name} {last:.0} us last, {middle:.0} us middle, {direct:.0} us direct"
        );
    }
    let rate = rates(&[&bed_a.client, &bed_b.client], plan.blocks)?;
    for (name, found) in [("iptables", &rate.iptables), (name, &rate.ours)] {
        let median = |samples: &[f64]| Summary::of(samples.iter().copied()).median;
        let [direct, middle, last] = [&found.direct, &found.middle, &found.last].map(|s| median(s));
        println!(
            "  short connections/s: {name} {last:.0} last, {middle:.0} middle, {direct:.0} direct"
        );
    }
    fs::write(plan.out.join(format!("daemon-{services}.log")), b.log())?;
    Ok(Size { services, load, update, sent, connect, rate })
}

/// Takes the Service's endpoint away, then measures how long a new one takes.
fn change(peer: &mut impl Peer, client: &Namespace, mode: Mode, round: usize) -> Result<Cost> {
    let patience = given_up(mode);
    let end = || Instant::now() + PATIENCE;
    if round > 1 {
        peer.change(None)?;
        peer.settle()?;
    }
    let closed = client.run(move || poll(end(), patience, |result| result.is_err()))?;
    closed.context("the Service without endpoints goes on answering")?;
    let endpoint = server(round)?;
    let open = client.start(move || poll(end(), patience, |result| result.is_ok()))?;
    let start = peer.change(Some(endpoint))?;
    let seen = open.recv()?.with_context(|| format!("{endpoint} never answered"))?;
    let cpu = peer.settle()?;
    Ok(cost(seen.saturating_duration_since(start), cpu))
}

/// A connect that is neither accepted nor refused by then is given up: its first packet
/// fell into the moment of a change (for iptables: between the commits of its two tables), and TCP
/// would repeat it only after a second. Long against a connect on the kernel in question.
const fn given_up(mode: Mode) -> Duration {
    match mode {
        Mode::Ipvs => Duration::from_millis(100),
        Mode::Ebpf => Duration::from_millis(5),
    }
}

/// Between two connects, to leave the processors to those who are measured.
const PAUSE: Duration = Duration::from_millis(1);

/// Connects to the Service [`LAST`] until the result is the wanted one; returns when.
fn poll(
    end: Instant,
    patience: Duration,
    wanted: impl Fn(&std::io::Result<TcpStream>) -> bool,
) -> Result<Instant> {
    loop {
        let result = TcpStream::connect_timeout(&SocketAddr::V4(LAST), patience);
        let now = Instant::now();
        if wanted(&result) {
            return Ok(now);
        }
        if now > end {
            bail!("after {PATIENCE:?} a connect still gives {result:?}");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Connects of one client to one target before it is the next one's turn: their caches are warm
/// as with a client that has much to do, and what the machine does beside hits all alike.
const BLOCK: usize = 20;

/// Connects, `count` of each kind.
fn connects(clients: &[&Namespace; 2], count: usize) -> Result<Peers<Paths>> {
    in_turn(clients, count.div_ceil(BLOCK), |target| {
        (0..BLOCK).map(|_| connect(target).map(micros)).collect()
    })
}

/// Short connections of one client to one target before it is the next one's turn. Their ports
/// (28,000 by default) come around again during a run, as on a busy client.
const SHORT: usize = 500;

/// Blocks of short connections.
fn rates(clients: &[&Namespace; 2], blocks: usize) -> Result<Peers<Paths>> {
    in_turn(clients, blocks, |target| {
        let start = Instant::now();
        (0..SHORT).try_for_each(|_| short(target))?;
        // Exact up to 2^53.
        Ok(vec![(SHORT as f64 / start.elapsed().as_secs_f64()).round()])
    })
}

/// Blocks from both clients in turn to each target in turn: the samples of each.
fn in_turn(
    clients: &[&Namespace; 2],
    blocks: usize,
    block: fn(SocketAddr) -> std::io::Result<Vec<f64>>,
) -> Result<Peers<Paths>> {
    let direct = server(0)?;
    let mut found = [Paths::default(), Paths::default()];
    // The first block warms up.
    for nth in 0..=blocks {
        for (client, found) in clients.iter().zip(&mut found) {
            for (target, samples) in
                [(direct, &mut found.direct), (MIDDLE, &mut found.middle), (LAST, &mut found.last)]
            {
                let took = client.run(move || block(target.into()))?;
                let took = took.with_context(|| format!("connecting to {target}"))?;
                if nth > 0 {
                    samples.extend(took);
                }
            }
        }
    }
    let [iptables, ours] = found;
    Ok(Peers { iptables, ours })
}

/// Connects, reads the server's byte, and closes by a reset, which leaves no port behind that
/// has to wait.
fn short(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
    setsockopt(&stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?;
    stream.read_exact(&mut [0])
}

fn connect(to: SocketAddr) -> std::io::Result<Duration> {
    let start = Instant::now();
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
    let took = start.elapsed();
    drop(stream);
    Ok(took)
}

/// Rounded to what the clock can tell, to keep the file readable.
fn micros(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e7).round() / 10.0
}

fn cost(time: Duration, cpu: Duration) -> Cost {
    Cost { ms: micros(time) / 1e3, cpu_ms: micros(cpu) / 1e3 }
}
