//! Sysctls, under a root that may be elsewhere: containers have `/proc/sys` read-only.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A kernel's version, as far as decisions need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion {
    pub major: u32,
    pub minor: u32,
}

impl KernelVersion {
    /// Of a release string such as `6.1.0-47-amd64`.
    #[must_use]
    pub fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some(Self { major: numbers.next()?.parse().ok()?, minor: numbers.next()?.parse().ok()? })
    }

    /// Of the running kernel.
    ///
    /// # Errors
    /// When `uname` fails or its answer has no version in it.
    pub fn running() -> io::Result<Self> {
        let uname = nix::sys::utsname::uname()?;
        let release = uname.release().to_string_lossy().into_owned();
        Self::parse(&release).ok_or_else(|| {
            io::Error::other(format!("cannot read a version in kernel release `{release}`"))
        })
    }

    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("sysctl {name}: cannot {operation} {path}: {source}")]
pub struct SysctlError {
    pub name: String,
    pub operation: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

/// One sysctl to set, by its path below `/proc/sys`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// For example `net/ipv4/vs/conntrack`.
    pub name: &'static str,
    pub value: &'static str,
}

/// The seam.
#[derive(Debug, Clone)]
pub struct Sysctls {
    root: PathBuf,
}

impl Sysctls {
    /// `root` is `/proc/sys`, or a writable mount of it.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// # Errors
    /// When the kernel has no such sysctl or it cannot be read.
    pub fn read(&self, name: &str) -> Result<String, SysctlError> {
        let path = self.root.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(source) => {
                Err(SysctlError { name: name.to_owned(), operation: "read", path, source })
            }
        }
    }

    /// The kernel has no such sysctl.
    #[must_use]
    pub fn is_missing(&self, name: &str) -> bool {
        matches!(self.root.join(name).try_exists(), Ok(false))
    }

    /// Writes only what differs; true when it did.
    ///
    /// # Errors
    /// When it cannot be read, or differs and cannot be written.
    pub fn set(&self, setting: &Setting) -> Result<bool, SysctlError> {
        self.set_to(setting.name, setting.value)
    }

    /// [`Sysctls::set`] for a value that is known at run time only.
    ///
    /// # Errors
    /// When it cannot be read, or differs and cannot be written.
    pub fn set_to(&self, name: &str, value: &str) -> Result<bool, SysctlError> {
        if self.read(name)? == value {
            return Ok(false);
        }
        let path = self.root.join(name);
        fs::write(&path, value).map(|()| true).map_err(|source| SysctlError {
            name: name.to_owned(),
            operation: "write",
            path,
            source,
        })
    }
}

/// What ipvs mode needs of the kernel (Documentation/networking/ipvs-sysctl.rst), as
/// kube-proxy sets it.
#[must_use]
pub fn ipvs_settings(kernel: KernelVersion, strict_arp: bool) -> Vec<Setting> {
    let mut settings = vec![
        // Without connection tracking of IPVS connections their packets are not
        // masqueraded.
        Setting { name: "net/ipv4/vs/conntrack", value: "1" },
        Setting { name: "net/ipv4/vs/expire_nodest_conn", value: "1" },
        Setting { name: "net/ipv4/vs/expire_quiescent_template", value: "1" },
        Setting { name: "net/ipv4/ip_forward", value: "1" },
    ];
    // Before 5.9 a reused source port whose connection is in TIME_WAIT is dropped once
    // when this is 1, which costs the client a second (kernel commit f0a5e4d7a594);
    // before 4.1 the sysctl does not exist.
    if (KernelVersion::new(4, 1)..KernelVersion::new(5, 9)).contains(&kernel) {
        settings.push(Setting { name: "net/ipv4/vs/conn_reuse_mode", value: "0" });
    }
    if strict_arp {
        settings.push(Setting { name: "net/ipv4/conf/all/arp_ignore", value: "1" });
        settings.push(Setting { name: "net/ipv4/conf/all/arp_announce", value: "2" });
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_release_strings() {
        for (release, version) in [
            ("6.1.0-47-amd64", Some((6, 1))),
            ("5.10.240", Some((5, 10))),
            ("4.19-rc1", Some((4, 19))),
            ("6", None),
            ("next", None),
        ] {
            let expected = version.map(|(major, minor)| KernelVersion { major, minor });
            assert_eq!(KernelVersion::parse(release), expected, "{release}");
        }
    }

    #[test]
    fn conn_reuse_mode_only_from_4_1_to_before_5_9() {
        let sets = |major, minor| {
            ipvs_settings(KernelVersion::new(major, minor), false)
                .iter()
                .any(|s| s.name.ends_with("conn_reuse_mode"))
        };
        assert_eq!(
            [sets(4, 0), sets(4, 1), sets(5, 8), sets(5, 9), sets(6, 1)],
            [false, true, true, false, false]
        );
    }

    #[test]
    fn strict_arp_sets_both_arp_sysctls() {
        let count = |strict| {
            ipvs_settings(KernelVersion::new(6, 1), strict)
                .iter()
                .filter(|s| s.name.contains("arp_"))
                .count()
        };
        assert_eq!((count(false), count(true)), (0, 2));
    }

    #[test]
    fn only_what_differs_is_written_and_errors_name_the_sysctl() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("net/ipv4/vs");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("conntrack"), "0\n").unwrap();
        let sysctls = Sysctls::at(root.path());
        let setting = Setting { name: "net/ipv4/vs/conntrack", value: "1" };
        assert!(sysctls.set(&setting).unwrap());
        assert!(!sysctls.set(&setting).unwrap(), "the second time there is nothing to do");
        let missing = Setting { name: "net/ipv4/vs/nothing", value: "1" };
        let error = sysctls.set(&missing).unwrap_err().to_string();
        assert!(error.contains("net/ipv4/vs/nothing"), "{error}");
    }
}
