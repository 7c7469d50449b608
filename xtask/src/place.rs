//! Where things are: the checkout, cargo's target directory, and the download cache.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of this checkout.
///
/// `cargo run` names the manifest's directory at run time, which stays right when
/// several checkouts share one target directory; the compiled-in path is for a
/// binary started by hand.
pub fn repo() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or_else(|| manifest.clone(), Path::to_path_buf)
}

/// Cargo's target directory for this checkout.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => repo().join(dir),
        None => repo().join("target"),
    }
}

/// What was downloaded or prepared once and serves every checkout of this user: guest
/// kernels, their initramfs, package lists.
///
/// `PROXY_CACHE_DIR` overrides the place, else `$XDG_CACHE_HOME` or `~/.cache` holds it.
///
/// # Errors
/// When the directory cannot be made.
pub fn cache() -> Result<PathBuf> {
    let dir = if let Some(dir) = env::var_os("PROXY_CACHE_DIR") {
        PathBuf::from(dir)
    } else {
        env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
            .unwrap_or_else(|| repo().join(".cache"))
            .join("node-dataplane")
    };
    std::fs::create_dir_all(&dir).with_context(|| {
        format!("cannot make the cache directory {} (set PROXY_CACHE_DIR)", dir.display())
    })?;
    dir.canonicalize().with_context(|| format!("cannot resolve {}", dir.display()))
}
