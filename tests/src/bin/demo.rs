//! `cargo xtask demo`'s part inside the guest.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use proxy_tests::demo::{Settings, run};

/// Two simulated nodes, the daemon on both, Services, traffic, a table
///
/// Needs root and a kernel with IPVS; `cargo xtask demo` brings such a kernel.
#[derive(Debug, Parser)]
struct Args {
    /// The daemon's program
    #[arg(long)]
    daemon: PathBuf,
    /// Connections to each frontend from each kind of client
    #[arg(long, default_value_t = 80)]
    connections: usize,
    /// Where logs are kept
    #[arg(long, default_value = "/tmp/proxy-demo")]
    logs: PathBuf,
}

fn main() -> ExitCode {
    let Args { daemon, connections, logs } = Args::parse();
    match run(&Settings { daemon, connections, logs }) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
