//! The cgroup v2 tree of one simulated cluster.
//!
//! Every node and every pod has its own cgroup, because socket-level programs attach
//! to cgroups, and because `cgroup.kill` (Linux 5.14, Documentation/admin-guide/cgroup-v2.rst)
//! ends every process of a cluster without anybody having to remember its id.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Start of the directory name of every cluster; what follows is
/// `<owner's pid>-<owner's start time>-<serial>`.
const PREFIX: &str = "pxtest-";
/// How long killed processes get until the kernel has taken them out of their cgroup.
const REAP_TIMEOUT: Duration = Duration::from_secs(5);

/// Where cgroup v2 is mounted: `/sys/fs/cgroup` on most machines, a subdirectory
/// where version 1 controllers are still in use.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("/proc/mounts")?;
    cgroup2_in(&mounts).context(
        "no cgroup2 file system is mounted: run `mount -t cgroup2 none /sys/fs/cgroup` first",
    )
}

fn cgroup2_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_device, dir, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(dir))
    })
}

/// Start time of a process in clock ticks since boot (field 22 of proc_pid_stat(5)):
/// together with the pid it names a process even after the pid is used again.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold spaces and parentheses; fields are counted after it.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// The root cgroup of one cluster. Dropping it ends every process in it and removes it.
#[derive(Debug)]
pub struct ClusterCgroup {
    root: PathBuf,
    threaded: bool,
}

impl ClusterCgroup {
    /// Removes what dead owners left, then makes a fresh tree. In a *threaded* one single
    /// threads of a process can be in different cgroups ("Threads" in
    /// Documentation/admin-guide/cgroup-v2.rst).
    pub fn create(threaded: bool) -> Result<Self> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let mount = mount_point()?;
        remove_leftovers(&mount);
        let pid = std::process::id();
        if threaded {
            // The tree has to be of the same domain as the threads that enter it.
            fs::write(mount.join("cgroup.procs"), pid.to_string()).context("the root cgroup")?;
        }
        let start = start_time(pid).unwrap_or(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let root = mount.join(format!("{PREFIX}{pid}-{start}-{serial}"));
        let cgroup = Self { root, threaded };
        cgroup.make(&cgroup.root)?;
        Ok(cgroup)
    }

    fn make(&self, dir: &Path) -> Result<()> {
        fs::create_dir(dir).with_context(|| format!("create cgroup {}", dir.display()))?;
        if self.threaded {
            fs::write(dir.join("cgroup.type"), "threaded")
                .with_context(|| format!("threads in cgroup {}", dir.display()))?;
        }
        Ok(())
    }

    /// A cgroup under this cluster's root; parents are made as needed.
    pub fn child(&self, path: &str) -> Result<PathBuf> {
        let mut dir = self.root.clone();
        for part in Path::new(path) {
            dir.push(part);
            if !dir.is_dir() {
                self.make(&dir)?;
            }
        }
        Ok(dir)
    }

    pub fn is_threaded(&self) -> bool {
        self.threaded
    }

    pub fn path(&self) -> &Path {
        &self.root
    }
}

impl Drop for ClusterCgroup {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.root) {
            tracing::warn!(cgroup = %self.root.display(), %error, "cgroup left behind");
        }
    }
}

/// Trees whose owner no longer runs: a crash of the owner skips `Drop`.
fn remove_leftovers(mount: &Path) {
    let Ok(entries) = fs::read_dir(mount) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(owner_is_dead) {
            // Another test run may be removing the same tree; losing that race is fine.
            let _ = remove_tree(&entry.path());
        }
    }
}

fn owner_is_dead(name: &str) -> bool {
    let Some(id) = name.strip_prefix(PREFIX) else {
        return false;
    };
    let mut parts = id.split('-');
    let pid = parts.next().and_then(|p| p.parse::<u32>().ok());
    let start = parts.next().and_then(|s| s.parse::<u64>().ok());
    match (pid, start) {
        (Some(pid), Some(start)) => start_time(pid) != Some(start),
        _ => false,
    }
}

/// Ends every process under `root`, then removes it from the leaves up.
fn remove_tree(root: &Path) -> io::Result<()> {
    match fs::write(root.join("cgroup.kill"), "1") {
        // A threaded cgroup has threads and no processes.
        Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => kill_threads(root)?,
        result => result?,
    }
    let deadline = Instant::now() + REAP_TIMEOUT;
    loop {
        match remove_dirs(root) {
            Ok(()) => return Ok(()),
            // EBUSY: a killed process has not left yet.
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
                if Instant::now() > deadline {
                    return Err(error);
                }
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Ends the processes of all threads under `dir` except for this one's own, which leave when
/// their work is done.
fn kill_threads(dir: &Path) -> io::Result<()> {
    for id in fs::read_to_string(dir.join("cgroup.threads"))?.lines() {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
        let process = process.and_then(|id| id.trim().parse::<i32>().ok());
        let Some(process) = process.filter(|id| u32::try_from(*id) != Ok(std::process::id()))
        else {
            continue;
        };
        // It may have ended meanwhile.
        let _ = nix::sys::signal::kill(Pid::from_raw(process), Signal::SIGKILL);
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            kill_threads(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_dirs(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_dirs(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_in_hybrid_and_unified_mount_tables() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_in(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let unified = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        assert_eq!(cgroup2_in(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(cgroup2_in("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn only_trees_of_dead_owners_are_leftovers() {
        let pid = std::process::id();
        let start = start_time(pid).expect("own start time");
        assert!(!owner_is_dead(&format!("{PREFIX}{pid}-{start}-0")));
        assert!(owner_is_dead(&format!("{PREFIX}{pid}-{}-0", start + 1)), "pid was used again");
        assert!(!owner_is_dead("system.slice"));
        assert!(!owner_is_dead(&format!("{PREFIX}odd")));
    }
}
