//! What outlives the daemon: maps and links, pinned in the BPF file system.
//!
//! ```text
//! ROOT/proxy-daemon/v2/maps/FLOWS          as long as the layout stays the same
//!                     /next/SLOTS          a larger copy, until it takes the other's place
//!                     /layout/FLOWS-FINGERPRINT     a directory; what the map looks like
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

mod lock;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use aya::maps::{MapData, MapInfo};
use nix::fcntl::Flock;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use proxy_ebpf::layout::LAYOUT_VERSION;
use proxy_ebpf::layout::maps::{FINGERPRINTS, known};
use tracing::info;

use super::LoadError;
use super::loader::detach_filter;
use crate::kernel::bpf::RawMap;

/// Where distributions mount it.
pub const DEFAULT_ROOT: &str = "/sys/fs/bpf";
const OURS: &str = "proxy-daemon";

/// What a daemon of another layout version has left.
#[derive(Debug)]
pub struct Other {
    pub version: u32,
    directory: PathBuf,
}

impl Other {
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.directory.join("maps").join(name)
    }

    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.map(name).exists()
    }

    /// Programs of that version are attached.
    #[must_use]
    pub fn is_live(&self) -> bool {
        has_links(&self.directory)
    }

    /// What a map looks like, as it stands beside it, or as is known of the version.
    #[must_use]
    pub fn fingerprint(&self, name: &str) -> Option<u64> {
        let Ok(entries) = fs::read_dir(self.directory.join("layout")) else {
            return known(self.version, name);
        };
        let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let of = |entry: String| match entry.split_once('-') {
            Some((map, number)) if map == name => u64::from_str_radix(number, 16).ok(),
            _ => None,
        };
        names.find_map(of)
    }
}

fn has_links(version: &Path) -> bool {
    let mut links = fs::read_dir(version.join("links")).into_iter().flatten();
    links.next().is_some()
}

/// The directories of other versions: those with programs first, and of these the newest.
fn others(ours: &Path) -> Result<Vec<Other>, LoadError> {
    let mut others = Vec::new();
    for entry in fs::read_dir(ours).map_err(failed(ours))? {
        let directory = entry.map_err(failed(ours))?.path();
        let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let version = name.strip_prefix('v').and_then(|version| version.parse().ok());
        match version {
            Some(LAYOUT_VERSION) | None => {}
            Some(version) => others.push(Other { version, directory }),
        }
    }
    others.sort_unstable_by_key(|other| std::cmp::Reverse((other.is_live(), other.version)));
    Ok(others)
}

/// The pins, held by this daemon alone.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    /// More than that of any link there was.
    start: u32,
    /// The one that is in service first.
    others: Vec<Other>,
    /// Held as long as the process lives; the kernel releases it even after a crash.
    _lock: Flock<File>,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> LoadError {
    move |source| LoadError::from_pin(path, source)
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
        let layout = FINGERPRINTS.map(|(name, number)| format!("layout/{name}-{number:016x}"));
        for part in ["maps", "next", "links"].into_iter().chain(layout.iter().map(|s| &**s)) {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(failed(&path))?;
        }
        let lock = lock::lock(&ours)?;
        let start = fs::read_dir(directory.join("links"))
            .map_err(failed(&directory))?
            .filter_map(|entry| numbers_of(&entry.ok()?.path()))
            .map(|(_, start)| start)
            .max()
            .unwrap_or(0)
            .wrapping_add(1);
        Ok(Self { directory, start, others: others(&ours)?, _lock: lock })
    }

    #[must_use]
    pub fn others(&self) -> &[Other] {
        &self.others
    }

    /// Programs of this version are attached.
    #[must_use]
    pub fn is_live(&self) -> bool {
        has_links(&self.directory)
    }

    /// Unpins a map of ours.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(&self, name: &str) -> Result<(), LoadError> {
        let path = self.map(name);
        if path.exists() { fs::remove_file(&path).map_err(failed(&path)) } else { Ok(()) }
    }

    /// Pins another version's map as ours, too.
    ///
    /// # Errors
    /// It is not there, or the place is taken.
    pub fn share(&self, other: &Other, name: &str) -> Result<(), LoadError> {
        let shared = |e: &(dyn std::error::Error + 'static)| {
            LoadError::from_aya(format!("share map {name} of version {}", other.version), e)
        };
        let map = MapData::from_pin(other.map(name)).map_err(|e| shared(&e))?;
        map.pin(self.map(name)).map_err(|e| shared(&e))
    }

    /// Removes the links of other versions.
    ///
    /// # Errors
    /// One cannot be removed.
    pub fn detach_others(&self) -> Result<(), LoadError> {
        self.others.iter().try_for_each(|other| {
            let links = other.directory.join("links");
            if links.is_dir() { empty(&links, &mut Vec::new()) } else { Ok(()) }
        })
    }

    /// Removes other versions altogether: their links first.
    ///
    /// # Errors
    /// Something cannot be removed; it is tried again at the next start.
    pub fn remove_others(&mut self) -> Result<(), LoadError> {
        for other in std::mem::take(&mut self.others) {
            remove_version(&other.directory, &mut Vec::new())?;
            info!(version = other.version, "what another version left is removed");
        }
        Ok(())
    }

    /// Where the maps are, each under its name: those in use at any time.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.directory.join("maps")
    }

    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Where the larger copy of a map is until it takes its place.
    #[must_use]
    pub fn next(&self, name: &str) -> PathBuf {
        self.directory.join("next").join(name)
    }

    /// Copies that did not come to be used: of a growth that failed, or of a daemon that died in
    /// the middle of it.
    ///
    /// # Errors
    /// They cannot be removed.
    pub fn clear_next(&self) -> Result<(), LoadError> {
        let next = self.directory.join("next");
        for entry in fs::read_dir(&next).map_err(failed(&next))? {
            let path = entry.map_err(failed(&next))?.path();
            fs::remove_file(&path).map_err(failed(&path))?;
        }
        Ok(())
    }

    /// The copy takes the map's place, in one step.
    ///
    /// # Errors
    /// It cannot be renamed.
    pub fn take_next(&self, name: &str) -> Result<(), LoadError> {
        let next = self.next(name);
        fs::rename(&next, self.map(name)).map_err(failed(&next))
    }

    /// The size of a map: the one it was made with, whatever is asked for now. `None` when it
    /// is not pinned.
    ///
    /// # Errors
    /// The kernel refuses to tell.
    pub fn size(&self, name: &str) -> Result<Option<u32>, LoadError> {
        let path = self.map(name);
        if !path.exists() {
            return Ok(None);
        }
        let info = MapInfo::from_pin(path);
        let info = info.map_err(|e| LoadError::from_aya(format!("ask about map {name}"), &e))?;
        Ok(Some(info.max_entries()))
    }

    /// From now on links are those of another start.
    pub const fn start_again(&mut self) {
        self.start = self.start.wrapping_add(1);
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

    /// The last link of `program` at `place` that a daemon before this one made, of whichever
    /// version.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn before(&self, program: &str, place: u32) -> Result<Option<PathBuf>, LoadError> {
        let ours = last_link(&self.directory, program, place, Some(self.start))?;
        if ours.is_some() {
            return Ok(ours);
        }
        for other in &self.others {
            let theirs = last_link(&other.directory, program, place, None)?;
            if theirs.is_some() {
                return Ok(theirs);
            }
        }
        Ok(None)
    }

    /// The link of `program` at `place` that is in place now.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn current(&self, program: &str, place: u32) -> Result<Option<PathBuf>, LoadError> {
        last_link(&self.directory, program, place, None)
    }

    /// Unpins what is attached no more. Whatever has a clsact filter's priority and handle by now
    /// stays.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn unpin(&self, path: &Path) -> Result<(), LoadError> {
        let result = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
        result.map_err(failed(path))
    }

    /// Makes the link that is pinned at `path` one of this process, which has put its own program
    /// there.
    ///
    /// # Errors
    /// It is gone.
    pub fn take_over(&self, path: &Path) -> Result<(), LoadError> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let (kept, _) = name.rsplit_once('-').unwrap_or((name, ""));
        let ours = self.directory.join("links").join(format!("{kept}-{}", self.start));
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

    /// Whether a daemon in ebpf mode has left anything, as far as it can be seen from here.
    #[must_use]
    pub fn any(root: &Path) -> bool {
        root.join(OURS).is_dir()
    }

    /// Whether the file system is there; it is not mounted.
    #[must_use]
    pub fn mounted(root: &Path) -> bool {
        statfs(root).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
    }

    /// Removes everything, of every layout: links first, so that no program meets empty
    /// maps.
    ///
    /// # Errors
    /// Something cannot be removed, or a daemon that lives holds it.
    pub fn cleanup(root: &Path) -> Result<Vec<String>, LoadError> {
        let ours = root.join(OURS);
        match fs::metadata(&ours) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(&ours)(error)),
        }
        let _lock = lock::lock(&ours)?;
        let mut removed = Vec::new();
        let mut versions: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(&ours).map_err(failed(&ours))? {
            versions.push(entry.map_err(failed(&ours))?.path());
        }
        for links in versions.iter().map(|version| version.join("links")) {
            if links.is_dir() {
                empty(&links, &mut removed)?;
            }
        }
        for version in &versions {
            remove_version(version, &mut removed)?;
        }
        fs::remove_dir(&ours).map_err(failed(&ours))?;
        Ok(removed)
    }
}

/// Removes what is in a directory, and tells it.
fn empty(directory: &Path, removed: &mut Vec<String>) -> Result<(), LoadError> {
    for entry in fs::read_dir(directory).map_err(failed(directory))? {
        let path = entry.map_err(failed(directory))?.path();
        remove(&path)?;
        removed.push(path.display().to_string());
    }
    Ok(())
}

/// Removes the directory of a version. What is there to tell its maps apart goes last.
fn remove_version(version: &Path, removed: &mut Vec<String>) -> Result<(), LoadError> {
    for part in ["links", "maps", "next", "layout"] {
        let directory = version.join(part);
        // An older daemon has no such part.
        if directory.is_dir() {
            let mut there = Vec::new();
            empty(&directory, &mut there)?;
            // What says how maps look is nothing of its own.
            removed.extend(there.into_iter().filter(|_| part != "layout"));
            fs::remove_dir(&directory).map_err(failed(&directory))?;
        }
    }
    fs::remove_dir(version).map_err(failed(version))
}

/// A handle to a pinned map, by its bytes.
///
/// # Errors
/// It is not there, or has a value for each CPU.
pub fn raw_pin(path: &Path) -> Result<RawMap, LoadError> {
    raw_pin_as(path, RawMap::of)
}

/// The same to a map that has a value for each of so many CPUs.
///
/// # Errors
/// It is not there, or no such map.
pub fn raw_pin_of_each_cpu(path: &Path, cpus: usize) -> Result<RawMap, LoadError> {
    raw_pin_as(path, |map| RawMap::of_each_cpu(map, cpus))
}

fn raw_pin_as(
    path: &Path,
    of: impl FnOnce(BorrowedFd<'_>) -> Result<RawMap, crate::kernel::netlink::Errno>,
) -> Result<RawMap, LoadError> {
    let operation = format!("open {}", path.display());
    let data = MapData::from_pin(path).map_err(|e| LoadError::from_aya(&*operation, &e))?;
    let raw = of(data.fd().as_fd());
    raw.map_err(|errno| LoadError::Kernel { operation, errno, hint: "" })
}

/// The one of the latest start but `except`.
fn last_link(
    version: &Path,
    program: &str,
    place: u32,
    except: Option<u32>,
) -> Result<Option<PathBuf>, LoadError> {
    let links = version.join("links");
    let mut last: Option<(u32, PathBuf)> = None;
    if !links.is_dir() {
        return Ok(None);
    }
    for entry in fs::read_dir(&links).map_err(failed(&links))? {
        let path = entry.map_err(failed(&links))?.path();
        let Some((at, start)) = numbers_of(&path) else { continue };
        if at == place
            && Some(start) != except
            && program_of(&path) == Some(program)
            && last.as_ref().is_none_or(|(other, _)| *other < start)
        {
            last = Some((start, path));
        }
    }
    Ok(last.map(|(_, path)| path))
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
    use nix::fcntl::FlockArg;

    use super::*;

    #[test]
    fn a_program_takes_the_place_of_the_last_one_at_its_device() {
        let root = tempfile::tempdir().unwrap();
        let lock = Flock::lock(File::open(root.path()).unwrap(), FlockArg::LockExclusive);
        let pins = Pins {
            directory: root.path().to_owned(),
            start: 9,
            others: Vec::new(),
            _lock: lock.unwrap(),
        };
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
