//! The eBPF programs: the tool chain that builds them, and the build.
//!
//! Rust's BPF target has no precompiled `core`, so a compiler that takes `-Z` flags and the
//! standard library's sources of exactly its own version are needed. rustup's nightly with
//! rust-src is used where it is installed; else Debian 12's security suite, which carries a
//! whole tool chain of one version for its browsers, serves without a download from
//! anywhere but Debian.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{apt, place, shell};

mod strip;

const TARGET: &str = "bpfel-unknown-none";

/// Debian's compiler, cargo and library sources, all of one version.
const DEBIAN_RUST: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// What bpf-linker is compiled against: the LLVM of Debian's compiler. A newer LLVM reads
/// older bitcode, not the other way round.
const LINKER_NEEDS: [&str; 5] =
    ["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"];
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
const LINKER_VERSION: &str = "^0.13";

/// How the daemon's build script and the tests learn the object's path.
pub const OBJECT_ENV: &str = "PROXY_EBPF_OBJECT";

/// A compiler that can build for BPF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compiler {
    /// rustup's nightly with its rust-src component.
    Nightly,
    /// Debian's `rustc-web`, with `RUSTC_BOOTSTRAP=1` for the unstable flag.
    Debian,
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nightly => "rustup's nightly with rust-src",
            Self::Debian => "Debian's rustc-web",
        })
    }
}

impl Compiler {
    /// The compiler to use, if one is complete.
    pub fn find() -> Option<Self> {
        if nightly_sources().is_some_and(|sources| sources.is_file()) {
            Some(Self::Nightly)
        } else if apt::missing(&DEBIAN_RUST).is_empty() {
            Some(Self::Debian)
        } else {
            None
        }
    }

    fn cargo(self) -> Command {
        let mut command = match self {
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
            Self::Debian => {
                let mut command = Command::new("/usr/bin/cargo");
                command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        // What the cargo that runs us set for its own tool chain and target.
        let foreign = [
            "CARGO",
            "RUSTUP_TOOLCHAIN",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTFLAGS",
            "CARGO_BUILD_TARGET",
        ];
        foreign.iter().for_each(|name| {
            command.env_remove(name);
        });
        if self == Self::Nightly {
            command.env_remove("RUSTC");
        }
        command
    }
}

/// The file that `-Z build-std` reads first.
fn nightly_sources() -> Option<PathBuf> {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "rustc", "--print", "sysroot"]);
    // Looking must not download anything.
    command.env("RUSTUP_AUTO_INSTALL", "0").env_remove("RUSTUP_TOOLCHAIN");
    let sysroot = shell::output(&mut command).ok()?;
    Some(Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/Cargo.lock"))
}

/// bpf-linker, on `PATH` or where `cargo install` puts it.
pub fn linker() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    shell::find("bpf-linker")
        .or_else(|| home.map(|home| home.join("bin/bpf-linker")).filter(|linker| linker.is_file()))
}

/// Finds the tool chain or installs what it lacks.
///
/// # Errors
/// When a package or bpf-linker cannot be installed.
pub fn ensure() -> Result<(Compiler, PathBuf)> {
    let compiler = if let Some(compiler) = Compiler::find() {
        compiler
    } else {
        eprintln!("  no nightly with rust-src here: installing Debian's compiler for eBPF");
        apt::install(&apt::missing(&DEBIAN_RUST))?;
        Compiler::find().context("Debian's compiler was installed, yet is not found")?
    };
    let linker = if let Some(linker) = linker() {
        linker
    } else {
        eprintln!("  no bpf-linker here: building it against Debian's LLVM 22");
        apt::install(&apt::missing(&LINKER_NEEDS))?;
        let mut install = shell::cargo();
        install.env("LLVM_PREFIX", LLVM_PREFIX).env_remove("CARGO_TARGET_DIR");
        install.args(["install", "bpf-linker", "--version", LINKER_VERSION]);
        install.args(["--no-default-features", "--features", "llvm-22"]);
        shell::quietly("cargo install bpf-linker", &mut install)?;
        linker().context("bpf-linker was installed, yet is not found")?
    };
    Ok((compiler, linker))
}

/// Where [`build`] puts the object: stable, so that tests and images can name it.
pub fn object() -> PathBuf {
    place::target().join("bpf/proxy-ebpf")
}

/// Builds the eBPF programs with the tool chain found, installing it when it is missing,
/// and returns the object's path.
///
/// # Errors
/// When the tool chain cannot be had or the programs do not compile.
pub fn build() -> Result<PathBuf> {
    let (compiler, linker) = ensure()?;
    // Apart from the host's builds: another compiler, and its lock must not wait for them.
    let work = place::target().join("bpf-build");
    let mut command = compiler.cargo();
    command.current_dir(place::repo());
    command.args(["build", "--release", "-Z", "build-std=core", "--target", TARGET]);
    command.args(["-p", "proxy-ebpf", "--bin", "proxy-ebpf", "--features", "programs"]);
    command.arg("--target-dir").arg(&work);
    command.env("PATH", with_linker(&linker)?);
    // BTF, which the kernel needs for the maps and for messages that name the source line,
    // comes from debug information; the host's release profile would strip it.
    // Instructions on 32 bits: half of what is done is, and without them each result is shifted
    // up and down. Kernels have them since 5.1.
    let flags = ["-Cdebuginfo=2", "-Clink-arg=--btf", "-Ctarget-cpu=v3"];
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    command.env("CARGO_PROFILE_RELEASE_STRIP", "none");
    let label = format!("building the eBPF programs with {compiler}");
    shell::quietly(&label, &mut command)?;

    let built = work.join(TARGET).join("release/proxy-ebpf");
    let linked =
        std::fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    // For llvm-objdump -S and the like.
    put(&linked, &place::target().join("bpf/proxy-ebpf.debug"))?;
    let object = object();
    put(&strip::strip(&linked)?, &object)?;
    Ok(object)
}

/// Writes a file that is the old one or the new one to whoever reads it meanwhile, and the same
/// file when nothing changed: cargo tells by its time whether to embed it again.
fn put(bytes: &[u8], path: &Path) -> Result<()> {
    if std::fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let dir = path.parent().context("a file in no directory")?;
    let part = path.with_extension(format!("part-{}", std::process::id()));
    std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::write(&part, bytes))
        .and_then(|()| std::fs::rename(&part, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn with_linker(linker: &Path) -> Result<OsString> {
    let Some(dir) = linker.parent() else { bail!("{} has no directory", linker.display()) };
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::iter::once(dir.to_owned()).chain(std::env::split_paths(&path)))
        .context("PATH cannot hold bpf-linker's directory")
}
