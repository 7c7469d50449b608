//! Mounts that end with the test.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// What is mounted from here on by this thread and those it starts, and by the daemons, goes
/// with them.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn hide_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a new mount namespace")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("private mounts")
}

/// What nodes have mounted; the daemon needs no right to do it.
///
/// # Errors
/// When the directory cannot be made or the kernel refuses.
pub fn mount_bpf(at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    let none: Option<&str> = None;
    mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), none)
        .with_context(|| format!("the BPF file system at {}", at.display()))
}
