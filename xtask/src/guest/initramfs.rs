//! The initramfs: busybox, the modules that reach the machine's root file system, and the
//! first-stage script, as a `newc` cpio archive.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::kernel::Tree;
use crate::{place, shell};

const INIT: &str = include_str!("init.sh");
const BUSYBOX: &str = "/bin/busybox";

/// What it takes to mount a 9p share over virtio and lay a tmpfs above it.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// The initramfs for a kernel, built when none of the same content is in the cache.
///
/// # Errors
/// When busybox or a module cannot be read, or the archive not written.
pub fn ensure(tree: &Tree) -> Result<PathBuf> {
    let busybox = fs::read(BUSYBOX)
        .with_context(|| format!("cannot read {BUSYBOX} (package busybox-static)"))?;
    let mut hash = DefaultHasher::new();
    (INIT, MODULES, &busybox).hash(&mut hash);
    let name = format!("initramfs-{}-{:016x}.cpio", tree.release, hash.finish());
    let file = place::cache()?.join(name);
    if file.is_file() {
        return Ok(file);
    }
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "modules"] {
        archive.directory(dir);
    }
    archive.file("bin/busybox", 0o755, &busybox);
    archive.file("init", 0o755, INIT.as_bytes());
    let mut order = String::new();
    for path in tree.loading_order(&MODULES)? {
        let (name, content) = module(&path)?;
        archive.file(&format!("modules/{name}"), 0o644, &content);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    let part = file.with_extension(format!("part-{}", std::process::id()));
    fs::write(&part, archive.finish())
        .and_then(|()| fs::rename(&part, &file))
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// A module's file name and content without compression: busybox's insmod may not know it.
fn module(path: &Path) -> Result<(String, Vec<u8>)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some(plain) = name.strip_suffix(".xz") else {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok((name, content));
    };
    let mut command = Command::new("xz");
    command.arg("-dc").arg(path);
    let out = command
        .output()
        .with_context(|| format!("cannot start `{}` (package xz-utils)", shell::shown(&command)))?;
    anyhow::ensure!(out.status.success(), "cannot decompress {}", path.display());
    Ok((plain.to_owned(), out.stdout))
}

/// A cpio archive in the `newc` format, as the kernel reads it
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: usize,
}

impl Archive {
    fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | permissions, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let (inode, size, name_size) = (self.inode, content.len(), name.len() + 1);
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, major, minor, rmajor,
        // rminor, namesize, check: each eight hexadecimal digits after the magic.
        let header = format!(
            "070701{inode:08x}{mode:08x}{z}{z}{nlink:08x}{z}{size:08x}{z}{z}{z}{z}{name_size:08x}{z}",
            z = "00000000",
            nlink = 1,
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::Stdio;

    #[test]
    fn cpio_lists_what_was_put_in() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/x", 0o755, b"12345");
        archive.file("y", 0o644, b"");
        let mut cpio = Command::new(BUSYBOX)
            .args(["cpio", "-t"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let out = cpio.wait_with_output().unwrap();
        assert!(out.status.success());
        assert_eq!(String::from_utf8(out.stdout).unwrap(), "bin\nbin/x\ny\n");
    }
}
