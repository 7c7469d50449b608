//! `cargo xtask demo`'s part beside the simulated cluster.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use proxy_tests::demo::{Settings, run};

/// Two simulated nodes, the daemon on both, Services, traffic, a table
///
/// Needs root and, in ipvs mode, a kernel with IPVS, which `cargo xtask demo` brings.
#[derive(Debug, Parser)]
struct Args {
    /// The daemon's program
    #[arg(long)]
    daemon: PathBuf,
    /// Data plane
    #[arg(long, value_enum)]
    proxy_mode: Mode,
    /// Connections to each frontend from each kind of client
    #[arg(long, default_value_t = 80)]
    connections: usize,
    /// Where logs are kept
    #[arg(long, default_value = "/tmp/proxy-demo")]
    logs: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    Ipvs,
    Ebpf,
}

fn main() -> ExitCode {
    let Args { daemon, proxy_mode, connections, logs } = Args::parse();
    let mode = match proxy_mode {
        Mode::Ipvs => "ipvs",
        Mode::Ebpf => "ebpf",
    };
    match run(&Settings { daemon, mode, connections, logs }) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
