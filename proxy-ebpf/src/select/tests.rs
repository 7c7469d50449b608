use core::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::fake::Fake;
use crate::layout::ServiceId;
use crate::order::Be16;
use crate::parse::TCP;

const SERVICE: ServiceId = ServiceId::new(3);

fn client(last: u8) -> AffinityKey {
    AffinityKey { client: Ipv4Addr::new(192, 0, 2, last).into(), service: SERVICE }
}

/// Slots 0 and 1 are somebody else's; 2 to 4 are the node's set, 4 alone the outside's.
fn tables() -> (Fake, Frontend) {
    let backend = |last: u8, flags| Backend {
        address: Ipv4Addr::new(10, 244, 0, last).into(),
        port: Be16::from_host(8080),
        flags,
        service: SERVICE,
    };
    let frontend = Frontend {
        node: SlotRange { base: 2, len: 3 },
        outside: SlotRange { base: 4, len: 1 },
        service: SERVICE,
        flags: Frontend::OUTSIDE_LOCAL_SET,
        ..Frontend::default()
    };
    let cluster = Backend::IN_CLUSTER_SET;
    let fake = Fake {
        slots: [9, 9, 0, 1, 2].map(BackendId).into(),
        backends: [backend(10, cluster), backend(11, cluster), backend(12, Backend::IN_USE)].into(),
        ..Fake::default()
    };
    (fake, frontend)
}

fn pick(
    tables: &Fake,
    frontend: &Frontend,
    who: Client,
    number: u32,
    now: u64,
) -> Result<u32, Reason> {
    select(tables, frontend, who, &client(1), number, now * SECOND).map(|(id, _)| id.0)
}

#[test]
fn each_kind_of_client_has_its_set() {
    let (tables, frontend) = tables();
    for (number, id) in [(0, 0), (u32::MAX / 3 + 1, 1), (u32::MAX, 2)] {
        assert_eq!(pick(&tables, &frontend, Client::Node, number, 0), Ok(id));
        assert_eq!(pick(&tables, &frontend, Client::Outside, number, 0), Ok(2));
    }
    assert!(tables.affinity.borrow().is_empty());
}

#[test]
fn an_empty_set_and_a_broken_table_are_told_apart() {
    let (mut tables, mut frontend) = tables();
    frontend.flags |= Frontend::OUTSIDE_DROPS;
    let empty = Frontend { node: SlotRange::default(), outside: SlotRange::default(), ..frontend };
    assert_eq!(pick(&tables, &empty, Client::Node, 7, 0), Err(Reason::NoEndpoint));
    assert_eq!(pick(&tables, &empty, Client::Outside, 7, 0), Err(Reason::NoLocalEndpoint));
    tables.backends[1].flags = 0;
    assert_eq!(pick(&tables, &frontend, Client::Node, 1 << 31, 0), Err(Reason::VacantSlot));
    tables.slots.truncate(2);
    assert_eq!(pick(&tables, &frontend, Client::Node, 0, 0), Err(Reason::VacantSlot));
}

#[test]
fn affinity_slides_with_its_client_and_ends() {
    let (tables, frontend) = tables();
    let frontend = Frontend { affinity: 10, ..frontend };
    let at = |now, number| pick(&tables, &frontend, Client::Node, number, now).unwrap();
    assert_eq!(at(100, 0), 0);
    assert_eq!(at(109, u32::MAX), 0);
    assert_eq!(at(118, u32::MAX), 0, "the last use counts");
    assert_eq!(at(128, u32::MAX), 2, "and ten seconds are over");
    // Without affinity nothing of it is looked at.
    let off = Frontend { affinity: 0, ..frontend };
    assert_eq!(pick(&tables, &off, Client::Node, 0, 129), Ok(0));
}

#[test]
fn affinity_forgets_a_backend_that_left_the_clients_set() {
    let (mut tables, frontend) = tables();
    let frontend = Frontend { affinity: 10, ..frontend };
    assert_eq!(pick(&tables, &frontend, Client::Node, 0, 100), Ok(0));
    // It has been for the node's clients only.
    assert_eq!(pick(&tables, &frontend, Client::Outside, 0, 101), Ok(2));
    assert_eq!(pick(&tables, &frontend, Client::Node, 0, 102), Ok(2), "one client, one backend");
    tables.backends[2].flags = Backend::IN_LOCAL_SET;
    assert_eq!(pick(&tables, &frontend, Client::Node, 0, 103), Ok(0));
    // The id belongs to another Service now.
    tables.backends[0].service = ServiceId::new(4);
    assert_eq!(pick(&tables, &frontend, Client::Node, 1 << 31, 104), Ok(1));
}

#[test]
fn affinity_is_to_an_endpoint_and_not_to_its_id() {
    let (mut tables, frontend) = tables();
    let frontend = Frontend { affinity: 10, ..frontend };
    assert_eq!(pick(&tables, &frontend, Client::Node, 0, 100), Ok(0));
    assert_eq!(pick(&tables, &frontend, Client::Node, 1 << 31, 101), Ok(0), "it holds");
    // Another endpoint of the same Service has the id now, or the same pod's other port.
    let before = tables.backends[0];
    tables.backends[0].address = Ipv4Addr::new(10, 244, 0, 13).into();
    assert_eq!(pick(&tables, &frontend, Client::Node, 1 << 31, 102), Ok(1));
    tables.backends[1].port = Be16::from_host(8081);
    assert_eq!(pick(&tables, &frontend, Client::Node, 0, 103), Ok(0));
    // What an older version remembers says nothing of the place.
    tables.backends[0] = before;
    let entry = Affinity { seen: 103 * SECOND, backend: BackendId(0), place: 0 };
    tables.affinity.borrow_mut().insert(client(1), entry);
    assert_eq!(pick(&tables, &frontend, Client::Node, 1 << 31, 104), Ok(0));
}

#[test]
fn a_backend_that_left_since_the_frontend_was_read_is_still_chosen_by_that() {
    let (mut tables, frontend) = tables();
    let frontend = Frontend { affinity: 10, ..frontend };
    assert_eq!(pick(&tables, &frontend, Client::Node, 0, 100), Ok(0));
    tables.backends[0].flags = Backend::LEAVING;
    assert_eq!(pick(&tables, &frontend, Client::Node, 0, 101), Ok(0));
    assert_eq!(pick(&tables, &frontend, Client::Node, u32::MAX, 102), Ok(2), "no affinity to it");
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

/// Flows as they come in practice (ports counted up, few addresses) spread like drawn ones:
/// chi-squared over 100 slots below the value that chance exceeds once in 10,000.
#[test]
#[allow(clippy::cast_possible_truncation, reason = "ports counted up")]
fn flows_spread_evenly() {
    const SLOTS: u32 = 100;
    const FLOWS: u32 = 100_000;
    let config = Config { seed: 1, ..Config::default() };
    for (clients, services) in [(1_u32, 1_u32), (7, 1), (1000, 1), (1, 1000)] {
        let mut hits = [0_u32; SLOTS as usize];
        for flow in 0..FLOWS {
            let address = Ipv4Addr::from(0x0a00_0001 + flow % clients);
            let tuple = Tuple {
                source: address.into(),
                destination: Ipv4Addr::from(0x0a60_0001 + flow % services).into(),
                source_port: Be16::from_host(1024 + (flow / clients / services % 60_000) as u16),
                destination_port: Be16::from_host(80 + (flow / clients / 60_000) as u16),
                protocol: TCP,
                pad: [0; 3],
            };
            hits[scale(Hash::of(&config, &tuple), SLOTS) as usize] += 1;
        }
        let expected = f64::from(FLOWS / SLOTS);
        let chi: f64 = hits.iter().map(|n| (f64::from(*n) - expected).powi(2) / expected).sum();
        assert!(chi < 161.0, "{clients} clients, {services} Services: {chi}");
    }
}
