//! What can go wrong between an object file and a running program.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapError;
use aya::programs::{ProgramError, tc::TcError};
use aya::sys::NetlinkError;
use proxy_ebpf::layout::Mark;

use super::{OBJECT_ENV, capability};
use crate::kernel::netlink::Errno;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(
        "no eBPF programs: none are embedded in this build; build with `cargo xtask build`, \
         or set {OBJECT_ENV} to the object file"
    )]
    NoObject,
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the eBPF object cannot be used: {0}")]
    Object(String),
    #[error(
        "the eBPF object has map layout {} ({:#018x}), this daemon has {} ({:#018x}): \
         build both from the same source",
        found.version, found.fingerprint, Mark::CURRENT.version, Mark::CURRENT.fingerprint
    )]
    Layout { found: Mark },
    #[error("{operation}: {errno}; {}", permission_hint(missing))]
    Permission { operation: String, missing: Vec<&'static str>, errno: Errno },
    #[error(
        "{}: {errno}; it is not the owner, or a security module of the node forbids it: AppArmor \
         (the profile of container runtimes denies writing below /sys/fs/bpf) or SELinux. \
         deploy/ebpf and the Helm chart set what lets it: appArmorProfile Unconfined and \
         seLinuxOptions type spc_t",
        path.display()
    )]
    Denied { path: PathBuf, errno: Errno },
    #[error("the kernel's verifier rejects program {program}: {errno}\n{log}")]
    Verifier { program: String, errno: Errno, log: String },
    #[error("{operation}: {errno}{hint}")]
    Kernel { operation: String, errno: Errno, hint: &'static str },
    #[error("{operation}: {reason}")]
    Other { operation: String, reason: String },
    #[error(
        "no cgroup v2 hierarchy is mounted, and programs at connect(2) are attached to one: \
         `mount -t cgroup2 none /sys/fs/cgroup/unified`"
    )]
    NoCgroup2,
    #[error(
        "--cgroup-root {} is no directory of a cgroup v2 hierarchy, which programs at connect(2) \
         are attached to{}",
        path.display(),
        mounted.as_ref().map(|at| format!("; here it is mounted at {}", at.display())).unwrap_or_default()
    )]
    NotCgroup2 { path: PathBuf, mounted: Option<PathBuf> },
}

impl LoadError {
    /// The errno, when the kernel gave one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Permission { errno, .. }
            | Self::Denied { errno, .. }
            | Self::Verifier { errno, .. }
            | Self::Kernel { errno, .. } => Some(*errno),
            Self::Read { source, .. } => source.raw_os_error().map(Errno),
            Self::NoObject
            | Self::Object(_)
            | Self::Layout { .. }
            | Self::Other { .. }
            | Self::NoCgroup2
            | Self::NotCgroup2 { .. } => None,
        }
    }

    /// Sorts an error at a file below the BPF file system's root.
    pub(super) fn from_pin(path: &Path, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(errno @ (number::EPERM | number::EACCES)) => {
                Self::Denied { path: path.to_owned(), errno: Errno(errno) }
            }
            _ => Self::Read { path: path.to_owned(), source },
        }
    }

    /// Sorts an aya error of `operation`, which starts the message.
    pub(super) fn from_aya(operation: impl Into<String>, error: &(dyn Error + 'static)) -> Self {
        let operation = operation.into();
        let Some(errno) = errno_of(error) else {
            return Self::Other { operation, reason: with_causes(error) };
        };
        match errno.0 {
            number::EPERM | number::EACCES => {
                Self::Permission { operation, missing: capability::missing(), errno }
            }
            _ => Self::Kernel { operation, errno, hint: hint(errno) },
        }
    }

    /// As [`Self::from_aya`], for loading one program: a rejection comes with a log, and
    /// `EACCES` then is the verifier's and not a matter of capabilities.
    pub(super) fn from_program_load(program: &str, error: &ProgramError) -> Self {
        let rejection = match error {
            ProgramError::LoadError { io_error, verifier_log } => {
                Self::rejection(program, io_error, verifier_log.to_string())
            }
            _ => None,
        };
        rejection.unwrap_or_else(|| Self::from_aya(format!("load program {program}"), error))
    }

    /// An empty log means that the verifier was not reached.
    fn rejection(program: &str, error: &io::Error, log: String) -> Option<Self> {
        let errno = Errno(error.raw_os_error()?);
        let program = program.into();
        (!log.trim().is_empty()).then_some(Self::Verifier { program, errno, log })
    }
}

/// Names for the numbers matched above.
mod number {
    use nix::errno::Errno;

    pub(super) const EPERM: i32 = Errno::EPERM as i32;
    pub(super) const EACCES: i32 = Errno::EACCES as i32;
    pub(super) const ENOSYS: i32 = Errno::ENOSYS as i32;
    pub(super) const ENODEV: i32 = Errno::ENODEV as i32;
    pub(super) const EOPNOTSUPP: i32 = Errno::EOPNOTSUPP as i32;
    pub(super) const E2BIG: i32 = Errno::E2BIG as i32;
    pub(super) const ENOMEM: i32 = Errno::ENOMEM as i32;
    pub(super) const EBUSY: i32 = Errno::EBUSY as i32;
}

fn permission_hint(missing: &[&str]) -> String {
    if missing.is_empty() {
        "no capability is missing: kernel lockdown, a user namespace, or a security module \
         (SELinux, AppArmor, seccomp) forbids it"
            .into()
    } else {
        format!("this process lacks {}", missing.join(" and "))
    }
}

fn hint(errno: Errno) -> &'static str {
    match errno.0 {
        number::ENOSYS => "; the kernel is built without CONFIG_BPF_SYSCALL",
        number::ENODEV => "; there is no such interface in this network namespace",
        number::EOPNOTSUPP => {
            "; the driver lacks it (XDP: try generic mode), or the kernel is built without it \
             (CONFIG_CGROUP_BPF, CONFIG_NET_SCH_INGRESS)"
        }
        number::E2BIG | number::ENOMEM => "; the map sizes are too large for this machine",
        number::EBUSY => "; another program holds this hook exclusively",
        _ => "",
    }
}

/// aya keeps the errno, at different depths: some of its variants are transparent and so
/// skip themselves in the chain of sources.
fn errno_of(error: &(dyn Error + 'static)) -> Option<Errno> {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = if let Some(io) = error.downcast_ref::<io::Error>() {
            io.raw_os_error()
        } else if let Some(netlink) = error.downcast_ref::<NetlinkError>() {
            netlink.raw_os_error()
        } else if let Some(MapError::IoError(io)) = error.downcast_ref() {
            io.raw_os_error()
        } else if let Some(tc) = error.downcast_ref::<TcError>() {
            errno_of_tc(tc)
        } else if let Some(program) = error.downcast_ref::<ProgramError>() {
            match program {
                ProgramError::IOError(io) => io.raw_os_error(),
                ProgramError::TcError(tc) => errno_of_tc(tc),
                ProgramError::NetlinkError(netlink) => netlink.raw_os_error(),
                ProgramError::UnknownInterface { .. } => Some(number::ENODEV),
                _ => None,
            }
        } else {
            None
        };
        if let Some(errno) = io {
            return Some(Errno(errno));
        }
        next = error.source();
    }
    None
}

fn errno_of_tc(error: &TcError) -> Option<i32> {
    match error {
        TcError::NetlinkError(netlink) => netlink.raw_os_error(),
        TcError::IoError(io) => io.raw_os_error(),
        _ => None,
    }
}

/// The message and those of its causes, which aya does not repeat in its own.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use aya::EbpfError;
    use aya::sys::SyscallError;

    use super::*;

    fn refused(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    #[test]
    fn the_errno_is_found_however_deep() {
        let syscall = |errno| SyscallError { call: "bpf_link_create", io_error: refused(errno) };
        let errors: [Box<dyn Error>; 5] = [
            Box::new(ProgramError::SyscallError(syscall(7))),
            Box::new(ProgramError::TcError(TcError::IoError(refused(7)))),
            Box::new(EbpfError::ProgramError(ProgramError::IOError(refused(7)))),
            Box::new(EbpfError::MapError(MapError::CreateError {
                name: "SLOTS".into(),
                io_error: refused(7),
            })),
            Box::new(MapError::SyscallError(syscall(7))),
        ];
        for error in errors {
            assert_eq!(errno_of(error.as_ref()), Some(Errno(7)), "{error:?}");
        }
        assert_eq!(errno_of(&ProgramError::NotLoaded), None);
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let error = LoadError::from_aya("attach to eth9", &refused(number::ENODEV));
        assert!(matches!(error, LoadError::Kernel { .. }), "{error}");
        assert!(error.to_string().contains("no such interface"), "{error}");
        let error = LoadError::Permission {
            operation: "create map".into(),
            missing: vec!["CAP_BPF", "CAP_NET_ADMIN"],
            errno: Errno(number::EPERM),
        };
        assert!(error.to_string().contains("lacks CAP_BPF and CAP_NET_ADMIN"), "{error}");
    }

    #[test]
    fn a_pin_that_may_not_be_made_names_the_security_modules() {
        let path = Path::new("/sys/fs/bpf/proxy-daemon/v6/maps");
        for errno in [number::EACCES, number::EPERM] {
            let error = LoadError::from_pin(path, refused(errno));
            assert_eq!(error.errno(), Some(Errno(errno)));
            let said = error.to_string();
            assert!(said.starts_with("/sys/fs/bpf/proxy-daemon/v6/maps: "), "{said}");
            for word in ["AppArmor", "SELinux", "appArmorProfile", "spc_t"] {
                assert!(said.contains(word), "no {word}: {said}");
            }
        }
        let error = LoadError::from_pin(path, refused(number::ENODEV));
        assert!(!error.to_string().contains("AppArmor"), "{error}");
    }

    #[test]
    fn a_rejection_keeps_the_verifiers_log() {
        let log = "R1 invalid mem access 'scalar'".to_owned();
        let error = refused(number::EACCES);
        assert!(LoadError::rejection("connect4", &error, " \n".into()).is_none());
        let error = LoadError::rejection("connect4", &error, log).unwrap();
        assert!(matches!(error, LoadError::Verifier { .. }), "{error}");
        assert_eq!(error.errno(), Some(Errno(number::EACCES)));
        assert!(error.to_string().contains("R1 invalid mem access"), "{error}");
    }
}
