//! Debian's kubectl, which tests let talk to the test API server.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::{Lists, Release};
use crate::{place, shell};

/// Names the program to tests.
pub const ENV: &str = "PROXY_KUBECTL";

/// Unpacked beside the guest kernels and never installed, since the machine may have one of
/// another origin.
///
/// # Errors
/// When the package cannot be fetched or unpacked.
pub fn ensure() -> Result<PathBuf> {
    let dir = place::cache()?.join("kubectl");
    let program = dir.join("usr/bin/kubectl");
    if program.is_file() {
        return Ok(program);
    }
    let cache = place::cache()?;
    let _lock = shell::lock(&cache.join("kernels.lock"))?;
    if program.is_file() {
        return Ok(program);
    }
    let work = tempfile::Builder::new().prefix(".new-").tempdir_in(&cache)?;
    Lists::update(Release::Bookworm, &cache.join(Release::Bookworm.directory()))?
        .download("kubernetes-client", work.path())?;
    let deb = fs::read_dir(work.path())?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get download left no package")?;
    let root = work.path().join("root");
    let mut unpack = Command::new("dpkg");
    shell::quietly("unpacking kubernetes-client", unpack.arg("-x").arg(&deb).arg(&root))?;
    fs::rename(&root, &dir).context("cannot move kubectl into place")?;
    Ok(program)
}
