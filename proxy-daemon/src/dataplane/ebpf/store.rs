//! The service table as a seam: the maps in the kernel, or memory.

use std::collections::HashMap;

use proxy_ebpf::layout::{
    Backend, BackendId, Frontend, FrontendId, FrontendKey, LocalKey, RangeData,
};

use super::{Programs, TableError, Tables};

/// What a readback looks at.
pub trait Read: Send {
    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, TableError>;
    fn slots(&self, base: u32, length: u32) -> Result<Vec<BackendId>, TableError>;
    /// As many as there are from this id on.
    fn backends(&self, first: BackendId, count: u32) -> Result<Vec<Backend>, TableError>;
    fn source_ranges(&self) -> Result<Vec<(RangeData, u32)>, TableError>;
    fn locals(&self) -> Result<Vec<(LocalKey, BackendId)>, TableError>;
}

/// What the plane does to the maps. The kernel either carries a write out or refuses it; of
/// several entries those before the refused one are written, and nobody names them yet.
pub trait Store: Read {
    fn set_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), TableError>;
    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), TableError>;
    fn set_slots(&mut self, base: u32, backends: &[BackendId]) -> Result<(), TableError>;
    fn set_backends(&mut self, backends: &[(BackendId, Backend)]) -> Result<(), TableError>;
    fn set_source_range(&mut self, range: RangeData, length: u32) -> Result<(), TableError>;
    fn remove_source_range(&mut self, range: RangeData, length: u32) -> Result<(), TableError>;
    fn set_local(&mut self, key: &LocalKey, id: BackendId) -> Result<(), TableError>;
    fn remove_local(&mut self, key: &LocalKey) -> Result<(), TableError>;
    /// The counters of an id that is given out.
    fn zero_frontend_counters(&mut self, id: FrontendId) -> Result<(), TableError>;
    fn zero_backend_counters(&mut self, id: BackendId) -> Result<(), TableError>;
    /// The maps were made by this process: nothing has counted in them before.
    fn is_new(&self) -> bool;
}

impl Read for Tables {
    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, TableError> {
        self.frontends()
    }
    fn slots(&self, base: u32, length: u32) -> Result<Vec<BackendId>, TableError> {
        self.slots(base, length)
    }
    fn backends(&self, first: BackendId, count: u32) -> Result<Vec<Backend>, TableError> {
        self.backends(first, count)
    }
    fn source_ranges(&self) -> Result<Vec<(RangeData, u32)>, TableError> {
        self.source_ranges()
    }
    fn locals(&self) -> Result<Vec<(LocalKey, BackendId)>, TableError> {
        self.locals()
    }
}

impl Read for Programs {
    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, TableError> {
        self.tables_ref().frontends()
    }
    fn slots(&self, base: u32, length: u32) -> Result<Vec<BackendId>, TableError> {
        self.tables_ref().slots(base, length)
    }
    fn backends(&self, first: BackendId, count: u32) -> Result<Vec<Backend>, TableError> {
        self.tables_ref().backends(first, count)
    }
    fn source_ranges(&self) -> Result<Vec<(RangeData, u32)>, TableError> {
        self.tables_ref().source_ranges()
    }
    fn locals(&self) -> Result<Vec<(LocalKey, BackendId)>, TableError> {
        self.tables_ref().locals()
    }
}

impl Store for Programs {
    fn set_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), TableError> {
        self.tables().set_frontend(key, value)
    }
    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), TableError> {
        self.tables().remove_frontend(key)
    }
    fn set_slots(&mut self, base: u32, backends: &[BackendId]) -> Result<(), TableError> {
        self.tables().set_slots(base, backends)
    }
    fn set_backends(&mut self, backends: &[(BackendId, Backend)]) -> Result<(), TableError> {
        self.tables().set_backends(backends)
    }
    fn set_source_range(&mut self, range: RangeData, length: u32) -> Result<(), TableError> {
        self.tables().set_source_range(range, length)
    }
    fn remove_source_range(&mut self, range: RangeData, length: u32) -> Result<(), TableError> {
        self.tables().remove_source_range(range, length)
    }
    fn set_local(&mut self, key: &LocalKey, id: BackendId) -> Result<(), TableError> {
        self.tables().set_local(key, id)
    }
    fn remove_local(&mut self, key: &LocalKey) -> Result<(), TableError> {
        self.tables().remove_local(key)
    }
    fn zero_frontend_counters(&mut self, id: FrontendId) -> Result<(), TableError> {
        self.tables().zero_frontend_counters(id)
    }
    fn zero_backend_counters(&mut self, id: BackendId) -> Result<(), TableError> {
        self.tables().zero_backend_counters(id)
    }
    fn is_new(&self) -> bool {
        self.made_maps()
    }
}

/// In memory; a copy is the same maps, as a restarted daemon would find them.
#[derive(Debug, Clone, Default)]
pub struct Memory(std::sync::Arc<std::sync::Mutex<Maps>>);

#[derive(Debug, Default)]
pub struct Maps {
    pub frontends: HashMap<FrontendKey, Frontend>,
    pub slots: HashMap<u32, BackendId>,
    pub backends: HashMap<u32, Backend>,
    pub source_ranges: Vec<(RangeData, u32)>,
    pub locals: HashMap<LocalKey, BackendId>,
    /// Writes so far, and reads.
    pub writes: u64,
    pub reads: u64,
    /// Ids whose counters were set to zero, in that order.
    pub zeroed: (Vec<FrontendId>, Vec<BackendId>),
    /// As a daemon finds them that was started again.
    pub taken_over: bool,
}

impl Memory {
    pub fn maps(&self) -> std::sync::MutexGuard<'_, Maps> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::MutexGuard<'_, Maps> {
        let mut maps = self.maps();
        maps.reads += 1;
        maps
    }

    fn write(&self) -> std::sync::MutexGuard<'_, Maps> {
        let mut maps = self.maps();
        maps.writes += 1;
        maps
    }
}

impl Read for Memory {
    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, TableError> {
        Ok(self.read().frontends.iter().map(|(k, v)| (*k, *v)).collect())
    }
    fn slots(&self, base: u32, length: u32) -> Result<Vec<BackendId>, TableError> {
        let maps = self.read();
        Ok((base..base + length)
            .map(|index| maps.slots.get(&index).copied().unwrap_or_default())
            .collect())
    }
    fn backends(&self, first: BackendId, count: u32) -> Result<Vec<Backend>, TableError> {
        let maps = self.read();
        let end = maps.backends.keys().max().map_or(0, |last| last + 1);
        Ok((first.0..end.min(first.0.saturating_add(count)))
            .map(|id| maps.backends.get(&id).copied().unwrap_or_default())
            .collect())
    }
    fn source_ranges(&self) -> Result<Vec<(RangeData, u32)>, TableError> {
        Ok(self.read().source_ranges.clone())
    }
    fn locals(&self) -> Result<Vec<(LocalKey, BackendId)>, TableError> {
        Ok(self.maps().locals.iter().map(|(key, id)| (*key, *id)).collect())
    }
}

impl Store for Memory {
    fn set_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), TableError> {
        self.write().frontends.insert(key, value);
        Ok(())
    }
    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), TableError> {
        self.write().frontends.remove(key);
        Ok(())
    }
    fn set_slots(&mut self, base: u32, backends: &[BackendId]) -> Result<(), TableError> {
        self.write().slots.extend((base..).zip(backends.iter().copied()));
        Ok(())
    }
    fn set_backends(&mut self, backends: &[(BackendId, Backend)]) -> Result<(), TableError> {
        self.write().backends.extend(backends.iter().map(|(id, value)| (id.0, *value)));
        Ok(())
    }
    fn set_source_range(&mut self, range: RangeData, length: u32) -> Result<(), TableError> {
        let mut maps = self.write();
        maps.source_ranges.retain(|entry| *entry != (range, length));
        maps.source_ranges.push((range, length));
        Ok(())
    }
    fn remove_source_range(&mut self, range: RangeData, length: u32) -> Result<(), TableError> {
        self.write().source_ranges.retain(|entry| *entry != (range, length));
        Ok(())
    }
    fn set_local(&mut self, key: &LocalKey, id: BackendId) -> Result<(), TableError> {
        self.write().locals.insert(*key, id);
        Ok(())
    }
    fn remove_local(&mut self, key: &LocalKey) -> Result<(), TableError> {
        self.write().locals.remove(key);
        Ok(())
    }
    fn zero_frontend_counters(&mut self, id: FrontendId) -> Result<(), TableError> {
        self.maps().zeroed.0.push(id);
        Ok(())
    }
    fn zero_backend_counters(&mut self, id: BackendId) -> Result<(), TableError> {
        self.maps().zeroed.1.push(id);
        Ok(())
    }
    fn is_new(&self) -> bool {
        !self.maps().taken_over
    }
}
