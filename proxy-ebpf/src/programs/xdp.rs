//! Packets at a device before the stack has them: those that the program sends on itself.
//! Everything else goes on to tc as it came.

use core::ptr::addr_of;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_redirect, bpf_xdp_adjust_head,
};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use proxy_ebpf::device::{self, Arrival, Hook, Work};
use proxy_ebpf::direct;
use proxy_ebpf::fast::{self, Course, Fields as _, Head, Receiver, Way};
use proxy_ebpf::layout::{Device, Flow, Traffic};
use proxy_ebpf::packet::{Bytes, Packet};
use proxy_ebpf::parse::{self, ETHERNET, Kind, Version};
use proxy_ebpf::rewrite;
use proxy_ebpf::tables::Tables as _;
use proxy_ebpf::verdict::{Reason, Verdict};

use crate::maps::{self, Kernel, Scratch};
use crate::route::{Place, way};
use crate::skb::{Frame, Start};

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
                missing: 0,
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
    match short(context.ctx) {
        LONG => long(context.ctx),
        verdict => verdict,
    }
}

/// No action of XDP's.
const LONG: u32 = 99;

/// [`Way::how`].
const BACK: u32 = 1;
const REDIRECT: u32 = 2;

/// The short way, if the packet is one for it; else `LONG`.
#[inline(never)]
fn short(context: *mut xdp_md) -> u32 {
    let Frame { start, end, .. } = Buffer(context).frame();
    let frame = Start { start, end };
    match fast::version(&frame) {
        Some(Version::V4) => short_as::<false>(context, frame),
        Some(Version::V6) => short_as::<true>(context, frame),
        None => LONG,
    }
}

#[inline(always)]
fn short_as<const V6: bool>(context: *mut xdp_md, mut frame: Start) -> u32 {
    let Some(head) = fast::parse::<V6>(&frame) else {
        return LONG;
    };
    let found = maps::flow(&head.tuple, |flow| match fast::course(&Kernel, Hook::Xdp, flow) {
        Course::Forward => follow::<V6>(context, &mut frame, &head, flow),
        Course::Translate | Course::Leave => XDP_PASS,
        Course::Long => LONG,
    });
    if let Some(verdict) = found {
        return verdict;
    }
    match maps::config() {
        Some(config) if fast::is_foreign(&Kernel, config, Hook::Xdp, &head.tuple) => XDP_PASS,
        _ => LONG,
    }
}

#[inline(always)]
fn follow<const V6: bool>(
    context: *mut xdp_md,
    frame: &mut Start,
    head: &Head,
    flow: &mut Flow,
) -> u32 {
    let came_in = ingress(context);
    let Some(way) = maps::way(Way::place::<V6>(&flow.to, came_in)) else {
        return LONG;
    };
    if head.ttl <= 1
        || !way.is_for::<V6>(&flow.to, came_in, head.length, maps::ticks())
        || way.receiver != Receiver::of(frame)
        || way.how > REDIRECT
        || !fast::rewrite::<V6>(frame, head, &flow.to, way.ethernet)
    {
        return LONG;
    }
    flow.seen = maps::now();
    let bytes = frame.end.wrapping_sub(frame.start) as u64;
    device::count_known(&Kernel, flow, Traffic { packets: 1, bytes });
    if way.how == BACK {
        return XDP_TX;
    }
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(way.out, 0) as u32 }
}

#[inline(always)]
fn long(context: *mut xdp_md) -> u32 {
    let Some(scratch) = maps::scratch() else {
        return XDP_PASS;
    };
    // Fragments and errors are rare; tc does them.
    if !parse(context, scratch) || scratch.work.headers.kind != Kind::Whole {
        return XDP_PASS;
    }
    match decide(context, scratch) {
        XDP_TX => forward(context, scratch, false),
        XDP_REDIRECT => forward(context, scratch, true),
        verdict => verdict,
    }
}

/// A function of its own, as those below: each has the stack to itself then.
#[inline(never)]
fn parse(context: *mut xdp_md, scratch: &mut Scratch) -> bool {
    let frame = Buffer(context).frame();
    // What a device sees that takes everything is mostly for others.
    let Some(receiver) = parse::receiver(&frame) else {
        return false;
    };
    scratch.device = 0;
    if let Some(device) = maps::device(ingress(context)) {
        if device.mac != [0; 6] && device.mac != receiver {
            return false;
        }
        scratch.device = device.flags;
    }
    parse::ethernet(&frame, &mut scratch.work.headers).is_ok()
}

#[inline(always)]
fn ingress(context: *mut xdp_md) -> u32 {
    // SAFETY: a valid context.
    unsafe { (*context).ingress_ifindex }
}

#[inline(always)]
fn traffic(context: *mut xdp_md) -> Traffic {
    let frame = Buffer(context).frame();
    Traffic { packets: 1, bytes: frame.end.wrapping_sub(frame.start) as u64 }
}

/// `XDP_TX`: to be sent on; `XDP_REDIRECT`: inside another packet.
#[inline(never)]
fn decide(context: *mut xdp_md, scratch: &mut Scratch) -> u32 {
    // SAFETY: helpers without arguments.
    let (now, random) = unsafe { (bpf_ktime_get_ns(), bpf_get_prandom_u32()) };
    let place = Place { context: context.cast(), ifindex: ingress(context) };
    let arrival = Arrival {
        hook: Hook::Xdp,
        device: scratch.device,
        wrapped: false,
        now,
        random,
        traffic: traffic(context),
    };
    match device::decide(&Kernel, &place, &arrival, &mut scratch.work) {
        Verdict::Translate { forward: true } => XDP_TX,
        Verdict::Encapsulate => XDP_REDIRECT,
        Verdict::Drop(_) => XDP_DROP,
        Verdict::Pass | Verdict::Translate { .. } | Verdict::Reject(_) => XDP_PASS,
    }
}

/// What needs an answer, a neighbour or the stack is left to tc, unchanged; and what this
/// program cannot send without the risk that it is lost on the way.
#[inline(always)]
fn forward(context: *mut xdp_md, scratch: &mut Scratch, direct: bool) -> u32 {
    let version = scratch.work.headers.version;
    let overhead = if direct { direct::overhead(version) as u32 } else { 0 };
    if scratch.work.headers.ttl <= 1
        || !is_finished(context, &scratch.work)
        || find_way(context, scratch, overhead) != way::FOUND
    {
        return XDP_PASS;
    }
    let (came_in, out) = (ingress(context), scratch.ifindex);
    let back = came_in == out && scratch.device & Device::XDP_TX != 0;
    if !back && !Device::xdp_may_redirect(scratch.device, takes(out)) {
        return XDP_PASS;
    }
    let traffic = traffic(context);
    if !direct {
        remember(context, scratch, if back { BACK } else { REDIRECT });
    }
    let changed = if direct { wrap(context, scratch) } else { change(context, scratch) };
    if !changed {
        Kernel.count_drop(Reason::Unwritable);
        return XDP_DROP;
    }
    device::count_sent(&Kernel, &scratch.work, traffic);
    if back {
        return XDP_TX;
    }
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(out, 0) as u32 }
}

#[inline(always)]
fn takes(out: u32) -> u32 {
    // Of a device that is not in the table nothing is known, not even what its frames look like.
    maps::device(out).map_or(Device::BARE, |device| device.flags)
}

/// The way on, for the packets after this one, which is about to be sent by it.
#[inline(never)]
fn remember(context: *mut xdp_md, scratch: &Scratch, how: u32) -> u32 {
    let came_in = ingress(context);
    let Frame { start, end, .. } = Buffer(context).frame();
    let frame = Start { start, end };
    if !frame.has(ETHERNET) {
        return 0;
    }
    scratch.remember(came_in, Receiver::of(&frame), how)
}

#[inline(never)]
fn is_finished(context: *mut xdp_md, work: &Work) -> bool {
    rewrite::is_finished(&Buffer(context).frame(), &work.headers) == Some(true)
}

#[inline(never)]
#[allow(clippy::cast_possible_truncation, reason = "two headers at most")]
fn find_way(context: *mut xdp_md, scratch: &mut Scratch, overhead: u32) -> u32 {
    let length = scratch.work.headers.length.saturating_add(overhead as u16);
    Place { context: context.cast(), ifindex: ingress(context) }.find_way(scratch, length)
}

#[inline(never)]
fn change(context: *mut xdp_md, scratch: &Scratch) -> bool {
    let mut buffer = Buffer(context);
    let Work { headers, to, .. } = &scratch.work;
    rewrite::translate(&mut buffer, headers, to).is_some()
        && rewrite::take_hop(&mut buffer, headers).is_some()
        && buffer.store(0, scratch.ethernet).is_some()
}

/// The packet inside another one.
#[inline(never)]
fn wrap(context: *mut xdp_md, scratch: &Scratch) -> bool {
    let Some(config) = maps::config() else {
        return false;
    };
    let mut buffer = Buffer(context);
    let Work { headers, to, .. } = &scratch.work;
    if rewrite::take_hop(&mut buffer, headers).is_none() {
        return false;
    }
    let room = direct::overhead(headers.version) as i32;
    // SAFETY: a valid context; what points into the packet is made anew at each access.
    if unsafe { bpf_xdp_adjust_head(context, -room) } != 0 {
        return false;
    }
    buffer.store(0, scratch.ethernet).is_some()
        && buffer.store(12, direct::ethertype(headers.version)).is_some()
        && direct::wrap(&mut buffer, to, config.direct_port, headers.version, headers.length)
            .is_some()
}
