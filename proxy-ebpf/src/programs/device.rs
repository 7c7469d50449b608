//! Packets that come in by a device.

use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use proxy_ebpf::parse::{self, Bytes, FiveTuple, Unparsed};
use proxy_ebpf::service::{self, Hook};
use proxy_ebpf::verdict::Verdict;

use crate::maps::Kernel;

/// `TCX_NEXT`, and `TC_ACT_UNSPEC` for a clsact filter: whatever else is attached here
/// runs as if we were not. `TC_ACT_OK` would end the chain.
const NEXT: i32 = -1;
const TC_DROP: i32 = 2;
const XDP_DROP: u32 = aya_ebpf::bindings::xdp_action::XDP_DROP;

#[classifier]
pub fn tc_ingress(context: TcContext) -> i32 {
    let Some(packet) = parse_skb(&context) else {
        return NEXT;
    };
    // SAFETY: a read of the context, which the kernel keeps valid.
    let segments = unsafe { (*context.skb.skb).gso_segs }.max(1);
    let verdict =
        service::observe(&Kernel, &packet, Hook::Tc, segments.into(), context.len().into());
    match verdict {
        Verdict::Pass | Verdict::Translate { .. } => NEXT,
        Verdict::Drop(_) => TC_DROP,
    }
}

#[xdp]
pub fn xdp_ingress(context: XdpContext) -> u32 {
    let frame = Frame { start: context.data(), end: context.data_end() };
    let Ok(packet) = parse::ethernet(&frame) else {
        return XDP_PASS;
    };
    let length = frame.end - frame.start;
    match service::observe(&Kernel, &packet, Hook::Xdp, 1, length as u64) {
        Verdict::Pass | Verdict::Translate { .. } => XDP_PASS,
        Verdict::Drop(_) => XDP_DROP,
    }
}

/// Only an skb's linear part can be read directly. Drivers usually put the headers there;
/// when one did not, have the kernel do it and look again.
#[inline(always)]
fn parse_skb(context: &TcContext) -> Option<FiveTuple> {
    let frame = Frame { start: context.data(), end: context.data_end() };
    match parse::ethernet(&frame) {
        Ok(packet) => Some(packet),
        Err(Unparsed::Truncated) if (frame.end - frame.start) < context.len() as usize => {
            context.pull_data(context.len().min(parse::USUAL_HEADERS)).ok()?;
            // The old pointers are void after the call.
            let frame = Frame { start: context.data(), end: context.data_end() };
            parse::ethernet(&frame).ok()
        }
        Err(_) => None,
    }
}

/// `data` to `data_end`.
struct Frame {
    start: usize,
    end: usize,
}

impl Bytes for Frame {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let at = self.start + offset;
        if at + N > self.end {
            return None;
        }
        // SAFETY: within the packet, as just compared. Bytes, since a header may lie on
        // any address.
        Some(unsafe { *(at as *const [u8; N]) })
    }
}
