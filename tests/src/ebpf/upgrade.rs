//! What programs of another layout version remember, in this version's maps.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use proxy_daemon::dataplane::ebpf::pins::Pins;
use proxy_daemon::dataplane::ebpf::upgrade::{CONVERTERS, Converter, Upgrade, take_over};
use proxy_daemon::dataplane::ebpf::{self, Programs};
use proxy_ebpf::layout::{
    Affinity, AffinityKey, Flow, LAYOUT_VERSION, ServiceId, Tuple, maps, names,
};
use proxy_ebpf::order::Be16;

use super::{CAPACITY, in_netns};
use crate::mounts::hide_mounts;

/// The other version has the ports of a flow's key the other way round, say, and one that begins
/// at port 666 means nothing any more.
const OTHERS_FLOWS: u64 = 7;

fn convert(key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut key = key.to_vec();
    key.swap(32, 34);
    key.swap(33, 35);
    (key[32..34] != 666_u16.to_be_bytes()).then(|| (key, value.to_vec()))
}

fn tuple(from: u16, to: u16) -> Tuple {
    let (source_port, destination_port) = (Be16::from_host(from), Be16::from_host(to));
    Tuple { source_port, destination_port, protocol: 6, ..Tuple::default() }
}

/// A map as in this version is one with another fingerprint from now on.
fn looks_like(directory: &Path, map: &str, fingerprint: u64) -> Result<()> {
    let ours = maps::fingerprint(map).with_context(|| format!("no {map}"))?;
    let marks = directory.join("layout");
    fs::rename(
        marks.join(format!("{map}-{ours:016x}")),
        marks.join(format!("{map}-{fingerprint:016x}")),
    )?;
    Ok(())
}

/// Version 6: flows are in a hash that makes room by itself, which is not taken over, and affinity
/// does not tell the place of a backend.
///
/// # Errors
/// What differed.
pub fn carries_over_from_6() -> Result<()> {
    /// Type, key, and value in the definition of `FLOWS`.
    const DEFINITION: [u8; 12] = [1, 0, 0, 0, 40, 0, 0, 0, 64, 0, 0, 0];
    const LRU_HASH: u8 = 9;
    in_netns(|| {
        hide_mounts()?;
        let root = tempfile::tempdir()?;
        let object = ebpf::object()?;
        let mut older = object.clone().into_owned();
        let places = older.windows(DEFINITION.len()).enumerate();
        let places: Vec<usize> =
            places.filter(|(_, bytes)| *bytes == DEFINITION).map(|(at, _)| at).collect();
        ensure!(places.len() == 1, "{places:?}");
        older[places[0]] = LRU_HASH;

        let mut theirs = Programs::load_pinned(&older, CAPACITY, &Pins::open(root.path())?)?;
        let flow = Flow { flags: 7, ..Flow::default() };
        theirs.tables().set_flow(&tuple(80, 1000), &flow)?;
        let client = AffinityKey { service: ServiceId::new(5), ..AffinityKey::default() };
        theirs.tables().set_affinity(&client, &Affinity { seen: 9, ..Affinity::default() })?;
        let directory = |version: u32| root.path().join(format!("proxy-daemon/v{version}"));
        let other = directory(6);
        fs::rename(directory(LAYOUT_VERSION), &other)?;
        looks_like(&other, names::AFFINITY, maps::AFFINITY_6)?;

        let pins = Pins::open(root.path())?;
        take_over(&pins)?;
        let mut programs = Programs::load_pinned(&object, CAPACITY, &pins)?;
        let mut upgrade = Upgrade::open(&pins, CONVERTERS)?;
        ensure!(upgrade.carry()? == 2, "a flow and a client");
        ensure!(programs.tables().flow(&tuple(80, 1000))? == flow, "another flow");
        let expected = (client, Affinity { seen: 9, ..Affinity::default() });
        ensure!(programs.tables().affinities()? == [expected], "another client");
        // Ours is another map, and none that makes room: it is full at its size.
        theirs.tables().set_flow(&tuple(80, 1001), &flow)?;
        ensure!(programs.tables().flows()?.len() == 1, "FLOWS is the same map");
        let full = (0..=u16::MAX)
            .find_map(|port| programs.tables().set_flow(&tuple(81, port), &flow).err());
        let full = full.context("there is room for everything")?;
        ensure!(full.is_beyond(), "{full}");
        ensure!(programs.tables().flow(&tuple(80, 1000))? == flow, "the first one made room");
        // What finds no room stays behind, and the programs are attached all the same.
        ensure!(upgrade.carry()? == 0, "there was no room");
        drop(pins);
        Pins::cleanup(root.path())?;
        Ok(())
    })
}

/// # Errors
/// What differed.
pub fn carries_over() -> Result<()> {
    in_netns(|| {
        hide_mounts()?;
        let root = tempfile::tempdir()?;
        let object = ebpf::object()?;

        let pins = Pins::open(root.path())?;
        let mut theirs = Programs::load_pinned(&object, CAPACITY, &pins)?;
        drop(pins);
        let of = |flags| Flow { flags, ..Flow::default() };
        for (number, port) in [(1, 1000), (2, 666), (3, 2000)] {
            theirs.tables().set_flow(&tuple(80, port), &of(number))?;
        }
        let directory = |version: u32| root.path().join(format!("proxy-daemon/v{version}"));
        let (ours, other) = (directory(LAYOUT_VERSION), directory(LAYOUT_VERSION + 1));
        fs::rename(&ours, &other)?;
        looks_like(&other, names::FLOWS, OTHERS_FLOWS)?;

        let mut pins = Pins::open(root.path())?;
        take_over(&pins)?;
        let mut programs = Programs::load_pinned(&object, CAPACITY, &pins)?;
        // One of ours is newer.
        programs.tables().set_flow(&tuple(2000, 80), &of(30))?;
        let converter = Converter { map: names::FLOWS, from: OTHERS_FLOWS, convert };
        let mut upgrade = Upgrade::open(&pins, &[converter])?;
        ensure!(!upgrade.waits(), "the service table is shared");
        ensure!(upgrade.carry()? == 1, "all but the one that has no meaning and the one we have");
        theirs.tables().set_flow(&tuple(80, 3000), &of(4))?;
        ensure!(upgrade.carry()? == 1, "what came since");
        ensure!(upgrade.carry()? == 0, "nothing came since");
        let mut flows: Vec<(u16, u16, u32)> = programs
            .tables()
            .flows()?
            .into_iter()
            .map(|(key, flow)| {
                (key.source_port.to_host(), key.destination_port.to_host(), flow.flags)
            })
            .collect();
        flows.sort_unstable();
        ensure!(flows == [(1000, 80, 1), (2000, 80, 30), (3000, 80, 4)], "{flows:?}");

        // The other maps are the same objects.
        let client = AffinityKey { service: ServiceId::new(5), ..AffinityKey::default() };
        theirs.tables().set_affinity(&client, &Affinity::default())?;
        ensure!(programs.tables().affinities()?.len() == 1, "AFFINITY is another map");

        // Without a converter its entries are left behind.
        let mut without = Upgrade::open(&pins, &[])?;
        ensure!(without.carry()? == 0, "there is no converter");
        pins.remove_others()?;
        ensure!(!other.exists() && ours.join("maps/FLOWS").exists(), "the wrong one is gone");
        drop(pins);
        Pins::cleanup(root.path())?;
        ensure!(!root.path().join("proxy-daemon").exists(), "something is left");
        Ok(())
    })
}
