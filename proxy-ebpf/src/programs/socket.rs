//! System calls on this node: the socket goes to a backend, once, and its packets are
//! never touched again.
//!
//! Each for `AF_INET` and `AF_INET6`; the latter with IPv4 too, by mapped addresses.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
    bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_set_retval,
};
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use proxy_ebpf::layout::{Config, FrontendKey};
use proxy_ebpf::order::{Address, Be16, Be32};
use proxy_ebpf::parse::{TCP, UDP};
use proxy_ebpf::socket::{self, Caller};
use proxy_ebpf::verdict::SocketVerdict;

use crate::maps::{self, Kernel};

/// Set by the loader. The verifier takes it as a constant and drops the dead branch, so
/// kernels without the helper (before 5.18) never meet the call.
#[unsafe(no_mangle)]
static CAN_SET_RETVAL: u8 = 0;

const PROCEED: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const AF_INET: u32 = 2;
/// `kubepods.slice/kubepods-QOS.slice/kubepods-QOS-podUID.slice`, counted from the root.
const POD_LEVEL: i32 = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(context: SockAddrContext) -> i32 {
    translate(context.sock_addr, Family::V4, true)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(context: SockAddrContext) -> i32 {
    translate(context.sock_addr, Family::V6, true)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(context: SockAddrContext) -> i32 {
    translate(context.sock_addr, Family::V4, false)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(context: SockAddrContext) -> i32 {
    translate(context.sock_addr, Family::V6, false)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(context: SockAddrContext) -> i32 {
    restore(context.sock_addr, Family::V4)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(context: SockAddrContext) -> i32 {
    restore(context.sock_addr, Family::V6)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(context: SockAddrContext) -> i32 {
    restore(context.sock_addr, Family::V4)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(context: SockAddrContext) -> i32 {
    restore(context.sock_addr, Family::V6)
}

/// What is remembered of a connected UDP socket goes with it.
#[cgroup_sock(sock_release)]
pub fn sock_release(context: SockContext) -> i32 {
    let socket: *mut bpf_sock = context.as_ptr().cast();
    // SAFETY: the kernel gives a valid context.
    let protocol = unsafe { addr_of!((*socket).protocol).read_volatile() };
    if protocol != u32::from(UDP) {
        return PROCEED;
    }
    // SAFETY: as above; the helper takes the context.
    let (family, port, cookie) = unsafe {
        (
            addr_of!((*socket).family).read_volatile(),
            Be16::from_kernel(u32::from(addr_of!((*socket).dst_port).read_volatile())),
            bpf_get_socket_cookie(socket.cast()),
        )
    };
    // All of them, whichever the family: reads that depend on it come by one pointer into the
    // context, which the verifier does not take.
    // SAFETY: as above.
    let (v4, v6) = unsafe {
        (
            Be32::from_kernel(addr_of!((*socket).dst_ip4).read_volatile()),
            [
                Be32::from_kernel(addr_of!((*socket).dst_ip6[0]).read_volatile()),
                Be32::from_kernel(addr_of!((*socket).dst_ip6[1]).read_volatile()),
                Be32::from_kernel(addr_of!((*socket).dst_ip6[2]).read_volatile()),
                Be32::from_kernel(addr_of!((*socket).dst_ip6[3]).read_volatile()),
            ],
        )
    };
    let address = if family == AF_INET { Address::v4(v4) } else { Address::v6(v6) };
    socket::closed(&Kernel, cookie, address, port);
    PROCEED
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "an IP protocol number has 8 bits")]
fn translate(socket: *mut bpf_sock_addr, family: Family, connect: bool) -> i32 {
    let (address, port) = load(socket, family);
    // SAFETY: the kernel gives a valid context.
    let protocol = unsafe { addr_of!((*socket).protocol).read_volatile() } as u8;
    let key = FrontendKey::new(address, port, protocol);
    let caller = caller(socket);
    let verdict = if connect {
        // SAFETY: a helper without arguments.
        socket::connect(&Kernel, &caller, &key, unsafe { bpf_get_prandom_u32() })
    } else {
        socket::send(&Kernel, &caller, &key)
    };
    match verdict {
        SocketVerdict::Pass => PROCEED,
        SocketVerdict::Translate { address, port, .. } => {
            // A set of backends has its frontend's family; anything else is a fault of
            // the table, and connecting elsewhere would hide it.
            if store(socket, family, address, port) { PROCEED } else { REFUSE }
        }
        SocketVerdict::Refuse(_) => refuse(socket, family, protocol),
    }
}

/// The address of the peer is the frontend's again.
#[inline(always)]
fn restore(socket: *mut bpf_sock_addr, family: Family) -> i32 {
    let (address, port) = load(socket, family);
    // SAFETY: the kernel gives a valid context.
    let cookie = unsafe { bpf_get_socket_cookie(socket.cast()) };
    if let Some((address, port)) = socket::known_as(&Kernel, cookie, address, port) {
        // A frontend of another family was never sent to by this socket; whatever is
        // shown then, the call itself goes on.
        store(socket, family, address, port);
    }
    PROCEED
}

#[inline(always)]
fn caller(socket: *mut bpf_sock_addr) -> Caller {
    // SAFETY: the kernel gives a valid context; the others take none.
    let (cookie, namespace, now) = unsafe {
        (
            bpf_get_socket_cookie(socket.cast()),
            bpf_get_netns_cookie(socket.cast()),
            bpf_ktime_get_ns(),
        )
    };
    let opt_outs = maps::config().is_some_and(|config| config.features & Config::OPT_OUTS != 0);
    let (mut cgroup, mut pod) = (0, 0);
    if opt_outs {
        // SAFETY: helpers that take numbers.
        (cgroup, pod) =
            unsafe { (bpf_get_current_cgroup_id(), bpf_get_current_ancestor_cgroup_id(POD_LEVEL)) };
    }
    Caller { cookie, namespace, cgroup, pod, now }
}

// The context is not memory: the verifier rewrites each access and takes aligned words
// only, hence volatile accesses that the compiler leaves alone.

#[inline(always)]
fn load(socket: *mut bpf_sock_addr, family: Family) -> (Address, Be16) {
    // SAFETY: the kernel gives a valid context.
    unsafe {
        let port = Be16::from_kernel(addr_of!((*socket).user_port).read_volatile());
        let address = match family {
            Family::V4 => {
                Address::v4(Be32::from_kernel(addr_of!((*socket).user_ip4).read_volatile()))
            }
            Family::V6 => Address::v6([
                Be32::from_kernel(addr_of!((*socket).user_ip6[0]).read_volatile()),
                Be32::from_kernel(addr_of!((*socket).user_ip6[1]).read_volatile()),
                Be32::from_kernel(addr_of!((*socket).user_ip6[2]).read_volatile()),
                Be32::from_kernel(addr_of!((*socket).user_ip6[3]).read_volatile()),
            ]),
        };
        (address, port)
    }
}

#[inline(always)]
fn store(socket: *mut bpf_sock_addr, family: Family, address: Address, port: Be16) -> bool {
    // SAFETY: the kernel gives a valid context; the fields are writable in these hooks.
    unsafe {
        match family {
            Family::V4 => {
                let Some(address) = address.to_v4() else {
                    return false;
                };
                addr_of_mut!((*socket).user_ip4).write_volatile(address.to_kernel());
            }
            Family::V6 => {
                let [a, b, c, d] = address.words();
                addr_of_mut!((*socket).user_ip6[0]).write_volatile(a.to_kernel());
                addr_of_mut!((*socket).user_ip6[1]).write_volatile(b.to_kernel());
                addr_of_mut!((*socket).user_ip6[2]).write_volatile(c.to_kernel());
                addr_of_mut!((*socket).user_ip6[3]).write_volatile(d.to_kernel());
            }
        }
        addr_of_mut!((*socket).user_port).write_volatile(port.to_kernel());
    }
    true
}

/// `ECONNREFUSED`: where the kernel lets us say so, and else from port 0 of the loopback
/// address, where nobody can listen. Without the latter it would be `EPERM`.
#[inline(always)]
fn refuse(socket: *mut bpf_sock_addr, family: Family, protocol: u8) -> i32 {
    // SAFETY: a read-only global.
    if unsafe { addr_of!(CAN_SET_RETVAL).read_volatile() } != 0 {
        // SAFETY: takes a number.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return REFUSE;
    }
    let (asked, _) = load(socket, family);
    // A connected UDP socket would stay there.
    if protocol != TCP {
        return REFUSE;
    }
    let loopback = match asked.to_v4() {
        Some(_) => Address::v4(Be32::from_host(0x7f00_0001)),
        None => Address::v6([
            Be32::from_host(0),
            Be32::from_host(0),
            Be32::from_host(0),
            Be32::from_host(1),
        ]),
    };
    if store(socket, family, loopback, Be16::from_host(0)) { PROCEED } else { REFUSE }
}
