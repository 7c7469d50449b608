//! Packets at a device before the stack has them: those that the program sends on itself.
//! Everything else goes on to tc as it came.

use core::ptr::addr_of;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use proxy_ebpf::device::{self, Arrival, Hook, Work};
use proxy_ebpf::layout::Traffic;
use proxy_ebpf::packet::{Bytes, Packet};
use proxy_ebpf::parse::{self, Kind};
use proxy_ebpf::rewrite;
use proxy_ebpf::verdict::Verdict;

use crate::maps::{self, Kernel, Scratch};
use crate::route::{Place, way};
use crate::skb::Frame;

#[derive(Clone, Copy)]
struct Buffer(*mut xdp_md);

impl Buffer {
    #[inline(always)]
    fn frame(self) -> Frame {
        // Volatile as in `Skb::frame`.
        // SAFETY: a valid context.
        unsafe {
            Frame {
                start: addr_of!((*self.0).data).read_volatile() as usize,
                end: addr_of!((*self.0).data_end).read_volatile() as usize,
            }
        }
    }
}

impl Bytes for Buffer {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.frame().load(offset)
    }
}

impl Packet for Buffer {
    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        let frame = self.frame();
        let at = frame.start + offset;
        if at + N > frame.end {
            return None;
        }
        // SAFETY: within the packet, as just compared; XDP may write all of it.
        unsafe { *(at as *mut [u8; N]) = bytes };
        Some(())
    }
}

#[xdp]
pub fn xdp_ingress(context: XdpContext) -> u32 {
    let Some(scratch) = maps::scratch() else {
        return XDP_PASS;
    };
    // Fragments and errors are rare; tc does them.
    if !parse(context.ctx, &mut scratch.work) || scratch.work.headers.kind != Kind::Whole {
        return XDP_PASS;
    }
    match decide(context.ctx, &mut scratch.work) {
        XDP_TX => forward(context.ctx, scratch),
        verdict => verdict,
    }
}

/// A function of its own, as those below: each has the stack to itself then.
#[inline(never)]
fn parse(context: *mut xdp_md, work: &mut Work) -> bool {
    parse::ethernet(&Buffer(context).frame(), &mut work.headers).is_ok()
}

/// `XDP_TX`: to be sent on.
#[inline(never)]
fn decide(context: *mut xdp_md, work: &mut Work) -> u32 {
    // SAFETY: a valid context, and helpers without arguments.
    let (ifindex, now, random) =
        unsafe { ((*context).ingress_ifindex, bpf_ktime_get_ns(), bpf_get_prandom_u32()) };
    let frame = Buffer(context).frame();
    let place = Place { context: context.cast(), ifindex };
    let arrival = Arrival {
        hook: Hook::Xdp,
        device: maps::device(ifindex).map_or(0, |device| device.flags),
        now,
        random,
        traffic: Traffic { packets: 1, bytes: frame.end.wrapping_sub(frame.start) as u64 },
    };
    match device::decide(&Kernel, &place, &arrival, work) {
        Verdict::Translate { forward: true } => XDP_TX,
        Verdict::Drop(_) => XDP_DROP,
        Verdict::Pass | Verdict::Translate { .. } | Verdict::Reject(_) => XDP_PASS,
    }
}

/// What needs an answer, a neighbour or the stack is left to tc, unchanged.
#[inline(always)]
fn forward(context: *mut xdp_md, scratch: &mut Scratch) -> u32 {
    if scratch.work.headers.ttl <= 1 || find_way(context, scratch) != way::FOUND {
        return XDP_PASS;
    }
    if !change(context, scratch) {
        return XDP_DROP;
    }
    // SAFETY: a valid context, and a helper that takes numbers.
    unsafe {
        if scratch.ifindex == (*context).ingress_ifindex {
            XDP_TX
        } else {
            bpf_redirect(scratch.ifindex, 0) as u32
        }
    }
}

#[inline(never)]
fn find_way(context: *mut xdp_md, scratch: &mut Scratch) -> u32 {
    // SAFETY: a valid context.
    let ifindex = unsafe { (*context).ingress_ifindex };
    let length = scratch.work.headers.length;
    Place { context: context.cast(), ifindex }.find_way(scratch, length)
}

#[inline(never)]
fn change(context: *mut xdp_md, scratch: &Scratch) -> bool {
    let mut buffer = Buffer(context);
    let Work { headers, to, .. } = &scratch.work;
    rewrite::translate(&mut buffer, headers, to).is_some()
        && rewrite::take_hop(&mut buffer, headers).is_some()
        && buffer.store(0, scratch.ethernet).is_some()
}
