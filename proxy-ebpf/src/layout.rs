//! The structs in the maps. The only definition of them: programs and daemon compile it.
//!
//! ```text
//! CONFIG     0           -> Config     array; the daemon's, of which FEATURES may change live
//! FRONTENDS  FrontendKey -> Frontend   hash; names ranges of SLOTS and the counters' index
//! SLOTS      index       -> BackendId  array; a range of it is one set of backends
//! BACKENDS   BackendId   -> Backend    array
//! LOCALS     LocalKey    -> BackendId  hash; the backends on this node
//! AFFINITY   AffinityKey -> Affinity   LRU hash
//! PREFIXES   prefix      -> u32        LPM trie; what an address is
//! SOURCE_RANGES  Service and prefix -> u32   LPM trie; clients let in
//! DEVICES    ifindex     -> Device     hash
//! OPT_OUTS   OptOut      -> u32        hash; sockets that are left alone
//! FLOWS      Tuple       -> Flow       hash; see [`crate::layout::flow`]
//! FRAGMENTS, SOCKETS, UDP_PEERS        LRU hashes: see there
//! FRONTEND_COUNTERS  FrontendId -> FrontendCounters   per-CPU array
//! BACKEND_COUNTERS   BackendId  -> BackendCounters    per-CPU array
//! DROPS      Reason      -> u64                       per-CPU array
//! ```
//!
//! A change of a frontend's backends writes a range that no frontend names, then
//! replaces the frontend's value: a reader meets the old set or the new one. The writer
//! must leave a range alone for a while after the last frontend stopped naming it (a
//! program may hold the value it read), and an id likewise. Weights, plain random choice
//! and Maglev differ in how a range is filled and which number indexes it, not in these
//! structs.
//!
//! Rules for a struct here: fixed-width integers, explicit padding, nothing the compiler
//! may choose. [`FINGERPRINT`] covers every name, offset and size; a change of it without
//! a new [`LAYOUT_VERSION`] fails a test, and the loader refuses an object that was built
//! from another one.

use core::mem::{offset_of, size_of};
use core::ops::AddAssign;

use crate::order::{Address, Be16};
use crate::select::Hash;

pub mod config;
pub mod flow;
pub mod maps;

pub use config::{Config, Device, LocalKey, OptOut, Prefix, RangeData, Timeouts};
pub use flow::{
    Affinity, AffinityKey, Flow, FragmentKey, FragmentPorts, SocketKey, SocketPeer, Tuple,
};

/// Part of the path maps are pinned under, and of the object's [`Mark`].
pub const LAYOUT_VERSION: u32 = 7;

/// A port of a Service: what affinity and source ranges belong to, across its frontends.
///
/// A hash of its name, so that it is the same after a restart without being kept anywhere.
/// In two halves, because keys of 4-byte alignment leave no holes.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ServiceId([u32; 2]);

impl ServiceId {
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "split into halves")]
    pub const fn new(hash: u64) -> Self {
        Self([hash as u32, (hash >> 32) as u32])
    }
}

/// Index into `FRONTEND_COUNTERS`. Stays with a frontend while its backends change.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct FrontendId(pub u32);

/// Index into `BACKENDS` and `BACKEND_COUNTERS`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct BackendId(pub u32);

/// What a client connects to.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrontendKey {
    address: Address,
    port: Be16,
    /// IP protocol number.
    protocol: u8,
    /// Always 0: it is compared like everything else in a key.
    pad: u8,
}

impl FrontendKey {
    #[must_use]
    #[inline(always)]
    pub const fn new(address: Address, port: Be16, protocol: u8) -> Self {
        Self { address, port, protocol, pad: 0 }
    }

    #[must_use]
    pub const fn address(&self) -> Address {
        self.address
    }

    #[must_use]
    pub const fn port(&self) -> Be16 {
        self.port
    }

    #[must_use]
    pub const fn protocol(&self) -> u8 {
        self.protocol
    }
}

/// `len` slots from `base`; `len` 0 is a frontend without usable backends.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SlotRange {
    pub base: u32,
    pub len: u32,
}

/// Value of `FRONTENDS`.
///
/// Two ranges, because a Service with `externalTrafficPolicy: Local` gives clients on the
/// node (the Cluster set) something else than clients outside (the Local set). In one
/// value, so that both change in one step and one lookup finds either; equal for
/// everybody else.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Frontend {
    /// For the node itself and its pods.
    pub node: SlotRange,
    /// For clients outside the node.
    pub outside: SlotRange,
    pub id: FrontendId,
    pub service: ServiceId,
    /// ClientIP affinity in seconds; 0: none.
    pub affinity: u32,
    /// `Frontend::NODE_DROPS | ..`
    pub flags: u32,
}

impl Frontend {
    /// Without a backend, clients of the node meet silence instead of a refusal.
    pub const NODE_DROPS: u32 = 1;
    pub const OUTSIDE_DROPS: u32 = 1 << 1;
    /// The range for clients of the node is the Local set.
    pub const NODE_LOCAL_SET: u32 = 1 << 2;
    pub const OUTSIDE_LOCAL_SET: u32 = 1 << 3;
    /// Only clients in `SOURCE_RANGES` are let in.
    pub const SOURCE_RANGES: u32 = 1 << 4;
    /// Every client's address is replaced (`--masquerade-all`).
    pub const MASQUERADE_ALL: u32 = 1 << 5;
    /// Every client's, when the backend is on another node: it would reply directly.
    pub const MASQUERADE_REMOTE: u32 = 1 << 6;
    /// That of clients outside the cluster.
    pub const MASQUERADE_OUTSIDE: u32 = 1 << 7;
    /// A new flow's backend is drawn instead of computed from its addresses and ports.
    pub const RANDOM: u32 = 1 << 8;
}

/// Value of `BACKENDS`. All zero (a fresh array) is a backend that does not exist.
///
/// An id belongs to one Service port, so that what the flags say of sets is about the sets
/// of that Service.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backend {
    pub address: Address,
    pub port: Be16,
    /// `Backend::IN_USE | ..`
    pub flags: u16,
    pub service: ServiceId,
}

impl Backend {
    /// In the set that internal and short-circuited clients choose from.
    pub const IN_CLUSTER_SET: u16 = 1;
    /// In the set that a Local policy leaves.
    pub const IN_LOCAL_SET: u16 = 1 << 1;
    /// The entry is a backend that somebody may choose.
    pub const IN_USE: u16 = Self::IN_CLUSTER_SET | Self::IN_LOCAL_SET;
    /// It was in a set until a moment ago: a program that has read the frontend's value before it
    /// changed may still choose it. Not in a set, or nobody may.
    pub const LEAVING: u16 = 1 << 15;
    /// On this node: the client's address can be kept.
    pub const LOCAL: u16 = 1 << 2;
    /// The address is one of the node's own.
    pub const HOST: u16 = 1 << 3;
    /// Flows of UDP that lead here go on, whoever may choose it: an endpoint that serves. It has
    /// a bit that was never set before, so that maps and programs of both ages understand each
    /// other.
    pub const SERVING: u16 = 1 << 4;

    #[must_use]
    #[inline(always)]
    pub const fn in_use(&self) -> bool {
        self.flags & Self::IN_USE != 0
    }

    /// A flow that leads here may go on.
    #[must_use]
    #[inline(always)]
    pub const fn is_there(&self) -> bool {
        self.flags & (Self::IN_USE | Self::SERVING) != 0
    }

    #[must_use]
    #[inline(always)]
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Tells it from others that had or will have its id; never 0.
    #[must_use]
    #[inline(always)]
    pub fn place(&self) -> u32 {
        let [a, b, c, d] = self.address.words();
        let hash = Hash::of_words(a.to_kernel()).word(b.to_kernel());
        let hash = hash.word(c.to_kernel()).word(d.to_kernel());
        hash.word(self.port.to_kernel()).finish() | 1
    }
}

/// Packets and bytes as one hook saw them: the frame's length, a GSO packet as the
/// segments it stands for. Counted where the packet is translated, so once.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

/// Per frontend and CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrontendCounters {
    /// Connects and flows given a backend.
    pub connections: u64,
    /// Connects and packets refused or dropped.
    pub refused: u64,
    pub requests: Traffic,
    pub replies: Traffic,
}

/// Per backend and CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BackendCounters {
    pub connections: u64,
    pub requests: Traffic,
    pub replies: Traffic,
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl AddAssign for FrontendCounters {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.refused += other.refused;
        self.requests += other.requests;
        self.replies += other.replies;
    }
}

impl AddAssign for BackendCounters {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.requests += other.requests;
        self.replies += other.replies;
    }
}

/// What layout an object file was built from. The programs carry it in the ELF section
/// [`Mark::SECTION`]; the loader compares it before anything reaches the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    pub version: u32,
    pub pad: u32,
    pub fingerprint: u64,
}

impl Mark {
    /// Not one of the names that libbpf or aya give a meaning to.
    pub const SECTION: &'static str = "proxy_layout";
    pub const SIZE: usize = size_of::<Self>();
    pub const CURRENT: Self = Self { version: LAYOUT_VERSION, pad: 0, fingerprint: FINGERPRINT };

    /// From the bytes of the section; the programs are little-endian.
    #[must_use]
    pub fn from_section(bytes: &[u8; Self::SIZE]) -> Self {
        let [a, b, c, d, e, f, g, h, fingerprint @ ..] = *bytes;
        Self {
            version: u32::from_le_bytes([a, b, c, d]),
            pad: u32::from_le_bytes([e, f, g, h]),
            fingerprint: u64::from_le_bytes(fingerprint),
        }
    }
}

const fn field_size<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

/// FNV-1a, which a `const fn` can do; this tells layouts apart, it protects nothing.
const fn hash(mut state: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        state = (state ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    state
}

/// States each struct's size and offsets, asserts them, asserts that fields leave no
/// hole, and hashes all of it.
macro_rules! layout {
    ($($name:ident [$size:literal] { $($field:ident @ $offset:literal),+ })+) => {
        $(const _: () = {
            assert!(size_of::<$name>() == $size, concat!("size of ", stringify!($name)));
            $(assert!(
                offset_of!($name, $field) == $offset,
                concat!("offset of ", stringify!($name), ".", stringify!($field)),
            );)+
            let fields = 0 $(+ field_size(|s: &$name| &s.$field))+;
            assert!(fields == $size, concat!("implicit padding in ", stringify!($name)));
        };

        impl maps::Described for $name {
            const FINGERPRINT: u64 = {
                let state = hash(0xcbf2_9ce4_8422_2325, concat!(stringify!($name), $size).as_bytes());
                $(let state = hash(state, concat!(stringify!($field), $offset).as_bytes());)+
                state
            };
        })+

        /// Of every name, offset and size above.
        pub const FINGERPRINT: u64 = {
            let state = 0xcbf2_9ce4_8422_2325;
            $(
                let state = hash(state, concat!(stringify!($name), $size).as_bytes());
                $(let state = hash(state, concat!(stringify!($field), $offset).as_bytes());)+
            )+
            state
        };

        $(
            #[cfg(feature = "user")]
            // SAFETY: `repr(C)` of integers, `Copy`, and the assertions above show that
            // there is no padding, so every byte is initialised.
            #[allow(unsafe_code, reason = "aya asks for the promise that there is no padding")]
            unsafe impl aya::Pod for $name {}
        )+
    };
}

layout! {
    FrontendKey [20] { address @ 0, port @ 16, protocol @ 18, pad @ 19 }
    SlotRange [8] { base @ 0, len @ 4 }
    Frontend [36] { node @ 0, outside @ 8, id @ 16, service @ 20, affinity @ 28, flags @ 32 }
    Backend [28] { address @ 0, port @ 16, flags @ 18, service @ 20 }
    Traffic [16] { packets @ 0, bytes @ 8 }
    FrontendCounters [48] { connections @ 0, refused @ 8, requests @ 16, replies @ 32 }
    BackendCounters [40] { connections @ 0, requests @ 8, replies @ 24 }
    Tuple [40] { source @ 0, destination @ 16, source_port @ 32, destination_port @ 34,
        protocol @ 36, pad @ 37 }
    Flow [64] { to @ 0, seen @ 40, backend @ 48, frontend @ 52, flags @ 56, pad @ 60 }
    FragmentKey [40] { source @ 0, destination @ 16, id @ 32, protocol @ 36, pad @ 37 }
    FragmentPorts [4] { source_port @ 0, destination_port @ 2 }
    AffinityKey [24] { client @ 0, service @ 16 }
    Affinity [16] { seen @ 0, backend @ 8, place @ 12 }
    SocketKey [32] { cookie @ 0, address @ 8, port @ 24, pad @ 26 }
    SocketPeer [24] { address @ 0, port @ 16, pad @ 18, backend @ 20 }
    Timeouts [24] { tcp_opening @ 0, tcp_established @ 4, tcp_closing @ 8, udp @ 12,
        udp_replied @ 16, sctp @ 20 }
    Prefix [32] { address @ 0, mask @ 16 }
    Config [216] { features @ 0, seed @ 4, source4 @ 8, source6 @ 24, port_low @ 40,
        port_high @ 42, prefixes @ 44, service_prefixes @ 48, timeouts @ 176, dropping @ 200,
        direct_port @ 204, pad @ 206, namespace @ 208 }
    Device [44] { source4 @ 0, source6 @ 16, flags @ 32, mac @ 36, pad @ 42 }
    OptOut [16] { id @ 0, kind @ 8, pad @ 12 }
    RangeData [24] { service @ 0, address @ 8 }
    LocalKey [24] { service @ 0, address @ 8 }
    Mark [16] { version @ 0, pad @ 4, fingerprint @ 8 }
}

// SAFETY: `repr(transparent)` over u32.
#[cfg(feature = "user")]
#[allow(unsafe_code, reason = "aya asks for the promise that there is no padding")]
unsafe impl aya::Pod for BackendId {}

// SAFETY: `repr(transparent)` over four u32.
#[cfg(feature = "user")]
#[allow(unsafe_code, reason = "aya asks for the promise that there is no padding")]
unsafe impl aya::Pod for Address {}

/// Names of maps and programs in the object, for the loader.
pub mod names {
    pub const CONFIG: &str = "CONFIG";
    pub const FRONTENDS: &str = "FRONTENDS";
    pub const SLOTS: &str = "SLOTS";
    pub const BACKENDS: &str = "BACKENDS";
    pub const LOCALS: &str = "LOCALS";
    pub const AFFINITY: &str = "AFFINITY";
    pub const PREFIXES: &str = "PREFIXES";
    pub const SOURCE_RANGES: &str = "SOURCE_RANGES";
    pub const DEVICES: &str = "DEVICES";
    pub const OPT_OUTS: &str = "OPT_OUTS";
    pub const FLOWS: &str = "FLOWS";
    pub const FRAGMENTS: &str = "FRAGMENTS";
    pub const SOCKETS: &str = "SOCKETS";
    pub const UDP_PEERS: &str = "UDP_PEERS";
    pub const FRONTEND_COUNTERS: &str = "FRONTEND_COUNTERS";
    pub const BACKEND_COUNTERS: &str = "BACKEND_COUNTERS";
    pub const DROPS: &str = "DROPS";

    /// Those that outlive the daemon: all but a program's own working memory.
    pub const PINNED: [&str; 17] = [
        CONFIG,
        FRONTENDS,
        SLOTS,
        BACKENDS,
        LOCALS,
        AFFINITY,
        PREFIXES,
        SOURCE_RANGES,
        DEVICES,
        OPT_OUTS,
        FLOWS,
        FRAGMENTS,
        SOCKETS,
        UDP_PEERS,
        FRONTEND_COUNTERS,
        BACKEND_COUNTERS,
        DROPS,
    ];

    /// At the cgroup, in the order in which they are attached: what undoes a translation
    /// before what makes one.
    pub const CGROUP: [&str; 9] = [
        SOCK_RELEASE,
        "getpeername4",
        "getpeername6",
        "recvmsg4",
        "recvmsg6",
        "sendmsg4",
        "sendmsg6",
        "connect4",
        "connect6",
    ];
    /// Where sockets are closed.
    pub const SOCK_RELEASE: &str = "sock_release";
    pub const TC_INGRESS: &str = "tc_ingress";
    pub const TC_EGRESS: &str = "tc_egress";
    pub const XDP_INGRESS: &str = "xdp_ingress";

    /// Read-only global: 1 when the kernel lets a cgroup program choose the errno.
    pub const CAN_SET_RETVAL: &str = "CAN_SET_RETVAL";

    /// Read-only global: how much of an Ethernet header packets lack at the devices that the tc
    /// programs are for.
    pub const MISSING_HEADER: &str = "MISSING_HEADER";
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When this fails, the maps of a running daemon no longer fit: raise
    /// `LAYOUT_VERSION` and put both new numbers here.
    #[test]
    fn a_changed_layout_has_a_new_version() {
        assert_eq!((LAYOUT_VERSION, FINGERPRINT), (7, 6_593_063_855_546_725_887));
    }

    #[test]
    fn a_mark_is_read_back_from_its_section() {
        let mut bytes = [0; Mark::SIZE];
        bytes[..4].copy_from_slice(&7_u32.to_le_bytes());
        bytes[8..].copy_from_slice(&9_u64.to_le_bytes());
        assert_eq!(Mark::from_section(&bytes), Mark { version: 7, pad: 0, fingerprint: 9 });
    }
}
