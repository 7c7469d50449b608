//! A packet put inside another one, and taken out.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_adjust_room;
use proxy_ebpf::device::{self, Work};
use proxy_ebpf::direct;
use proxy_ebpf::layout::Config;
use proxy_ebpf::parse::Version;
use proxy_ebpf::rewrite;
use proxy_ebpf::verdict::Reason;

use crate::maps::{self, Kernel, Scratch};
use crate::skb::{Fresh, Skb};
use crate::tc::{NEXT, failed, parse};

/// `include/uapi/linux/bpf.h`: room after the Ethernet header.
const ADJ_ROOM_MAC: u32 = 1;
/// What is cut into segments later is cut where the sender wanted it.
const FIXED_GSO: u64 = 1;
const ENCAP_L3_IPV4: u64 = 1 << 1;
const ENCAP_L3_IPV6: u64 = 1 << 2;
/// All that is before the inner IP header is copied to each segment.
const ENCAP_L4_UDP: u64 = 1 << 4;

#[inline(always)]
fn adjust_room(skb: *mut __sk_buff, bytes: i32, flags: u64) -> bool {
    // SAFETY: a valid context; what points into the packet is made anew at each access.
    unsafe { bpf_skb_adjust_room(skb, bytes, ADJ_ROOM_MAC, flags) == 0 }
}

/// Puts a packet inside another one. False: it is half changed.
#[inline(never)]
pub fn wrap(skb: *mut __sk_buff, work: &Work) -> bool {
    let Some(config) = maps::config() else {
        return false;
    };
    let Work { headers, to, .. } = work;
    if rewrite::take_hop(&mut Skb(skb), headers).is_none() {
        return false;
    }
    let family = match headers.version {
        Version::V4 => ENCAP_L3_IPV4,
        Version::V6 => ENCAP_L3_IPV6,
    };
    let room = direct::overhead(headers.version) as i32;
    adjust_room(skb, room, FIXED_GSO | family | ENCAP_L4_UDP)
        && direct::wrap(
            &mut Fresh(Skb(skb)),
            to,
            config.direct_port,
            headers.version,
            headers.length,
        )
        .is_some()
}

/// Takes out the packet that is inside, when it is for a backend of this node: what is known of
/// the packet then is known of that one. `NEXT`, or a reason to drop.
#[inline(never)]
pub fn unwrap(skb: *mut __sk_buff, scratch: &mut Scratch) -> i32 {
    // Off, as it mostly is, this costs no lookup.
    if maps::config().is_none_or(|config| config.features & Config::DIRECT_ACCEPT == 0) {
        return NEXT;
    }
    let headers = &scratch.work.headers;
    // SAFETY: a valid context.
    let flags = maps::device(unsafe { (*skb).ifindex }).map_or(0, |device| device.flags);
    if !device::has_one_inside(&Kernel, &Skb(skb).frame(), headers, flags) {
        return NEXT;
    }
    let (sender, via) = (headers.tuple.source, headers.tuple.destination);
    let room = direct::overhead(headers.version) as i32;
    scratch.wrapped = 1;
    scratch.work.sender = sender;
    scratch.work.via = via;
    if !adjust_room(skb, -room, FIXED_GSO) {
        return failed(Reason::Unwritable);
    }
    if parse(skb, &mut scratch.work) { NEXT } else { failed(Reason::Misdirected) }
}
