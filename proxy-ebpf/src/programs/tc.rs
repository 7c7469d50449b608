//! Packets at a device, by tcx or clsact.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_redirect, bpf_redirect_neigh,
};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use proxy_ebpf::answer::{self, Error};
use proxy_ebpf::device::{self, Arrival, Hook, Work};
use proxy_ebpf::direct::overhead;
use proxy_ebpf::fast::{self, Course, Head, Receiver, Way};
use proxy_ebpf::layout::{Config, Flow, Traffic};
use proxy_ebpf::packet::{Bytes as _, Packet as _};
use proxy_ebpf::parse::{self, Headers, Kind, TCP, UDP, Version};
use proxy_ebpf::rewrite;
use proxy_ebpf::tables::Tables as _;
use proxy_ebpf::verdict::{Reason, Verdict};

use crate::direct;
use crate::maps::{self, Kernel, Scratch};
use crate::route::{Place, way};
use crate::skb::{Frame, Skb, Start};

/// `TCX_NEXT`, and `TC_ACT_UNSPEC` for a clsact filter: whatever else is attached here
/// runs as if we were not. `TC_ACT_OK` would end the chain.
pub const NEXT: i32 = -1;
const DROP: i32 = 2;
const TO_INGRESS: u64 = 1;
/// `PACKET_OTHERHOST` (include/uapi/linux/if_packet.h): seen by a device that takes everything,
/// and some other machine's.
const OTHER_HOST: u32 = 3;
const UDP_HEADER: usize = 8;

#[classifier]
pub fn tc_ingress(context: TcContext) -> i32 {
    run(context.skb.skb, Hook::Ingress)
}

#[classifier]
pub fn tc_egress(context: TcContext) -> i32 {
    run(context.skb.skb, Hook::Egress)
}

/// What [`decide`] came to: numbers, because a function of its own can return no more.
mod decision {
    pub const PASS: u32 = 0;
    pub const TRANSLATE: u32 = 1;
    pub const FORWARD: u32 = 2;
    pub const REJECT: u32 = 3;
    pub const DROP: u32 = 4;
    pub const ENCAPSULATE: u32 = 5;
}

#[inline(always)]
fn run(skb: *mut __sk_buff, hook: Hook) -> i32 {
    let Some(scratch) = maps::scratch() else {
        return NEXT;
    };
    let egress = hook == Hook::Egress;
    if is_of_another(skb, egress) {
        return NEXT;
    }
    let result = short(skb, egress);
    if result != LONG {
        return result;
    }
    if !parse(skb, &mut scratch.work) {
        return NEXT;
    }
    scratch.wrapped = 0;
    // The kernel forgets how many there are when it takes a packet out of another one.
    // SAFETY: a valid context.
    scratch.segments = unsafe { (*skb).gso_segs };
    if !egress {
        let result = direct::unwrap(skb, scratch);
        if result != NEXT {
            return finish(result);
        }
    }
    match decide(skb, scratch, egress) {
        decision::TRANSLATE => finish(translate(skb, &scratch.work)),
        decision::FORWARD => finish(forward(skb, scratch, egress, false)),
        decision::ENCAPSULATE if !egress => finish(forward(skb, scratch, egress, true)),
        decision::REJECT => finish(reject(skb, &scratch.work, egress)),
        decision::DROP => DROP,
        // The stack would send it where it came from.
        _ if scratch.wrapped != 0 => finish(failed(Reason::Misdirected)),
        _ => NEXT,
    }
}

/// No action of tc's.
const LONG: i32 = -99;
/// [`Way::how`]
const INGRESS: u32 = 3;
const EGRESS: u32 = 4;

/// The short way, if the packet is one for it; else `LONG`.
#[inline(never)]
fn short(skb: *mut __sk_buff, egress: bool) -> i32 {
    let Frame { start, end, missing } = Skb(skb).frame();
    // The verifier ends here for the programs of devices without link headers.
    if missing != 0 {
        return LONG;
    }
    let frame = Start { start, end };
    match fast::version(&frame) {
        Some(Version::V4) => short_as::<false>(skb, &frame, egress),
        Some(Version::V6) => short_as::<true>(skb, &frame, egress),
        None => LONG,
    }
}

#[inline(always)]
fn short_as<const V6: bool>(skb: *mut __sk_buff, frame: &Start, egress: bool) -> i32 {
    let (Some(head), Some(config)) = (fast::parse::<V6>(frame), maps::config()) else {
        return LONG;
    };
    if !egress && head.may_have_one_inside(config) {
        return LONG;
    }
    let hook = if egress { Hook::Egress } else { Hook::Ingress };
    let found = maps::flow(&head.tuple, |flow| match fast::course(&Kernel, hook, flow) {
        Course::Forward => follow::<V6>(skb, &head, flow, egress),
        Course::Translate => {
            count(skb, flow);
            match fast::translate::<V6>(&mut Skb(skb), &head, &flow.to, false) {
                Some(()) => NEXT,
                None => dropped(Reason::Unwritable),
            }
        }
        // Its sender has been heard of, wherever it goes.
        Course::Leave => {
            flow.seen = maps::now();
            NEXT
        }
        Course::Long => LONG,
    });
    match found {
        Some(result) => result,
        None if is_nothing(config, hook, &head) => NEXT,
        None => LONG,
    }
}

/// Not even in the way of a flow ([`device::decide`]).
#[inline(always)]
fn is_nothing(config: &Config, hook: Hook, head: &Head) -> bool {
    (head.tuple.protocol != UDP || maps::flow(&head.tuple.inverse(), |_| ()).is_none())
        && fast::is_foreign(&Kernel, config, hook, &head.tuple)
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "a segment")]
fn follow<const V6: bool>(skb: *mut __sk_buff, head: &Head, flow: &mut Flow, egress: bool) -> i32 {
    // SAFETY: a valid context.
    let (came_in, segments, size) = unsafe { ((*skb).ifindex, (*skb).gso_segs, (*skb).gso_size) };
    let whole = segments == 1 || size == 0;
    let length = if whole { head.length } else { head.segment_length::<V6>(size as u16) };
    let Some(way) = maps::way(Way::place::<V6>(&flow.to, came_in)) else {
        return LONG;
    };
    if !egress && head.ttl <= 1
        || !way.is_for::<V6>(&flow.to, came_in, length, maps::ticks())
        || way.how != if egress { EGRESS } else { INGRESS }
    {
        return LONG;
    }
    count(skb, flow);
    let mut packet = Skb(skb);
    let translated = fast::translate::<V6>(&mut packet, head, &flow.to, !egress);
    if translated.and_then(|()| packet.store_words(0, way.ethernet)).is_none() {
        return dropped(Reason::Unwritable);
    }
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(way.out, 0) as i32 }
}

#[inline(always)]
fn count(skb: *mut __sk_buff, flow: &mut Flow) {
    // SAFETY: a valid context.
    let (segments, bytes) = unsafe { ((*skb).gso_segs, (*skb).len) };
    flow.seen = maps::now();
    let traffic = Traffic { packets: segments.max(1).into(), bytes: bytes.into() };
    device::count_known(&Kernel, flow, traffic);
}

#[inline(always)]
fn dropped(reason: Reason) -> i32 {
    Kernel.count_drop(reason);
    DROP
}

/// Whether a frame is another machine's, or another device's: one of a VLAN comes by the
/// VLAN's own device as well. Sent on from here it would keep its tag. (VLAN 0 is none: such a
/// tag only tells a priority.)
#[inline(always)]
fn is_of_another(skb: *mut __sk_buff, egress: bool) -> bool {
    const VLAN_ID: u32 = 0x0fff;
    // SAFETY: a valid context.
    let (kind, tagged, tag) = unsafe { ((*skb).pkt_type, (*skb).vlan_present, (*skb).vlan_tci) };
    !egress && kind == OTHER_HOST || tagged != 0 && tag & VLAN_ID != 0
}

/// A step's result is what to return, or a reason to drop below zero by this much.
const FAILED: i32 = -100;

#[inline(always)]
pub const fn failed(reason: Reason) -> i32 {
    FAILED - reason as i32
}

#[inline(always)]
fn finish(result: i32) -> i32 {
    if result > FAILED {
        return result;
    }
    let number = FAILED.wrapping_sub(result) as u32;
    for reason in Reason::ALL {
        if reason as u32 == number {
            Kernel.count_drop(reason);
        }
    }
    DROP
}

#[inline(always)]
fn place(skb: *mut __sk_buff) -> Place {
    // SAFETY: a valid context.
    Place { context: skb.cast(), ifindex: unsafe { (*skb).ifindex } }
}

/// A function of its own, as those below: each has the stack to itself then.
#[inline(never)]
pub fn parse(skb: *mut __sk_buff, work: &mut Work) -> bool {
    let packet = Skb(skb);
    packet.pull(parse::USUAL_HEADERS);
    packet
        .ethertype()
        .is_some_and(|ethertype| parse::ip(ethertype, &packet.frame(), &mut work.headers).is_ok())
}

#[inline(never)]
fn decide(skb: *mut __sk_buff, scratch: &mut Scratch, egress: bool) -> u32 {
    let place = place(skb);
    // SAFETY: a valid context, and helpers without arguments.
    let (length, now, random) = unsafe { ((*skb).len, bpf_ktime_get_ns(), bpf_get_prandom_u32()) };
    let arrival = Arrival {
        hook: if egress { Hook::Egress } else { Hook::Ingress },
        device: maps::device(place.ifindex).map_or(0, |device| device.flags),
        wrapped: scratch.wrapped != 0,
        now,
        random,
        traffic: Traffic { packets: scratch.segments.max(1).into(), bytes: length.into() },
    };
    match device::decide(&Kernel, &place, &arrival, &mut scratch.work) {
        Verdict::Pass => decision::PASS,
        Verdict::Translate { forward: true } => decision::FORWARD,
        Verdict::Translate { forward: false } => decision::TRANSLATE,
        Verdict::Encapsulate => decision::ENCAPSULATE,
        Verdict::Reject(_) => decision::REJECT,
        Verdict::Drop(_) => decision::DROP,
    }
}

#[inline(never)]
fn translate(skb: *mut __sk_buff, work: &Work) -> i32 {
    match rewrite::translate(&mut Skb(skb), &work.headers, &work.to) {
        Some(()) => NEXT,
        None => failed(Reason::Unwritable),
    }
}

/// Sends a packet on without the stack.
#[inline(always)]
fn forward(skb: *mut __sk_buff, scratch: &mut Scratch, egress: bool, direct: bool) -> i32 {
    let Headers { ttl, dont_fragment, version, .. } = scratch.work.headers;
    // One that the stack has routed has had its hop taken, or came from this node.
    if !egress && ttl <= 1 {
        return answer(skb, scratch, egress, NO_MTU);
    }
    let overhead = if direct { overhead(version) as u32 } else { 0 };
    match find_way(skb, scratch, overhead) {
        way::FOUND => send(skb, scratch, egress, direct),
        way::NO_NEIGHBOUR => match ready(skb, scratch, egress, direct) {
            // SAFETY: a helper that takes numbers, and no parameters.
            Some(()) => unsafe {
                bpf_redirect_neigh(scratch.ifindex, core::ptr::null_mut(), 0, 0) as i32
            },
            None => failed(Reason::Unwritable),
        },
        // Nobody cuts the outer packet into pieces; and a sender that would let others do so
        // mostly cuts itself, once it is told.
        way::TOO_BIG if dont_fragment || direct => {
            let mtu = scratch.mtu.saturating_sub(overhead);
            answer(skb, scratch, egress, mtu)
        }
        way::TOO_BIG => failed(Reason::TooBig),
        // A reply to the node itself: the stack takes it.
        way::LOCAL if !egress && !direct => translate(skb, &scratch.work),
        _ => failed(Reason::NoRoute),
    }
}

#[inline(never)]
#[allow(clippy::cast_possible_truncation, reason = "two headers at most")]
fn find_way(skb: *mut __sk_buff, scratch: &mut Scratch, overhead: u32) -> u32 {
    let length = packet_length(skb, &scratch.work.headers).saturating_add(overhead as u16);
    place(skb).find_way(scratch, length)
}

/// Of the longest packet that will be on the wire: an skb may stand for several, cut later.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "two headers and a segment")]
fn packet_length(skb: *mut __sk_buff, headers: &Headers) -> u16 {
    // SAFETY: a valid context.
    let (segments, size) = unsafe { ((*skb).gso_segs, (*skb).gso_size) };
    // Not counted anew since the packet came out of another one.
    if segments == 1 || size == 0 {
        return headers.length;
    }
    let transport = usize::from(headers.transport) & parse::MAX_TRANSPORT;
    let header = match headers.tuple.protocol {
        TCP => match Skb(skb).load::<2>(transport + 12) {
            Some([data_offset, _]) => usize::from(data_offset >> 4) * 4,
            None => return headers.length,
        },
        _ => UDP_HEADER,
    };
    (transport.wrapping_sub(parse::ETHERNET) + header + size as usize) as u16
}

#[inline(always)]
fn send(skb: *mut __sk_buff, scratch: &Scratch, egress: bool, direct: bool) -> i32 {
    if !direct && scratch.wrapped == 0 && scratch.work.headers.kind == Kind::Whole {
        remember(skb, scratch, egress);
    }
    let ready = ready(skb, scratch, egress, direct);
    if ready.and_then(|()| Skb(skb).store_link_addresses(scratch.ethernet)).is_none() {
        return failed(Reason::Unwritable);
    }
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(scratch.ifindex, 0) as i32 }
}

/// The way on, for the packets after this one.
#[inline(never)]
fn remember(skb: *mut __sk_buff, scratch: &Scratch, egress: bool) -> u32 {
    let how = if egress { EGRESS } else { INGRESS };
    scratch.remember(place(skb).ifindex, Receiver::default(), how)
}

/// What both ways to send ask for: the packet as it is to be, with an Ethernet header.
#[inline(always)]
fn ready(skb: *mut __sk_buff, scratch: &Scratch, egress: bool, direct: bool) -> Option<()> {
    change(skb, &scratch.work, egress, direct)?;
    Skb(skb).ensure_link_header()
}

#[inline(always)]
fn change(skb: *mut __sk_buff, work: &Work, egress: bool, direct: bool) -> Option<()> {
    if direct {
        return direct::wrap(skb, work).then_some(());
    }
    if translate(skb, work) != NEXT {
        return None;
    }
    if egress { Some(()) } else { rewrite::take_hop(&mut Skb(skb), &work.headers) }
}

#[inline(never)]
fn reject(skb: *mut __sk_buff, work: &Work, egress: bool) -> i32 {
    match answer::refuse(&mut Skb(skb), &work.headers) {
        Some(()) => turn_back(skb, egress),
        None => failed(Reason::Unanswerable),
    }
}

/// Instead of what the route takes: no hop is left. (A function has five registers for its
/// arguments, and an enum with a value takes two.)
const NO_MTU: u32 = u32::MAX;

#[inline(never)]
#[allow(clippy::cast_possible_truncation, reason = "made from 16 bits")]
fn answer(skb: *mut __sk_buff, scratch: &mut Scratch, egress: bool, mtu: u32) -> i32 {
    let (error, reason) = match mtu {
        NO_MTU => (Error::TimeExceeded, Reason::TimeToLive),
        mtu => (Error::TooBig(mtu as u16), Reason::TooBig),
    };
    // No error is made about an error (RFC 1122 section 3.2.2), and none to a sender that
    // answers each with the same packet again: between veth ends that has no end.
    if scratch.work.headers.kind == Kind::IcmpError || !may_answer(scratch) {
        return failed(reason);
    }
    match answer::error(&mut Skb(skb), &scratch.work.headers, error) {
        Some(()) => {
            Kernel.count_drop(reason);
            turn_back(skb, egress)
        }
        None => failed(reason),
    }
}

/// RFC 1812 section 4.3.2.8: a limit to errors, of this CPU.
#[inline(always)]
fn may_answer(scratch: &mut Scratch) -> bool {
    const SECOND: u64 = 1_000_000_000;
    const EACH_SECOND: u32 = 1000;
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if now.wrapping_sub(scratch.errors_since) >= SECOND {
        scratch.errors_since = now;
        scratch.errors_left = EACH_SECOND;
    }
    let allowed = scratch.errors_left > 0;
    scratch.errors_left = scratch.errors_left.saturating_sub(1);
    allowed
}

/// To where it came from: out by the device, or back up to the stack that sent it.
#[inline(always)]
fn turn_back(skb: *mut __sk_buff, egress: bool) -> i32 {
    // SAFETY: a valid context, and a helper that takes numbers.
    unsafe { bpf_redirect((*skb).ifindex, if egress { TO_INGRESS } else { 0 }) as i32 }
}
