//! The cgroup whose sockets are seen: the root of the hierarchy, or one that was given.

use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::LoadError;

const MOUNTS: &str = "/proc/self/mounts";

/// The cgroup to attach to: `given` when it is one, or else the root of the hierarchy.
///
/// # Errors
/// `given` is no cgroup v2 directory, or no such hierarchy is mounted, or the mount table cannot
/// be read.
pub fn cgroup(given: Option<&Path>) -> Result<PathBuf, LoadError> {
    let Some(given) = given else {
        return mount()?.ok_or(LoadError::NoCgroup2);
    };
    let path = given.to_owned();
    match statfs(given) {
        Err(errno) => Err(LoadError::Read { path, source: errno.into() }),
        Ok(found) if found.filesystem_type() == CGROUP2_SUPER_MAGIC && given.is_dir() => Ok(path),
        Ok(_) => Err(LoadError::NotCgroup2 { path, mounted: mount().ok().flatten() }),
    }
}

/// `/sys/fs/cgroup` on most machines, `/sys/fs/cgroup/unified` where v1 is in use beside
/// it, and anything in a container: so it is looked up.
fn mount() -> Result<Option<PathBuf>, LoadError> {
    let mounts = fs::read_to_string(MOUNTS)
        .map_err(|source| LoadError::Read { path: MOUNTS.into(), source })?;
    Ok(find(&mounts))
}

/// The first cgroup2 line of `fstab(5)`-style text: device, mount point, type, ...
fn find(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| unescape(path))
    })
}

/// Blanks and backslashes in a path are written as `\` and three octal digits
/// (`mangle_path`, `fs/seq_file.c`).
fn unescape(path: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = tail
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_must_be_a_cgroup() {
        let error = |path: &str| cgroup(Some(Path::new(path))).unwrap_err().to_string();
        let not_one = "--cgroup-root /proc/self is no directory of a cgroup v2 hierarchy";
        assert!(error("/proc/self").starts_with(not_one), "{}", error("/proc/self"));
        assert!(error("/no/such").starts_with("/no/such: "), "{}", error("/no/such"));
        let root = mount().unwrap().expect("the machine has a cgroup v2 hierarchy");
        assert_eq!(cgroup(None).unwrap(), root);
        assert_eq!(cgroup(Some(&root)).unwrap(), root);
        assert!(error("/proc").ends_with(&format!("mounted at {}", root.display())));
        let file = root.join("cgroup.procs");
        assert!(cgroup(Some(&file)).is_err());
    }

    #[test]
    fn finds_cgroup2_wherever_it_is() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0\n\
            cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(find(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find("none /my\\040cgroup\\134x cgroup2 rw 0 0"), Some("/my cgroup\\x".into()));
        assert_eq!(find("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\nbroken"), None);
    }
}
