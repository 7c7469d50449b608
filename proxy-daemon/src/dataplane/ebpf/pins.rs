//! What outlives the daemon: maps and links, pinned in the BPF file system.
//!
//! ```text
//! ROOT/proxy-daemon/v2/maps/FLOWS          as long as the layout stays the same
//!                     /links/connect4-0-START       of the daemon that attached it
//!                     /links/PROGRAM-IFINDEX-START  at a device
//! ```
//!
//! A clsact filter (kernels before 6.6) has nothing to pin: a directory named
//! `PROGRAM-PRIORITY-HANDLE-IFINDEX-START` stands for it. START counts the starts of daemons
//! (their process ids are all 1 in containers).
//!
//! A new daemon takes over the maps. At a device each of its programs takes the place of the one
//! before, in the same link or filter and at once: with two attached, the second would take what
//! the first has translated for a client that speaks to the backend itself, and end the flow. At
//! the cgroup both are attached until the links of the one before are removed: what one has
//! translated the other does not find in the tables. So no connection meets neither, and none is
//! translated twice.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapInfo;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use proxy_ebpf::layout::LAYOUT_VERSION;
use tracing::info;

use super::LoadError;
use super::loader::detach_filter;

/// Where distributions mount it.
pub const DEFAULT_ROOT: &str = "/sys/fs/bpf";
const OURS: &str = "proxy-daemon";

/// The pins, held by this daemon alone.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    /// More than that of any link there was.
    start: u32,
    /// Held as long as the process lives; the kernel releases it even after a crash.
    _lock: Flock<File>,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> LoadError {
    move |source| LoadError::Read { path: path.to_owned(), source }
}

impl Pins {
    /// Mounts the file system at `root` when it is not, and takes the lock.
    ///
    /// # Errors
    /// It cannot be mounted, or another daemon holds the lock.
    pub fn open(root: &Path) -> Result<Self, LoadError> {
        ensure_mounted(root)?;
        let ours = root.join(OURS);
        let directory = ours.join(format!("v{LAYOUT_VERSION}"));
        for part in ["maps", "links"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(failed(&path))?;
        }
        let file = File::open(&ours).map_err(failed(&ours))?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| LoadError::Other {
                operation: format!("lock {}", ours.display()),
                reason: "another daemon in ebpf mode runs here (`fuser` tells which)".into(),
            })?;
        let last = fs::read_dir(directory.join("links"))
            .map_err(failed(&directory))?
            .filter_map(|entry| numbers_of(&entry.ok()?.path()))
            .map(|(_, start)| start)
            .max();
        Ok(Self { directory, start: last.unwrap_or(0).wrapping_add(1), _lock: lock })
    }

    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.directory.join("maps").join(name)
    }

    /// The size of a map: the one it was made with, whatever is asked for now.
    ///
    /// # Errors
    /// It is not pinned.
    pub fn size(&self, name: &str) -> Result<u32, LoadError> {
        let info = MapInfo::from_pin(self.map(name));
        let info = info.map_err(|e| LoadError::from_aya(format!("ask about map {name}"), &e))?;
        Ok(info.max_entries())
    }

    /// Which start this is.
    #[must_use]
    pub const fn start(&self) -> u32 {
        self.start
    }

    /// Where this process pins the link of `program` at `place`: a device's index, or 0.
    #[must_use]
    pub fn link(&self, program: &str, place: u32) -> PathBuf {
        self.directory.join("links").join(format!("{program}-{place}-{}", self.start))
    }

    /// The last link of `program` at `place` that a daemon before this one made.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn before(&self, program: &str, place: u32) -> Result<Option<PathBuf>, LoadError> {
        let links = self.directory.join("links");
        let mut last: Option<(u32, PathBuf)> = None;
        for entry in fs::read_dir(&links).map_err(failed(&links))? {
            let path = entry.map_err(failed(&links))?.path();
            let Some((at, start)) = numbers_of(&path) else { continue };
            if at == place
                && start != self.start
                && program_of(&path) == Some(program)
                && last.as_ref().is_none_or(|(other, _)| *other < start)
            {
                last = Some((start, path));
            }
        }
        Ok(last.map(|(_, path)| path))
    }

    /// Makes the link that is pinned at `path` one of this process, which has put its own program
    /// there.
    ///
    /// # Errors
    /// It is gone.
    pub fn take_over(&self, path: &Path) -> Result<(), LoadError> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let (kept, _) = name.rsplit_once('-').unwrap_or((name, ""));
        let ours = path.with_file_name(format!("{kept}-{}", self.start));
        fs::rename(path, &ours).map_err(failed(path))
    }

    /// Removes the links for which `is_stale` holds, given the place and the start.
    ///
    /// # Errors
    /// The directory cannot be read or changed.
    pub fn remove_links(&self, is_stale: impl Fn(u32, u32) -> bool) -> Result<(), LoadError> {
        let links = self.directory.join("links");
        for entry in fs::read_dir(&links).map_err(failed(&links))? {
            let path = entry.map_err(failed(&links))?.path();
            let Some((place, start)) = numbers_of(&path) else { continue };
            if is_stale(place, start) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Removes everything, of every layout: links first, so that no program meets empty
    /// maps.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn cleanup(root: &Path) -> Result<Vec<String>, LoadError> {
        let ours = root.join(OURS);
        if !ours.is_dir() {
            return Ok(Vec::new());
        }
        let mut removed = Vec::new();
        let mut versions: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(&ours).map_err(failed(&ours))? {
            versions.push(entry.map_err(failed(&ours))?.path());
        }
        for part in ["links", "maps"] {
            for directory in versions.iter().map(|version| version.join(part)) {
                for entry in fs::read_dir(&directory).map_err(failed(&directory))? {
                    let path = entry.map_err(failed(&directory))?.path();
                    remove(&path)?;
                    removed.push(path.display().to_string());
                }
                fs::remove_dir(&directory).map_err(failed(&directory))?;
            }
        }
        for directory in versions.iter().chain([&ours]) {
            fs::remove_dir(directory).map_err(failed(directory))?;
        }
        Ok(removed)
    }
}

/// The place and the start in a link's name.
fn numbers_of(path: &Path) -> Option<(u32, u32)> {
    let name = path.file_name().and_then(|name| name.to_str())?;
    let mut numbers = name.rsplit('-').map(str::parse::<u32>);
    let (start, place) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((place, start))
}

fn program_of(path: &Path) -> Option<&str> {
    Some(path.file_name()?.to_str()?.split_once('-')?.0)
}

/// Priority and handle, when `path` is the directory that stands for a clsact filter.
pub(super) fn filter_of(path: &Path) -> Option<(u16, u32)> {
    let mut parts = path.file_name()?.to_str()?.split('-').skip(1);
    let (priority, handle) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    path.is_dir().then_some((priority, handle))
}

/// The name of the directory that stands for a clsact filter whose link would be at `path`.
#[must_use]
pub fn filter(path: &Path, priority: u16, handle: u32) -> PathBuf {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let (program, rest) = name.split_once('-').unwrap_or((name, ""));
    path.with_file_name(format!("{program}-{priority}-{handle}-{rest}"))
}

/// Detaches: a link by its pin, a filter by what its directory says.
fn remove(path: &Path) -> Result<(), LoadError> {
    if !path.is_dir() {
        return fs::remove_file(path).map_err(failed(path));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let parts: Vec<&str> = name.split('-').collect();
    if let [program, priority, handle, place, _] = parts[..]
        && let (Ok(priority), Ok(handle), Ok(place)) =
            (priority.parse(), handle.parse(), place.parse())
    {
        detach_filter(program, priority, handle, place);
    }
    fs::remove_dir(path).map_err(failed(path))
}

fn ensure_mounted(root: &Path) -> Result<(), LoadError> {
    fs::create_dir_all(root).map_err(failed(root))?;
    let kind = statfs(root).map_err(|errno| failed(root)(errno.into()))?.filesystem_type();
    if kind == BPF_FS_MAGIC {
        return Ok(());
    }
    info!(at = %root.display(), "mounting the BPF file system");
    let none: Option<&str> = None;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), root, Some("bpf"), flags, none).map_err(|errno| LoadError::Other {
        operation: format!("mount the BPF file system at {}", root.display()),
        reason: format!(
            "{errno}; mount it on the node (`mount -t bpf bpf {}`) and show it to the container, or \
             let the container mount it (CAP_SYS_ADMIN)",
            root.display()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_takes_the_place_of_the_last_one_at_its_device() {
        let root = tempfile::tempdir().unwrap();
        let lock = Flock::lock(File::open(root.path()).unwrap(), FlockArg::LockExclusive);
        let pins = Pins { directory: root.path().to_owned(), start: 9, _lock: lock.unwrap() };
        let links = root.path().join("links");
        fs::create_dir(&links).unwrap();
        for name in ["tc_egress-7-3", "tc_egress-7-5", "tc_egress-8-6", "tc_ingress-7-8"] {
            File::create(links.join(name)).unwrap();
        }
        // A clsact filter, by its priority and handle.
        fs::create_dir(links.join("tc_ingress-49152-1-12-4")).unwrap();
        let before = |program, place| pins.before(program, place).unwrap();
        assert_eq!(before("tc_egress", 7), Some(links.join("tc_egress-7-5")));
        assert_eq!(filter_of(&links.join("tc_egress-7-5")), None);
        assert_eq!(before("tc_egress", 12), None);
        let filter = before("tc_ingress", 12).unwrap();
        assert_eq!(filter_of(&filter), Some((49_152, 1)));
        pins.take_over(&links.join("tc_egress-7-5")).unwrap();
        pins.take_over(&filter).unwrap();
        assert!(pins.link("tc_egress", 7).is_file());
        assert!(links.join("tc_ingress-49152-1-12-9").is_dir());
        assert_eq!(before("tc_egress", 7), Some(links.join("tc_egress-7-3")), "never its own");
    }
}
