use core::cell::RefCell;
use core::net::Ipv4Addr;
use std::collections::HashMap;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::layout::Traffic;
use crate::order::{Address, Be16};

#[derive(Default)]
struct Fake {
    frontends: HashMap<FrontendKey, Frontend>,
    slots: Vec<BackendId>,
    backends: Vec<Backend>,
    frontend_counters: RefCell<HashMap<FrontendId, FrontendCounters>>,
    backend_counters: RefCell<HashMap<BackendId, BackendCounters>>,
    drops: RefCell<Vec<Reason>>,
}

impl Tables for Fake {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends.get(key).copied()
    }
    fn slot(&self, index: u32) -> Option<BackendId> {
        self.slots.get(index as usize).copied()
    }
    fn backend(&self, id: BackendId) -> Option<Backend> {
        self.backends.get(id.0 as usize).copied()
    }
    fn count_frontend(&self, id: FrontendId, update: impl FnOnce(&mut FrontendCounters)) {
        update(self.frontend_counters.borrow_mut().entry(id).or_default());
    }
    fn count_backend(&self, id: BackendId, update: impl FnOnce(&mut BackendCounters)) {
        update(self.backend_counters.borrow_mut().entry(id).or_default());
    }
    fn count_drop(&self, reason: Reason) {
        self.drops.borrow_mut().push(reason);
    }
}

const ID: FrontendId = FrontendId(5);

fn key(protocol: u8) -> FrontendKey {
    FrontendKey::new(Ipv4Addr::new(10, 96, 0, 1).into(), Be16::from_host(80), protocol)
}

fn backend(last: u8) -> Backend {
    Backend {
        address: Ipv4Addr::new(10, 244, 0, last).into(),
        port: Be16::from_host(8080),
        flags: Backend::IN_USE,
        pad: 0,
    }
}

/// Slots 0 and 1 are somebody else's; 2 to 4 are the node's set, 4 alone the outside's.
fn tables() -> Fake {
    let frontend = Frontend {
        node: SlotRange { base: 2, len: 3 },
        outside: SlotRange { base: 4, len: 1 },
        id: ID,
        ..Frontend::default()
    };
    Fake {
        frontends: [(key(parse::TCP), frontend)].into(),
        slots: [9, 9, 0, 1, 2].map(BackendId).into(),
        backends: [backend(10), backend(11), backend(12)].into(),
        ..Fake::default()
    }
}

#[test]
fn a_connect_to_a_frontend_goes_to_one_of_its_backends_and_is_counted() {
    let tables = tables();
    for (random, id) in [(0, 0), (u32::MAX / 3 + 1, 1), (u32::MAX, 2)] {
        let Backend { address, port, .. } = tables.backends[id as usize];
        assert_eq!(
            connect(&tables, &key(parse::TCP), random),
            Verdict::Translate { backend: BackendId(id), address, port }
        );
        assert_eq!(tables.backend_counters.borrow()[&BackendId(id)].connections, 1);
    }
    assert_eq!(tables.frontend_counters.borrow()[&ID].connections, 3);
    assert_eq!(tables.frontend_counters.borrow()[&ID].refused, 0);
}

#[test]
fn other_connects_pass_uncounted() {
    let tables = tables();
    let elsewhere = FrontendKey::new(Address::default(), Be16::from_host(80), parse::TCP);
    for key in [key(parse::UDP), key(1), elsewhere] {
        assert_eq!(connect(&tables, &key, 0), Verdict::Pass);
    }
    assert!(tables.frontend_counters.borrow().is_empty());
}

#[test]
fn an_empty_frontend_refuses() {
    let mut tables = tables();
    tables.frontends.get_mut(&key(parse::TCP)).unwrap().node.len = 0;
    assert_eq!(connect(&tables, &key(parse::TCP), 7), Verdict::Drop(Reason::NoEndpoint));
    assert_eq!(tables.frontend_counters.borrow()[&ID].refused, 1);
    assert_eq!(*tables.drops.borrow(), [Reason::NoEndpoint]);
}

#[test]
fn a_slot_or_backend_that_is_not_there_refuses() {
    let mut tables = tables();
    tables.backends[1].flags = 0;
    assert_eq!(connect(&tables, &key(parse::TCP), 1 << 31), Verdict::Drop(Reason::VacantSlot));
    tables.slots.truncate(2);
    assert_eq!(connect(&tables, &key(parse::TCP), 0), Verdict::Drop(Reason::VacantSlot));
    assert_eq!(*tables.drops.borrow(), [Reason::VacantSlot; 2]);
}

#[test]
fn clients_outside_have_their_own_set() {
    let tables = tables();
    let frontend = tables.frontends[&key(parse::TCP)];
    for number in [0, 1 << 31, u32::MAX] {
        let (id, _) = select(&tables, &frontend, Client::Outside, number).unwrap();
        assert_eq!(id, BackendId(2));
    }
}

#[test]
fn packets_are_counted_at_their_hook_only() {
    let tables = tables();
    let packet = FiveTuple {
        source: Ipv4Addr::LOCALHOST.into(),
        destination: key(parse::TCP).address(),
        source_port: Be16::from_host(4660),
        destination_port: key(parse::TCP).port(),
        protocol: parse::TCP,
    };
    assert_eq!(observe(&tables, &packet, Hook::Tc, 2, 3000), Verdict::Pass);
    assert_eq!(observe(&tables, &packet, Hook::Xdp, 1, 60), Verdict::Pass);
    assert_eq!(observe(&tables, &packet, Hook::Xdp, 1, 61), Verdict::Pass);
    let swapped = FiveTuple { destination_port: packet.source_port, ..packet };
    assert_eq!(observe(&tables, &swapped, Hook::Xdp, 1, 60), Verdict::Pass);
    let counters = tables.frontend_counters.borrow()[&ID];
    assert_eq!(counters.tc, Traffic { packets: 2, bytes: 3000 });
    assert_eq!(counters.xdp, Traffic { packets: 2, bytes: 121 });
}

proptest! {
    #[test]
    fn a_slot_is_within_its_range(base in 0..u32::MAX / 2, len in 1..u32::MAX / 2, number: u32) {
        let index = slot_index(SlotRange { base, len }, number).unwrap();
        prop_assert!((base..base + len).contains(&index));
    }

    /// Evenly spaced numbers fall on every slot equally often, give or take one.
    #[test]
    fn slots_are_chosen_evenly(len in 1_u32..200) {
        const DRAWS: u32 = 1 << 12;
        let mut hits = std::vec![0_u32; len as usize];
        for draw in 0..DRAWS {
            let index = slot_index(SlotRange { base: 0, len }, draw << 20).unwrap();
            hits[index as usize] += 1;
        }
        let (least, most) = (hits.iter().min().unwrap(), hits.iter().max().unwrap());
        prop_assert!(most - least <= 1, "{least}..{most}");
    }
}
