//! The kernel's routing table, asked from a program.

use core::ffi::c_void;
use core::mem::size_of;
use core::ptr::addr_of;

use aya_ebpf::bindings::{bpf_fib_lookup as Params, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{
    bpf_fib_lookup, bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp,
};
use proxy_ebpf::answer;
use proxy_ebpf::layout::Tuple;
use proxy_ebpf::order::Address;
use proxy_ebpf::parse::{TCP, UDP};
use proxy_ebpf::tables::Network;

use crate::maps::{self, Scratch};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `BPF_F_CURRENT_NETNS`: that of the device.
const CURRENT_NETNS: u64 = u64::MAX;

/// Results of `bpf_fib_lookup`, `include/uapi/linux/bpf.h`.
const SUCCESS: i64 = 0;
const NOT_FWDED: i64 = 4;
const NO_NEIGH: i64 = 7;
const FRAG_NEEDED: i64 = 8;

/// `include/net/tcp_states.h`; no socket is in the state 0.
const NO_SOCKET: u32 = 0;
const TCP_ESTABLISHED: u32 = 1;
const TCP_LISTEN: u32 = 10;

/// Where a packet of a program's context is.
pub struct Place {
    /// `__sk_buff` or `xdp_md`.
    pub context: *mut c_void,
    pub ifindex: u32,
}

/// What is known of the way on for a packet. Numbers, because a function of its own can
/// return no more.
pub mod way {
    /// All of it.
    pub const FOUND: u32 = 0;
    /// The kernel has yet to find the neighbour.
    pub const NO_NEIGHBOUR: u32 = 1;
    /// To the node itself.
    pub const LOCAL: u32 = 2;
    /// Not at this length.
    pub const TOO_BIG: u32 = 3;
    pub const NONE: u32 = 4;
}

impl Place {
    /// Looks up the way for what the packet is to become. `length` 0: not to be compared
    /// with what the route takes.
    #[inline(always)]
    pub fn find_way(&self, scratch: &mut Scratch, length: u16) -> u32 {
        let mut params = params(self.ifindex, &scratch.work.to, length);
        let result = self.look_up(&mut params);
        scratch.ifindex = params.ifindex;
        match result {
            SUCCESS => {
                let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (params.dmac, params.smac);
                scratch.ethernet = [a, b, c, d, e, f, g, h, i, j, k, l];
                // What the route takes, from kernel 5.12 on; before, what was asked stays there.
                // SAFETY: both members of the union are u16.
                scratch.longest = unsafe { params.__bindgen_anon_1.mtu_result }.into();
                way::FOUND
            }
            NO_NEIGH => way::NO_NEIGHBOUR,
            FRAG_NEEDED => {
                // SAFETY: both members of the union are u16.
                let told = unsafe { params.__bindgen_anon_1.mtu_result };
                // Before kernel 5.12 what was asked stays there.
                let mtu = if told == length { answer::next_shorter(length) } else { told };
                scratch.mtu = mtu.into();
                way::TOO_BIG
            }
            NOT_FWDED => way::LOCAL,
            _ => way::NONE,
        }
    }

    #[inline(always)]
    fn look_up(&self, params: &mut Params) -> i64 {
        const SIZE: i32 = size_of::<Params>() as i32;
        // SAFETY: a valid context, and a struct of the size that is passed along.
        unsafe { bpf_fib_lookup(self.context, params, SIZE, 0) }
    }
}

#[inline(always)]
fn params(ifindex: u32, to: &Tuple, length: u16) -> Params {
    // SAFETY: integers and unions of integers, for which zeros are valid.
    let mut params: Params = unsafe { core::mem::zeroed() };
    params.l4_protocol = to.protocol;
    params.sport = to.source_port.to_kernel() as u16;
    params.dport = to.destination_port.to_kernel() as u16;
    params.__bindgen_anon_1.tot_len = length;
    params.ifindex = ifindex;
    let (source, destination) = (to.source.words(), to.destination.words());
    if to.destination.to_v4().is_some() {
        params.family = AF_INET;
        params.__bindgen_anon_3.ipv4_src = source[3].to_kernel();
        params.__bindgen_anon_4.ipv4_dst = destination[3].to_kernel();
    } else {
        params.family = AF_INET6;
        params.__bindgen_anon_3.ipv6_src = source.map(|word| word.to_kernel());
        params.__bindgen_anon_4.ipv6_dst = destination.map(|word| word.to_kernel());
    }
    params
}

impl Network for Place {
    /// That of the device the packet will leave by.
    #[inline(always)]
    fn source_for(&self, destination: &Address) -> Address {
        let v4 = destination.to_v4().is_some();
        let to = Tuple { destination: *destination, ..Tuple::default() };
        let mut params = params(self.ifindex, &to, 0);
        // The frame as it came may be longer than that device takes, which is no matter here: by a
        // tunnel it goes without its Ethernet header.
        if matches!(self.look_up(&mut params), SUCCESS | NO_NEIGH | FRAG_NEEDED)
            && let Some(device) = maps::device(params.ifindex)
        {
            let source = if v4 { device.source4 } else { device.source6 };
            if !source.is_unset() {
                return source;
            }
        }
        match maps::config() {
            Some(config) if v4 => config.source4,
            Some(config) => config.source6,
            None => Address::default(),
        }
    }

    #[inline(always)]
    fn has_socket(&self, incoming: &Tuple) -> bool {
        let (mut tuple, size) = sock_tuple(incoming);
        // SAFETY: a valid context and a tuple of at least that size.
        let socket = unsafe {
            match incoming.protocol {
                TCP => bpf_skc_lookup_tcp(self.context, &mut tuple, size, CURRENT_NETNS, 0),
                UDP => bpf_sk_lookup_udp(self.context, &mut tuple, size, CURRENT_NETNS, 0),
                _ => return false,
            }
        };
        if socket.is_null() {
            return false;
        }
        // SAFETY: a socket from one of the lookups, released once.
        unsafe { bpf_sk_release(socket.cast()) };
        true
    }

    #[inline(always)]
    fn has_connection(&self, incoming: &Tuple) -> bool {
        let (mut tuple, size) = sock_tuple(incoming);
        match incoming.protocol {
            TCP => !matches!(tcp_state(self.context, &mut tuple, size), NO_SOCKET | TCP_LISTEN),
            // A UDP socket has this one when it is connected.
            UDP => udp_state(self.context, &mut tuple, size) == TCP_ESTABLISHED,
            _ => false,
        }
    }
}

/// The state of the socket that would take such packets. Each kind of lookup is a function of its
/// own: one instruction must not read from both kinds of socket, which the compiler makes of two.
#[inline(never)]
fn tcp_state(context: *mut c_void, tuple: &mut bpf_sock_tuple, size: u32) -> u32 {
    // SAFETY: a valid context and a tuple of at least that size; a socket from the lookup, of which
    // this may be read, released once.
    unsafe {
        let socket = bpf_skc_lookup_tcp(context, tuple, size, CURRENT_NETNS, 0);
        if socket.is_null() {
            return NO_SOCKET;
        }
        let state = addr_of!((*socket).state).read_volatile();
        bpf_sk_release(socket.cast());
        state
    }
}

#[inline(never)]
fn udp_state(context: *mut c_void, tuple: &mut bpf_sock_tuple, size: u32) -> u32 {
    // SAFETY: as in `tcp_state`.
    unsafe {
        let socket = bpf_sk_lookup_udp(context, tuple, size, CURRENT_NETNS, 0);
        if socket.is_null() {
            return NO_SOCKET;
        }
        let state = addr_of!((*socket).state).read_volatile();
        bpf_sk_release(socket.cast());
        state
    }
}

/// As the kernel's lookups take it, and the size that tells them the family.
#[inline(always)]
fn sock_tuple(incoming: &Tuple) -> (bpf_sock_tuple, u32) {
    // SAFETY: integers and unions of integers, for which zeros are valid.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let (source, destination) = (incoming.source.words(), incoming.destination.words());
    // The kernel tells the families apart by this size.
    let size = if incoming.source.to_v4().is_some() {
        // SAFETY: a field of a union of integers.
        unsafe {
            let v4 = &mut tuple.__bindgen_anon_1.ipv4;
            v4.saddr = source[3].to_kernel();
            v4.daddr = destination[3].to_kernel();
            v4.sport = incoming.source_port.to_kernel() as u16;
            v4.dport = incoming.destination_port.to_kernel() as u16;
        }
        12
    } else {
        // SAFETY: a field of a union of integers.
        unsafe {
            let v6 = &mut tuple.__bindgen_anon_1.ipv6;
            v6.saddr = source.map(|word| word.to_kernel());
            v6.daddr = destination.map(|word| word.to_kernel());
            v6.sport = incoming.source_port.to_kernel() as u16;
            v6.dport = incoming.destination_port.to_kernel() as u16;
        }
        36
    };
    (tuple, size)
}
