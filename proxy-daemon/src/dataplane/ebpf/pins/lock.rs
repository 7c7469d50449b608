//! One daemon at a time has the pins.

use std::fs::{self, File};
use std::os::linux::fs::MetadataExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{major, minor};

use super::{LoadError, failed};

/// Held until it is dropped; the kernel releases it even after a crash.
///
/// # Errors
/// Another process holds it, which is named where that can be seen.
pub(super) fn lock(directory: &Path) -> Result<Flock<File>, LoadError> {
    let file = File::open(directory).map_err(failed(directory))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(file, errno)| {
        let reason = match errno {
            Errno::EWOULDBLOCK => {
                format!("another daemon in ebpf mode runs here: {}", owner(&file))
            }
            errno => errno.to_string(),
        };
        LoadError::Other { operation: format!("lock {}", directory.display()), reason }
    })
}

/// Who holds the lock, as far as this process may see.
fn owner(locked: &File) -> String {
    let unknown = "which one cannot be seen from here".to_owned();
    let Ok(found) = locked.metadata() else { return unknown };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let Some(pid) = holder(&locks, found.st_dev(), found.st_ino()) else { return unknown };
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = command
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(String::from_utf8_lossy)
        .collect();
    if words.is_empty() {
        format!("process {pid}")
    } else {
        format!("process {pid}, `{}`", words.join(" "))
    }
}

/// The process that holds the flock(2) of a file, by what `/proc/locks` says.
fn holder(locks: &str, device: u64, inode: u64) -> Option<u32> {
    // fs/locks.c: the numbers of the device are hexadecimal, that of the inode is not.
    let file = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            // `->` marks who waits.
            return None;
        }
        let mut words = words.skip(2);
        let pid = words.next()?.parse().ok()?;
        (words.next()? == file).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_by_a_process() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:1f:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 4711 00:1f:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 12 00:1f:77 0 EOF\n\
                     3: FLOCK  ADVISORY  READ  13 fe:01:78 0 EOF\n";
        let device = |major, minor| nix::sys::stat::makedev(major, minor);
        assert_eq!(holder(locks, device(0, 0x1f), 77), Some(4711));
        assert_eq!(holder(locks, device(0xfe, 1), 78), Some(13));
        assert_eq!(holder(locks, device(0, 0x1f), 78), None);
        assert_eq!(holder("", 0, 0), None);
        let waits = "2: -> FLOCK  ADVISORY  WRITE 12 00:1f:77 0 EOF\n";
        assert_eq!(holder(waits, device(0, 0x1f), 77), None, "of those that have it none is seen");
    }

    #[test]
    fn the_owner_of_a_lock_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let open = || File::open(directory.path()).unwrap();
        let _held = Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap();
        let owner = owner(&open());
        assert!(owner.starts_with(&format!("process {}, `", std::process::id())), "{owner}");
    }
}
