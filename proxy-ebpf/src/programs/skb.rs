//! An skb as a packet that can be changed.

use core::ptr::addr_of;

use aya_ebpf::bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::{
    bpf_csum_update, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_adjust_room,
    bpf_skb_change_head, bpf_skb_change_tail, bpf_skb_pull_data, bpf_skb_store_bytes,
};
use proxy_ebpf::fast::Fields;
use proxy_ebpf::packet::{Bytes, Packet, Resize, Sum};
use proxy_ebpf::parse::{ETHERNET, MAX_TRANSPORT};

/// How much of an Ethernet header packets do not have: set by the loader, to all of it for devices
/// without link headers (WireGuard, tunnels). The verifier takes it as a constant and drops the
/// branches of the other kind.
#[unsafe(no_mangle)]
static MISSING_HEADER: u32 = 0;

/// The library counts from where an Ethernet header would begin.
#[inline(always)]
fn missing() -> usize {
    // SAFETY: a read-only global.
    unsafe { addr_of!(MISSING_HEADER).read_volatile() as usize }
}

/// Beyond whatever is read: twice an offset that went through memory, and a header.
const MAX_OFFSET: usize = MAX_TRANSPORT << 2 | 3;

/// `bpf_skb_adjust_room`: before the network header, which is moved along.
const ADJ_ROOM_MAC: u32 = 1;

/// Flags of the checksum helpers, `include/uapi/linux/bpf.h`; the low four bits are the
/// size of the field, and 0 means that the change itself is passed.
const PSEUDO_HDR: u64 = 1 << 4;
const MARK_MANGLED_0: u64 = 1 << 5;

#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

impl Skb {
    #[inline(always)]
    pub fn frame(&self) -> Frame {
        // Volatile, so that the compiler takes no comparison with an earlier end for enough:
        // the verifier forgets it as soon as the offset is in another register.
        // SAFETY: a valid context; both fields are offered to tc programs.
        unsafe {
            Frame {
                start: addr_of!((*self.0).data).read_volatile() as usize,
                end: addr_of!((*self.0).data_end).read_volatile() as usize,
                missing: missing(),
            }
        }
    }

    /// As an Ethernet header has it.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "16 bits, in the order of the wire")]
    pub fn ethertype(&self) -> Option<[u8; 2]> {
        if self.has_link_header() {
            return self.load(12);
        }
        // SAFETY: a valid context.
        Some(unsafe { (*self.0).protocol as u16 }.to_ne_bytes())
    }

    /// Has the packet begin with an Ethernet header, of zeros where it had none: the helpers that
    /// send want one, and take it off where it is not for the device.
    #[inline(always)]
    pub fn ensure_link_header(&mut self) -> Option<()> {
        if self.has_link_header() {
            return Some(());
        }
        let ethertype = self.ethertype()?;
        // SAFETY: a valid context.
        ok(unsafe { bpf_skb_change_head(self.0, ETHERNET as u32, 0) })?;
        self.store_at(12, ethertype)
    }

    /// The addresses of a packet that has an Ethernet header, from the start or by now.
    #[inline(always)]
    pub fn store_link_addresses(&mut self, addresses: [u8; 12]) -> Option<()> {
        self.store_at(0, addresses)
    }

    /// From the first byte that there is.
    #[inline(always)]
    fn store_at<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Option<()> {
        // SAFETY: a valid context and N bytes.
        ok(unsafe { bpf_skb_store_bytes(self.0, at as u32, bytes.as_ptr().cast(), N as u32, 0) })
    }

    #[inline(always)]
    fn at(offset: usize) -> u32 {
        offset.wrapping_sub(missing()) as u32
    }

    #[inline(always)]
    pub fn length(&self) -> u32 {
        // SAFETY: a valid context.
        unsafe { (*self.0).len }
    }

    /// Only an skb's linear part can be read directly. Drivers usually put the headers
    /// there; when one did not, the kernel does it on demand. True when that changed
    /// anything: pointers from before are void then.
    #[inline(always)]
    pub fn pull(&self, length: u32) -> bool {
        let frame = self.frame();
        let linear = frame.end.wrapping_sub(frame.start);
        let wanted = self.length().min(length);
        // SAFETY: a valid context.
        linear < wanted as usize && unsafe { bpf_skb_pull_data(self.0, wanted) } == 0
    }
}

impl Bytes for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        // Anew each time: a helper that changes the packet voids the pointers.
        self.frame().load(offset)
    }
}

#[inline(always)]
fn ok(result: i64) -> Option<()> {
    (result == 0).then_some(())
}

impl Packet for Skb {
    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        self.store_at(offset.wrapping_sub(missing()), bytes)
    }

    #[inline(always)]
    fn store_words<const N: usize>(&mut self, offset: usize, words: [u32; N]) -> Option<()> {
        let at = Self::at(offset);
        // SAFETY: a valid context and that many bytes.
        ok(unsafe { bpf_skb_store_bytes(self.0, at, words.as_ptr().cast(), N as u32 * 4, 0) })
    }

    #[inline(always)]
    fn adjust_header_sum(&mut self, offset: usize, delta: u32) -> Option<()> {
        // SAFETY: a valid context.
        ok(unsafe { bpf_l3_csum_replace(self.0, Self::at(offset), 0, delta.into(), 0) })
    }

    #[inline(always)]
    fn adjust_sum(&mut self, offset: usize, delta: u32, kind: Sum) -> Option<()> {
        let pseudo = if kind.pseudo { PSEUDO_HDR } else { 0 };
        let optional = if kind.optional { MARK_MANGLED_0 } else { 0 };
        // SAFETY: a valid context.
        ok(unsafe {
            bpf_l4_csum_replace(self.0, Self::at(offset), 0, delta.into(), pseudo | optional)
        })?;
        // When the device summed up the packet, the helper takes the change of addresses out
        // of that sum, since an IPv4 header's own checksum makes up for them. IPv6 has none:
        // put it back (the kernel's own flag for this, BPF_F_IPV6, came with 6.16). An
        // error means that there is no such sum.
        if kind.pseudo && kind.v6 {
            // SAFETY: a valid context.
            unsafe { bpf_csum_update(self.0, delta) };
        }
        Some(())
    }
}

/// Bytes that are new in an skb, of which a sum that the device made knows nothing yet.
pub struct Fresh(pub Skb);

impl Bytes for Fresh {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load(offset)
    }
}

impl Packet for Fresh {
    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> Option<()> {
        let (skb, flags) = (self.0.0, BPF_F_RECOMPUTE_CSUM.into());
        // SAFETY: a valid context and N bytes.
        ok(unsafe {
            bpf_skb_store_bytes(skb, offset as u32, bytes.as_ptr().cast(), N as u32, flags)
        })
    }
}

impl Resize for Skb {
    #[inline(always)]
    fn truncate(&mut self, length: usize) -> Option<()> {
        let length = Self::at(length);
        if length > self.length() {
            return None;
        }
        // SAFETY: a valid context.
        ok(unsafe { bpf_skb_change_tail(self.0, length, 0) })
    }

    #[inline(always)]
    fn push_front(&mut self, length: usize) -> Option<()> {
        if self.has_link_header() {
            // SAFETY: a valid context.
            return ok(unsafe { bpf_skb_change_head(self.0, length as u32, 0) });
        }
        // By a device without a link header `bpf_redirect` sends what begins at the network
        // header, which that helper would leave where it was.
        // SAFETY: a valid context.
        ok(unsafe { bpf_skb_adjust_room(self.0, length as i32, ADJ_ROOM_MAC, 0) })
    }

    #[inline(always)]
    fn has_link_header(&self) -> bool {
        missing() == 0
    }

    /// The context does not tell. But the helper leaves such a checksum alone when data
    /// changes, since the hardware will see the data; any other it adjusts.
    #[inline(always)]
    fn is_sum_partial(&mut self, offset: usize) -> Option<bool> {
        let before: [u8; 2] = self.load(offset)?;
        // SAFETY: a valid context.
        ok(unsafe { bpf_l4_csum_replace(self.0, Self::at(offset), 0, 0x5555, 0) })?;
        let after: [u8; 2] = self.load(offset)?;
        if before == after {
            return Some(true);
        }
        self.store(offset, before)?;
        Some(false)
    }
}

/// `data` to `data_end`.
pub struct Frame {
    pub start: usize,
    pub end: usize,
    /// Bytes of an Ethernet header that are not there, before `start`.
    pub missing: usize,
}

impl Bytes for Frame {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        // The verifier wants to know that this is not below zero; and with a mask between (which
        // cannot be left out, for all that the compiler knows) the difference is made first, and
        // no pointer to before the packet.
        let at = self.start + (offset.wrapping_sub(self.missing) & MAX_OFFSET);
        if at + N > self.end {
            return None;
        }
        // SAFETY: within the packet, as just compared. Bytes, since a header may lie on
        // any address.
        Some(unsafe { *(at as *const [u8; N]) })
    }
}

/// The first bytes of a packet, for [`proxy_ebpf::fast`]: compared with the end once and not at
/// each access.
pub struct Start {
    pub start: usize,
    pub end: usize,
}

impl Fields for Start {
    #[inline(always)]
    fn has(&self, length: usize) -> bool {
        self.start + length <= self.end
    }

    #[inline(always)]
    fn get16(&self, at: usize) -> u16 {
        // SAFETY: within the packet, which the verifier sees to; and it sees to the alignment where
        // the machine has any (the kernel puts the IP header on a whole word there).
        unsafe { ((self.start + at) as *const u16).read() }
    }

    #[inline(always)]
    fn get32(&self, at: usize) -> u32 {
        // SAFETY: as above.
        unsafe { ((self.start + at) as *const u32).read() }
    }

    #[inline(always)]
    fn put16(&mut self, at: usize, value: u16) {
        // SAFETY: as above.
        unsafe { ((self.start + at) as *mut u16).write(value) };
    }

    #[inline(always)]
    fn put32(&mut self, at: usize, value: u32) {
        // SAFETY: as above.
        unsafe { ((self.start + at) as *mut u32).write(value) };
    }
}
