//! `cargo xtask demo`: the daemon at work, in a guest, in under a minute.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::guest::{Kernel, Spec};
use crate::{place, setup, shell};

/// Show the daemon at work: two simulated nodes, Services, a few thousand connections
///
/// Builds the daemon and the test bed, boots a guest with IPVS, starts a test API server and
/// the daemon on two nodes, sends connections from pods, nodes and outside over IPv4 and
/// IPv6, prints who answered, then changes an endpoint and shows how soon traffic follows.
///
/// The exit code is 0 when nothing failed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data plane to show
    #[arg(long, value_enum, default_value_t = Mode::Ipvs)]
    proxy_mode: Mode,
    /// Kernel to boot
    #[arg(long, value_enum, default_value_t = Kernel::V6_1)]
    kernel: Kernel,
    /// Connections to each frontend from each kind of client
    #[arg(long, value_name = "N", default_value_t = 80)]
    connections: usize,
}

/// Data planes that can be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// IPVS over netlink
    Ipvs,
}

/// Runs the command.
///
/// # Errors
/// When something does not build, or the guest does not come up.
pub fn run(args: &Args) -> Result<ExitCode> {
    let Mode::Ipvs = args.proxy_mode;
    setup::packages_for_guests()?;
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
    let command: Vec<OsString> = vec![
        built.join("demo").into(),
        "--daemon".into(),
        built.join("proxy-daemon").into(),
        "--connections".into(),
        args.connections.to_string().into(),
    ];
    let spec = Spec { timeout: Duration::from_secs(300), ..Spec::new(args.kernel, command)? };
    Ok(ExitCode::from(spec.run()?.code))
}
