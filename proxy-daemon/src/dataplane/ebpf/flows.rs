//! Removing flows that have timed out.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use nix::libc;
use proxy_ebpf::flow::timeout;
use proxy_ebpf::layout::{Flow, Timeouts, Tuple, names};
use tracing::warn;

use super::per_cpu::from_bytes;
use super::pins::{Pins, raw_pin};
use super::tables::{failed, refused};
use super::{LoadError, TableError};
use crate::dataplane::Fill;
use crate::kernel::bpf::RawMap;

const SECOND: u64 = 1_000_000_000;

/// How full the tables are that programs remember in, as they were looked through last.
#[derive(Debug, Default)]
pub struct Remembered {
    flows: Level,
    udp_peers: Level,
}

#[derive(Debug, Default)]
struct Level {
    used: AtomicU32,
    capacity: AtomicU32,
}

impl Level {
    fn set(&self, used: usize, capacity: u32) {
        self.used.store(u32::try_from(used).unwrap_or(u32::MAX), Ordering::Relaxed);
        self.capacity.store(capacity, Ordering::Relaxed);
    }

    fn fill(&self, table: &'static str) -> Fill {
        let of = |number: &AtomicU32| number.load(Ordering::Relaxed);
        Fill { table, used: of(&self.used), capacity: of(&self.capacity), growths: 0 }
    }
}

impl Remembered {
    pub(super) fn fills(&self) -> [Fill; 2] {
        [self.flows.fill(names::FLOWS), self.udp_peers.fill(names::UDP_PEERS)]
    }
}

/// How full a table of flows is that no longer remembers what has ended for as long as it could.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pressure {
    None,
    /// More than half.
    Some,
    /// More than seven parts of eight.
    High,
}

impl Pressure {
    const fn of(used: usize, capacity: u32) -> Self {
        let (used, capacity) = (used as u64, capacity as u64);
        if used * 8 > capacity * 7 {
            Self::High
        } else if used * 2 > capacity {
            Self::Some
        } else {
            Self::None
        }
    }

    /// What has ended, and what was never answered, makes room for what begins. Established
    /// connections keep their time, as they do in the kernel's conntrack (`early_drop`).
    fn timeouts(self, whole: Timeouts) -> Timeouts {
        let udp = |limit| whole.udp.min(limit);
        match self {
            Self::None => whole,
            Self::Some => Timeouts { tcp_opening: 20, tcp_closing: 2, udp: udp(10), ..whole },
            Self::High => Timeouts { tcp_opening: 5, tcp_closing: 1, udp: udp(5), ..whole },
        }
    }

    /// Until the next look.
    const fn period(self) -> Duration {
        match self {
            Self::None => Duration::from_secs(5),
            Self::Some | Self::High => Duration::from_secs(1),
        }
    }
}

/// The table of flows, apart from the others: it is looked through by a thread of its own.
pub struct FlowTable {
    flows: HashMap<MapData, Tuple, Flow>,
    /// The same map, to be read in batches.
    all: RawMap,
    udp_peers: RawMap,
    sweeper: Sweeper,
    remembered: Arc<Remembered>,
    sweeps: u64,
}

/// Sweeps from one count of connected UDP sockets to the next.
const UDP_PEERS_EVERY: u64 = 6;

impl fmt::Debug for FlowTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowTable").field("sweeper", &self.sweeper).finish_non_exhaustive()
    }
}

impl FlowTable {
    /// `timeouts` are those of a table with room.
    ///
    /// # Errors
    /// The map is not pinned there.
    pub fn open(pins: &Pins, timeouts: Timeouts) -> Result<Self, LoadError> {
        let unusable = |e: &(dyn std::error::Error + 'static)| {
            LoadError::from_aya(format!("open map {}", names::FLOWS), e)
        };
        let path = pins.map(names::FLOWS);
        let data = MapData::from_pin(&path).map_err(|e| unusable(&e))?;
        let flows = HashMap::try_from(Map::HashMap(data)).map_err(|e| unusable(&e))?;
        let (all, udp_peers) = (raw_pin(&path)?, raw_pin(&pins.map(names::UDP_PEERS))?);
        let remembered = Arc::new(Remembered::default());
        let table = Self {
            flows,
            all,
            udp_peers,
            sweeper: Sweeper::new(timeouts),
            remembered: Arc::clone(&remembered),
            sweeps: 0,
        };
        let capacity = |map: &RawMap| map.shape().max_entries;
        remembered.flows.set(0, capacity(&table.all));
        remembered.udp_peers.set(0, capacity(&table.udp_peers));
        Ok(table)
    }

    /// What the last sweep found.
    #[must_use]
    pub fn remembered(&self) -> Arc<Remembered> {
        Arc::clone(&self.remembered)
    }

    /// How long to wait for the next sweep: less, the fuller the table is.
    #[must_use]
    pub const fn period(&self) -> Duration {
        self.sweeper.pressure.period()
    }

    fn read(&self) -> Result<Vec<(Tuple, Flow)>, TableError> {
        let mut all = Vec::new();
        let read = self.all.read(|keys, values| {
            let values = values.chunks_exact(size_of::<Flow>());
            let entries = keys.chunks_exact(size_of::<Tuple>()).zip(values);
            all.extend(
                entries.filter_map(|(key, flow)| Some((from_bytes(key)?, from_bytes(flow)?))),
            );
        });
        read.map_err(refused(names::FLOWS, "read all")).map(|()| all)
    }

    fn count_udp_peers(&self) -> Result<(), TableError> {
        let mut count = 0;
        let read = self.udp_peers.read(|keys, _| count += keys.len());
        read.map_err(refused(names::UDP_PEERS, "read all"))?;
        let shape = self.udp_peers.shape();
        self.remembered.udp_peers.set(count / shape.key_size as usize, shape.max_entries);
        Ok(())
    }

    /// How many entries were removed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn sweep(&mut self) -> Result<usize, TableError> {
        let all = self.read()?;
        let capacity = self.all.shape().max_entries;
        let pressure = Pressure::of(all.len(), capacity);
        if pressure == Pressure::High && self.sweeper.pressure != Pressure::High {
            warn!(
                entries = all.len(),
                capacity,
                "the table of flows is nearly full: new connections are dropped when it is \
                 (--ebpf-map-sizes=flows=N)"
            );
        }
        self.sweeper.pressure = pressure;
        self.sweeper.timeouts = pressure.timeouts(self.sweeper.whole);
        let mut removed = 0;
        for key in self.sweeper.candidates(&all, now()) {
            let Some(flow) = self.get(&key)? else { continue };
            let other_key = flow.to.inverse();
            // What is there may be another flow's.
            let other = if Flow::is_direct(flow.flags) {
                None
            } else {
                self.get(&other_key)?.filter(|other| other.to == key.inverse())
            };
            if !self.sweeper.ends(&key, &flow, other.as_ref(), now()) {
                continue;
            }
            // Both: a request's half alone would lead datagrams to where no reply comes back.
            for key in [Some(key), other.map(|_| other_key)].into_iter().flatten() {
                match self.flows.remove(&key).map_err(failed(names::FLOWS, "remove")) {
                    Err(error) if !error.is_missing() => return Err(error),
                    _ => removed += 1,
                }
            }
        }
        self.sweeper.end();
        self.remembered.flows.set(all.len().saturating_sub(removed), capacity);
        if self.sweeps.is_multiple_of(UDP_PEERS_EVERY) {
            self.count_udp_peers()?;
        }
        self.sweeps += 1;
        Ok(removed)
    }

    fn get(&self, key: &Tuple) -> Result<Option<Flow>, TableError> {
        match self.flows.get(key, 0).map_err(failed(names::FLOWS, "read")) {
            Ok(flow) => Ok(Some(flow)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// `bpf_ktime_get_ns`: std's `Instant` is the same clock but does not tell its number.
#[allow(unsafe_code, reason = "one call into libc")]
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to the struct that it is given; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * SECOND + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Which entries are over. The table is written to while it is read, so one half of a flow can
/// be missing from what was read of it, and a reply's that has seen nothing yet says nothing of
/// its age: each is looked at again, and a half alone goes only when it was alone before.
#[derive(Debug)]
struct Sweeper {
    pressure: Pressure,
    /// With room in the table, and now.
    whole: Timeouts,
    timeouts: Timeouts,
    /// Halves that were alone at the last sweep, and at this one.
    alone: HashSet<Tuple>,
    alone_now: HashSet<Tuple>,
}

impl Sweeper {
    fn new(whole: Timeouts) -> Self {
        let (alone, alone_now) = (HashSet::new(), HashSet::new());
        Self { pressure: Pressure::None, whole, timeouts: whole, alone, alone_now }
    }

    /// Keys of both entries of flows in which neither direction has had a packet for too long,
    /// and of halves whose other half is gone, as far as was read.
    fn candidates(&self, all: &[(Tuple, Flow)], now: u64) -> Vec<Tuple> {
        let by_key: std::collections::HashMap<&Tuple, &Flow> =
            all.iter().map(|(key, flow)| (key, flow)).collect();
        let over = |(key, flow): &&(Tuple, Flow)| {
            let other = by_key.get(&flow.to.inverse()).copied();
            self.is_over(key, flow, other.filter(|_| !Flow::is_direct(flow.flags)), now)
        };
        all.iter().filter(over).map(|(key, _)| *key).collect()
    }

    fn is_over(&self, key: &Tuple, flow: &Flow, other: Option<&Flow>, now: u64) -> bool {
        let seen = flow.seen.max(other.map_or(0, |other| other.seen));
        // The request's entry knows whether there were replies.
        let flags = if flow.flags & Flow::REPLY == 0 {
            flow.flags
        } else {
            other.map_or(0, |other| other.flags)
        };
        now.saturating_sub(seen) >= u64::from(timeout(key.protocol, flags, &self.timeouts)) * SECOND
    }

    /// Of a candidate as it is now.
    fn ends(&mut self, key: &Tuple, flow: &Flow, other: Option<&Flow>, now: u64) -> bool {
        if !self.is_over(key, flow, other, now) {
            return false;
        }
        // One whose replies go another way has no other half.
        let alone = other.is_none() && !Flow::is_direct(flow.flags);
        if alone && !self.alone.contains(key) {
            self.alone_now.insert(*key);
            return false;
        }
        true
    }

    fn end(&mut self) {
        self.alone = std::mem::take(&mut self.alone_now);
    }
}

#[cfg(test)]
mod tests {
    use proxy_ebpf::order::Be16;
    use proxy_ebpf::parse::{TCP, UDP};

    use super::*;

    #[test]
    fn a_flow_ends_whole_and_by_its_later_half() {
        let key =
            |port| Tuple { source_port: Be16::from_host(port), protocol: UDP, ..Tuple::default() };
        let pair = |port, request: u64, reply: u64, replied| {
            let to = Tuple { destination_port: Be16::from_host(port), ..key(port) };
            let flow =
                |to, seconds, flags| Flow { to, seen: seconds * SECOND, flags, ..Flow::default() };
            [
                (key(port), flow(to, request, if replied { Flow::REPLIED } else { 0 })),
                (to.inverse(), flow(key(port).inverse(), reply, Flow::REPLY)),
            ]
        };
        let all: Vec<(Tuple, Flow)> = [
            pair(1, 100, 0, false),
            pair(2, 100, 150, true),
            pair(3, 50, 60, true),
            pair(4, 190, 0, false),
        ]
        .concat();
        let gone = Sweeper::new(Timeouts::default()).candidates(&all, 200 * SECOND);
        let ports: Vec<u16> = gone
            .iter()
            .map(|key| key.source_port.to_host().max(key.destination_port.to_host()))
            .collect();
        assert_eq!(ports, [1, 1, 3, 3]);
    }

    #[test]
    fn a_table_that_fills_forgets_what_has_ended_and_never_what_lives() {
        let levels = [0, 512, 513, 896, 897, 1024].map(|used| Pressure::of(used, 1024));
        use Pressure::{High, None as Low, Some as More};
        assert_eq!(levels, [Low, Low, More, More, High, High]);
        let of = |flags, seen| {
            let key = Tuple { protocol: TCP, ..Tuple::default() };
            let to = Tuple { destination_port: Be16::from_host(9), ..key };
            let reply = Flow { to: key.inverse(), flags: Flow::REPLY, ..Flow::default() };
            [(key, Flow { to, seen, flags, ..Flow::default() }), (to.inverse(), reply)]
        };
        let now = 100_000 * SECOND;
        let ended = |pressure: Pressure, flags, age: u64| {
            let whole = Timeouts { tcp_established: 90_000, ..Timeouts::default() };
            let mut sweeper = Sweeper::new(whole);
            sweeper.timeouts = pressure.timeouts(whole);
            sweeper.candidates(&of(flags, now - age * SECOND), now).len() == 2
        };
        let closed = Flow::REPLIED | Flow::FIN | Flow::PEER_FIN;
        for pressure in [Low, More, High] {
            assert!(!ended(pressure, Flow::REPLIED, 89_000), "{pressure:?}: it lives");
            let half = Flow::REPLIED | Flow::FIN;
            assert!(!ended(pressure, half, 299), "{pressure:?}: half closed");
            assert!(ended(pressure, half, 3_600), "{pressure:?}: somebody has vanished");
            assert!(!ended(pressure, closed, 0) && !ended(pressure, 0, 4), "{pressure:?}");
        }
        assert_eq!([Low, More, High].map(|p| ended(p, closed, 1)), [false, false, true]);
        assert_eq!([Low, More, High].map(|p| ended(p, closed, 3)), [false, true, true]);
        assert_eq!([Low, More, High].map(|p| ended(p, 0, 7)), [false, false, true]);
        assert!(More.period() < Low.period());
    }

    #[test]
    fn a_flow_without_another_half_ends_by_itself() {
        let now = 200 * SECOND;
        let key = Tuple { protocol: UDP, ..Tuple::default() };
        let to = Tuple { destination_port: Be16::from_host(9), ..key };
        let direct = |seen| Flow { to, seen, flags: Flow::DIRECT, ..Flow::default() };
        // Of somebody else, and seen just now.
        let other = Flow { to: key, seen: now, flags: Flow::REPLY, ..Flow::default() };
        let mut sweeper = Sweeper::new(Timeouts::default());
        let all = [(key, direct(now - 31 * SECOND)), (to.inverse(), other)];
        assert_eq!(sweeper.candidates(&all, now), [key]);
        assert!(sweeper.ends(&key, &all[0].1, None, now), "at the first sweep");
        assert!(!sweeper.ends(&key, &direct(now - 29 * SECOND), None, now));
    }

    /// The reply's entry is made first, has no time of its own yet, and was read alone: with it
    /// gone the flow would be a hole until the client gives up.
    #[test]
    fn a_half_that_was_read_alone_is_not_taken_for_an_ended_flow() {
        let now = 200 * SECOND;
        let key = Tuple { protocol: UDP, ..Tuple::default() };
        let reply = Flow { flags: Flow::REPLY, ..Flow::default() };
        let request = Flow { seen: now, ..Flow::default() };
        let mut sweeper = Sweeper::new(Timeouts::default());
        assert_eq!(sweeper.candidates(&[(key, reply)], now), [key]);
        assert!(!sweeper.ends(&key, &reply, Some(&request), now), "the other half is there now");
        assert!(!sweeper.ends(&key, &reply, None, now), "it may be about to be");
        sweeper.end();
        assert!(sweeper.ends(&key, &reply, None, now), "alone for a whole period");
        sweeper.end();
        assert!(!sweeper.ends(&key, &reply, None, now), "another one with the same tuple");
    }
}
