//! Frontends in and out of the maps.
//!
//! Order within one change, so that a program meets the old set or the new one: backends,
//! then the slots of a fresh range, then the frontend's value, then what nobody names any
//! more. The picture of what is where is made from the maps, once, at the first readback.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnetwork::IpNetwork;
use proxy_ebpf::layout::{self, BackendId, FrontendId, RangeData, ServiceId, SlotRange};
use proxy_ebpf::order::Address;

mod adopt;
mod held;

use held::{HeldBackend, NO_ID, Part, parts_of};

use super::backends::Backends;
use super::ids::Ranges;
use super::locals::{Change, Locals};
use super::members::{Member, Members};
use super::store::Store;
use super::value::{Key, Programmed, Set, Value, map_key};
use super::{Capacity, TableError};
use crate::dataplane::OpError;
use crate::kernel::netlink::Errno;
use crate::model::Protocol;
use crate::plan::Op;
use crate::policy::FrontendKey;

/// The daemon's side of the service table.
#[derive(Debug)]
pub struct Table<S> {
    store: S,
    slots: Ranges,
    frontend_ids: Ranges,
    backend_ids: Ranges,
    frontends: HashMap<FrontendKey, Held>,
    /// Ranges by what is in them, for the frontends of a Service to share.
    sets: HashMap<(ServiceId, Arc<Set>), SharedRange>,
    backends: Backends<HeldBackend>,
    source_ranges: BTreeMap<(ServiceId, IpNetwork), u32>,
    locals: Locals,
    /// Backends that nothing leads to any more since the operation began.
    freed: Vec<Gone>,
    /// The same of UDP, until somebody asks.
    gone: Vec<Gone>,
    /// Frontends with affinity.
    affine: HashMap<ServiceId, u32>,
    /// Services that have none any more, until somebody asks.
    forgotten: BTreeSet<ServiceId>,
    counting: Counting,
    writes: u64,
    /// Why the last operation found no room.
    shortage: Option<Shortage>,
}

/// The maps that can be full: what is written to them is nobody's but the daemon's, so that
/// they can be exchanged for larger ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Growing {
    Frontends,
    Slots,
    Backends,
}

impl Growing {
    pub const ALL: [Self; 3] = [Self::Frontends, Self::Slots, Self::Backends];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Frontends => layout::names::FRONTENDS,
            Self::Slots => layout::names::SLOTS,
            Self::Backends => layout::names::BACKENDS,
        }
    }
}

/// An operation needs so many more than the map has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    pub map: Growing,
    pub needed: u32,
}

/// From which id on nobody has counted since the maps were made.
#[derive(Debug, Clone, Copy, Default)]
struct Counting {
    frontends: u32,
    backends: u32,
}

/// A backend that is none any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone {
    pub id: BackendId,
    pub address: IpAddr,
    pub port: u16,
}

/// What a frontend's value in the map names.
#[derive(Debug, Clone)]
struct Held {
    id: FrontendId,
    value: Arc<Programmed>,
}

#[derive(Debug, Clone, Copy)]
struct SharedRange {
    range: SlotRange,
    users: u32,
}

fn refused(error: TableError) -> OpError {
    OpError::Refused(error.to_string())
}

impl<S: Store> Table<S> {
    pub fn new(store: S, capacity: Capacity) -> Self {
        Self {
            store,
            slots: Ranges::new(capacity.slots),
            frontend_ids: Ranges::new(capacity.frontends),
            backend_ids: Ranges::new(capacity.backends),
            frontends: HashMap::new(),
            sets: HashMap::new(),
            backends: Backends::default(),
            source_ranges: BTreeMap::new(),
            locals: Locals::default(),
            freed: Vec::new(),
            gone: Vec::new(),
            affine: HashMap::new(),
            forgotten: BTreeSet::new(),
            counting: Counting::default(),
            writes: 0,
            shortage: None,
        }
    }

    /// Whether `LOCALS` is kept as well.
    #[must_use]
    pub fn with_locals(self, kept: bool) -> Self {
        Self { locals: Locals::new(kept), ..self }
    }

    /// A map has no room for what an operation needs.
    fn full(&mut self, map: Growing, needed: u32) -> OpError {
        self.shortage = Some(Shortage { map, needed });
        let (used, capacity) = self.fill_of(map);
        OpError::Refused(format!("map {} is full: {used} of {capacity} in use", map.name()))
    }

    /// Frontends have ids, which tell how many there are, but addresses take entries as well.
    fn no_entry(&mut self, error: TableError) -> OpError {
        let no_room = Some(Errno(nix::errno::Errno::E2BIG as i32));
        if error.errno() == no_room { self.full(Growing::Frontends, 1) } else { refused(error) }
    }

    /// Why the operation before this failed, if that is what it was.
    pub const fn take_shortage(&mut self) -> Option<Shortage> {
        self.shortage.take()
    }

    /// The store's maps are as large as this now, and hold what they held.
    pub fn grown(&mut self, capacity: Capacity) {
        self.frontend_ids.grow(capacity.frontends);
        self.slots.grow(capacity.slots);
        self.backend_ids.grow(capacity.backends);
    }

    /// UDP backends that went since the last call of this.
    pub fn take_gone(&mut self) -> Vec<Gone> {
        std::mem::take(&mut self.gone)
    }

    /// Services whose last frontend with affinity went since the last call of this: when they have
    /// one again, clients begin anew.
    pub fn take_forgotten(&mut self) -> BTreeSet<ServiceId> {
        std::mem::take(&mut self.forgotten)
    }

    fn count_affinity(&mut self, before: Option<&Programmed>, now: Option<&Programmed>) {
        let of = |value: Option<&Programmed>| value.filter(|v| v.affinity > 0).map(|v| v.service);
        if let Some(service) = of(now) {
            *self.affine.entry(service).or_default() += 1;
        }
        let Some(service) = of(before) else { return };
        if let Some(frontends) = self.affine.get_mut(&service) {
            *frontends -= 1;
            if *frontends == 0 {
                self.affine.remove(&service);
                self.forgotten.insert(service);
            }
        }
    }

    pub const fn store(&mut self) -> &mut S {
        &mut self.store
    }

    pub const fn writes(&self) -> u64 {
        self.writes
    }

    /// In use, and the map's size.
    pub const fn fill_of(&self, map: Growing) -> (u32, u32) {
        match map {
            Growing::Frontends => self.frontend_ids.fill(),
            Growing::Slots => self.slots.fill(),
            Growing::Backends => self.backend_ids.fill(),
        }
    }

    pub fn apply(&mut self, op: &Op<Key>, now: Instant) -> Result<(), OpError> {
        let result = match op {
            Op::Create(key, value) | Op::Update(key, value) | Op::Retire(key, value) => {
                match (key, value) {
                    (Key::Frontend(key), Value::Frontend(value)) => {
                        self.set_frontend(key, value, now)
                    }
                    (Key::Address(_) | Key::External(_), _) | (_, Value::Address) => {
                        self.set_address(key)
                    }
                }
            }
            Op::Delete(key) => self.delete(key, now),
        };
        let freed = std::mem::take(&mut self.freed);
        if matches!(op.key(), Key::Frontend(key) if key.protocol == Protocol::Udp) {
            self.gone.extend(freed);
        }
        result
    }

    fn set_address(&mut self, key: &Key) -> Result<(), OpError> {
        self.writes += 1;
        let value = layout::Frontend::default();
        let result = self.store.set_frontend(map_key(key), value);
        result.map_err(|error| self.no_entry(error))
    }

    fn set_frontend(
        &mut self,
        key: &FrontendKey,
        value: &Arc<Programmed>,
        now: Instant,
    ) -> Result<(), OpError> {
        let old = self.frontends.get(key).cloned();
        let id = match &old {
            Some(old) => old.id,
            None => match self.frontend_ids.allocate(1, now) {
                Some(id) => {
                    self.frontend_counts(FrontendId(id));
                    FrontendId(id)
                }
                None => return Err(self.full(Growing::Frontends, 1)),
            },
        };
        let result = self.take(value, now).and_then(|[node, outside]| {
            let Programmed { service, affinity, flags, .. } = **value;
            let in_map = layout::Frontend { node, outside, id, service, affinity, flags };
            self.writes += 1;
            let result = self.store.set_frontend(map_key(&Key::Frontend(*key)), in_map);
            result.map_err(|error| self.no_entry(error))
        });
        if let Err(error) = result {
            // What was taken is released; the frontend is as it was.
            self.release(value, None);
            if old.is_none() {
                self.frontend_ids.give_back(id.0, 1);
            }
            return Err(error);
        }
        self.frontends.insert(*key, Held { id, value: Arc::clone(value) });
        let old = old.map(|old| old.value);
        self.count_affinity(old.as_deref(), Some(value));
        if let Some(old) = old {
            self.release(&old, Some(now));
        }
        Ok(())
    }

    fn delete(&mut self, key: &Key, now: Instant) -> Result<(), OpError> {
        self.writes += 1;
        match self.store.remove_frontend(&map_key(key)) {
            Ok(()) => {}
            // Gone already: what was asked for.
            Err(error) if error.is_missing() => {}
            Err(error) => return Err(refused(error)),
        }
        if let Key::Frontend(key) = key
            && let Some(Held { id, value }) = self.frontends.remove(key)
        {
            self.frontend_ids.release(id.0, 1, now);
            self.count_affinity(Some(&value), None);
            self.release(&value, Some(now));
        }
        Ok(())
    }

    /// Everything that the frontend will name; counted, so that a failure half-way is undone
    /// by releasing all of it.
    fn take(&mut self, value: &Programmed, now: Instant) -> Result<[SlotRange; 2], OpError> {
        for range in &value.source_ranges {
            *self.source_ranges.entry((value.service, *range)).or_default() += 1;
        }
        for (members, part) in parts_of(value) {
            for member in members.iter() {
                self.count_backend(value.service, member, part, now);
            }
        }
        let serving = self.write_backends(value.service, &value.serving);
        let mut result = serving.map(|_| [SlotRange::default(); 2]);
        for (place, set) in sets_of(value).into_iter().enumerate() {
            let shared = self.sets.entry((value.service, Arc::clone(set)));
            shared.or_insert(SharedRange { range: SlotRange::default(), users: 0 }).users += 1;
            let written = self.write_set(value.service, set, now);
            match (&mut result, written) {
                (Ok(ranges), Ok(range)) => ranges[place] = range,
                (Ok(_), Err(error)) => result = Err(error),
                (Err(_), _) => {}
            }
        }
        for range in &value.source_ranges {
            if result.is_ok() && self.source_ranges.get(&(value.service, *range)) == Some(&1) {
                self.writes += 1;
                let (data, length) = range_data(value.service, range);
                result = self.store.set_source_range(data, length).map_err(refused).and(result);
            }
        }
        result
    }

    /// What another frontend counted under this id is not this one's. It works without that as
    /// well, so that a refusal is no reason to do without the frontend.
    fn frontend_counts(&mut self, id: FrontendId) {
        if id.0 < self.counting.frontends {
            self.writes += 1;
            let _ = self.store.zero_frontend_counters(id);
        } else {
            self.counting.frontends = id.0 + 1;
        }
    }

    fn backend_counts(&mut self, id: BackendId) -> BackendId {
        if id.0 < self.counting.backends {
            self.writes += 1;
            let _ = self.store.zero_backend_counters(id);
        } else {
            self.counting.backends = id.0 + 1;
        }
        id
    }

    fn count_backend(&mut self, service: ServiceId, member: Member, part: Part, now: Instant) {
        let key = (service, member.address, member.port);
        let id = match self.backends.get(&key) {
            Some((_, held)) => held.id,
            // Written below, or reported as full.
            None => match self.backend_ids.allocate(1, now) {
                Some(id) => self.backend_counts(BackendId(id)),
                None => NO_ID,
            },
        };
        let held = self.backends.put(service, member, || HeldBackend::new(id, 0));
        held.users(part).one_more();
    }

    /// The members' ids, after what the map has otherwise is written in one go.
    fn write_backends(
        &mut self,
        service: ServiceId,
        members: &Members,
    ) -> Result<Vec<BackendId>, OpError> {
        let mut ids = Vec::with_capacity(members.len());
        let mut changed = Vec::new();
        for member in members.iter() {
            let place = (service, member.address, member.port);
            let Some((member, held)) = self.backends.get(&place) else { continue };
            let value = held.value(service, member);
            if value.flags != held.written {
                changed.push((held.id, value));
            }
            ids.push(held.id);
        }
        let missing = ids.iter().filter(|id| **id == NO_ID).count();
        if missing > 0 {
            let missing = u32::try_from(missing).unwrap_or(u32::MAX);
            return Err(self.full(Growing::Backends, missing));
        }
        if !changed.is_empty() {
            self.writes += 1;
            self.store.set_backends(&changed).map_err(refused)?;
            for member in members.iter() {
                let place = (service, member.address, member.port);
                if let Some((member, held)) = self.backends.get_mut(&place) {
                    held.written = held.value(service, member).flags;
                }
            }
            for (id, value) in changed {
                self.write_local(id, &value).map_err(refused)?;
            }
        }
        Ok(ids)
    }

    fn write_local(&mut self, id: BackendId, value: &layout::Backend) -> Result<(), TableError> {
        let local = value.in_use() && value.has(layout::Backend::LOCAL);
        let changes = self.locals.note(value.service, value.address.into(), id, local);
        self.write_locals(changes)
    }

    fn write_locals(&mut self, changes: Vec<Change>) -> Result<(), TableError> {
        for (key, id) in changes {
            self.writes += 1;
            match id {
                Some(id) => self.store.set_local(&key, id)?,
                None => match self.store.remove_local(&key) {
                    Err(error) if !error.is_missing() => return Err(error),
                    _ => {}
                },
            }
        }
        Ok(())
    }

    /// The set's range: the one that another frontend has, or a fresh one.
    fn write_set(
        &mut self,
        service: ServiceId,
        set: &Arc<Set>,
        now: Instant,
    ) -> Result<SlotRange, OpError> {
        let ids = self.write_backends(service, &set.members)?;
        let shared = self.sets.get(&(service, Arc::clone(set))).copied();
        if set.members.is_empty() {
            return Ok(SlotRange::default());
        }
        if let Some(SharedRange { range, .. }) = shared
            && range.len > 0
        {
            return Ok(range);
        }
        let len = u32::try_from(set.slots().len()).unwrap_or(u32::MAX);
        let Some(base) = self.slots.allocate(len, now) else {
            return Err(self.full(Growing::Slots, len));
        };
        let slots: Vec<BackendId> = set.slots().map(|slot| ids[slot]).collect();
        self.writes += 1;
        if let Err(error) = self.store.set_slots(base, &slots) {
            self.slots.release(base, len, now);
            return Err(refused(error));
        }
        let range = SlotRange { base, len };
        if let Some(shared) = self.sets.get_mut(&(service, Arc::clone(set))) {
            shared.range = range;
        }
        Ok(range)
    }

    /// A frontend names this no more. What is left over in the maps when the kernel refuses
    /// is unreachable, and found again by the next readback. Without a time: none ever did.
    fn release(&mut self, value: &Programmed, now: Option<Instant>) {
        for set in sets_of(value) {
            let key = (value.service, Arc::clone(set));
            if let Some(shared) = self.sets.get_mut(&key) {
                shared.users -= 1;
                if shared.users == 0 {
                    let SlotRange { base, len } = shared.range;
                    free(&mut self.slots, base, len, now);
                    self.sets.remove(&key);
                }
            }
        }
        for (members, part) in parts_of(value) {
            for member in members.iter() {
                self.release_backend(value.service, member, part, now);
            }
        }
        for range in &value.source_ranges {
            let key = (value.service, *range);
            if let Some(users) = self.source_ranges.get_mut(&key) {
                *users -= 1;
                if *users == 0 {
                    self.source_ranges.remove(&key);
                    self.writes += 1;
                    let (data, length) = range_data(value.service, range);
                    let _ = self.store.remove_source_range(data, length);
                }
            }
        }
    }

    fn release_backend(
        &mut self,
        service: ServiceId,
        Member { address, port, .. }: Member,
        part: Part,
        now: Option<Instant>,
    ) {
        let key = (service, address, port);
        let Some((member, held)) = self.backends.get(&key) else { return };
        let before = held.value(service, member);
        let mut held = *held;
        held.users(part).one_less();
        let gone = !held.is_used();
        // A frontend's value that was read before may lead here until the id has rested.
        let after = if gone {
            layout::Backend { flags: layout::Backend::LEAVING, ..before }
        } else {
            held.value(service, member)
        };
        if after != before && held.id != NO_ID {
            // What is refused here leads to a backend that is none any more.
            let _ = self.write_local(held.id, &layout::Backend { flags: after.flags, ..before });
            self.writes += 1;
            held.written = self.store.set_backends(&[(held.id, after)]).map_or(0, |()| after.flags);
        }
        if gone {
            self.backends.remove(&key);
            if held.id != NO_ID {
                free(&mut self.backend_ids, held.id.0, 1, now);
                self.freed.push(Gone { id: held.id, address, port });
            }
        } else if let Some((_, kept)) = self.backends.get_mut(&key) {
            *kept = held;
        }
    }
}

/// Rests, if it was ever named.
fn free(ranges: &mut Ranges, start: u32, length: u32, named: Option<Instant>) {
    match named {
        Some(now) => ranges.release(start, length, now),
        None => ranges.give_back(start, length),
    }
}

/// Each range's set.
const fn sets_of(value: &Programmed) -> [&Arc<Set>; 2] {
    [&value.node, &value.outside]
}

pub fn member_of(backend: &layout::Backend) -> Member {
    Member {
        address: backend.address.into(),
        port: backend.port.to_host(),
        local: backend.has(layout::Backend::LOCAL),
        host: backend.has(layout::Backend::HOST),
    }
}

/// With the length from the front of the 128 bits.
pub fn prefix(network: &IpNetwork) -> (Address, u32) {
    let before = if network.is_ipv4() { 96 } else { 0 };
    (network.network().into(), before + u32::from(network.prefix()))
}

fn range_data(service: ServiceId, network: &IpNetwork) -> (RangeData, u32) {
    let (address, length) = prefix(network);
    (RangeData { service, address }, length)
}

/// The inverse of [`prefix`].
pub fn network(address: Address, length: u32) -> Option<IpNetwork> {
    let address = IpAddr::from(address);
    let before = if address.is_ipv4() { 96 } else { 0 };
    IpNetwork::new(address, u8::try_from(length.checked_sub(before)?).ok()?).ok()
}

#[cfg(test)]
#[path = "plane_tests.rs"]
mod tests;
