//! Where the cgroup v2 hierarchy is mounted.

use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use super::LoadError;

const MOUNTS: &str = "/proc/self/mounts";

/// `/sys/fs/cgroup` on most machines, `/sys/fs/cgroup/unified` where v1 is in use beside
/// it, and anything in a container: so it is looked up.
///
/// # Errors
/// The mount table cannot be read, or has no cgroup2 in it.
pub fn cgroup2_mount() -> Result<PathBuf, LoadError> {
    let mounts = fs::read_to_string(MOUNTS)
        .map_err(|source| LoadError::Read { path: MOUNTS.into(), source })?;
    find(&mounts).ok_or(LoadError::NoCgroup2)
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
    fn finds_cgroup2_wherever_it_is() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0\n\
            cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(find(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find("none /my\\040cgroup\\134x cgroup2 rw 0 0"), Some("/my cgroup\\x".into()));
        assert_eq!(find("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\nbroken"), None);
    }
}
