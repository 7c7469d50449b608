//! The maps, typed.

use std::fmt;
use std::path::PathBuf;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::sys::SyscallError;
use aya::util::nr_cpus;
use proxy_ebpf::layout::{
    Affinity, AffinityKey, Backend, BackendCounters, BackendId, Config, Device, Flow, Frontend,
    FrontendCounters, FrontendId, FrontendKey, OptOut, RangeData, SocketKey, SocketPeer, Tuple,
    names,
};
use proxy_ebpf::order::Address;
use proxy_ebpf::verdict::Reason;

use super::LoadError;
use super::pins::Pins;
use crate::kernel::netlink::Errno;

/// One access to one map failed.
#[derive(Debug, thiserror::Error)]
#[error("map {map}, {operation}: {source}")]
pub struct TableError {
    pub map: &'static str,
    pub operation: &'static str,
    source: MapError,
}

impl TableError {
    /// The kernel's errno: `E2BIG` for an index beyond an array or a full hash, `ENOENT`
    /// for a key that is not there.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        let number = match &self.source {
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
    slots: Array<MapData, BackendId>,
    backends: Array<MapData, Backend>,
    frontend_counters: PerCpuArray<MapData, FrontendCounters>,
    backend_counters: PerCpuArray<MapData, BackendCounters>,
    drops: PerCpuArray<MapData, u64>,
    flows: HashMap<MapData, Tuple, Flow>,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
    sockets: HashMap<MapData, SocketKey, SocketPeer>,
    prefixes: LpmTrie<MapData, Address, u32>,
    source_ranges: LpmTrie<MapData, RangeData, u32>,
    devices: HashMap<MapData, u32, Device>,
    opt_outs: HashMap<MapData, OptOut, u32>,
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
        Ok(Self {
            config: typed(map, names::CONFIG)?,
            frontends: typed(map, names::FRONTENDS)?,
            slots: typed(map, names::SLOTS)?,
            backends: typed(map, names::BACKENDS)?,
            frontend_counters: typed(map, names::FRONTEND_COUNTERS)?,
            backend_counters: typed(map, names::BACKEND_COUNTERS)?,
            drops: typed(map, names::DROPS)?,
            flows: typed(map, names::FLOWS)?,
            affinity: typed(map, names::AFFINITY)?,
            sockets: typed(map, names::SOCKETS)?,
            prefixes: typed(map, names::PREFIXES)?,
            source_ranges: typed(map, names::SOURCE_RANGES)?,
            devices: typed(map, names::DEVICES)?,
            opt_outs: typed(map, names::OPT_OUTS)?,
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

    /// # Errors
    /// The kernel refuses.
    pub fn peers(&self) -> Result<Vec<(SocketKey, SocketPeer)>, TableError> {
        let all: Result<_, _> = self.sockets.iter().collect();
        all.map_err(failed(names::SOCKETS, "read"))
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
        let all: Result<_, _> = self.frontends.iter().collect();
        all.map_err(failed(names::FRONTENDS, "read"))
    }

    /// # Errors
    /// The range goes beyond the map, or the kernel refuses.
    pub fn slots(&self, base: u32, length: u32) -> Result<Vec<BackendId>, TableError> {
        (base..base.saturating_add(length))
            .map(|index| self.slots.get(&index, 0).map_err(failed(names::SLOTS, "read")))
            .collect()
    }

    /// # Errors
    /// The id is beyond the map, or the kernel refuses.
    pub fn backend(&self, id: BackendId) -> Result<Backend, TableError> {
        self.backends.get(&id.0, 0).map_err(failed(names::BACKENDS, "read"))
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
        for (index, backend) in (base..).zip(backends) {
            let result = self.slots.set(index, *backend, 0);
            result.map_err(failed(names::SLOTS, "update"))?;
        }
        Ok(())
    }

    /// # Errors
    /// The id is beyond the map, or the kernel refuses.
    pub fn set_backend(&mut self, id: BackendId, value: Backend) -> Result<(), TableError> {
        self.backends.set(id.0, value, 0).map_err(failed(names::BACKENDS, "update"))
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

pub(super) fn failed(
    map: &'static str,
    operation: &'static str,
) -> impl FnOnce(MapError) -> TableError {
    move |source| TableError { map, operation, source }
}

fn sum<T: aya::Pod + Default + std::ops::AddAssign>(values: PerCpuValues<T>) -> T {
    values.iter().fold(T::default(), |mut total, value| {
        total += *value;
        total
    })
}
