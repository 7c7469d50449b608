//! `cargo xtask demo`: the daemon at work, in under a minute.

use std::ffi::OsString;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::guest::{Kernel, Spec};
use crate::mode::Mode;
use crate::{ebpf, place, setup, shell};

/// Show the daemon at work: two simulated nodes, Services, a few thousand connections
///
/// Builds the daemon and the test bed, starts a test API server and the daemon on two nodes,
/// sends connections from pods, nodes and outside over IPv4 and IPv6, prints who answered, then
/// changes an endpoint and shows how soon traffic follows. In ebpf mode on this machine's own
/// kernel, as root, in network namespaces; in ipvs mode in a guest that has IPVS.
///
/// The exit code is 0 when nothing failed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data plane to show
    #[arg(long, value_enum, default_value_t = Mode::Ebpf)]
    proxy_mode: Mode,
    /// Boot this kernel and show it there [default: none in ebpf mode, 6.1 in ipvs mode]
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Connections to each frontend from each kind of client
    #[arg(long, value_name = "N", default_value_t = 80)]
    connections: usize,
}

/// Runs the command.
///
/// # Errors
/// When something does not build, or the guest does not come up.
pub fn run(args: &Args) -> Result<ExitCode> {
    let kernel = match args.proxy_mode {
        Mode::Ipvs => Some(args.kernel.unwrap_or(Kernel::V6_1)),
        Mode::Ebpf => args.kernel,
    };
    if kernel.is_some() {
        setup::packages_for_guests()?;
    }
    let object = match args.proxy_mode {
        Mode::Ipvs => None,
        Mode::Ebpf => Some(ebpf::build()?),
    };
    let mut cargo = shell::cargo();
    cargo.current_dir(place::repo()).args([
        "build",
        "-p",
        "proxy-daemon",
        "--bin",
        "proxy-daemon",
        "-p",
        "proxy-tests",
        "--bin",
        "demo",
    ]);
    if !shell::visibly(&mut cargo)? {
        bail!("the demo does not build; cargo's messages are above");
    }
    let built = place::target().join("debug");
    let mode = match args.proxy_mode {
        Mode::Ipvs => "--proxy-mode=ipvs",
        Mode::Ebpf => "--proxy-mode=ebpf",
    };
    let command: Vec<OsString> = vec![
        built.join("demo").into(),
        "--daemon".into(),
        built.join("proxy-daemon").into(),
        mode.into(),
        "--connections".into(),
        args.connections.to_string().into(),
    ];
    let env: Vec<(String, OsString)> =
        object.map(|object| (ebpf::OBJECT_ENV.to_owned(), object.into())).into_iter().collect();
    let Some(kernel) = kernel else {
        let status = Command::new(&command[0])
            .args(&command[1..])
            .envs(env)
            .status()
            .context("cannot start the demo")?;
        return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    };
    let spec = Spec { timeout: Duration::from_secs(300), env, ..Spec::new(kernel, command)? };
    Ok(ExitCode::from(spec.run()?.code))
}
