//! Removing flows that have timed out.

use std::collections::HashSet;
use std::fmt;

use aya::maps::{HashMap, Map, MapData};
use nix::libc;
use proxy_ebpf::flow::timeout;
use proxy_ebpf::layout::{Flow, Timeouts, Tuple, names};

use super::pins::Pins;
use super::tables::failed;
use super::{LoadError, TableError};

const SECOND: u64 = 1_000_000_000;

/// The table of flows, apart from the others: it is looked through by a thread of its own.
pub struct FlowTable {
    flows: HashMap<MapData, Tuple, Flow>,
    sweeper: Sweeper,
}

impl fmt::Debug for FlowTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowTable").field("sweeper", &self.sweeper).finish_non_exhaustive()
    }
}

impl FlowTable {
    /// # Errors
    /// The map is not pinned there.
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        let unusable = |e: &(dyn std::error::Error + 'static)| {
            LoadError::from_aya(format!("open map {}", names::FLOWS), e)
        };
        let data = MapData::from_pin(pins.map(names::FLOWS)).map_err(|e| unusable(&e))?;
        let flows = HashMap::try_from(Map::LruHashMap(data)).map_err(|e| unusable(&e))?;
        Ok(Self { flows, sweeper: Sweeper::default() })
    }

    /// How many flows were removed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn sweep(&mut self) -> Result<usize, TableError> {
        let all: Result<Vec<(Tuple, Flow)>, _> = self.flows.iter().collect();
        let all = all.map_err(failed(names::FLOWS, "read"))?;
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
#[derive(Debug, Default)]
struct Sweeper {
    timeouts: Timeouts,
    /// Halves that were alone at the last sweep, and at this one.
    alone: HashSet<Tuple>,
    alone_now: HashSet<Tuple>,
}

impl Sweeper {
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
    use proxy_ebpf::parse::UDP;

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
        let gone = Sweeper::default().candidates(&all, 200 * SECOND);
        let ports: Vec<u16> = gone
            .iter()
            .map(|key| key.source_port.to_host().max(key.destination_port.to_host()))
            .collect();
        assert_eq!(ports, [1, 1, 3, 3]);
    }

    #[test]
    fn a_flow_without_another_half_ends_by_itself() {
        let now = 200 * SECOND;
        let key = Tuple { protocol: UDP, ..Tuple::default() };
        let to = Tuple { destination_port: Be16::from_host(9), ..key };
        let direct = |seen| Flow { to, seen, flags: Flow::DIRECT, ..Flow::default() };
        // Of somebody else, and seen just now.
        let other = Flow { to: key, seen: now, flags: Flow::REPLY, ..Flow::default() };
        let mut sweeper = Sweeper::default();
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
        let mut sweeper = Sweeper::default();
        assert_eq!(sweeper.candidates(&[(key, reply)], now), [key]);
        assert!(!sweeper.ends(&key, &reply, Some(&request), now), "the other half is there now");
        assert!(!sweeper.ends(&key, &reply, None, now), "it may be about to be");
        sweeper.end();
        assert!(sweeper.ends(&key, &reply, None, now), "alone for a whole period");
        sweeper.end();
        assert!(!sweeper.ends(&key, &reply, None, now), "another one with the same tuple");
    }
}
