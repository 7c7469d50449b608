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
//! A new daemon takes over the maps, attaches its own programs, and then removes the links
//! of the one before. In between both are attached: what one has translated the other does
//! not find in the tables, so no connection meets neither and none is translated twice.

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

    /// The pins of links of `program` at `place` that other daemons left, of any layout.
    #[must_use]
    pub fn others(&self, program: &str, place: u32) -> Vec<PathBuf> {
        let start = format!("{program}-{place}-");
        let own = self.link(program, place);
        let versions = self.directory.parent().and_then(|ours| fs::read_dir(ours).ok());
        let links = versions.into_iter().flatten().flatten();
        links
            .filter_map(|version| fs::read_dir(version.path().join("links")).ok())
            .flat_map(|links| links.flatten().map(|link| link.path()))
            .filter(|path| *path != own)
            .filter(|path| {
                path.file_name().is_some_and(|it| it.to_string_lossy().starts_with(&start))
            })
            .collect()
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
        reason: errno.to_string(),
    })
}
