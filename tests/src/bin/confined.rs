//! Starts a program the way a container runtime would: in a root file system that holds its
//! libraries and nothing else, read-only, with the capabilities that are named and no other.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use caps::{CapSet, Capability, CapsHashSet};
use clap::Parser;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Start a program in a minimal root file system with exactly these capabilities
#[derive(Debug, Parser)]
struct Args {
    /// Its capabilities, without the prefix CAP_
    #[arg(long, value_name = "NAMES", value_delimiter = ',', required = true)]
    capabilities: Vec<String>,
    /// FROM or FROM:TO: a file or directory to see besides, read-only
    #[arg(long = "mount", value_name = "FROM[:TO]")]
    mounts: Vec<String>,
    program: PathBuf,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

const PROGRAM: &str = "/usr/local/bin/program";
const NONE: Option<&str> = None;

fn main() -> ExitCode {
    let Err(error) = run(&Args::parse());
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

fn run(args: &Args) -> Result<Infallible> {
    let capabilities = parse(&args.capabilities)?;
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .context("private mounts")?;
    let root = Root::new()?;
    for library in libraries(&args.program)? {
        root.show(&library, &library, MsFlags::empty())?;
    }
    root.show(&args.program, Path::new(PROGRAM), MsFlags::empty())?;
    root.show(Path::new("/proc"), Path::new("/proc"), MsFlags::MS_REC)?;
    // As runtimes do it, where nothing is privileged.
    root.show(Path::new("/proc/sys"), Path::new("/proc/sys"), MsFlags::empty())?;
    root.read_only(Path::new("/proc/sys"))?;
    root.show(Path::new("/sys"), Path::new("/sys"), MsFlags::empty())?;
    root.read_only(Path::new("/sys"))?;
    // The DaemonSet's own volume, and the only one that can be written to.
    let sysctls = Path::new("/host/proc/sys/net");
    root.show(Path::new("/proc/sys/net"), sysctls, MsFlags::empty())?;
    for wanted in &args.mounts {
        let (from, to) = wanted.split_once(':').unwrap_or((wanted, wanted));
        // What is mounted below stays as it is.
        root.show(Path::new(from), Path::new(to), MsFlags::MS_REC)?;
        root.read_only(Path::new(to))?;
    }
    root.enter()?;
    keep_only(&capabilities)?;
    let error = Command::new(PROGRAM).args(&args.arguments).exec();
    Err(error).with_context(|| format!("starting {}", args.program.display()))
}

fn parse(names: &[String]) -> Result<CapsHashSet> {
    let parse = |name: &String| {
        format!("CAP_{name}").parse().map_err(|_| anyhow::anyhow!("no capability {name}"))
    };
    names.iter().map(parse).collect()
}

/// For a program of root's, the bounding set is what it starts with (capabilities(7)).
fn keep_only(wanted: &CapsHashSet) -> Result<()> {
    for capability in caps::runtime::thread_all_supported() {
        if !wanted.contains(&capability) && caps::has_cap(None, CapSet::Bounding, capability)? {
            caps::drop(None, CapSet::Bounding, capability)
                .with_context(|| format!("dropping {capability}"))?;
        }
    }
    let kept: CapsHashSet = caps::read(None, CapSet::Bounding)?;
    let lacking: Vec<&Capability> = wanted.difference(&kept).collect();
    if !lacking.is_empty() {
        bail!("this process has no {lacking:?} to give");
    }
    caps::clear(None, CapSet::Inheritable)?;
    nix::sys::prctl::set_no_new_privs().context("no new privileges")
}

/// The shared libraries of a program, and its loader.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8(output.stdout)?;
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

/// An empty root file system to be.
struct Root(PathBuf);

impl Root {
    /// In memory; it goes with the mount namespace.
    fn new() -> Result<Self> {
        let at = PathBuf::from("/run");
        mount(Some("root"), &at, Some("tmpfs"), MsFlags::empty(), NONE).context("a tmpfs")?;
        Ok(Self(at))
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Makes a file or directory of the present root visible in the new one.
    fn show(&self, from: &Path, to: &Path, flags: MsFlags) -> Result<()> {
        let at = self.at(to);
        let what = || format!("showing {} at {}", from.display(), to.display());
        let is_dir = fs::metadata(from).with_context(what)?.is_dir();
        if !at.exists() {
            let parent = if is_dir { Some(at.as_path()) } else { at.parent() };
            fs::create_dir_all(parent.unwrap_or(&at)).with_context(what)?;
            if !is_dir {
                File::create(&at).with_context(what)?;
            }
        }
        mount(Some(from), &at, NONE, MsFlags::MS_BIND | flags, NONE).with_context(what)
    }

    fn read_only(&self, path: &Path) -> Result<()> {
        remount_read_only(&self.at(path)).with_context(|| format!("{} read-only", path.display()))
    }

    fn enter(self) -> Result<()> {
        nix::unistd::chroot(&self.0).context("chroot")?;
        std::env::set_current_dir("/")?;
        remount_read_only(Path::new("/")).context("a read-only root")
    }
}

fn remount_read_only(at: &Path) -> nix::Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(NONE, at, NONE, flags, NONE)
}
