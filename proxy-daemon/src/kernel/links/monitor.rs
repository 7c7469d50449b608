//! Hears that some address of the node came or went.
//!
//! Only *that* something changed is taken from the notice; the list itself is dumped
//! anew by the caller. A notice that was lost to a full buffer (`ENOBUFS`) is then as
//! good as one that arrived.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// `RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR` (include/uapi/linux/rtnetlink.h).
const GROUPS: u32 = 0x10 | 0x100;

/// Addresses come in bursts when a link is set up.
const SETTLE: Duration = Duration::from_millis(20);
/// A flapping link must not put off the notice for ever.
const LONGEST_BURST: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub struct AddressMonitor {
    socket: Socket,
}

impl AddressMonitor {
    /// Listens in the network namespace of the calling thread. Open it before the first
    /// dump, so that no change falls in between.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUPS))?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket })
    }

    /// Waits until something changed (true) or the time is over (false). A burst is one
    /// notice.
    ///
    /// # Errors
    /// When waiting on the socket fails.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        if !self.readable(timeout)? {
            return Ok(false);
        }
        let end = Instant::now() + LONGEST_BURST;
        loop {
            self.drain()?;
            let left = end.saturating_duration_since(Instant::now()).min(SETTLE);
            if left.is_zero() || !self.readable(left)? {
                return Ok(true);
            }
        }
    }

    fn readable(&self, timeout: Duration) -> io::Result<bool> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn drain(&self) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(32 << 10);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // Notices were lost, which is a notice too.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => {
                    tracing::debug!(fd = self.socket.as_raw_fd(), %error, "address monitor");
                    return Err(error);
                }
            }
        }
    }
}
