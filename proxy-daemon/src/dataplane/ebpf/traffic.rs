//! What the programs have counted.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::PathBuf;

use aya::util::nr_cpus;
use proxy_ebpf::layout::{
    self, Backend, BackendCounters, BackendId, FrontendCounters, FrontendId, ServiceId, names,
};
use proxy_ebpf::verdict::Reason;
use tracing::info;

use super::per_cpu::{from_bytes, sum};
use super::pins::{Pins, raw_pin_of_each_cpu};
use super::tables::refused;
use super::value::{Key, from_map_key};
use super::{LoadError, TableError, Tables};
use crate::dataplane::PlaneError;
use crate::dataplane::traffic::{
    Abilities, Amount, Counters, EndpointKey, Sample, Sink, TrafficSource,
};
use crate::kernel::bpf::{BATCH, RawMap};
use crate::kernel::netlink::Errno;
use crate::model::HostPort;
use crate::policy::FrontendKey;

/// Reads the pinned maps.
pub struct EbpfTraffic {
    /// Where the maps are pinned: those that grow are others from time to time.
    maps: PathBuf,
    tables: Tables,
    batches: Option<Batches>,
    /// Ids of frontends that have counted something, as the last reading found them.
    held: HashMap<FrontendKey, u32>,
}

struct Batches {
    frontend_counters: RawMap,
    backend_counters: RawMap,
}

impl Batches {
    fn open(pins: &Pins) -> Result<Self, LoadError> {
        let cpus =
            nr_cpus().map_err(|(path, source)| LoadError::Read { path: path.into(), source })?;
        let open = |name| raw_pin_of_each_cpu(&pins.map(name), cpus);
        Ok(Self {
            frontend_counters: open(names::FRONTEND_COUNTERS)?,
            backend_counters: open(names::BACKEND_COUNTERS)?,
        })
    }

    /// Asked of the kernel: distributions carry such things further back than its version.
    fn work(&self) -> bool {
        self.frontend_counters.read_while(1, |_, _| false).is_ok()
    }
}

impl std::fmt::Debug for EbpfTraffic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EbpfTraffic")
            .field("batch", &self.batches.is_some())
            .finish_non_exhaustive()
    }
}

impl EbpfTraffic {
    /// # Errors
    /// A map is not pinned there.
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        let batches = Some(Batches::open(pins)?).filter(Batches::work);
        if batches.is_none() {
            info!(
                "the kernel reads maps entry by entry only (before 5.13): scrapes of metrics cost more"
            );
        }
        Ok(Self { maps: pins.maps(), tables: Tables::open(pins)?, batches, held: HashMap::new() })
    }

    /// Whether whole maps are read in a few system calls.
    #[must_use]
    pub const fn in_batches(&self) -> bool {
        self.batches.is_some()
    }

    /// Of these ids, which are sorted; those beyond the map have none.
    fn frontend_counters(
        &self,
        ids: &[u32],
        each: &mut dyn FnMut(usize, FrontendCounters),
    ) -> Result<(), TableError> {
        match &self.batches {
            Some(batches) => sums(&batches.frontend_counters, ids, each)
                .map_err(refused(names::FRONTEND_COUNTERS, "read all")),
            None => one_by_one(ids, each, |id| self.tables.frontend_counters(FrontendId(id))),
        }
    }

    fn backend_counters(
        &self,
        ids: &[u32],
        each: &mut dyn FnMut(usize, BackendCounters),
    ) -> Result<(), TableError> {
        match &self.batches {
            Some(batches) => sums(&batches.backend_counters, ids, each)
                .map_err(refused(names::BACKEND_COUNTERS, "read all")),
            None => one_by_one(ids, each, |id| self.tables.backend_counters(BackendId(id))),
        }
    }

    /// All that these lead to, by id.
    fn backends(
        &self,
        frontends: &[(layout::FrontendKey, layout::Frontend)],
    ) -> Result<Vec<(u32, Backend)>, TableError> {
        let ranges = frontends.iter().flat_map(|(_, value)| [value.node, value.outside]);
        let end = ranges.map(|range| range.base.saturating_add(range.len)).max().unwrap_or(0);
        let slots = self.tables.slots(0, end)?;
        let end = slots.iter().map(|id| id.0.saturating_add(1)).max().unwrap_or(0);
        let all = self.tables.backends(BackendId(0), end)?;
        Ok((0..).zip(all).filter(|(_, backend)| backend.in_use()).collect())
    }

    fn read_frontends(
        &mut self,
        all: &[(layout::FrontendKey, layout::Frontend)],
        sink: &mut dyn Sink,
    ) -> Result<(), TableError> {
        let mut named: Vec<(u32, FrontendKey)> = all
            .iter()
            .filter_map(|(key, value)| match from_map_key(key)? {
                Key::Frontend(key) => Some((value.id.0, key)),
                Key::Address(_) | Key::External(_) => None,
            })
            .collect();
        named.sort_unstable();
        // Those that went since keep their id's counters until another frontend gets it.
        let keys: std::collections::HashSet<FrontendKey> =
            named.iter().map(|(_, key)| *key).collect();
        let gone: Vec<(u32, FrontendKey)> = std::mem::take(&mut self.held)
            .into_iter()
            .filter(|(key, _)| !keys.contains(key))
            .map(|(key, id)| (id, key))
            .filter(|(id, _)| named.binary_search_by_key(id, |(id, _)| *id).is_err())
            .collect();
        named.extend(gone.iter().copied());
        named.sort_unstable();
        let ids: Vec<u32> = named.iter().map(|(id, _)| *id).collect();
        let mut held = HashMap::new();
        self.frontend_counters(&ids, &mut |place, counted| {
            let (incarnation, key) = named[place];
            let counters = Counters {
                connections: counted.connections,
                refused: counted.refused,
                requests: amount(counted.requests),
                replies: amount(counted.replies),
            };
            if !counters.is_zero() && keys.contains(&key) {
                held.insert(key, incarnation);
            }
            sink.frontend(key, Sample { incarnation, counters, ..Sample::default() });
        })?;
        self.held = held;
        Ok(())
    }

    fn read_endpoints(
        &self,
        all: &[(layout::FrontendKey, layout::Frontend)],
        sink: &mut dyn Sink,
    ) -> Result<(), TableError> {
        let mut of: HashMap<ServiceId, FrontendKey> = HashMap::new();
        for (key, value) in all {
            if let Some(Key::Frontend(key)) = from_map_key(key) {
                of.entry(value.service).or_insert(key);
            }
        }
        let backends = self.backends(all)?;
        let ids: Vec<u32> = backends.iter().map(|(id, _)| *id).collect();
        self.backend_counters(&ids, &mut |place, counted| {
            let (incarnation, backend) = backends[place];
            let Some(of) = of.get(&backend.service) else { return };
            let counters = Counters {
                connections: counted.connections,
                refused: 0,
                requests: amount(counted.requests),
                replies: amount(counted.replies),
            };
            let at = HostPort::new(backend.address.into(), backend.port.to_host());
            let key = EndpointKey { owner: number_of(backend.service), at };
            sink.endpoint(key, *of, Sample { incarnation, counters, ..Sample::default() });
        })
    }

    fn read_all(&mut self, endpoints: bool, sink: &mut dyn Sink) -> Result<(), TableError> {
        let all = self.tables.frontends()?;
        self.read_frontends(&all, sink)?;
        if endpoints {
            self.read_endpoints(&all, sink)?;
        }
        for reason in Reason::ALL {
            sink.dropped(0, reason.name(), self.tables.drops(reason)?);
        }
        Ok(())
    }
}

/// The sums of these ids, which are sorted, from one walk over the map.
fn sums<T: aya::Pod + Default + std::ops::AddAssign>(
    map: &RawMap,
    ids: &[u32],
    each: &mut dyn FnMut(usize, T),
) -> Result<(), Errno> {
    let mut next = 0;
    // An array's entries come by their number.
    let limit = BATCH.min(ids.last().map_or(1, |last| *last as usize + 1));
    map.read_while(limit, |key, value| {
        let Some(id) = from_bytes::<u32>(key) else { return false };
        while ids.get(next) == Some(&id) {
            each(next, sum(value));
            next += 1;
        }
        next < ids.len()
    })?;
    // Others are beyond the map.
    (next..ids.len()).for_each(|place| each(place, T::default()));
    Ok(())
}

fn one_by_one<T: Default>(
    ids: &[u32],
    each: &mut dyn FnMut(usize, T),
    read: impl Fn(u32) -> Result<T, TableError>,
) -> Result<(), TableError> {
    for (place, id) in ids.iter().enumerate() {
        match read(*id) {
            Ok(counters) => each(place, counters),
            Err(error) if error.is_beyond() => each(place, T::default()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

const fn amount(traffic: layout::Traffic) -> Amount {
    Amount { packets: traffic.packets, bytes: traffic.bytes }
}

fn number_of(service: ServiceId) -> u64 {
    let mut hasher = DefaultHasher::new();
    service.hash(&mut hasher);
    hasher.finish()
}

impl TrafficSource for EbpfTraffic {
    fn abilities(&self) -> Abilities {
        Abilities { refused: true, current: false }
    }

    fn read(&mut self, endpoints: bool, sink: &mut dyn Sink) -> Result<(), PlaneError> {
        let failed = |error: &dyn std::fmt::Display| PlaneError::new("eBPF counters", error);
        self.tables = Tables::open_at(|name| self.maps.join(name)).map_err(|e| failed(&e))?;
        self.read_all(endpoints, sink).map_err(|e| failed(&e))
    }
}
