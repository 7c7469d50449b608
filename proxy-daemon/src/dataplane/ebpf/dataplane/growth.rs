//! Larger maps in the place of full ones, while everything goes on.
//!
//! A program names its maps when it is loaded, so a larger map takes other programs. The order
//! is that of a restart: a copy of the map, which the daemon alone writes; programs that use
//! the copy and all other maps as they are; these in the old ones' place; the copy in the old
//! map's place. Whichever step is the last that is done, what is pinned is whole and holds the
//! same as what any attached program uses.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::net::if_::if_indextoname;
use proxy_ebpf::layout::Device;
use tracing::{info, warn};

use super::super::plane::{Growing, Shortage};
use super::super::value::Key;
use super::super::{Capacity, LoadError, Programs, Tables, object};
use super::EbpfPlane;
use crate::dataplane::{Fill, OpError};
use crate::plan::Op;

/// What the kernel refused once is not asked for again at once: it takes a load of all programs.
const RETRY: Duration = Duration::from_secs(30);

/// How the maps came to their sizes.
#[derive(Debug, Default)]
pub(super) struct Growth {
    times: BTreeMap<Growing, u64>,
    /// Why there is no growth until then.
    refused: Option<(Instant, String)>,
}

impl EbpfPlane {
    /// With larger maps, when that is what it takes.
    pub(super) fn apply_one(&mut self, op: &Op<Key>, now: Instant) -> Result<(), OpError> {
        loop {
            let Err(error) = self.table.apply(op, now) else { return Ok(()) };
            // Every turn makes a map larger, and there is a limit.
            let Some(shortage) = self.table.take_shortage() else { return Err(error) };
            if let Err(reason) = self.grow(shortage) {
                return Err(OpError::Refused(format!("{error}; {reason}")));
            }
        }
    }

    pub(super) fn fills(&self) -> Vec<Fill> {
        let fill = |map: Growing| {
            let (used, capacity) = self.table.fill_of(map);
            let growths = self.growth.times.get(&map).copied().unwrap_or(0);
            Fill { table: map.name(), used, capacity, growths }
        };
        let mut fills = Growing::ALL.map(fill).to_vec();
        fills.extend(self.config.remembered.fills());
        fills
    }

    fn grow(&mut self, shortage: Shortage) -> Result<(), String> {
        let (map, before, limit) = (shortage.map.name(), self.config.capacity, self.config.limit);
        let Some(capacity) = before.grown(shortage, limit) else {
            return Err("it is as large as --ebpf-map-limits lets it be".to_owned());
        };
        let start = Instant::now();
        if let Some((until, reason)) = &self.growth.refused
            && start < *until
        {
            return Err(reason.clone());
        }
        info!(map, from = ?before.of(shortage.map), to = ?capacity.of(shortage.map), "growing");
        if let Err(error) = self.exchange(capacity) {
            let reason = format!("it cannot grow: {error}");
            warn!(map, %error, retry_after = ?RETRY, "a map that is full cannot grow");
            self.growth.refused = Some((start + RETRY, reason.clone()));
            return Err(reason);
        }
        self.table.grown(capacity);
        self.config.capacity = capacity;
        *self.growth.times.entry(shortage.map).or_default() += 1;
        info!(map, took = ?start.elapsed(), "grown");
        Ok(())
    }

    fn exchange(&mut self, capacity: Capacity) -> Result<(), LoadError> {
        let result = object()
            .and_then(|object| Programs::load_pinned(&object, capacity, &self.pins))
            .and_then(|programs| self.take_up(programs));
        if result.is_err()
            && let Err(error) = self.pins.clear_next()
        {
            // They take memory until the next attempt, or start.
            warn!(%error, "copies of maps stay");
        }
        result
    }

    /// Other programs in the place of those that are attached.
    fn take_up(&mut self, programs: Programs) -> Result<(), LoadError> {
        let old = std::mem::replace(self.table.store(), programs);
        let devices = self.devices.clone();
        let taken = self
            .attach_again(&devices)
            .and_then(|()| self.table.store().settle(&self.pins).map(drop));
        if let Err(error) = taken {
            // Those that have been replaced so far: back to the maps that stay.
            *self.table.store() = old;
            if let Err(error) = self.attach_again(&devices) {
                warn!(%error, "some programs use maps that were given up, until the next start");
            }
            return Err(error);
        }
        match Tables::open(&self.pins) {
            Ok(tables) => self.sockets.look_at(tables),
            Err(error) => warn!(%error, "sockets of removed endpoints are looked for in vain"),
        }
        Ok(())
    }

    /// The programs of the store take the place of those that are attached.
    fn attach_again(&mut self, before: &BTreeMap<u32, Device>) -> Result<(), LoadError> {
        let failed = |what: String| LoadError::Other {
            operation: "attach the programs that use it".to_owned(),
            reason: what,
        };
        self.pins.start_again();
        self.devices.clear();
        self.uplinks.clear();
        self.attach_devices().map_err(|error| failed(error.to_string()))?;
        for index in before.keys().filter(|index| !self.devices.contains_key(index)) {
            match if_indextoname(*index) {
                Ok(name) => {
                    return Err(failed(format!("not at device {}", name.to_string_lossy())));
                }
                // It went meanwhile; so will its links.
                Err(_) => match self.table.store().tables().remove_device(*index) {
                    Err(error) if !error.is_missing() => return Err(failed(error.to_string())),
                    _ => {}
                },
            }
        }
        self.attach_sockets()?;
        let ours = self.pins.start();
        self.pins.remove_links(|_, start| start != ours)
    }
}
