//! Debian packages: which are missing, installing them, and fetching a package from a
//! suite the machine itself is not set up for.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

/// Those of `packages` that are not installed.
pub fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    packages.iter().copied().filter(|package| !installed(package)).collect()
}

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .output()
        .is_ok_and(|out| out.status.success() && out.stdout == b"installed")
}

/// Installs `packages` from the machine's own sources.
///
/// # Errors
/// Without root, or when apt fails: its last lines are in the message.
pub fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let names = packages.join(" ");
    if !is_root() {
        bail!("these packages are missing: {names}\n  install them: sudo apt-get install {names}");
    }
    let mut install = apt_get();
    install.args(["install", "-y", "--no-install-recommends"]).args(packages);
    if shell::quietly(&format!("apt-get install {names}"), &mut install).is_ok() {
        return Ok(());
    }
    // Old or absent package lists are the usual reason for a failure.
    shell::quietly("apt-get update", apt_get().arg("update"))?;
    shell::quietly(&format!("apt-get install {names}"), &mut install)
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
    command
}

/// Whether this process may install packages, boot with raw sockets, mount.
pub fn is_root() -> bool {
    shell::output(Command::new("id").arg("-u")).is_ok_and(|uid| uid.trim() == "0")
}

/// A Debian release that guest kernels come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Debian 11.
    Bullseye,
    /// Debian 12, with its backports.
    Bookworm,
}

impl Release {
    /// Its suites in the main archive, and in that of security updates.
    const fn suites(self) -> (&'static [&'static str], &'static str) {
        match self {
            Self::Bullseye => (&["bullseye"], "bullseye-security"),
            Self::Bookworm => (&["bookworm", "bookworm-backports"], "bookworm-security"),
        }
    }

    /// Below the cache, the place of its lists: a release that the mirror no longer has stops
    /// only those who want a kernel of it.
    #[must_use]
    pub const fn directory(self) -> &'static str {
        match self {
            Self::Bullseye => "apt-bullseye",
            Self::Bookworm => "apt",
        }
    }
}

/// Package lists of a release, kept beside the machine's own: guest kernels come from there
/// whatever the machine runs, and its sources stay untouched.
#[derive(Debug)]
pub struct Lists {
    options: Vec<String>,
}

impl Lists {
    /// Fetches the lists of `release` into `dir`.
    ///
    /// # Errors
    /// When the mirror cannot be read.
    pub fn update(release: Release, dir: &Path) -> Result<Self> {
        for sub in ["lists/partial", "archives/partial", "parts"] {
            fs::create_dir_all(dir.join(sub))
                .with_context(|| format!("cannot make {}", dir.join(sub).display()))?;
        }
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let mirrors = Mirrors::of_machine();
        let (main, security) = (&mirrors.main, &mirrors.security);
        let (suites, security_suite) = release.suites();
        let list: String = suites
            .iter()
            .map(|suite| (main, *suite))
            .chain([(security, security_suite)])
            .map(|(mirror, suite)| format!("deb [signed-by={keyring}] {mirror} {suite} main\n"))
            .collect();
        fs::write(dir.join("sources.list"), list).context("cannot write the sources list")?;
        let place = dir.display();
        let options = [
            format!("Dir::Etc::sourcelist={place}/sources.list"),
            format!("Dir::Etc::sourceparts={place}/parts"),
            format!("Dir::State::lists={place}/lists"),
            format!("Dir::Cache={place}"),
            format!("Dir::Cache::archives={place}/archives"),
            // The unprivileged download user cannot write below root's home.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ];
        let this = Self { options: options.to_vec() };
        shell::quietly(
            &format!("reading the package lists of {}", suites.join(", ")),
            this.tool("apt-get").arg("update"),
        )?;
        Ok(this)
    }

    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.arg("-q").args(self.options.iter().flat_map(|option| ["-o", option]));
        command
    }

    /// The package names that match an apt regular expression.
    ///
    /// # Errors
    /// When apt-cache fails.
    pub fn search(&self, pattern: &str) -> Result<Vec<String>> {
        let found =
            shell::output(self.tool("apt-cache").args(["search", "--names-only"]).arg(pattern))?;
        Ok(found.lines().filter_map(|line| line.split(" - ").next()).map(str::to_owned).collect())
    }

    /// Downloads one package file into `dir`, which must hold no other.
    ///
    /// # Errors
    /// When the download fails.
    pub fn download(&self, package: &str, dir: &Path) -> Result<()> {
        let mut command = self.tool("apt-get");
        command.arg("download").arg(package).current_dir(dir);
        shell::quietly(&format!("downloading {package}"), &mut command)
    }
}

/// The mirror in use on this machine, so that a local one serves the guests as well.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    main: String,
    security: String,
}

impl Mirrors {
    fn of_machine() -> Self {
        let mut text = fs::read_to_string("/etc/apt/sources.list").unwrap_or_default();
        for entry in fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|ext| ext == "list" || ext == "sources") {
                text.push('\n');
                text.push_str(&fs::read_to_string(&path).unwrap_or_default());
            }
        }
        Self::parse(&text)
    }

    /// Reads both formats of sources.list(5), one-line and deb822: all that matters here
    /// are the addresses, and Debian's end in `/debian` and `/debian-security`.
    fn parse(text: &str) -> Self {
        let mut words = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'))
            .flat_map(str::split_whitespace)
            .filter(|word| word.contains("://"))
            .map(|word| word.trim_end_matches('/'));
        let main = words.clone().find(|word| word.ends_with("/debian"));
        let security = words.find(|word| word.ends_with("/debian-security"));
        Self {
            main: main.unwrap_or("http://deb.debian.org/debian").to_owned(),
            security: security.unwrap_or("http://deb.debian.org/debian-security").to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_from_both_formats_of_sources_list() {
        let one_line = "# deb http://old/debian x\n\
            deb [signed-by=/k] http://near/debian/ bookworm main\n\
            deb http://near/debian-security bookworm-security main\n";
        let deb822 = "Types: deb\n# http://old/debian\nURIs: http://near/debian\nSuites: a\n\n\
            Types: deb\nURIs: http://near/debian-security/\n";
        for text in [one_line, deb822] {
            let mirrors = Mirrors::parse(text);
            assert_eq!(mirrors.main, "http://near/debian");
            assert_eq!(mirrors.security, "http://near/debian-security");
        }
    }

    #[test]
    fn without_a_debian_source_the_public_mirror_is_used() {
        let mirrors = Mirrors::parse("deb https://example.com/ubuntu noble main");
        assert_eq!(mirrors.main, "http://deb.debian.org/debian");
        assert_eq!(mirrors.security, "http://deb.debian.org/debian-security");
    }
}
