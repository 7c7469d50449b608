//! The network namespace that the process is in.

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket};

/// `SO_NETNS_COOKIE`, from Linux 5.14 on.
#[derive(Debug, Clone, Copy)]
struct Cookie;

nix::getsockopt_impl!(
    Cookie,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    u64,
    nix::sys::socket::sockopt::GetStruct<u64>
);

/// What eBPF programs know this namespace by (`bpf_get_netns_cookie`); `None` when the kernel
/// does not tell.
#[must_use]
pub fn own_cookie() -> Option<u64> {
    let none = None;
    let socket =
        socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, none).ok()?;
    getsockopt(&socket, Cookie).ok()
}

/// Runs `test` in a network namespace that ends with it.
#[cfg(test)]
pub fn in_new_namespace(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("a network namespace of the test's own (needs root)");
        test();
    })
    .join()
    .expect("the test in its namespace");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_one_cookie() {
        assert_eq!(own_cookie(), own_cookie());
        assert!(own_cookie().is_some_and(|cookie| cookie != 0));
    }
}
