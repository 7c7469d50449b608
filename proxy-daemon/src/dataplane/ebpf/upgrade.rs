//! From the maps of another layout version to this one's, while its programs go on.
//!
//! A daemon pins in a directory of its version, beside which stands what each map looks like.
//! Of another version's maps those that look as ours would are taken over as they are: the same
//! kernel object, which both versions' programs use until ours have taken the place of theirs.
//! Of the rest
//!
//! * the service table is made anew, from what the API says, before ours are attached;
//! * of what the programs remember, entries are converted, where there is a [`Converter`], before
//!   and once more after ours are attached: for those that theirs made meanwhile;
//! * everything else is the daemon's to write before it attaches anything.
//!
//! The other version's links go when ours are attached, then its maps. Whoever dies before that
//! leaves them, and the next one begins again.

use std::collections::HashSet;

use proxy_ebpf::layout::maps::{AFFINITY_6, fingerprint};
use proxy_ebpf::layout::names;
use tracing::{info, warn};

use super::LoadError;
use super::pins::{Other, Pins, raw_pin};
use crate::kernel::bpf::RawMap;
use crate::kernel::netlink::Errno;

/// An entry as this version has it; none where it means nothing any more.
pub type Convert = fn(&[u8], &[u8]) -> Option<(Vec<u8>, Vec<u8>)>;

/// How entries of an older map become those of ours.
#[derive(Debug, Clone, Copy)]
pub struct Converter {
    pub map: &'static str,
    /// Of the map that they come from.
    pub from: u64,
    pub convert: Convert,
}

/// Affinity did not tell the place of its backend until version 6, where zeros are now: not known.
pub const CONVERTERS: &[Converter] =
    &[Converter { map: names::AFFINITY, from: AFFINITY_6, convert: as_it_is }];

/// What names each other by ids: all of it is taken over or nothing.
const SERVICE_TABLE: [&str; 4] =
    [names::FRONTENDS, names::SLOTS, names::BACKENDS, names::SOURCE_RANGES];

/// Names ids of that table as well, but can be made again from it: older versions have none.
const DERIVED: &str = names::LOCALS;

/// What the programs remember.
pub(super) const MEMORY: [&str; 5] =
    [names::FLOWS, names::FRAGMENTS, names::AFFINITY, names::SOCKETS, names::UDP_PEERS];

fn same_looks(other: &Other, name: &str) -> bool {
    other.has(name) && other.fingerprint(name) == fingerprint(name)
}

/// A hash that makes room by itself (`BPF_MAP_TYPE_LRU_HASH`, include/uapi/linux/bpf.h).
const LRU: u32 = 9;

/// Until version 6 flows were in one of these, which forgets idle connections: its entries are
/// carried over, and it is not used any more.
fn forgets(other: &Other, name: &str) -> Result<bool, LoadError> {
    Ok(name == names::FLOWS && raw_pin(&other.map(name))?.shape().kind == LRU)
}

/// Pins what can be taken over of the other version, before maps are made. Once ours are
/// in service they are what counts.
///
/// # Errors
/// A map cannot be opened or pinned.
pub fn take_over(pins: &Pins) -> Result<(), LoadError> {
    let Some(other) = pins.others().first().filter(|_| !pins.is_live()) else { return Ok(()) };
    let table = SERVICE_TABLE.iter().all(|name| same_looks(other, name));
    let (mut taken, mut left) = (Vec::new(), Vec::new());
    for name in names::PINNED {
        // Of a daemon that died before it attached anything.
        pins.forget(name)?;
        let of_table = SERVICE_TABLE.contains(&name) || name == DERIVED;
        if same_looks(other, name) && (table || !of_table) && !forgets(other, name)? {
            pins.share(other, name)?;
            taken.push(name);
        } else {
            left.push(name);
        }
    }
    info!(version = other.version, ?taken, ?left, "maps of another version");
    Ok(())
}

/// What is still to be done about another version's maps.
#[derive(Debug, Default)]
pub struct Upgrade {
    carried: Vec<Carried>,
    /// The service table is made anew.
    rebuilds: bool,
}

#[derive(Debug)]
struct Carried {
    map: &'static str,
    from: RawMap,
    to: RawMap,
    carrying: Carrying,
}

/// Which entries are to be added.
#[derive(Debug)]
struct Carrying {
    key: usize,
    value: usize,
    convert: Convert,
    /// Carried already: another look finds what came since.
    seen: HashSet<Vec<u8>>,
    /// Without a meaning in this version.
    dropped: u64,
}

impl Carrying {
    fn of(&mut self, keys: &[u8], values: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
        let entries = keys.chunks_exact(self.key).zip(values.chunks_exact(self.value));
        let mut new = Vec::new();
        for (key, value) in entries {
            if self.seen.contains(key) {
                continue;
            }
            self.seen.insert(key.to_vec());
            match (self.convert)(key, value) {
                Some(entry) => new.push(entry),
                None => self.dropped += 1,
            }
        }
        new
    }
}

fn as_it_is(key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    Some((key.to_vec(), value.to_vec()))
}

impl Upgrade {
    /// After maps were made.
    ///
    /// # Errors
    /// One cannot be opened.
    pub fn open(pins: &Pins, converters: &[Converter]) -> Result<Self, LoadError> {
        let mut upgrade = Self::default();
        for other in pins.others() {
            for map in MEMORY.into_iter().filter(|map| other.has(map)) {
                let (from, to) = (raw_pin(&other.map(map))?, raw_pin(&pins.map(map))?);
                if from.shape().id == to.shape().id {
                    continue;
                }
                let looks = other.fingerprint(map);
                let known = converters.iter().find(|one| one.map == map && Some(one.from) == looks);
                let same = same_looks(other, map).then_some(as_it_is as Convert);
                let Some(convert) = same.or(known.map(|one| one.convert)) else {
                    warn!(
                        map,
                        version = other.version,
                        "its entries cannot be converted and are left behind"
                    );
                    continue;
                };
                let (key, value) =
                    (from.shape().key_size as usize, from.shape().value_size as usize);
                let carrying = Carrying { key, value, convert, seen: HashSet::new(), dropped: 0 };
                upgrade.carried.push(Carried { map, from, to, carrying });
            }
        }
        if let Some(other) = pins.others().first().filter(|other| other.is_live())
            && !pins.is_live()
        {
            upgrade.rebuilds = !SERVICE_TABLE.iter().all(|name| same_looks(other, name));
        }
        Ok(upgrade)
    }

    /// Whether programs must not be attached yet, since their service table is still empty: once.
    pub fn waits(&mut self) -> bool {
        std::mem::take(&mut self.rebuilds)
    }

    /// Adds what the other version's programs remember and ours do not: how many entries.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn carry(&mut self) -> Result<usize, LoadError> {
        let mut total = 0;
        for Carried { map, from, to, carrying } in &mut self.carried {
            let map = *map;
            let refused = |errno: Errno| LoadError::Kernel {
                operation: format!("carry over entries of map {map}"),
                errno,
                hint: "",
            };
            let mut without_room = 0_usize;
            let mut new = Vec::new();
            from.read(|keys, values| new.extend(carrying.of(keys, values))).map_err(refused)?;
            for (key, value) in &new {
                match to.add(key, value) {
                    // One of ours is newer.
                    Ok(added) => total += usize::from(added),
                    // Theirs was larger, and full: no reason to leave theirs in service.
                    Err(Errno(number)) if number == nix::errno::Errno::E2BIG as i32 => {
                        without_room += 1;
                    }
                    Err(errno) => return Err(refused(errno)),
                }
            }
            if !new.is_empty() {
                info!(map, entries = new.len(), dropped = carrying.dropped, "carried over");
            }
            if without_room > 0 {
                warn!(map, without_room, "entries were left behind: the map is full");
            }
        }
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_is_converted_once_and_later_ones_are_found() {
        // A key of 2 bytes that becomes one of 3; a value of 0 means nothing any more.
        let convert: Convert =
            |key, value| (value != [0]).then(|| ([key, &[9]].concat(), value.repeat(2)));
        let mut carrying = Carrying { key: 2, value: 1, convert, seen: HashSet::new(), dropped: 0 };
        assert_eq!(
            carrying.of(&[1, 1, 2, 2, 3, 3], &[7, 0, 8]),
            [(vec![1, 1, 9], vec![7, 7]), (vec![3, 3, 9], vec![8, 8])]
        );
        assert_eq!(carrying.dropped, 1);
        assert_eq!(carrying.of(&[2, 2, 4, 4, 1, 1], &[0, 5, 7]), [(vec![4, 4, 9], vec![5, 5])]);
        assert_eq!(carrying.dropped, 1);
    }

    #[test]
    fn converters_are_of_maps_that_programs_remember_in() {
        for Converter { map, from, .. } in CONVERTERS {
            assert!(MEMORY.contains(map) && fingerprint(map) != Some(*from), "{map}");
        }
    }
}
