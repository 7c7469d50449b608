//! The picture of what is in the maps: made from them once, and compared with them later.

use std::collections::HashSet;
use std::sync::Arc;

use proxy_ebpf::layout::{self, BackendId, ServiceId, SlotRange};

use super::super::TableError;
use super::super::readback::{Found, Reading};
use super::super::store::Store;
use super::super::value::{Key, Programmed, Value};
use super::{
    Counting, Held, HeldBackend, SharedRange, Table, member_of, parts_of, range_data, sets_of,
};

impl<S: Store> Table<S> {
    /// Makes the picture from the maps, once: before anything is written. From then on what
    /// is believed here is what was written, and later readbacks are compared with it.
    ///
    /// # Errors
    /// The kernel refuses; there is no picture then.
    pub fn adopt_all(&mut self) -> Result<Vec<(Key, Value)>, TableError> {
        if !self.store.is_new() {
            // Which ids were in use before is not known.
            self.counting = Counting { frontends: u32::MAX, backends: u32::MAX };
        }
        let mut reading = Reading::new(&self.store);
        let mut all = Vec::new();
        reading.run(|found| all.push(found))?;
        // One that merely serves and whose frontends are gone is nobody's.
        let services: HashSet<ServiceId> = all.iter().map(|found| found.in_map.service).collect();
        let is_ones =
            |backend: &layout::Backend| backend.is_there() && services.contains(&backend.service);
        for (id, backend) in reading.backends.into_iter().filter(|(_, b)| is_ones(b)) {
            self.backend_ids.claim(id.0, 1);
            let member = member_of(&backend);
            if member.local && backend.in_use() {
                self.locals.note(backend.service, member.address, id, true);
            }
            let new = || HeldBackend::new(id, backend.flags);
            self.backends.put(backend.service, member, new);
        }
        let stale = self.locals.differences(&self.store.locals()?);
        self.write_locals(stale)?;
        let mut objects = Vec::with_capacity(all.len());
        for Found { key, value, in_map } in all {
            if let (Key::Frontend(key), Value::Frontend(value)) = (&key, &value) {
                // An id twice would be a fault of ours; counters are then mixed, nothing else.
                self.frontend_ids.claim(in_map.id.0, 1);
                self.adopt(value, [in_map.node, in_map.outside]);
                self.count_affinity(None, Some(value));
                self.frontends.insert(*key, Held { id: in_map.id, value: Arc::clone(value) });
            }
            objects.push((key, value));
        }
        Ok(objects)
    }

    /// A readback found this. When it is not what was written, somebody else wrote to the
    /// maps: slots and source ranges are written again, where they are; the frontend and its
    /// backends are the engine's to repair, by an update.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn found(&mut self, key: &Key, value: &Value) -> Result<(), TableError> {
        let (Key::Frontend(key), Value::Frontend(found)) = (key, value) else { return Ok(()) };
        let believed = self.frontends.get(key).map(|held| Arc::clone(&held.value));
        let Some(believed) = believed.filter(|believed| believed != found) else { return Ok(()) };
        for member in parts_of(&believed).into_iter().flat_map(|(members, _)| members.iter()) {
            let key = (believed.service, member.address, member.port);
            if let Some((_, held)) = self.backends.get_mut(&key) {
                held.written = 0;
            }
        }
        for set in sets_of(&believed) {
            let shared = self.sets.get(&(believed.service, Arc::clone(set))).copied();
            let Some(SharedRange { range, .. }) = shared.filter(|shared| shared.range.len > 0)
            else {
                continue;
            };
            let id = |slot: usize| {
                let member = set.members.get(slot)?;
                let held = self.backends.get(&(believed.service, member.address, member.port));
                held.map(|(_, held)| held.id)
            };
            let slots: Vec<BackendId> =
                set.slots().map(|slot| id(slot).unwrap_or_default()).collect();
            self.writes += 1;
            self.store.set_slots(range.base, &slots)?;
        }
        for range in &believed.source_ranges {
            self.writes += 1;
            let (data, length) = range_data(believed.service, range);
            self.store.set_source_range(data, length)?;
        }
        for range in found.source_ranges.difference(&believed.source_ranges) {
            if !self.source_ranges.contains_key(&(found.service, *range)) {
                self.writes += 1;
                let (data, length) = range_data(found.service, range);
                self.store.remove_source_range(data, length)?;
            }
        }
        Ok(())
    }

    /// Counts what a frontend that was read names.
    fn adopt(&mut self, value: &Programmed, ranges: [SlotRange; 2]) {
        for (members, part) in parts_of(value) {
            for member in members.iter() {
                let key = (value.service, member.address, member.port);
                if let Some((_, held)) = self.backends.get_mut(&key) {
                    held.users(part).one_more();
                }
            }
        }
        for (set, range) in sets_of(value).into_iter().zip(ranges) {
            let shared = self
                .sets
                .entry((value.service, Arc::clone(set)))
                .or_insert(SharedRange { range, users: 0 });
            if shared.users == 0 {
                self.slots.claim(range.base, range.len);
            }
            shared.users += 1;
        }
        for range in &value.source_ranges {
            *self.source_ranges.entry((value.service, *range)).or_default() += 1;
        }
    }
}
