//! The maps, typed.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::sys::SyscallError;
use aya::util::nr_cpus;
use proxy_ebpf::layout::{
    Affinity, AffinityKey, Backend, BackendCounters, BackendId, Config, Device, Flow, Frontend,
    FrontendCounters, FrontendId, FrontendKey, LocalKey, OptOut, RangeData, ServiceId, SocketKey,
    SocketPeer, Tuple, names,
};
use proxy_ebpf::order::Address;
use proxy_ebpf::verdict::Reason;

use super::LoadError;
use super::pins::Pins;
use super::pod::{bytes, values};
use crate::kernel::bpf::RawMap;
use crate::kernel::netlink::Errno;

/// One access to one map failed.
#[derive(Debug, thiserror::Error)]
#[error("map {map}, {operation}: {source}")]
pub struct TableError {
    pub map: &'static str,
    pub operation: &'static str,
    source: Refusal,
}

/// How aya says it, or the kernel.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Aya(MapError),
    #[error("{0}")]
    Kernel(Errno),
}

impl TableError {
    /// The kernel's errno: `E2BIG` for an index beyond an array or a full hash, `ENOENT`
    /// for a key that is not there.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        let source = match &self.source {
            Refusal::Aya(source) => source,
            Refusal::Kernel(errno) => return Some(*errno),
        };
        let number = match source {
            MapError::SyscallError(SyscallError { io_error, .. }) | MapError::IoError(io_error) => {
                io_error.raw_os_error()?
            }
            MapError::KeyNotFound | MapError::ElementNotFound => nix::errno::Errno::ENOENT as i32,
            MapError::OutOfBounds { .. } => nix::errno::Errno::E2BIG as i32,
            _ => return None,
        };
        Some(Errno(number))
    }

    /// The index is beyond the array.
    #[must_use]
    pub fn is_beyond(&self) -> bool {
        self.errno().is_some_and(|errno| errno.0 == nix::errno::Errno::E2BIG as i32)
    }

    /// What was to be removed is not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.errno().is_some_and(|errno| errno.0 == nix::errno::Errno::ENOENT as i32)
    }
}

/// The service table and its counters, in the kernel.
pub struct Tables {
    config: Array<MapData, Config>,
    frontends: HashMap<MapData, FrontendKey, Frontend>,
    /// The same map, to be read in batches.
    all_frontends: RawMap,
    slots: RawMap,
    backends: RawMap,
    frontend_counters: PerCpuArray<MapData, FrontendCounters>,
    backend_counters: PerCpuArray<MapData, BackendCounters>,
    drops: PerCpuArray<MapData, u64>,
    flows: HashMap<MapData, Tuple, Flow>,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
    sockets: HashMap<MapData, SocketKey, SocketPeer>,
    udp_peers: HashMap<MapData, SocketKey, SocketPeer>,
    prefixes: LpmTrie<MapData, Address, u32>,
    source_ranges: LpmTrie<MapData, RangeData, u32>,
    devices: HashMap<MapData, u32, Device>,
    opt_outs: HashMap<MapData, OptOut, u32>,
    locals: HashMap<MapData, LocalKey, BackendId>,
}

impl fmt::Debug for Tables {
    /// aya's maps have nothing to show.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

impl Tables {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        Self::of(&mut |name| {
            ebpf.take_map(name).ok_or_else(|| LoadError::Object(format!("it has no map {name}")))
        })
    }

    /// Handles of their own to maps that are pinned: for another thread.
    ///
    /// # Errors
    /// One is not pinned there.
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        Self::open_at(|name| pins.map(name))
    }

    /// Those at these paths, beside a daemon that holds the pins: for looking into them, and for
    /// tests.
    ///
    /// # Errors
    /// One is not pinned there.
    pub fn open_at(path: impl Fn(&str) -> PathBuf) -> Result<Self, LoadError> {
        Self::of(&mut |name| {
            let data = MapData::from_pin(path(name)).and_then(Map::from_map_data);
            data.map_err(|e| LoadError::from_aya(format!("open map {name}"), &e))
        })
    }

    fn of(map: &mut dyn FnMut(&'static str) -> Result<Map, LoadError>) -> Result<Self, LoadError> {
        let frontends = map(names::FRONTENDS)?;
        let all_frontends = raw(&frontends, names::FRONTENDS)?;
        Ok(Self {
            config: typed(map, names::CONFIG)?,
            frontends: frontends
                .try_into()
                .map_err(|e| LoadError::Object(format!("map {}: {e}", names::FRONTENDS)))?,
            all_frontends,
            slots: raw(&map(names::SLOTS)?, names::SLOTS)?,
            backends: raw(&map(names::BACKENDS)?, names::BACKENDS)?,
            frontend_counters: typed(map, names::FRONTEND_COUNTERS)?,
            backend_counters: typed(map, names::BACKEND_COUNTERS)?,
            drops: typed(map, names::DROPS)?,
            flows: typed(map, names::FLOWS)?,
            affinity: typed(map, names::AFFINITY)?,
            sockets: typed(map, names::SOCKETS)?,
            udp_peers: typed(map, names::UDP_PEERS)?,
            prefixes: typed(map, names::PREFIXES)?,
            source_ranges: typed(map, names::SOURCE_RANGES)?,
            devices: typed(map, names::DEVICES)?,
            opt_outs: typed(map, names::OPT_OUTS)?,
            locals: typed(map, names::LOCALS)?,
        })
    }

    /// # Errors
    /// The kernel refuses.
    pub fn set_config(&mut self, config: Config) -> Result<(), TableError> {
        self.config.set(0, config, 0).map_err(failed(names::CONFIG, "update"))
    }

    /// `length` counts from the front of the 128 bits: that of an IPv4 prefix is 96 more.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn set_prefix(
        &mut self,
        address: Address,
        length: u32,
        kind: u32,
    ) -> Result<(), TableError> {
        let result = self.prefixes.insert(&Key::new(length, address), kind, 0);
        result.map_err(failed(names::PREFIXES, "insert"))
    }

    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn remove_prefix(&mut self, address: Address, length: u32) -> Result<(), TableError> {
        let result = self.prefixes.remove(&Key::new(length, address));
        result.map_err(failed(names::PREFIXES, "remove"))
    }

    /// `length` as in [`Self::set_prefix`].
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn set_source_range(&mut self, range: RangeData, length: u32) -> Result<(), TableError> {
        let key = Key::new(RangeData::SERVICE_BITS + length, range);
        self.source_ranges.insert(&key, 1, 0).map_err(failed(names::SOURCE_RANGES, "insert"))
    }

    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn remove_source_range(&mut self, range: RangeData, length: u32) -> Result<(), TableError> {
        let key = Key::new(RangeData::SERVICE_BITS + length, range);
        self.source_ranges.remove(&key).map_err(failed(names::SOURCE_RANGES, "remove"))
    }

    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn set_device(&mut self, ifindex: u32, device: Device) -> Result<(), TableError> {
        self.devices.insert(ifindex, device, 0).map_err(failed(names::DEVICES, "insert"))
    }

    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn remove_device(&mut self, ifindex: u32) -> Result<(), TableError> {
        self.devices.remove(&ifindex).map_err(failed(names::DEVICES, "remove"))
    }

    /// All of them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn opt_outs(&self) -> Result<Vec<OptOut>, TableError> {
        let all: Result<_, _> = self.opt_outs.keys().collect();
        all.map_err(failed(names::OPT_OUTS, "read"))
    }

    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn set_opt_out(&mut self, who: OptOut) -> Result<(), TableError> {
        self.opt_outs.insert(who, 1, 0).map_err(failed(names::OPT_OUTS, "insert"))
    }

    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn remove_opt_out(&mut self, who: &OptOut) -> Result<(), TableError> {
        self.opt_outs.remove(who).map_err(failed(names::OPT_OUTS, "remove"))
    }

    /// All of them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn locals(&self) -> Result<Vec<(LocalKey, BackendId)>, TableError> {
        let all: Result<_, _> = self.locals.iter().collect();
        all.map_err(failed(names::LOCALS, "read"))
    }

    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn set_local(&mut self, key: &LocalKey, id: BackendId) -> Result<(), TableError> {
        self.locals.insert(key, id, 0).map_err(failed(names::LOCALS, "insert"))
    }

    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn remove_local(&mut self, key: &LocalKey) -> Result<(), TableError> {
        self.locals.remove(key).map_err(failed(names::LOCALS, "remove"))
    }

    /// All entries of the flow table, both directions; those that come or go meanwhile may
    /// be among them or not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn flows(&self) -> Result<Vec<(Tuple, Flow)>, TableError> {
        let all: Result<_, _> = self.flows.iter().collect();
        all.map_err(failed(names::FLOWS, "read"))
    }

    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn flow(&self, key: &Tuple) -> Result<Flow, TableError> {
        self.flows.get(key, 0).map_err(failed(names::FLOWS, "read"))
    }

    /// One entry, as the programs would make it: for tests and measurements.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_flow(&mut self, key: &Tuple, flow: &Flow) -> Result<(), TableError> {
        self.flows.insert(key, flow, 0).map_err(failed(names::FLOWS, "update"))
    }

    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn remove_flow(&mut self, key: &Tuple) -> Result<(), TableError> {
        self.flows.remove(key).map_err(failed(names::FLOWS, "remove"))
    }

    /// # Errors
    /// The kernel refuses.
    pub fn affinities(&self) -> Result<Vec<(AffinityKey, Affinity)>, TableError> {
        let all: Result<_, _> = self.affinity.iter().collect();
        all.map_err(failed(names::AFFINITY, "read"))
    }

    /// One entry, as the programs would make it: for tests.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_affinity(
        &mut self,
        key: &AffinityKey,
        affinity: &Affinity,
    ) -> Result<(), TableError> {
        let result = self.affinity.insert(key, affinity, 0);
        result.map_err(failed(names::AFFINITY, "update"))
    }

    /// Removes all entries of these Services: how many.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget_affinity(&mut self, services: &BTreeSet<ServiceId>) -> Result<usize, TableError> {
        let all: Result<Vec<AffinityKey>, _> = self.affinity.keys().collect();
        let all = all.map_err(failed(names::AFFINITY, "read"))?;
        let mut removed = 0;
        for key in all.iter().filter(|key| services.contains(&key.service)) {
            match self.affinity.remove(key).map_err(failed(names::AFFINITY, "remove")) {
                // It made room meanwhile.
                Err(error) if error.is_missing() => {}
                result => {
                    result?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }

    /// Of UDP sockets, those connected and those whose single datagrams were translated; some of
    /// TCP are among them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn peers(&self) -> Result<Vec<(SocketKey, SocketPeer)>, TableError> {
        let mut all = self.udp_peers()?;
        // Until version 6 connected ones were there, too.
        let others: Result<Vec<_>, _> = self.sockets.iter().collect();
        all.extend(others.map_err(failed(names::SOCKETS, "read"))?);
        Ok(all)
    }

    /// Of connected UDP sockets.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn udp_peers(&self) -> Result<Vec<(SocketKey, SocketPeer)>, TableError> {
        let all: Result<_, _> = self.udp_peers.iter().collect();
        all.map_err(failed(names::UDP_PEERS, "read"))
    }

    /// Adds or replaces; a reader meets the old value or the new one.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn set_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), TableError> {
        let result = self.frontends.insert(key, value, 0);
        result.map_err(failed(names::FRONTENDS, "insert"))
    }

    /// # Errors
    /// It is not there, or the kernel refuses.
    pub fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), TableError> {
        self.frontends.remove(key).map_err(failed(names::FRONTENDS, "remove"))
    }

    /// All of them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, TableError> {
        let mut all = Vec::new();
        let result = self.all_frontends.read(|keys, frontends| {
            all.extend(values::<FrontendKey>(keys).zip(values::<Frontend>(frontends)));
        });
        result.map_err(refused(names::FRONTENDS, "read")).map(|()| all)
    }

    /// As many as there are from `base` on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn slots(&self, base: u32, length: u32) -> Result<Vec<BackendId>, TableError> {
        let range = self.slots.range(base, length).map_err(refused(names::SLOTS, "read"))?;
        Ok(values(&range).collect())
    }

    /// As many as there are from this id on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn backends(&self, first: BackendId, count: u32) -> Result<Vec<Backend>, TableError> {
        let range = self.backends.range(first.0, count);
        Ok(values(&range.map_err(refused(names::BACKENDS, "read"))?).collect())
    }

    /// # Errors
    /// The id is beyond the map, or the kernel refuses.
    pub fn backend(&self, id: BackendId) -> Result<Backend, TableError> {
        let beyond = Errno(nix::errno::Errno::E2BIG as i32);
        let all = self.backends(id, 1)?;
        all.first().copied().ok_or_else(|| refused(names::BACKENDS, "read")(beyond))
    }

    /// System calls so far that read or wrote entries of these in batches: of `FRONTENDS`,
    /// `SLOTS` and `BACKENDS`.
    #[must_use]
    pub fn batch_calls(&self) -> [u64; 3] {
        [self.all_frontends.calls(), self.slots.calls(), self.backends.calls()]
    }

    /// As on a kernel without batches: for tests.
    pub fn one_by_one(&self) {
        for map in [&self.all_frontends, &self.slots, &self.backends] {
            map.one_by_one();
        }
    }

    /// With the length from the front of the 128 bits.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn source_ranges(&self) -> Result<Vec<(RangeData, u32)>, TableError> {
        let all: Result<Vec<Key<RangeData>>, _> = self.source_ranges.keys().collect();
        let all = all.map_err(failed(names::SOURCE_RANGES, "read"))?;
        Ok(all
            .into_iter()
            .map(|key| (key.data(), key.prefix_len() - RangeData::SERVICE_BITS))
            .collect())
    }

    /// All of them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn prefixes(&self) -> Result<Vec<(Address, u32, u32)>, TableError> {
        let all: Result<Vec<_>, _> = self.prefixes.iter().collect();
        let all = all.map_err(failed(names::PREFIXES, "read"))?;
        Ok(all.into_iter().map(|(key, kind)| (key.data(), key.prefix_len(), kind)).collect())
    }

    /// All of them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn devices(&self) -> Result<Vec<(u32, Device)>, TableError> {
        let all: Result<_, _> = self.devices.iter().collect();
        all.map_err(failed(names::DEVICES, "read"))
    }

    /// Writes consecutive slots from `base`. No frontend may name the range yet.
    ///
    /// # Errors
    /// The range goes beyond the map, or the kernel refuses.
    pub fn set_slots(&mut self, base: u32, backends: &[BackendId]) -> Result<(), TableError> {
        let length = u32::try_from(backends.len()).unwrap_or(u32::MAX);
        let indices: Vec<BackendId> = (base..base.saturating_add(length)).map(BackendId).collect();
        let result = self.slots.update(bytes(&indices), bytes(backends));
        result.map_err(refused(names::SLOTS, "update"))
    }

    /// # Errors
    /// An id is beyond the map, or the kernel refuses.
    pub fn set_backends(&mut self, backends: &[(BackendId, Backend)]) -> Result<(), TableError> {
        let (ids, backends): (Vec<BackendId>, Vec<Backend>) = backends.iter().copied().unzip();
        let result = self.backends.update(bytes(&ids), bytes(&backends));
        result.map_err(refused(names::BACKENDS, "update"))
    }

    /// # Errors
    /// The id is beyond the map, or the kernel refuses.
    pub fn set_backend(&mut self, id: BackendId, value: Backend) -> Result<(), TableError> {
        self.set_backends(&[(id, value)])
    }

    /// The id is another frontend's from now on. One beyond the map counts nothing.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn zero_frontend_counters(&mut self, id: FrontendId) -> Result<(), TableError> {
        zero(&mut self.frontend_counters, id.0, names::FRONTEND_COUNTERS)
    }

    /// As [`Self::zero_frontend_counters`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn zero_backend_counters(&mut self, id: BackendId) -> Result<(), TableError> {
        zero(&mut self.backend_counters, id.0, names::BACKEND_COUNTERS)
    }

    /// Over all CPUs.
    ///
    /// # Errors
    /// The id is beyond the map, or the kernel refuses.
    pub fn frontend_counters(&self, id: FrontendId) -> Result<FrontendCounters, TableError> {
        let values = self.frontend_counters.get(&id.0, 0);
        values.map_err(failed(names::FRONTEND_COUNTERS, "read")).map(sum)
    }

    /// Over all CPUs.
    ///
    /// # Errors
    /// The id is beyond the map, or the kernel refuses.
    pub fn backend_counters(&self, id: BackendId) -> Result<BackendCounters, TableError> {
        let values = self.backend_counters.get(&id.0, 0);
        values.map_err(failed(names::BACKEND_COUNTERS, "read")).map(sum)
    }

    /// Over all CPUs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn drops(&self, reason: Reason) -> Result<u64, TableError> {
        self.drops.get(&(reason as u32), 0).map_err(failed(names::DROPS, "read")).map(sum)
    }
}

fn zero<T: aya::Pod + Default>(
    map: &mut PerCpuArray<MapData, T>,
    id: u32,
    name: &'static str,
) -> Result<(), TableError> {
    let cpus = nr_cpus().map_err(|(_, error)| failed(name, "update")(MapError::IoError(error)))?;
    let zeroes = PerCpuValues::try_from(vec![T::default(); cpus])
        .map_err(|error| failed(name, "update")(MapError::IoError(error)))?;
    match map.set(id, zeroes, 0).map_err(failed(name, "update")) {
        Err(error) if error.is_beyond() => Ok(()),
        result => result,
    }
}

fn typed<T: TryFrom<Map, Error = MapError>>(
    map: &mut dyn FnMut(&'static str) -> Result<Map, LoadError>,
    name: &'static str,
) -> Result<T, LoadError> {
    T::try_from(map(name)?).map_err(|e| LoadError::Object(format!("map {name}: {e}")))
}

fn raw(map: &Map, name: &'static str) -> Result<RawMap, LoadError> {
    let data = match map {
        Map::Array(data) | Map::HashMap(data) => data,
        _ => return Err(LoadError::Object(format!("map {name} is of another kind"))),
    };
    RawMap::of(data.fd().as_fd()).map_err(|errno| LoadError::Kernel {
        operation: format!("ask about map {name}"),
        errno,
        hint: "",
    })
}

pub(super) fn failed(
    map: &'static str,
    operation: &'static str,
) -> impl FnOnce(MapError) -> TableError {
    move |source| TableError { map, operation, source: Refusal::Aya(source) }
}

pub(super) fn refused(
    map: &'static str,
    operation: &'static str,
) -> impl FnOnce(Errno) -> TableError {
    move |errno| TableError { map, operation, source: Refusal::Kernel(errno) }
}

fn sum<T: aya::Pod + Default + std::ops::AddAssign>(values: PerCpuValues<T>) -> T {
    values.iter().fold(T::default(), |mut total, value| {
        total += *value;
        total
    })
}
