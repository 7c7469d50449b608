//! Hears that some address of the node came or went, or some device.
//!
//! Only *that* something changed is taken from the notice; the list itself is dumped
//! anew by the caller. A notice that was lost to a full buffer (`ENOBUFS`) is then as
//! good as one that arrived.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// `RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR` (include/uapi/linux/rtnetlink.h).
const ADDRESSES: u32 = 0x10 | 0x100;
/// `RTMGRP_LINK`
const DEVICES: u32 = 1;

/// include/uapi/linux/rtnetlink.h
const RT_SCOPE_LINK: u8 = 253;

/// Addresses come in bursts when a link is set up.
const SETTLE: Duration = Duration::from_millis(20);
/// A flapping link must not put off the notice for ever.
const LONGEST_BURST: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub struct AddressMonitor {
    socket: Socket,
    /// Changes on this link are not news: we make them ourselves, by the thousand.
    ignore: Option<u32>,
}

impl AddressMonitor {
    /// Listens in the network namespace of the calling thread. Open it before the first
    /// dump, so that no change falls in between.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open() -> io::Result<Self> {
        Self::of(ADDRESSES)
    }

    /// Of devices, too: one that comes without an address would be no news.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for_devices() -> io::Result<Self> {
        Self::of(ADDRESSES | DEVICES)
    }

    fn of(groups: u32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, ignore: None })
    }

    /// From here on, changes on this link are no news. One that is made anew has another
    /// index: it is news until this is called again.
    pub const fn ignore(&mut self, link: Option<u32>) {
        self.ignore = link;
    }

    /// Waits until something changed (true) or the time is over (false). A burst is one
    /// notice.
    ///
    /// # Errors
    /// When waiting on the socket fails.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.readable(left)? {
                return Ok(false);
            }
            if self.drain()? {
                break;
            }
        }
        let end = Instant::now() + LONGEST_BURST;
        loop {
            let left = end.saturating_duration_since(Instant::now()).min(SETTLE);
            if left.is_zero() || !self.readable(left)? {
                return Ok(true);
            }
            self.drain()?;
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

    /// Each pod's interface comes with a link-local IPv6 address, on which nothing listens:
    /// to list 10,000 addresses of Services for it would be waste.
    const fn is_news(&self, notice: Option<Notice>) -> bool {
        match notice {
            Some(Notice { link, scope }) => {
                !matches!(self.ignore, Some(ignored) if ignored == link) && scope != RT_SCOPE_LINK
            }
            None => true,
        }
    }

    /// True when something came that is not to be ignored.
    fn drain(&self) -> io::Result<bool> {
        let mut news = false;
        let mut buffer = Vec::with_capacity(32 << 10);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => news |= notices(&buffer).any(|notice| self.is_news(notice)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(news),
                // Notices were lost, which is a notice too.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => news = true,
                Err(error) => return Err(error),
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Notice {
    link: u32,
    scope: u8,
}

/// What each notice of a datagram is about: `ifa_scope` and `ifa_index` of
/// `struct ifaddrmsg`, behind the 16 bytes of `struct nlmsghdr`. `None` for what cannot be
/// read. In `struct ifinfomsg` the index is at the same place, and where a scope would be is the
/// upper half of a hardware type, of which none is that scope.
fn notices(mut datagram: &[u8]) -> impl Iterator<Item = Option<Notice>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?) as usize;
        let notice = datagram.get(19..24).and_then(|bytes| {
            let (scope, link) = bytes.split_first()?;
            Some(Notice { link: u32::from_ne_bytes(link.try_into().ok()?), scope: *scope })
        });
        let next = length.next_multiple_of(4).max(16).min(datagram.len());
        datagram = &datagram[next..];
        Some(notice)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_notice_of_a_datagram_names_its_link() {
        let notice = |link: u32| {
            let mut bytes = vec![0u8; 24];
            bytes[0] = 24;
            bytes[19] = RT_SCOPE_LINK;
            bytes[20..].copy_from_slice(&link.to_ne_bytes());
            bytes
        };
        let datagram = [notice(7), notice(100)].concat();
        let about = |link| Some(Notice { link, scope: RT_SCOPE_LINK });
        assert_eq!(notices(&datagram).collect::<Vec<_>>(), [about(7), about(100)]);
        assert_eq!(notices(&datagram[..30]).collect::<Vec<_>>(), [about(7), None]);
    }

    proptest::proptest! {
        #[test]
        fn any_datagram_is_read_without_panic(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80),
        ) {
            let _ = notices(&bytes).count();
        }
    }
}
