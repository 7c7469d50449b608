//! The maps, and [`Tables`] over them.
//!
//! The sizes here are for tests; the loader sets them from the daemon's configuration.

use aya_ebpf::bindings::{BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use proxy_ebpf::device::Work;
use proxy_ebpf::fast::{self, Receiver, Way};
use proxy_ebpf::layout::{
    Affinity, AffinityKey, Backend, BackendCounters, BackendId, Config, Device, Flow, FragmentKey,
    FragmentPorts, Frontend, FrontendCounters, FrontendId, FrontendKey, LocalKey, OptOut,
    RangeData, ServiceId, SocketKey, SocketPeer, Tuple,
};
use proxy_ebpf::order::Address;
use proxy_ebpf::parse::Version;
use proxy_ebpf::tables::Tables;
use proxy_ebpf::verdict::Reason;

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// Not preallocated: the memory follows the number of Services, and the limit can be
/// generous.
#[map]
static FRONTENDS: HashMap<FrontendKey, Frontend> =
    HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[map]
static SLOTS: Array<BackendId> = Array::with_max_entries(1024, 0);

#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(1024, 0);

#[map]
static LOCALS: HashMap<LocalKey, BackendId> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[map]
static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::with_max_entries(1024, 0);

#[map]
static PREFIXES: LpmTrie<Address, u32> = LpmTrie::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[map]
static SOURCE_RANGES: LpmTrie<RangeData, u32> = LpmTrie::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[map]
static DEVICES: HashMap<u32, Device> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[map]
static OPT_OUTS: HashMap<OptOut, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

/// No LRU: that would make room by what has been idle for longest, however alive it is. A full one
/// takes no new flow.
#[map]
static FLOWS: HashMap<Tuple, Flow> = HashMap::with_max_entries(1024, 0);

#[map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts> = LruHashMap::with_max_entries(1024, 0);

#[map]
static SOCKETS: LruHashMap<SocketKey, SocketPeer> = LruHashMap::with_max_entries(1024, 0);

#[map]
static UDP_PEERS: LruHashMap<SocketKey, SocketPeer> = LruHashMap::with_max_entries(1024, 0);

#[map]
static FRONTEND_COUNTERS: PerCpuArray<FrontendCounters> = PerCpuArray::with_max_entries(1024, 0);

#[map]
static BACKEND_COUNTERS: PerCpuArray<BackendCounters> = PerCpuArray::with_max_entries(1024, 0);

#[map]
static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::CAPACITY, 0);

/// One packet's, of which a CPU has one at a time.
#[derive(Default, Clone, Copy)]
#[repr(C)]
pub struct Scratch {
    pub work: Work,
    /// The way on: by this device, with these Ethernet addresses; or what it takes.
    pub ifindex: u32,
    pub ethernet: [u8; 12],
    pub mtu: u32,
    /// 1 when the packet came inside another one; and segments that it stood for as it came.
    pub wrapped: u32,
    pub segments: u32,
    /// ICMP errors that may still be sent in the second that began then.
    pub errors_left: u32,
    pub pad: u32,
    pub errors_since: u64,
    /// The longest packet that is known to fit there; and `Device::PODS | ..` of the device that
    /// the packet came in by.
    pub longest: u32,
    pub device: u32,
    /// See [`now`].
    pub ticks: u64,
    pub now: u64,
}

impl Scratch {
    /// Remembers the way that was found for this packet.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "made from 16 bits")]
    pub fn remember(&self, came_in: u32, receiver: Receiver, how: u32) -> u32 {
        let to = &self.work.to;
        let v6 = self.work.headers.version == Version::V6;
        let place =
            if v6 { Way::place::<true>(to, came_in) } else { Way::place::<false>(to, came_in) };
        let Some(way) = way(place) else {
            return 0;
        };
        way.to = *to;
        way.v6 = v6.into();
        way.since = ticks();
        way.came_in = came_in;
        way.receiver = receiver;
        way.longest = self.longest as u16;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = self.ethernet;
        way.ethernet = [
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
        ];
        way.out = self.ifindex;
        way.how = how;
        how
    }
}

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: programs at devices run with bottom halves off, so that no other one has it.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// This CPU's memory of ways. Like [`SCRATCH`] nobody else's, and gone with the programs.
#[map]
static WAYS: PerCpuArray<Way> = PerCpuArray::with_max_entries(fast::WAYS, 0);

/// As [`Tables::flow`], with the key written in whole words. What is written in smaller pieces than
/// it is read in has to reach the cache before it can be read, and the kernel reads it at once.
#[inline(always)]
pub fn flow<R>(tuple: &Tuple, access: impl FnOnce(&mut Flow) -> R) -> Option<R> {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let (source, destination) = (tuple.source.words(), tuple.destination.words());
    let ports = tuple.source_port.to_kernel() | tuple.destination_port.to_kernel() << 16;
    let key: [u64; 5] = [
        pair(source[0].to_kernel(), source[1].to_kernel()),
        pair(source[2].to_kernel(), source[3].to_kernel()),
        pair(destination[0].to_kernel(), destination[1].to_kernel()),
        pair(destination[2].to_kernel(), destination[3].to_kernel()),
        pair(ports, tuple.protocol.into()),
    ];
    // SAFETY: of the same size, more strictly aligned, and integers all of them; the programs are
    // little-endian.
    Kernel.flow(unsafe { &*key.as_ptr().cast::<Tuple>() }, access)
}

#[inline(always)]
pub fn way(place: u32) -> Option<&'static mut Way> {
    // SAFETY: as in `scratch`.
    WAYS.get_ptr_mut(place).map(|way| unsafe { &mut *way })
}

/// See [`fast::TICKS`]. A load and no call: the verifier puts it in the place of the helper.
#[inline(always)]
pub fn ticks() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() }
}

/// `bpf_ktime_get_ns` at the first packet since the clock's last tick (1 to 10 ms): near enough to
/// tell when a flow was seen.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: a helper without arguments.
    let exact = || unsafe { bpf_ktime_get_ns() };
    let Some(scratch) = scratch() else {
        return exact();
    };
    let ticks = ticks();
    if scratch.ticks != ticks {
        scratch.now = exact();
        scratch.ticks = ticks;
    }
    scratch.now
}

#[inline(always)]
pub fn device(ifindex: u32) -> Option<&'static Device> {
    // SAFETY: as in `Kernel::frontend`.
    unsafe { DEVICES.get(ifindex) }
}

#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// The tables in the kernel.
pub struct Kernel;

/// The key of a whole address.
const ADDRESS_BITS: u32 = 128;

impl Tables for Kernel {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        config()
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        // SAFETY: the pointer is valid until the program ends (it runs in an RCU read
        // section). The writer only ever replaces whole values; copying at once keeps
        // the time short in which the kernel may hand the element's memory to another
        // key (it reuses freed elements without waiting for readers, since 6.1).
        unsafe { FRONTENDS.get(key).copied() }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<BackendId> {
        SLOTS.get(index).copied()
    }

    #[inline(always)]
    fn backend(&self, id: BackendId) -> Option<Backend> {
        BACKENDS.get(id.0).copied()
    }

    #[inline(always)]
    fn local(&self, key: &LocalKey) -> Option<BackendId> {
        // SAFETY: as in `frontend`.
        unsafe { LOCALS.get(key).copied() }
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: as in `frontend`.
        unsafe { AFFINITY.get(key).copied() }
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, value: &Affinity) {
        // An LRU that has no element to spare for this CPU: the client may get another
        // endpoint next time, which is no reason to refuse it now.
        let _ = AFFINITY.insert(key, value, BPF_ANY.into());
    }

    #[inline(always)]
    fn client(&self, address: &Address) -> u32 {
        PREFIXES.get(Key::new(ADDRESS_BITS, *address)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn in_source_ranges(&self, service: ServiceId, address: &Address) -> bool {
        let data = RangeData { service, address: *address };
        SOURCE_RANGES.get(Key::new(RangeData::SERVICE_BITS + ADDRESS_BITS, data)).is_some()
    }

    #[inline(always)]
    fn is_opted_out(&self, who: &OptOut) -> bool {
        OPT_OUTS.get_ptr(who).is_some()
    }

    #[inline(always)]
    fn flow<R>(&self, key: &Tuple, access: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        // SAFETY: as in `frontend`. Two CPUs with packets of one flow write single words;
        // a lost flag is set again by the next packet that has it.
        FLOWS.get_ptr_mut(key).map(|flow| access(unsafe { &mut *flow }))
    }

    #[inline(always)]
    fn add_flow(&self, key: &Tuple, flow: &Flow) -> bool {
        FLOWS.insert(key, flow, BPF_NOEXIST.into()).is_ok()
    }

    #[inline(always)]
    fn remove_flow(&self, key: &Tuple) -> bool {
        FLOWS.remove(key).is_ok()
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: as in `frontend`.
        unsafe { FRAGMENTS.get(key).copied() }
    }

    #[inline(always)]
    fn set_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        // Without the entry the rest of the datagram is lost, as if by the network.
        let _ = FRAGMENTS.insert(key, ports, BPF_ANY.into());
    }

    #[inline(always)]
    fn peer(&self, key: &SocketKey) -> Option<SocketPeer> {
        // SAFETY: as in `frontend`.
        unsafe { SOCKETS.get(key).copied() }
    }

    #[inline(always)]
    fn set_peer(&self, key: &SocketKey, peer: &SocketPeer) {
        // Without the entry the socket's owner sees the backend's address.
        let _ = SOCKETS.insert(key, peer, BPF_ANY.into());
    }

    #[inline(always)]
    fn udp_peer(&self, key: &SocketKey) -> Option<SocketPeer> {
        // SAFETY: as in `frontend`.
        unsafe { UDP_PEERS.get(key).copied() }
    }

    #[inline(always)]
    fn set_udp_peer(&self, key: &SocketKey, peer: &SocketPeer) {
        // Without the entry the socket stays when its backend goes.
        let _ = UDP_PEERS.insert(key, peer, BPF_ANY.into());
    }

    #[inline(always)]
    fn remove_udp_peer(&self, key: &SocketKey) {
        // Most sockets have none.
        let _ = UDP_PEERS.remove(key);
    }

    #[inline(always)]
    fn count_frontend(&self, id: FrontendId, update: impl FnOnce(&mut FrontendCounters)) {
        if let Some(counters) = FRONTEND_COUNTERS.get_ptr_mut(id.0) {
            // SAFETY: this CPU's entry. A program that interrupts this one on the same
            // CPU may lose one of two updates; it cannot do worse.
            update(unsafe { &mut *counters });
        }
    }

    #[inline(always)]
    fn count_backend(&self, id: BackendId, update: impl FnOnce(&mut BackendCounters)) {
        if let Some(counters) = BACKEND_COUNTERS.get_ptr_mut(id.0) {
            // SAFETY: as in `count_frontend`.
            update(unsafe { &mut *counters });
        }
    }

    #[inline(always)]
    fn count_drop(&self, reason: Reason) {
        if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
            // SAFETY: as in `count_frontend`.
            unsafe { *count += 1 };
        }
    }
}
