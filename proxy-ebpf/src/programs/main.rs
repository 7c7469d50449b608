//! The eBPF programs. Entry points only: what they decide is in the library.
//!
//! | program | hook | what it does |
//! |---|---|---|
//! | `connect4`, `connect6` | cgroup, `connect(2)` | sends the socket to a backend, or refuses |
//! | `sendmsg4`, `sendmsg6` | cgroup, `sendmsg(2)` | the same for a datagram with an address |
//! | `recvmsg4`, `recvmsg6` | cgroup, `recvmsg(2)` | shows the frontend as the sender |
//! | `sock_release` | cgroup, `close(2)` | forgets a connected UDP socket |
//! | `getpeername4`, `getpeername6` | cgroup | shows the frontend as the peer |
//! | `tc_ingress`, `tc_egress` | tcx or clsact | translates packets in both directions, answers |
//! | `xdp_ingress` | XDP | the same for what goes on to another node or back to a client |
//!
//! `docs/ebpf.md` says how they are built and loaded.
#![no_std]
#![no_main]
// Every line that touches kernel memory is unsafe; the lint would mark the whole file.
#![allow(unsafe_code, reason = "contexts and maps are raw pointers given by the kernel")]

#[cfg(not(target_arch = "bpf"))]
compile_error!("feature `programs` is for target bpfel-unknown-none: use `cargo xtask build`");

mod direct;
mod maps;
mod route;
mod skb;
mod socket;
mod tc;
mod xdp;

use proxy_ebpf::layout::Mark;

/// The loader compares it with its own before it loads anything.
#[unsafe(no_mangle)]
#[unsafe(link_section = "proxy_layout")]
pub static LAYOUT: Mark = Mark::CURRENT;

/// Several of the helpers in use are for GPL-compatible programs only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Cannot be reached: the verifier rejects a program that could. The compiler wants it.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
