//! What the maps hold, as objects.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use proxy_ebpf::layout::{self, BackendId, ServiceId, SlotRange};

use super::TableError;
use super::members::{Member, Members};
use super::plane::{member_of, network};
use super::store::Read;
use super::value::{Key, Programmed, Set, Value, from_map_key};
use crate::model::Protocol;

/// An object, and the map's own value.
#[derive(Debug)]
pub struct Found {
    pub key: Key,
    pub value: Value,
    pub in_map: layout::Frontend,
}

/// One look through the maps.
pub struct Reading<'a, R: ?Sized> {
    maps: &'a R,
    ranges: HashMap<ServiceId, BTreeSet<IpNetwork>>,
    /// Frontends of a Service share them.
    sets: HashMap<(ServiceId, SlotRange), Arc<Set>>,
    /// By Service, once they were looked for: no slot may name them.
    serving: Option<HashMap<ServiceId, Members>>,
    /// All that a slot names, and those that serve.
    pub backends: HashMap<BackendId, layout::Backend>,
    /// How much of sets and backends is remembered.
    memory: usize,
    /// The part of `SLOTS` that was read last, by its first index.
    slots: (u32, Vec<BackendId>),
    /// The same of `BACKENDS`.
    part: (u32, Vec<layout::Backend>),
}

/// Slots and backends read at once, for those of one set and the next are neighbours as a rule.
const SLOTS: u32 = 4096;
const PART: u32 = 1024;

/// Enough to find again what neighbours share.
pub const FEW: usize = 1024;

impl<'a, R: Read + ?Sized> Reading<'a, R> {
    pub fn new(maps: &'a R) -> Self {
        Self {
            maps,
            ranges: HashMap::new(),
            sets: HashMap::new(),
            serving: None,
            backends: HashMap::new(),
            memory: usize::MAX,
            slots: (0, Vec::new()),
            part: (0, Vec::new()),
        }
    }

    /// Keeps no more than so many sets, and about as many backends: nobody asks for
    /// [`Self::backends`].
    #[must_use]
    pub fn remembering(self, memory: usize) -> Self {
        Self { memory, ..self }
    }

    /// Gives every object.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn run(&mut self, mut give: impl FnMut(Found)) -> Result<(), TableError> {
        for (data, length) in self.maps.source_ranges()? {
            if let Some(range) = network(data.address, length) {
                self.ranges.entry(data.service).or_default().insert(range);
            }
        }
        let mut frontends = self.maps.frontends()?;
        // In the order in which the sets were written, mostly, so that neighbours follow.
        frontends.sort_unstable_by_key(|(_, in_map)| in_map.node.base);
        for (map_key, in_map) in frontends {
            let Some(key) = from_map_key(&map_key) else { continue };
            let value = match key {
                Key::Address(_) | Key::External(_) => Value::Address,
                Key::Frontend(key) => {
                    let udp = key.protocol == Protocol::Udp;
                    Value::Frontend(Arc::new(self.programmed(&in_map, udp)?))
                }
            };
            give(Found { key, value, in_map });
        }
        Ok(())
    }

    fn programmed(
        &mut self,
        in_map: &layout::Frontend,
        udp: bool,
    ) -> Result<Programmed, TableError> {
        let serving = if udp { self.serving(in_map.service)? } else { Members::default() };
        let guarded = in_map.flags & layout::Frontend::SOURCE_RANGES != 0;
        let source_ranges = self.ranges.get(&in_map.service).filter(|_| guarded);
        Ok(Programmed {
            service: in_map.service,
            affinity: in_map.affinity,
            flags: in_map.flags,
            source_ranges: source_ranges.cloned().unwrap_or_default(),
            node: self.set(in_map.service, in_map.node)?,
            outside: self.set(in_map.service, in_map.outside)?,
            serving,
        })
    }

    fn serving(&mut self, service: ServiceId) -> Result<Members, TableError> {
        if self.serving.is_none() {
            let mut all: HashMap<ServiceId, BTreeSet<Member>> = HashMap::new();
            let mut first = 0;
            loop {
                let part = self.maps.backends(BackendId(first), PART)?;
                for (id, backend) in (first..).zip(&part) {
                    if backend.has(layout::Backend::SERVING) {
                        self.backends.insert(BackendId(id), *backend);
                        all.entry(backend.service).or_default().insert(member_of(backend));
                    }
                }
                first += PART;
                if part.len() < PART as usize {
                    break;
                }
            }
            let list = |(service, members): (_, BTreeSet<Member>)| {
                (service, Members::from(Vec::from_iter(members)))
            };
            self.serving = Some(all.into_iter().map(list).collect());
        }
        let of_service = self.serving.as_ref().and_then(|all| all.get(&service));
        Ok(of_service.cloned().unwrap_or_default())
    }

    fn slots(&mut self, range: SlotRange) -> Result<Vec<BackendId>, TableError> {
        let of = |(first, part): &(u32, Vec<BackendId>)| {
            let start = range.base.checked_sub(*first)? as usize;
            let slots = part.get(start..start.checked_add(range.len as usize)?)?;
            Some(slots.to_vec())
        };
        if let Some(slots) = of(&self.slots) {
            return Ok(slots);
        }
        self.slots = (range.base, self.maps.slots(range.base, range.len.max(SLOTS))?);
        // A range that goes beyond the map is as long as the map lets it be.
        Ok(of(&self.slots).unwrap_or_else(|| self.slots.1.clone()))
    }

    /// An id beyond the map is nobody's: somebody else wrote it.
    fn backend(&mut self, BackendId(id): BackendId) -> Result<layout::Backend, TableError> {
        let first = id - id % PART;
        if self.part.1.is_empty() || self.part.0 != first {
            self.part = (first, self.maps.backends(BackendId(first), PART)?);
        }
        Ok(self.part.1.get((id % PART) as usize).copied().unwrap_or_default())
    }

    fn set(&mut self, service: ServiceId, range: SlotRange) -> Result<Arc<Set>, TableError> {
        if let Some(set) = self.sets.get(&(service, range)) {
            return Ok(Arc::clone(set));
        }
        if self.sets.len() >= self.memory {
            self.sets.clear();
        }
        if self.backends.len() >= self.memory {
            self.backends.clear();
        }
        let mut members = Vec::new();
        for id in self.slots(range)? {
            let backend = match self.backends.get(&id) {
                Some(backend) => *backend,
                None => {
                    let backend = self.backend(id)?;
                    self.backends.insert(id, backend);
                    backend
                }
            };
            members.push(member_of(&backend));
        }
        let set = Arc::new(Set::from_slots(&members));
        self.sets.insert((service, range), Arc::clone(&set));
        Ok(set)
    }
}
