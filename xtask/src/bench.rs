//! `cargo xtask bench`: the daemon against its peers, in a guest.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::{Kernel, Spec};
use crate::{place, setup, shell};

/// Measure the daemon against kube-proxy's iptables rules, both in one guest
///
/// Builds with optimisations, boots one guest, measures both in turn, and writes
/// results.json, results.md, update.svg and connect.svg. docs/benchmarks.md says what is
/// measured. The guest is emulated: compare the two, not a number with hardware's.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Numbers of Services, each with 10 endpoints
    #[arg(long, value_name = "N,...", default_value = "10,1000,5000")]
    sizes: String,
    /// Endpoint changes at each size [default: 15, 7 from 101 and 3 from 2001 Services]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Kernel to boot
    #[arg(long, value_enum, default_value_t = Kernel::V6_1)]
    kernel: Kernel,
    /// Directory for the results [default: TARGET/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// End the guest after this long
    #[arg(long, value_name = "SECONDS", default_value_t = 1200)]
    timeout: u64,
}

/// MiB: kernel and program each hold the 5,000 Services' rules, about 100 MB, twice.
const MEMORY: u32 = 4096;

/// Runs the command.
///
/// # Errors
/// When the build fails, or the guest does not finish.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::packages_for_guests()?;
    let out = args.out.clone().unwrap_or_else(|| place::target().join("bench"));
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let out = out.canonicalize()?;
    // ipvs mode needs no eBPF programs: the plain build serves.
    let mut cargo = shell::cargo();
    cargo.current_dir(place::repo()).args([
        "build",
        "--release",
        "-p",
        "proxy-daemon",
        "-p",
        "bench",
    ]);
    if !shell::visibly(&mut cargo)? {
        bail!("the build failed");
    }
    let programs = place::target().join("release").canonicalize()?;
    let bench = programs.join("bench");
    let mut command: Vec<OsString> = vec![bench.clone().into(), "measure".into()];
    command.extend(["--daemon".into(), programs.join("proxy-daemon").into()]);
    command.extend([
        "--out".into(),
        out.clone().into(),
        "--sizes".into(),
        args.sizes.clone().into(),
    ]);
    if let Some(rounds) = args.rounds {
        command.extend(["--rounds".into(), rounds.to_string().into()]);
    }
    let spec = Spec {
        memory: MEMORY,
        timeout: Duration::from_secs(args.timeout),
        out: Some(out.clone()),
        ..Spec::new(args.kernel, command)?
    };
    let code = spec.run()?.code;
    if code != 0 {
        bail!("the measurement failed in the guest (exit code {code})");
    }
    let reported = shell::visibly(Command::new(bench).arg("report").arg(&out))?;
    println!("results: {}", out.display());
    Ok(if reported { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
