//! `cargo xtask deb`: a Debian package for nodes whose proxy is no Pod.
//!
//! What goes where follows the Debian Policy Manual; `dpkg-deb` writes the archive.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{fs, io};

use anyhow::{Context as _, Result, bail};
use flate2::{Compression, GzBuilder};

use crate::{build, place, shell};

/// Pack the daemon into a Debian package
///
/// Builds the daemon with optimisations and the eBPF programs inside, and writes
/// TARGET/deb/node-dataplane_VERSION_ARCH.deb: the daemon, its systemd unit, manual pages and
/// shell completions. Installing it starts nothing: `systemctl enable --now node-dataplane`
/// does, once /etc/node-dataplane/environment says where the API server is.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File to write [default: TARGET/deb/node-dataplane_VERSION_ARCH.deb]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

const PACKAGE: &str = "node-dataplane";

/// Runs the command.
///
/// # Errors
/// When something does not build, or the package cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let program = build::release()?;
    let architecture = shell::output(Command::new("dpkg").arg("--print-architecture"))?;
    let architecture = architecture.trim();
    let version = env!("CARGO_PKG_VERSION");
    let out = args.out.clone().unwrap_or_else(|| {
        place::target().join(format!("deb/{PACKAGE}_{version}_{architecture}.deb"))
    });
    write(&program, architecture, &out)?;
    println!("{}", out.display());
    Ok(ExitCode::SUCCESS)
}

fn write(program: &Path, architecture: &str, out: &Path) -> Result<()> {
    let directory = out.parent().context("a file lies in a directory")?;
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let work = tempfile::Builder::new().prefix(".deb-").tempdir_in(directory)?;
    let tree = Tree(work.path().to_owned());
    tree.fill(program)?;
    tree.add("DEBIAN/control", control(architecture, tree.kib()?).as_bytes(), 0o644)?;
    tree.add("DEBIAN/conffiles", b"/etc/node-dataplane/environment\n", 0o644)?;
    let mut dpkg = Command::new("dpkg-deb");
    dpkg.args(["--root-owner-group", "-Zxz", "--build"]).arg(work.path()).arg(out);
    // The same files give the same bytes.
    dpkg.env("SOURCE_DATE_EPOCH", "0");
    shell::quietly("dpkg-deb --build", &mut dpkg)
}

fn control(architecture: &str, kib: u64) -> String {
    format!(
        "Package: {PACKAGE}\n\
         Version: {}\n\
         Architecture: {architecture}\n\
         Maintainer: The node-dataplane project <maintainers@node-dataplane.invalid>\n\
         Section: admin\n\
         Priority: optional\n\
         Installed-Size: {kib}\n\
         Depends: libc6 (>= 2.34), libgcc-s1\n\
         Description: Kubernetes Services by IPVS or eBPF, in place of kube-proxy\n \
         Watches Services and EndpointSlices and programs either IPVS virtual servers\n \
         or eBPF programs and maps. Takes kube-proxy's flags and configuration file,\n \
         and runs no other program.\n",
        env!("CARGO_PKG_VERSION"),
    )
}

/// What is going to be the root of the file system.
struct Tree(PathBuf);

impl Tree {
    fn fill(&self, program: &Path) -> Result<()> {
        self.add("usr/bin/proxy-daemon", &read(program)?, 0o755)?;
        let deploy = place::repo().join("deploy");
        let unit = "node-dataplane.service";
        self.add(
            &format!("lib/systemd/system/{unit}"),
            &read(&deploy.join("systemd").join(unit))?,
            0o644,
        )?;
        // An example: which mode runs is for the node's administrator to say.
        self.add(
            &format!("usr/share/doc/{PACKAGE}/examples/ebpf.conf"),
            &read(&deploy.join("systemd/ebpf.conf"))?,
            0o644,
        )?;
        for page in files(&deploy.join("man"))? {
            let mut packed = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
            packed.write_all(&read(&page)?)?;
            let name = name(&page)?;
            self.add(&format!("usr/share/man/man8/{name}.gz"), &packed.finish()?, 0o644)?;
        }
        for (from, to) in [
            ("proxy-daemon.bash", "bash-completion/completions/proxy-daemon"),
            ("_proxy-daemon", "zsh/vendor-completions/_proxy-daemon"),
            ("proxy-daemon.fish", "fish/vendor_completions.d/proxy-daemon.fish"),
        ] {
            let text = read(&deploy.join("completions").join(from))?;
            self.add(&format!("usr/share/{to}"), &text, 0o644)?;
        }
        for page in files(&place::repo().join("docs"))? {
            let text = read(&page)?;
            self.add(&format!("usr/share/doc/{PACKAGE}/{}", name(&page)?), &text, 0o644)?;
        }
        self.add(&format!("usr/share/doc/{PACKAGE}/copyright"), COPYRIGHT.as_bytes(), 0o644)?;
        self.add("etc/node-dataplane/environment", ENVIRONMENT.as_bytes(), 0o644)
    }

    fn add(&self, path: &str, content: &[u8], mode: u32) -> Result<()> {
        let at = self.0.join(path);
        let put = || -> io::Result<()> {
            if let Some(parent) = at.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&at, content)?;
            fs::set_permissions(&at, fs::Permissions::from_mode(mode))
        };
        put().with_context(|| format!("cannot write {}", at.display()))?;
        // A temporary directory is its owner's alone; a package's directories are everybody's.
        for parent in at.ancestors().skip(1).take_while(|parent| parent.starts_with(&self.0)) {
            fs::set_permissions(parent, fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    fn kib(&self) -> Result<u64> {
        let text = shell::output(Command::new("du").arg("-sk").arg(&self.0))?;
        let first = text.split_whitespace().next().unwrap_or_default();
        first.parse().with_context(|| format!("du says {text:?}"))
    }
}

const ENVIRONMENT: &str = "\
# Options of the daemon; `man proxy-daemon` has them all. For example:
#OPTIONS=--proxy-mode=ipvs --kubeconfig=/etc/kubernetes/proxy.conf --cluster-cidr=10.244.0.0/16
OPTIONS=--config=/etc/node-dataplane/config.yaml
";

const COPYRIGHT: &str = "\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: node-dataplane

Files: *
Copyright: the node-dataplane project
License: Apache-2.0 or MIT
 On Debian systems the text of the Apache License 2.0 is in
 /usr/share/common-licenses/Apache-2.0.
";

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

fn name(path: &Path) -> Result<&str> {
    path.file_name().and_then(|name| name.to_str()).context("a file has a name")
}

/// The plain files of a directory, in a fixed order.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            found.push(entry.path());
        }
    }
    if found.is_empty() {
        bail!("{} holds no file", directory.display());
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_has_the_daemon_its_unit_and_its_manual() {
        let work = tempfile::tempdir().unwrap();
        let program = work.path().join("program");
        fs::write(&program, "not a daemon").unwrap();
        let out = work.path().join("deb/x.deb");
        write(&program, "amd64", &out).unwrap();
        let first = read(&out).unwrap();
        let dpkg = |option: &str| shell::output(Command::new("dpkg-deb").arg(option).arg(&out));
        let contents = dpkg("--contents").unwrap();
        for wanted in [
            " 1970-01-01 00:00 ./usr/bin/proxy-daemon",
            "./lib/systemd/system/node-dataplane.service",
            "./usr/share/doc/node-dataplane/examples/ebpf.conf",
            "./usr/share/man/man8/proxy-daemon.8.gz",
            "./usr/share/zsh/vendor-completions/_proxy-daemon",
            "./etc/node-dataplane/environment",
        ] {
            assert!(contents.contains(wanted), "no {wanted} in\n{contents}");
        }
        let packed = contents.lines().find(|line| line.ends_with("./usr/bin/proxy-daemon"));
        assert!(packed.is_some_and(|line| line.starts_with("-rwxr-xr-x root/root")));
        assert!(dpkg("--info").unwrap().contains("Package: node-dataplane"));
        write(&program, "amd64", &out).unwrap();
        assert!(read(&out).unwrap() == first, "the same files give other bytes");
    }
}
