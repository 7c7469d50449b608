//! Two tun devices and what is between them: packets without a link header, from one network
//! namespace to another.

#![allow(unsafe_code, reason = "an ioctl without a wrapper")]

use std::fs::File;
use std::io::{Error, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};

/// As much of `struct ifreq` as `TUNSETIFF` reads, and as long as the whole.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

/// Makes a tun device in the current network namespace; it lasts as long as the file.
///
/// # Errors
/// The kernel refuses, or has none.
pub fn open(name: &str) -> Result<File> {
    const CONTROL: &str = "/dev/net/tun";
    if !Path::new(CONTROL).exists() {
        // The file comes with the module, where it is one.
        let loaded = Command::new("modprobe").arg("tun").status().context("modprobe")?;
        ensure!(loaded.success(), "modprobe tun: {loaded}");
    }
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(CONTROL)
        .context(CONTROL)?;
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        flags: u16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?,
        rest: [0; 22],
    };
    ensure!(name.len() < request.name.len(), "{name} is too long");
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the kernel reads and writes a `struct ifreq`, which `Request` is as long as.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(result == 0, "tun device {name}: {}", Error::last_os_error());
    Ok(file)
}

/// Carries packets from each device to the other, until it is dropped.
#[derive(Debug)]
#[must_use = "nothing is carried any more when it is dropped"]
pub struct Tunnel(Arc<AtomicBool>);

impl Tunnel {
    pub fn between(ends: [File; 2]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let tunnel = Self(Arc::clone(&over));
        thread::spawn(move || carry(&ends, &over));
        tunnel
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn carry(ends: &[File; 2], over: &AtomicBool) {
    const LOOK: u8 = 100;
    let mut buffer = vec![0; 1 << 16];
    while !over.load(Ordering::Relaxed) {
        let mut readable = ends.each_ref().map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
        // Whatever ends the wait, what is there is read.
        let _ = poll(&mut readable, LOOK);
        for (mut from, mut to) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])] {
            while let Ok(length) = from.read(&mut buffer) {
                // A device that is down takes none, as a cable that was pulled.
                let _ = to.write(&buffer[..length]);
            }
        }
    }
}
