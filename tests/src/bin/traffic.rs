//! The test bed's server and clients as one program, for processes that need a cgroup or
//! a life of their own. Reports are JSON on standard output.

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use proxy_tests::traffic::{
    Close, ConnectSpec, Listen, Protocol, RateSpec, Server, StreamChecker, StreamSpec, UdpRate,
    connect, parse_endpoint,
};
use serde::Serialize;

/// Send and answer test traffic
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Greet and echo; prints the bound addresses when ready
    Serve {
        /// What it calls itself towards clients
        #[arg(long)]
        name: String,
        /// PROTOCOL:ADDRESS:PORT, as tcp:0.0.0.0:8080 or udp:[::]:53 (repeat for more)
        #[arg(long, required = true, value_parser = parse_endpoint)]
        listen: Vec<(Protocol, SocketAddr)>,
        /// Ends after this long
        #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
        seconds: u64,
    },
    /// Open many short connections, or send single datagrams
    Connect {
        /// PROTOCOL:ADDRESS:PORT
        #[arg(value_parser = parse_endpoint)]
        target: (Protocol, SocketAddr),
        #[arg(long, default_value_t = 1)]
        count: usize,
        #[arg(long, default_value_t = 1)]
        concurrency: usize,
        #[arg(long, value_name = "MS", default_value_t = 2000)]
        timeout: u64,
        /// Time for all of them
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        seconds: u64,
        /// ADDRESS:PORT; port 0 lets the kernel choose
        #[arg(long)]
        source: Option<SocketAddr>,
        /// The client closes first, which leaves its port in TIME_WAIT
        #[arg(long)]
        client_closes: bool,
    },
    /// Keep one connection busy and report whether it lived
    Stream {
        /// PROTOCOL:ADDRESS:PORT
        #[arg(value_parser = parse_endpoint)]
        target: (Protocol, SocketAddr),
        #[arg(long, value_name = "MS", default_value_t = 50)]
        interval: u64,
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        seconds: u64,
        #[arg(long)]
        source: Option<SocketAddr>,
    },
    /// Send datagrams of one flow at a steady rate
    Rate {
        target: SocketAddr,
        #[arg(long, default_value_t = 20)]
        per_second: u32,
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        seconds: u64,
        #[arg(long)]
        source: Option<SocketAddr>,
    },
}

fn print(report: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, report)?;
    writeln!(out)?;
    Ok(())
}

fn run(command: Command) -> Result<bool> {
    match command {
        Command::Serve { name, listen, seconds } => {
            let listen: Vec<Listen> = listen
                .into_iter()
                .map(|(protocol, address)| Listen { protocol, address })
                .collect();
            let server = Server::start(&name, &listen)?;
            print(&server.addresses())?;
            thread::sleep(Duration::from_secs(seconds));
            Ok(true)
        }
        Command::Connect {
            target,
            count,
            concurrency,
            timeout,
            seconds,
            source,
            client_closes,
        } => {
            let spec = ConnectSpec {
                source,
                deadline: Duration::from_secs(seconds),
                close: if client_closes { Close::ClientFirst } else { Close::ServerFirst },
                ..ConnectSpec::new(target.0, target.1, count)
                    .concurrency(concurrency)
                    .timeout(Duration::from_millis(timeout))
            };
            let report = connect(&spec)?;
            print(&report)?;
            Ok(report.failed() == 0)
        }
        Command::Stream { target, interval, seconds, source } => {
            let checker = StreamChecker::start(StreamSpec {
                protocol: target.0,
                interval: Duration::from_millis(interval),
                source,
                ..StreamSpec::new(target.1)
            })?;
            thread::sleep(Duration::from_secs(seconds));
            let report = checker.stop()?;
            print(&report)?;
            Ok(report.failure.is_none())
        }
        Command::Rate { target, per_second, seconds, source } => {
            let sender = UdpRate::start(RateSpec { source, ..RateSpec::new(target, per_second) })?;
            thread::sleep(Duration::from_secs(seconds));
            let report = sender.stop()?;
            print(&report)?;
            Ok(report.lost() == 0)
        }
    }
}

/// 0: all well; 1: traffic failed, as reported; 2: it could not be tried.
fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
