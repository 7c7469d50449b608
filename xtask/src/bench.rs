//! `cargo xtask bench`: the daemon against its peers, in a guest; ebpf mode's programs here.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::{Kernel, Spec};
use crate::mode::Mode;
use crate::{ebpf, place, setup, shell};

/// Measure the daemon against kube-proxy's iptables rules in a guest, or ebpf mode here
///
/// In ipvs mode: builds with optimisations, boots one guest, measures both in turn, and writes
/// results.json, results.md, update.svg and connect.svg. The guest is emulated: compare the
/// two, not a number with hardware's.
///
/// In ebpf mode: on this machine's own kernel, as root, what a connect, a packet and a change of
/// the maps cost; writes ebpf.json and ebpf.md. docs/benchmarks.md says what is measured.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data plane to measure
    #[arg(long, value_enum, default_value_t = Mode::Ipvs)]
    proxy_mode: Mode,
    /// Numbers of Services, each with 10 endpoints [default: 10,1000,5000; 1,10000 in ebpf mode]
    #[arg(long, value_name = "N,...")]
    sizes: Option<String>,
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
    let out = args.out.clone().unwrap_or_else(|| place::target().join("bench"));
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let out = out.canonicalize()?;
    match args.proxy_mode {
        Mode::Ipvs => in_guest(args, out),
        Mode::Ebpf => here(args, &out),
    }
}

fn here(args: &Args, out: &Path) -> Result<ExitCode> {
    let object = ebpf::build()?;
    let mut cargo = shell::cargo();
    cargo.current_dir(place::repo()).args(["build", "--release", "-p", "bench"]);
    if !shell::visibly(&mut cargo)? {
        bail!("the build failed");
    }
    let mut bench = Command::new(place::target().join("release/bench"));
    bench.arg("ebpf").arg("--out").arg(out).env(ebpf::OBJECT_ENV, object);
    if let Some(sizes) = &args.sizes {
        bench.args(["--sizes", sizes]);
    }
    let measured = shell::visibly(&mut bench)?;
    println!("results: {}", out.display());
    Ok(if measured { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn in_guest(args: &Args, out: PathBuf) -> Result<ExitCode> {
    setup::packages_for_guests()?;
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
        args.sizes.as_deref().unwrap_or("10,1000,5000").into(),
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
