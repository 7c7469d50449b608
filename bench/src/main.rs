//! The benchmark's program: `measure` runs in a guest, `report` reads what it found.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use bench::{ebpf, measure, plot, record::Run, report};
use clap::{Parser, Subcommand};

/// `cargo xtask bench` starts this in a guest.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure; needs root and a kernel with IPVS, and changes nothing outside of network
    /// namespaces of its own. Writes `results.json`.
    Measure(measure::Plan),
    /// Measure ebpf mode's programs on this machine; needs root, and the object in
    /// `PROXY_EBPF_OBJECT`. Writes `ebpf.json` and `ebpf.md`
    Ebpf(ebpf::Plan),
    /// Read `results.json` in DIR, and write the table and the plots beside it
    Report {
        /// Directory with the results
        dir: PathBuf,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Measure(plan) => measure::run(&plan),
        Command::Ebpf(plan) => ebpf::run(&plan),
        Command::Report { dir } => {
            let file = dir.join("results.json");
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let run: Run = serde_json::from_str(&text).context("results.json")?;
            let table = report::table(&run);
            print!("{table}");
            fs::write(dir.join("results.md"), table)?;
            plot::draw(&run, &dir)
        }
    }
}
