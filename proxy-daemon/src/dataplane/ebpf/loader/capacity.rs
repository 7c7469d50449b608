//! Sizes of the maps, and what they grow to.

use aya::util::nr_cpus;
use proxy_ebpf::layout::{BackendCounters, FrontendCounters, names};

use super::super::LoadError;
use super::super::pins::Pins;
use super::super::plane::{Growing, Shortage};

/// Sizes of the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Addresses with a port. Allocated as used.
    pub frontends: u32,
    /// 4 bytes each, allocated at once.
    pub slots: u32,
    /// 24 bytes each, allocated at once.
    pub backends: u32,
    /// Two for each flow, about 190 bytes each, allocated at once. A full table takes no new flow.
    pub flows: u32,
    /// Entries of the tables that make room by themselves, allocated at once: one for each
    /// client with affinity, and datagram in pieces.
    pub affinities: u32,
    pub fragments: u32,
    /// Also of these: for sockets with a peer, and as many for connected UDP sockets.
    pub sockets: u32,
    /// Allocated as used: these are bounds.
    pub prefixes: u32,
    pub source_ranges: u32,
    pub devices: u32,
    pub opt_outs: u32,
    pub locals: u32,
    /// As many of each, the lowest, have counters at most: they cannot be exchanged while
    /// programs count.
    pub counted_frontends: u32,
    pub counted_backends: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            // 44,000 Services with 6 endpoints each, or 5,000 with 50, in 12 MiB.
            frontends: 1 << 16,
            slots: 1 << 19,
            backends: 5 << 16,
            flows: ENTRIES_PER_FLOW * LEAST_FLOWS,
            affinities: 1 << 15,
            fragments: 1 << 12,
            sockets: 1 << 16,
            prefixes: 1 << 16,
            source_ranges: 1 << 20,
            devices: 1 << 14,
            opt_outs: 1 << 14,
            locals: 1 << 16,
            counted_frontends: Self::LIMIT.frontends,
            counted_backends: Self::LIMIT.backends,
        }
    }
}

/// Sizes of the maps that grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub frontends: u32,
    pub slots: u32,
    pub backends: u32,
}

/// One for each direction.
const ENTRIES_PER_FLOW: u32 = 2;

/// About, in the kernel.
const FLOW_BYTES: u64 = 2 * 190;

/// Flows that there is room for on the smallest machine.
const LEAST_FLOWS: u32 = 1 << 16;

/// Flows take no more than this part of the machine's memory by themselves.
const SHARE_OF_MEMORY: u64 = 256;

/// In `FRONTENDS`: the frontend itself, and that its address is a Service's. Many share one
/// address, none has two.
const ENTRIES_PER_FRONTEND: u32 = 2;

/// For the counters of frontends, and for those of backends: every CPU has its own, allocated
/// at once, and machines have hundreds.
const COUNTERS_BYTES: usize = 16 << 20;

/// How many ids, the lowest, have counters. Low ones are taken first.
fn counted<T>(ids: u32) -> Result<u32, LoadError> {
    let cpus = nr_cpus().map_err(|(path, source)| LoadError::Read { path: path.into(), source })?;
    let room = COUNTERS_BYTES / (size_of::<T>() * cpus.max(1));
    Ok(u32::try_from(room).map_or(ids, |room| room.min(ids)))
}

impl Capacity {
    /// What maps grow to unless something else is said: 180 MiB, and what frontends take.
    pub const LIMIT: Limit = Limit { frontends: 1 << 20, slots: 1 << 24, backends: 1 << 22 };

    /// With room for so many connections, two entries each.
    #[must_use]
    pub fn with_flows(self, flows: u32) -> Self {
        Self { flows: flows.saturating_mul(ENTRIES_PER_FLOW), ..self }
    }

    /// How many connections there is room for when nobody says: as many as kube-proxy has the
    /// kernel's conntrack take (`wanted`), unless that is too much of the machine's memory (bytes).
    #[must_use]
    pub fn default_flows(wanted: u32, memory: u64) -> u32 {
        let affordable = u32::try_from(memory / SHARE_OF_MEMORY / FLOW_BYTES).unwrap_or(u32::MAX);
        wanted.min(affordable).max(LEAST_FLOWS)
    }

    /// No smaller than the maps that are there: they keep their size, or grow.
    ///
    /// # Errors
    /// The kernel refuses to tell their size.
    pub fn at_least(self, pins: &Pins) -> Result<Self, LoadError> {
        let of = |name, asked: u32, each: u32| {
            Ok::<_, LoadError>(asked.max(pins.size(name)?.unwrap_or(0) / each))
        };
        Ok(Self {
            frontends: of(names::FRONTENDS, self.frontends, ENTRIES_PER_FRONTEND)?,
            slots: of(names::SLOTS, self.slots, 1)?,
            backends: of(names::BACKENDS, self.backends, 1)?,
            ..self
        })
    }

    /// With room for what is short: twice as much, as often as it takes. `None` when that is
    /// more than the limit.
    #[must_use]
    pub fn grown(self, shortage: Shortage, limit: Limit) -> Option<Self> {
        let more = |size: u32, limit: u32| {
            let wanted = size.checked_add(shortage.needed).filter(|wanted| *wanted <= limit)?;
            let mut grown = size.max(1);
            while grown < wanted {
                grown = grown.checked_mul(2)?;
            }
            // What was free is in pieces, or rests: all that is needed comes new.
            Some(grown.min(limit))
        };
        let mut grown = self;
        let (size, limit) = match shortage.map {
            Growing::Frontends => (&mut grown.frontends, limit.frontends),
            Growing::Slots => (&mut grown.slots, limit.slots),
            Growing::Backends => (&mut grown.backends, limit.backends),
        };
        *size = more(*size, limit)?;
        Some(grown)
    }

    /// The size of one that grows.
    #[must_use]
    pub const fn of(&self, map: Growing) -> u32 {
        match map {
            Growing::Frontends => self.frontends,
            Growing::Slots => self.slots,
            Growing::Backends => self.backends,
        }
    }

    /// Entries of the maps in the kernel.
    pub(super) fn entries(&self) -> Result<[(&'static str, u32); 15], LoadError> {
        let counted_frontends = self.counted_frontends.max(self.frontends);
        let counted_backends = self.counted_backends.max(self.backends);
        Ok([
            (names::FRONTENDS, self.frontends.saturating_mul(ENTRIES_PER_FRONTEND)),
            (names::FRONTEND_COUNTERS, counted::<FrontendCounters>(counted_frontends)?),
            (names::SLOTS, self.slots),
            (names::BACKENDS, self.backends),
            (names::BACKEND_COUNTERS, counted::<BackendCounters>(counted_backends)?),
            (names::FLOWS, self.flows),
            (names::AFFINITY, self.affinities),
            (names::FRAGMENTS, self.fragments),
            (names::SOCKETS, self.sockets),
            (names::UDP_PEERS, self.sockets),
            (names::PREFIXES, self.prefixes),
            (names::SOURCE_RANGES, self.source_ranges),
            (names::DEVICES, self.devices),
            (names::OPT_OUTS, self.opt_outs),
            (names::LOCALS, self.locals),
        ])
    }
}

/// Maps that only the daemon writes, so that larger ones can take their place.
pub(super) const GROWING: [&str; 8] = [
    names::FRONTENDS,
    names::SLOTS,
    names::BACKENDS,
    names::PREFIXES,
    names::SOURCE_RANGES,
    names::DEVICES,
    names::OPT_OUTS,
    names::LOCALS,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_as_many_as_conntrack_has_unless_memory_is_short() {
        const GIB: u64 = 1 << 30;
        assert_eq!(Capacity::default_flows(131_072, 16 * GIB), 131_072);
        assert_eq!(Capacity::default_flows(16 * 32_768, 64 * GIB), 524_288);
        assert_eq!(Capacity::default_flows(131_072, 8 * GIB), 88_301);
        assert_eq!(Capacity::default_flows(131_072, 0), 65_536);
        assert_eq!(Capacity::default().with_flows(100).flows, 200);
    }

    #[test]
    fn maps_double_as_often_as_it_takes_and_no_further_than_their_limit() {
        let capacity = Capacity { backends: 6, slots: 1, ..Capacity::default() };
        let limit = Limit { backends: 40, slots: 1 << 24, frontends: 65_536 };
        let grown = |map, needed| {
            let grown = capacity.grown(Shortage { map, needed }, limit)?;
            // No other map changes.
            let others = Growing::ALL.into_iter().filter(|other| *other != map);
            others.for_each(|other| assert_eq!(grown.of(other), capacity.of(other)));
            Some(grown.of(map))
        };
        assert_eq!(grown(Growing::Backends, 1), Some(12));
        assert_eq!(grown(Growing::Backends, 7), Some(24));
        assert_eq!(grown(Growing::Backends, 34), Some(40));
        assert_eq!(grown(Growing::Backends, 35), None);
        assert_eq!(grown(Growing::Backends, u32::MAX), None);
        assert_eq!(grown(Growing::Slots, 131_071), Some(131_072));
        assert_eq!(grown(Growing::Frontends, 1), None);
    }
}
