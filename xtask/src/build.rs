//! `cargo xtask build`: the eBPF programs and the daemon.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::{ebpf, place, shell};

/// Build the eBPF programs, then the daemon
///
/// The eBPF object is written to TARGET/bpf/proxy-ebpf, where TARGET is cargo's target
/// directory; beside it, as proxy-ebpf.debug, is the one with debug information.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Build the daemon with optimisations, as it is shipped
    #[arg(long)]
    release: bool,
    /// Build only the eBPF programs
    #[arg(long)]
    ebpf_only: bool,
}

/// Runs the command.
///
/// # Errors
/// When the tool chain cannot be had, or the eBPF programs do not compile.
pub fn run(args: &Args) -> Result<ExitCode> {
    let object = ebpf::build()?;
    println!("{}", object.display());
    if args.ebpf_only {
        return Ok(ExitCode::SUCCESS);
    }
    let mut cargo = shell::cargo();
    cargo.current_dir(place::repo()).args(["build", "-p", "proxy-daemon"]);
    // Embedded into the daemon by its build script.
    cargo.env(ebpf::OBJECT_ENV, object);
    if args.release {
        cargo.arg("--release");
    }
    Ok(if shell::visibly(&mut cargo)? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The daemon as it is shipped, with the eBPF programs inside.
///
/// # Errors
/// As [`run`].
pub fn release() -> Result<PathBuf> {
    let object = ebpf::build()?;
    let mut cargo = shell::cargo();
    cargo.current_dir(place::repo()).args(["build", "--release", "-p", "proxy-daemon"]);
    cargo.env(ebpf::OBJECT_ENV, object);
    if !shell::visibly(&mut cargo)? {
        bail!("the daemon does not build; cargo's messages are above");
    }
    Ok(place::target().join("release/proxy-daemon"))
}
