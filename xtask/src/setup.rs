//! `cargo xtask setup`: finds or installs what the other commands need.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::guest::Kernel;
use crate::{apt, ebpf, kubectl, place, shell};

/// Find or install everything the other commands need
///
/// Debian packages, guest kernels (unpacked below ~/.cache/node-dataplane, never installed),
/// and a tool chain for eBPF: rustup's nightly with rust-src and bpf-linker where they are
/// present, else Debian's rustc-web and a bpf-linker built here. Only what is missing is
/// fetched; the second run takes a second.
///
/// The other commands do the parts they need by themselves.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Report only; exit code 1 when something is missing
    #[arg(long)]
    check: bool,
}

/// Debian packages and what asks for them.
const PACKAGES: [(&str, &str); 17] = [
    ("gcc", "links every Rust program, and builds the TLS library's assembly"),
    ("libc6-dev", "linking"),
    ("qemu-system-x86", "runs the guests"),
    ("busybox-static", "the guests' initramfs"),
    ("xz-utils", "reads compressed kernel modules"),
    ("kmod", "depmod here, modprobe in the guests"),
    ("util-linux", "setpriv, which ends a guest with its parent"),
    ("iproute2", "network namespaces and links in tests"),
    ("procps", "sysctl in tests"),
    ("ipvsadm", "tests compare its view of IPVS with ours"),
    ("nftables", "tests read our table back with it"),
    ("iptables", "the peer in benchmarks"),
    ("ipset", "switching from kube-proxy is tested with its sets"),
    ("conntrack", "tests look at tracked flows"),
    ("bpftool", "tests look at loaded programs and maps"),
    ("tcpdump", "tests look at packets on the wire"),
    ("prometheus", "promtool checks the metrics page"),
];

/// Those of [`PACKAGES`] without which no guest boots.
const GUEST_PACKAGES: [&str; 6] =
    ["qemu-system-x86", "busybox-static", "xz-utils", "kmod", "util-linux", "iproute2"];

/// Runs the command.
///
/// # Errors
/// When something cannot be installed; the message says what to do.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.check {
        return check();
    }
    let start = Instant::now();
    packages()?;
    for kernel in Kernel::ALL {
        let tree = kernel.ensure()?;
        println!("guest kernel {kernel}: {}", tree.release);
    }
    let (compiler, linker) = ebpf::ensure()?;
    println!("eBPF compiler: {compiler}");
    println!("eBPF linker: {}", linker.display());
    println!("kubectl: {}", kubectl::ensure()?.display());
    println!("cache: {}", place::cache()?.display());
    println!("ready after {:.1} s", start.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

/// What the unit tests need beside a tool chain.
///
/// # Errors
/// As [`packages`].
pub fn unit_packages() -> Result<()> {
    apt::install(&apt::missing(&["prometheus"]))
}

/// Installs the Debian packages that are missing, saying what each is for.
///
/// # Errors
/// When apt fails, or without root.
pub fn packages() -> Result<()> {
    let missing = missing_packages();
    for (name, why) in &missing {
        println!("package {name} is missing: {why}");
    }
    let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
    apt::install(&names)?;
    println!("packages: {} present, {} installed", PACKAGES.len() - names.len(), names.len());
    Ok(())
}

/// Installs what it takes to boot a guest, silently when all is there.
///
/// # Errors
/// As [`packages`].
pub fn packages_for_guests() -> Result<()> {
    apt::install(&apt::missing(&GUEST_PACKAGES))
}

fn missing_packages() -> Vec<(&'static str, &'static str)> {
    let names: Vec<_> = PACKAGES.iter().map(|(name, _)| *name).collect();
    let missing = apt::missing(&names);
    PACKAGES.iter().copied().filter(|(name, _)| missing.contains(name)).collect()
}

fn check() -> Result<ExitCode> {
    let mut lacking = 0;
    let mut report = |what: &str, found: Option<String>| {
        if found.is_none() {
            lacking += 1;
        }
        println!("{what}: {}", found.as_deref().unwrap_or("missing"));
    };
    for (name, why) in missing_packages() {
        report(&format!("package {name} ({why})"), None);
    }
    for kernel in Kernel::ALL {
        report(&format!("guest kernel {kernel}"), kernel.find()?.map(|tree| tree.release));
    }
    report("eBPF compiler", ebpf::Compiler::find().map(|compiler| compiler.to_string()));
    report("eBPF linker", ebpf::linker().map(|linker| linker.display().to_string()));
    for component in ["rustfmt", "clippy-driver"] {
        report(component, tool(component).map(|path| path.display().to_string()));
    }
    if lacking == 0 {
        println!("nothing is missing");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{lacking} missing: `cargo xtask setup` gets them");
    Ok(ExitCode::FAILURE)
}

/// A program of the Rust tool chain in use.
fn tool(name: &str) -> Option<PathBuf> {
    let sysroot = shell::output(Command::new("rustc").args(["--print", "sysroot"])).ok()?;
    Some(PathBuf::from(sysroot.trim()).join("bin").join(name)).filter(|path| path.is_file())
}

/// rustfmt and clippy, which a minimal rustup installation lacks.
///
/// # Errors
/// When they are missing and rustup cannot add them.
pub fn lint_components() -> Result<()> {
    if tool("rustfmt").is_some() && tool("clippy-driver").is_some() {
        return Ok(());
    }
    let mut add = Command::new("rustup");
    add.args(["component", "add", "rustfmt", "clippy"]);
    shell::quietly("rustup component add rustfmt clippy", &mut add)
        .context("`cargo xtask lint` needs rustfmt and clippy")
}
