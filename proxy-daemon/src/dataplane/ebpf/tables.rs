//! The maps, typed.

use std::fmt;

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::sys::SyscallError;
use proxy_ebpf::layout::{
    Backend, BackendCounters, BackendId, Frontend, FrontendCounters, FrontendId, FrontendKey, names,
};
use proxy_ebpf::verdict::Reason;

use super::LoadError;
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
}

/// The service table and its counters, in the kernel.
pub struct Tables {
    frontends: HashMap<MapData, FrontendKey, Frontend>,
    slots: Array<MapData, BackendId>,
    backends: Array<MapData, Backend>,
    frontend_counters: PerCpuArray<MapData, FrontendCounters>,
    backend_counters: PerCpuArray<MapData, BackendCounters>,
    drops: PerCpuArray<MapData, u64>,
}

impl fmt::Debug for Tables {
    /// aya's maps have nothing to show.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

impl Tables {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            frontends: take(ebpf, names::FRONTENDS)?,
            slots: take(ebpf, names::SLOTS)?,
            backends: take(ebpf, names::BACKENDS)?,
            frontend_counters: take(ebpf, names::FRONTEND_COUNTERS)?,
            backend_counters: take(ebpf, names::BACKEND_COUNTERS)?,
            drops: take(ebpf, names::DROPS)?,
        })
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

fn take<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, LoadError> {
    let map =
        ebpf.take_map(name).ok_or_else(|| LoadError::Object(format!("it has no map {name}")))?;
    T::try_from(map).map_err(|e| LoadError::Object(format!("map {name}: {e}")))
}

fn failed(map: &'static str, operation: &'static str) -> impl FnOnce(MapError) -> TableError {
    move |source| TableError { map, operation, source }
}

fn sum<T: aya::Pod + Default + std::ops::AddAssign>(values: PerCpuValues<T>) -> T {
    values.iter().fold(T::default(), |mut total, value| {
        total += *value;
        total
    })
}
