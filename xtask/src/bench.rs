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
/// results.json, results.md, update.svg, connect.svg and rate.svg. The guest is emulated: compare
/// the two, not a number with hardware's.
///
/// In ebpf mode: on this machine's own kernel, as root, in network namespaces. The same comparison
/// first, then what a connect, a packet and a change of the maps cost, in ebpf.json and ebpf.md.
/// docs/benchmarks.md says what is measured.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data plane to measure
    #[arg(long, value_enum, default_value_t = Mode::Ipvs)]
    proxy_mode: Mode,
    /// Numbers of Services [default: 10,1000,5000; 1,100,1000,10000 in ebpf mode]
    #[arg(long, value_name = "N,...")]
    sizes: Option<String>,
    /// Endpoints of each Service
    #[arg(long, value_name = "N", default_value_t = 10)]
    endpoints: usize,
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
    setup::packages()?;
    let object = ebpf::build()?;
    let programs = build()?;
    let run = |arguments: &mut Command| {
        if shell::visibly(arguments.env(ebpf::OBJECT_ENV, &object))? {
            return Ok(());
        }
        bail!("the measurement failed")
    };
    let bench = || Command::new(programs.join("bench"));
    run(bench().args(comparison(args, &programs, "ebpf", "1,100,1000,10000", out)))?;
    run(bench().arg("report").arg(out))?;
    run(bench().arg("ebpf").arg("--out").arg(out))?;
    println!("results: {}", out.display());
    Ok(ExitCode::SUCCESS)
}

/// With optimisations; the directory with the programs.
fn build() -> Result<PathBuf> {
    let mut cargo = shell::cargo();
    // ipvs mode needs no eBPF programs, and ebpf mode's are named in the environment: the plain
    // build serves.
    let arguments = ["build", "--release", "-p", "proxy-daemon", "-p", "bench"];
    if !shell::visibly(cargo.current_dir(place::repo()).args(arguments))? {
        bail!("the build failed");
    }
    Ok(place::target().join("release").canonicalize()?)
}

/// Arguments of the program that compares.
fn comparison(args: &Args, programs: &Path, mode: &str, sizes: &str, out: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![
        "measure".into(),
        "--daemon".into(),
        programs.join("proxy-daemon").into(),
        "--mode".into(),
        mode.into(),
        "--out".into(),
        out.into(),
        "--sizes".into(),
        args.sizes.as_deref().unwrap_or(sizes).into(),
        "--endpoints".into(),
        args.endpoints.to_string().into(),
    ];
    if let Some(rounds) = args.rounds {
        arguments.extend(["--rounds".into(), rounds.to_string().into()]);
    }
    arguments
}

fn in_guest(args: &Args, out: PathBuf) -> Result<ExitCode> {
    setup::packages_for_guests()?;
    let programs = build()?;
    let bench = programs.join("bench");
    let mut command: Vec<OsString> = vec![bench.clone().into()];
    command.extend(comparison(args, &programs, "ipvs", "10,1000,5000", &out));
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
