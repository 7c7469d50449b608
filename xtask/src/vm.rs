//! `cargo xtask vm`: one command on a guest kernel.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use crate::guest::{Kernel, Spec};
use crate::setup;

/// Run a command as root on a guest kernel, with this machine's files at their own paths
///
/// The guest sees this machine's root file system: what it writes goes to memory and is gone
/// with it, except below --out. Programs built here run there as they are. It has loopback
/// and no network card. `modprobe` finds every module of Debian's kernel: ip_vs, dummy, sctp,
/// veth. cgroup v2 is at /sys/fs/cgroup, BPF's file system at /sys/fs/bpf.
///
/// Output comes live, and the exit code is the command's.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask vm -- sh -c 'modprobe ip_vs && ipvsadm -Ln && uname -r'
  cargo xtask vm --kernel 6.12 --cpus 1 --out /tmp/results -- sh -c 'ip -d link > $PROXY_VM_OUT/links'
  cargo xtask vm --env RUST_LOG=debug -- target/debug/proxy-daemon --version

The command's environment: PATH and HOME as here, PROXY_VM=1, PROXY_VM_KERNEL (6.1 or 6.12),
PROXY_VM_OUT (with --out), and what --env gives; nothing else is inherited.

Timings in an emulated guest are 10 to 30 times those of hardware: compare within one run.
Kernels are kept below ~/.cache/node-dataplane (PROXY_CACHE_DIR overrides).")]
pub struct Args {
    /// Kernel to boot
    #[arg(long, value_enum, default_value_t = Kernel::V6_1)]
    kernel: Kernel,
    /// Memory of the guest; files it writes live in it too
    #[arg(long, value_name = "MiB", default_value_t = 2048)]
    memory: u32,
    /// Virtual processors
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// Directory the guest may write results to: same path there, named by PROXY_VM_OUT
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Environment variable for the command (repeat for more)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, OsString)>,
    /// End the guest after this long
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Command and its arguments, after `--`
    #[arg(required = true, last = true, value_name = "CMD ARGS")]
    command: Vec<OsString>,
}

fn key_value(text: &str) -> Result<(String, OsString), String> {
    let (key, value) = text.split_once('=').ok_or("want KEY=VALUE")?;
    let name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if key.is_empty() || !key.chars().all(name) || key.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(format!("{key:?} is not a variable name"));
    }
    Ok((key.to_owned(), value.into()))
}

/// Runs the command and passes its exit code on.
///
/// # Errors
/// When there is no exit code to pass on: the guest did not come up, panicked, or exceeded
/// its time.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::packages_for_guests()?;
    let spec = Spec {
        memory: args.memory,
        cpus: args.cpus,
        timeout: Duration::from_secs(args.timeout),
        out: args.out.clone(),
        env: args.env.clone(),
        ..Spec::new(args.kernel, args.command.clone())?
    };
    Ok(ExitCode::from(spec.run()?.code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_arguments() {
        assert_eq!(key_value("A_1=x=y").unwrap(), ("A_1".to_owned(), OsString::from("x=y")));
        for bad in ["novalue", "=x", "1A=x", "A-B=x"] {
            assert!(key_value(bad).is_err(), "{bad}");
        }
    }
}
