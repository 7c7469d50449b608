//! `connect(2)` on this node: the socket goes to a backend, once, and its packets are
//! never touched again.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use proxy_ebpf::layout::FrontendKey;
use proxy_ebpf::order::{Address, Be16, Be32};
use proxy_ebpf::service;
use proxy_ebpf::verdict::Verdict;

use crate::maps::Kernel;

/// Set by the loader. The verifier takes it as a constant and drops the dead branch, so
/// kernels without the helper (before 5.18) never meet the call.
#[unsafe(no_mangle)]
static CAN_SET_RETVAL: u8 = 0;

const PROCEED: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

#[cgroup_sock_addr(connect4)]
pub fn connect4(context: SockAddrContext) -> i32 {
    let socket = context.sock_addr;
    // The context is not memory: the verifier rewrites each access and takes aligned
    // words only, hence volatile accesses that the compiler leaves alone.
    // SAFETY: the kernel gives a valid context.
    let address = unsafe { addr_of!((*socket).user_ip4).read_volatile() };
    match decide(socket, Address::v4(Be32::from_kernel(address))) {
        Verdict::Pass => PROCEED,
        Verdict::Translate { address, port, .. } => {
            // A set of backends has its frontend's family; anything else is a fault of
            // the table, and connecting elsewhere would hide it.
            let Some(address) = address.to_v4() else {
                return REFUSE;
            };
            // SAFETY: as above; both fields are writable in this hook.
            unsafe {
                addr_of_mut!((*socket).user_ip4).write_volatile(address.to_kernel());
                addr_of_mut!((*socket).user_port).write_volatile(port.to_kernel());
            }
            PROCEED
        }
        Verdict::Drop(_) => refuse(),
    }
}

/// Also IPv4 by its mapped address, from sockets of family `AF_INET6`.
#[cgroup_sock_addr(connect6)]
pub fn connect6(context: SockAddrContext) -> i32 {
    let socket = context.sock_addr;
    // SAFETY: the kernel gives a valid context; words as in `connect4`.
    let address = unsafe {
        Address::v6([
            Be32::from_kernel(addr_of!((*socket).user_ip6[0]).read_volatile()),
            Be32::from_kernel(addr_of!((*socket).user_ip6[1]).read_volatile()),
            Be32::from_kernel(addr_of!((*socket).user_ip6[2]).read_volatile()),
            Be32::from_kernel(addr_of!((*socket).user_ip6[3]).read_volatile()),
        ])
    };
    match decide(socket, address) {
        Verdict::Pass => PROCEED,
        Verdict::Translate { address, port, .. } => {
            let [a, b, c, d] = address.words();
            // SAFETY: as above; the fields are writable in this hook.
            unsafe {
                addr_of_mut!((*socket).user_ip6[0]).write_volatile(a.to_kernel());
                addr_of_mut!((*socket).user_ip6[1]).write_volatile(b.to_kernel());
                addr_of_mut!((*socket).user_ip6[2]).write_volatile(c.to_kernel());
                addr_of_mut!((*socket).user_ip6[3]).write_volatile(d.to_kernel());
                addr_of_mut!((*socket).user_port).write_volatile(port.to_kernel());
            }
            PROCEED
        }
        Verdict::Drop(_) => refuse(),
    }
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "an IP protocol number has 8 bits")]
fn decide(socket: *const bpf_sock_addr, address: Address) -> Verdict {
    // SAFETY: the kernel gives a valid context.
    let (port, protocol) = unsafe {
        (
            addr_of!((*socket).user_port).read_volatile(),
            addr_of!((*socket).protocol).read_volatile(),
        )
    };
    let key = FrontendKey::new(address, Be16::from_kernel(port), protocol as u8);
    // SAFETY: a helper without arguments.
    service::connect(&Kernel, &key, unsafe { bpf_get_prandom_u32() })
}

/// `ECONNREFUSED` where the kernel lets us say so, else its `EPERM`.
#[inline(always)]
fn refuse() -> i32 {
    // SAFETY: a read-only global.
    if unsafe { addr_of!(CAN_SET_RETVAL).read_volatile() } != 0 {
        // SAFETY: takes a number.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REFUSE
}
