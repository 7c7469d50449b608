//! Removing flows that have timed out.

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
    timeouts: Timeouts,
}

impl fmt::Debug for FlowTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowTable").field("timeouts", &self.timeouts).finish_non_exhaustive()
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
        Ok(Self { flows, timeouts: Timeouts::default() })
    }

    /// How many flows were removed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn sweep(&mut self) -> Result<usize, TableError> {
        let all: Result<Vec<(Tuple, Flow)>, _> = self.flows.iter().collect();
        let all = all.map_err(failed(names::FLOWS, "read"))?;
        let gone = ended(&all, now(), &self.timeouts);
        for key in &gone {
            // A new flow may have taken the place since; at worst it begins again.
            match self.flows.remove(key).map_err(failed(names::FLOWS, "remove")) {
                Err(error) if !error.is_missing() => return Err(error),
                _ => {}
            }
        }
        Ok(gone.len())
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

/// Keys of both entries of flows in which neither direction has had a packet for too long,
/// and of halves whose other half is gone.
fn ended(all: &[(Tuple, Flow)], now: u64, timeouts: &Timeouts) -> Vec<Tuple> {
    let by_key: std::collections::HashMap<&Tuple, &Flow> =
        all.iter().map(|(key, flow)| (key, flow)).collect();
    let over = |(key, flow): &&(Tuple, Flow)| {
        let other = by_key.get(&flow.to.inverse());
        let seen = flow.seen.max(other.map_or(0, |other| other.seen));
        // The request's entry knows whether there were replies.
        let request = if flow.flags & Flow::REPLY == 0 { Some(&flow) } else { None };
        let flags = request.map_or_else(|| other.map_or(0, |other| other.flags), |flow| flow.flags);
        now.saturating_sub(seen) >= u64::from(timeout(key.protocol, flags, timeouts)) * SECOND
    };
    all.iter().filter(over).map(|(key, _)| *key).collect()
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
        let gone = ended(&all, 200 * SECOND, &Timeouts::default());
        let ports: Vec<u16> = gone
            .iter()
            .map(|key| key.source_port.to_host().max(key.destination_port.to_host()))
            .collect();
        assert_eq!(ports, [1, 1, 3, 3]);
    }
}
