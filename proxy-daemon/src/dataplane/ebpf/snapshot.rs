//! The service table, read whole: a readback of 100,000 endpoints takes some hundred system calls
//! instead of a quarter of a million.

use proxy_ebpf::layout::{Backend, BackendId, Frontend, FrontendKey, RangeData, names};

use super::batch::{BATCH, BatchMap, from_bytes};
use super::pins::Pins;
use super::store::Read;
use super::{LoadError, TableError, Tables};

/// The maps, opened; reading them is another thread's work.
pub struct Snapshots {
    tables: Tables,
    frontends: BatchMap,
    slots: BatchMap,
    backends: BatchMap,
}

impl std::fmt::Debug for Snapshots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshots").finish_non_exhaustive()
    }
}

/// What was in them.
#[derive(Debug)]
pub struct Snapshot {
    frontends: Vec<(FrontendKey, Frontend)>,
    slots: Vec<BackendId>,
    backends: Vec<Backend>,
    source_ranges: Vec<(RangeData, u32)>,
}

impl Snapshots {
    /// # Errors
    /// A map is not pinned there.
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        Ok(Self {
            tables: Tables::open(pins)?,
            frontends: BatchMap::open::<FrontendKey, Frontend>(pins, names::FRONTENDS, None)?,
            slots: BatchMap::open::<u32, BackendId>(pins, names::SLOTS, None)?,
            backends: BatchMap::open::<u32, Backend>(pins, names::BACKENDS, None)?,
        })
    }

    /// Everything, in the order in which one thing names the next. A kernel before 5.6 has it
    /// read entry by entry.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn read(self) -> Result<Box<dyn Read>, TableError> {
        let mut frontends = Vec::new();
        let read = self.frontends.each(BATCH, &mut |key, value| {
            frontends.extend(from_bytes(key).zip(from_bytes(value)));
            true
        });
        if read.is_err() {
            return Ok(Box::new(self.tables));
        }
        let end = end_of_slots(&frontends);
        let slots: Vec<BackendId> = self.slots.first(end)?;
        let backends = self.backends.first(end_of_backends(&slots))?;
        let source_ranges = self.tables.source_ranges()?;
        Ok(Box::new(Snapshot { frontends, slots, backends, source_ranges }))
    }
}

/// Slots from here on are named by no frontend.
pub(super) fn end_of_slots(frontends: &[(FrontendKey, Frontend)]) -> u32 {
    let ranges = frontends.iter().flat_map(|(_, value)| [value.node, value.outside]);
    ranges.map(|range| range.base.saturating_add(range.len)).max().unwrap_or(0)
}

/// Backends from here on are named by no slot.
pub(super) fn end_of_backends(slots: &[BackendId]) -> u32 {
    slots.iter().map(|id| id.0.saturating_add(1)).max().unwrap_or(0)
}

impl Read for Snapshot {
    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, TableError> {
        Ok(self.frontends.clone())
    }

    fn slots(&self, base: u32, length: u32) -> Result<Vec<BackendId>, TableError> {
        let range = base as usize..base.saturating_add(length) as usize;
        Ok(self.slots.get(range).map(<[_]>::to_vec).unwrap_or_default())
    }

    fn backend(&self, id: BackendId) -> Result<Backend, TableError> {
        Ok(self.backends.get(id.0 as usize).copied().unwrap_or_default())
    }

    fn source_ranges(&self) -> Result<Vec<(RangeData, u32)>, TableError> {
        Ok(self.source_ranges.clone())
    }
}
