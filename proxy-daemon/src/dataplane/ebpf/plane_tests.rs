use std::num::NonZeroU16;
use std::time::Duration;

use proptest::prelude::*;
use proxy_ebpf::layout::LocalKey;

use super::super::ids::REST;
use super::super::readback::Reading;
use super::super::store::Memory;
use super::super::value::Lowering;
use super::*;
use crate::model::{HostPort, ObjectName, Protocol};
use crate::policy::{
    Backend, BackendSet, Frontend, FrontendKey, FrontendKind, Known, KnownSet, Masquerade,
    WhenEmpty, sample,
};

const CAPACITY: Capacity = Capacity {
    frontends: 32,
    slots: 64,
    backends: 32,
    flows: 1,
    affinities: 1,
    fragments: 1,
    sockets: 1,
    prefixes: 1,
    source_ranges: 32,
    devices: 1,
    opt_outs: 1,
    locals: 16,
    counted_frontends: 32,
    counted_backends: 32,
};

fn backend(last: u8, local: bool) -> Backend {
    let port = NonZeroU16::new(8080).unwrap();
    Backend { address: [10, 244, 0, last].into(), port, local, weight: 1 }
}

fn key(last: u8) -> FrontendKey {
    let port = NonZeroU16::new(80).unwrap();
    FrontendKey { address: [10, 96, 0, last].into(), protocol: Protocol::Tcp, port }
}

fn frontend(service: &str, backends: Vec<Backend>) -> Frontend {
    Frontend {
        kind: FrontendKind::LoadBalancer,
        masquerade: Masquerade::Always,
        affinity: Some(Duration::from_secs(60)),
        ..sample::frontend(ObjectName::new("ns", service), BackendSet::from(backends))
    }
}

struct Plane {
    table: Table<Memory>,
    maps: Memory,
    now: Instant,
}

impl Plane {
    fn new() -> Self {
        let maps = Memory::default();
        Self { table: Table::new(maps.clone(), CAPACITY), maps, now: Instant::now() }
    }

    fn set(&mut self, key: FrontendKey, frontend: &Frontend) -> Result<(), OpError> {
        self.now += REST;
        for (key, value) in Lowering::default().lower(&key, frontend) {
            self.table.apply(&Op::Update(key, value), self.now)?;
        }
        Ok(())
    }

    fn delete(&mut self, key: FrontendKey) {
        self.now += REST;
        self.table.apply(&Op::Delete(Key::Frontend(key)), self.now).unwrap();
    }

    /// Addresses that a client of the node, or one outside, is sent to.
    fn reaches(&self, key: FrontendKey) -> [Vec<IpAddr>; 2] {
        let maps = self.maps.maps();
        let value = maps.frontends[&map_key(&Key::Frontend(key))];
        [value.node, value.outside].map(|range| {
            (range.base..range.base + range.len)
                .map(|slot| maps.backends[&maps.slots[&slot].0])
                .inspect(|backend| assert!(backend.in_use(), "{backend:?}"))
                .map(|backend| backend.address.into())
                .collect()
        })
    }
}

impl Table<Memory> {
    fn used(&self) -> [u32; 3] {
        Growing::ALL.map(|map| self.fill_of(map).0)
    }
}

fn addresses(lasts: &[u8]) -> Vec<IpAddr> {
    lasts.iter().map(|last| IpAddr::from([10, 244, 0, *last])).collect()
}

#[test]
fn a_frontend_leads_to_its_backends_and_an_update_to_the_others() {
    let mut plane = Plane::new();
    plane.set(key(1), &frontend("a", vec![backend(1, true), backend(2, false)])).unwrap();
    assert_eq!(plane.reaches(key(1)), [addresses(&[1, 2]), addresses(&[1, 2])]);
    plane.set(key(1), &frontend("a", vec![backend(2, false), backend(3, false)])).unwrap();
    assert_eq!(plane.reaches(key(1)), [addresses(&[2, 3]), addresses(&[2, 3])]);
    let gone = plane.maps.maps().backends.values().filter(|b| !b.in_use()).count();
    assert_eq!(gone, 1, "the removed backend is vacant at once");
    // Who has read the frontend before still finds it, until its id has rested.
    let maps = plane.maps.maps();
    let left = maps.backends.values().find(|b| !b.in_use()).unwrap();
    assert_eq!(IpAddr::from(left.address), addresses(&[1])[0]);
    assert_eq!((left.flags, left.port.to_host()), (layout::Backend::LEAVING, 8080));
}

#[test]
fn a_service_without_affinity_is_to_be_forgotten_by_its_last_frontend() {
    let mut plane = Plane::new();
    let with = |seconds| Frontend {
        affinity: (seconds > 0).then(|| Duration::from_secs(seconds)),
        ..frontend("a", vec![backend(1, true)])
    };
    let after = |plane: &mut Plane, last: u8, seconds: u64| {
        plane.set(key(last), &with(seconds)).unwrap();
        plane.table.take_forgotten().len()
    };
    assert_eq!(after(&mut plane, 1, 60), 0);
    assert_eq!(after(&mut plane, 2, 60), 0);
    assert_eq!(after(&mut plane, 1, 30), 0, "another timeout");
    assert_eq!(after(&mut plane, 1, 0), 0, "the other frontend has it");
    assert_eq!(after(&mut plane, 2, 0), 1);
    assert_eq!(after(&mut plane, 2, 0), 0);
    assert_eq!(after(&mut plane, 2, 60), 0);
    let mut restarted = Table::new(plane.maps.clone(), CAPACITY);
    restarted.adopt_all().unwrap();
    plane.table = restarted;
    plane.delete(key(2));
    assert_eq!(
        plane.table.take_forgotten().len(),
        1,
        "it is gone, by a daemon that did not set it"
    );
}

#[test]
fn a_local_policy_has_two_sets_in_one_value() {
    let mut plane = Plane::new();
    let all = vec![backend(1, true), backend(2, false)];
    let local = Frontend {
        local_only: true,
        short_circuit_set: Some(BackendSet::from(all)),
        when_empty: WhenEmpty::Drop,
        ..frontend("a", vec![backend(1, true)])
    };
    plane.set(key(1), &local).unwrap();
    assert_eq!(plane.reaches(key(1)), [addresses(&[1, 2]), addresses(&[1])]);
    let maps = plane.maps.maps();
    let flags = maps.frontends[&map_key(&Key::Frontend(key(1)))].flags;
    use layout::{Backend as B, Frontend as F};
    assert_eq!(flags, F::OUTSIDE_LOCAL_SET | F::OUTSIDE_DROPS | F::MASQUERADE_REMOTE);
    let sets = |last: u8| {
        let is = |b: &&layout::Backend| IpAddr::from(b.address) == IpAddr::from([10, 244, 0, last]);
        maps.backends.values().find(is).unwrap().flags & B::IN_USE
    };
    assert_eq!((sets(1), sets(2)), (B::IN_CLUSTER_SET | B::IN_LOCAL_SET, B::IN_CLUSTER_SET));
}

#[test]
fn frontends_of_a_service_share_a_range_and_others_do_not() {
    let mut plane = Plane::new();
    for last in 1..=3 {
        plane.set(key(last), &frontend("a", vec![backend(1, false)])).unwrap();
    }
    plane.set(key(4), &frontend("b", vec![backend(1, false)])).unwrap();
    assert_eq!(plane.table.used(), [4, 2, 2]);
    for last in 1..=4 {
        plane.delete(key(last));
    }
    assert_eq!(plane.table.used(), [0, 0, 0]);
    assert!(plane.maps.maps().backends.values().all(|b| !b.in_use()));
}

#[test]
fn a_full_map_refuses_the_new_and_keeps_the_old() {
    let mut plane = Plane::new();
    plane.set(key(1), &frontend("a", vec![backend(1, false)])).unwrap();
    let many = (1..=40).map(|last| backend(last, false)).collect();
    let error = plane.set(key(1), &frontend("a", many)).unwrap_err();
    assert!(error.to_string().contains("BACKENDS is full: 32 of 32"), "{error}");
    assert_eq!(plane.reaches(key(1)), [addresses(&[1]), addresses(&[1])]);
    assert_eq!(plane.table.used(), [1, 1, 1]);
    plane.set(key(2), &frontend("b", vec![backend(9, false)])).unwrap();
}

#[test]
fn a_shortage_is_told_and_over_when_the_maps_have_grown() {
    let mut plane = Plane::new();
    plane.set(key(1), &frontend("a", vec![backend(1, false)])).unwrap();
    assert_eq!(plane.table.take_shortage(), None);
    let many = frontend("a", (1..=80).map(|last| backend(last, false)).collect());
    let mut capacity = CAPACITY;
    for (map, needed, room) in [
        // 31 of 80 get an id; one of them is there already.
        (
            Growing::Backends,
            48,
            &mut (|c: &mut Capacity| c.backends = 96) as &mut dyn FnMut(&mut _),
        ),
        (Growing::Slots, 80, &mut |c: &mut Capacity| c.slots = 256),
    ] {
        plane.set(key(1), &many).unwrap_err();
        assert_eq!(plane.table.take_shortage(), Some(Shortage { map, needed }));
        assert_eq!(plane.table.take_shortage(), None);
        assert_eq!(plane.reaches(key(1)), [addresses(&[1]), addresses(&[1])]);
        room(&mut capacity);
        plane.table.grown(capacity);
    }
    plane.set(key(1), &many).unwrap();
    let all: Vec<u8> = (1..=80).collect();
    assert_eq!(plane.reaches(key(1)), [addresses(&all), addresses(&all)]);
    assert_eq!(Growing::ALL.map(|map| plane.table.fill_of(map).1), [32, 256, 96]);
}

/// Backends in one write, slots in one, and the frontend; besides, that the address is one.
#[test]
fn a_set_is_written_in_three_goes_and_what_is_there_in_none() {
    let mut plane = Plane::new();
    let writes = |plane: &Plane| plane.maps.maps().writes;
    plane.set(key(1), &frontend("a", (1..=20).map(|n| backend(n, false)).collect())).unwrap();
    assert_eq!(writes(&plane), 4);
    plane.set(key(2), &frontend("a", (1..=20).map(|n| backend(n, false)).collect())).unwrap();
    assert_eq!(writes(&plane), 6, "the set is there");
    plane.set(key(3), &frontend("a", (2..=21).map(|n| backend(n, false)).collect())).unwrap();
    assert_eq!(writes(&plane), 10, "one backend, slots, the frontend");
    let key = IpAddr::from([10, 244, 0, 21]);
    let maps = plane.maps.maps();
    let new = maps.backends.iter().find(|(_, b)| IpAddr::from(b.address) == key).unwrap();
    assert_eq!((*new.0, maps.backends.len()), (20, 21));
}

/// Their clients' sockets have to be ended; TCP connections live on.
#[test]
fn udp_backends_that_nothing_leads_to_are_told() {
    let mut plane = Plane::new();
    let udp = |last| FrontendKey { protocol: Protocol::Udp, ..key(last) };
    let both = frontend("a", vec![backend(1, false), backend(2, false)]);
    let one = frontend("a", vec![backend(2, false)]);
    for key in [udp(1), udp(2), key(3)] {
        plane.set(key, &both).unwrap();
    }
    plane.set(udp(1), &one).unwrap();
    plane.set(key(3), &one).unwrap();
    assert_eq!(plane.table.take_gone(), [], "another frontend leads there");
    plane.set(udp(2), &one).unwrap();
    let gone = plane.table.take_gone();
    let addresses: Vec<_> = gone.iter().map(|gone| (gone.address, gone.port)).collect();
    assert_eq!(addresses, [([10, 244, 0, 1].into(), 8080)]);
    plane.delete(udp(1));
    plane.delete(udp(2));
    assert_eq!(plane.table.take_gone().len(), 1);
}

fn known(lasts: &[u8]) -> KnownSet {
    let known = |last: &u8| Known {
        at: HostPort::new([10, 244, 0, *last].into(), 8080),
        local: last.is_multiple_of(2),
        serving: true,
    };
    lasts.iter().map(known).collect()
}

#[test]
fn udp_backends_that_serve_stay_for_their_flows_and_get_no_more() {
    let mut plane = Plane::new();
    let udp = |last| FrontendKey { protocol: Protocol::Udp, ..key(last) };
    let of = |backends: &[u8], serving: &[u8]| Frontend {
        endpoints: known(serving),
        ..frontend("a", backends.iter().map(|last| backend(*last, last % 2 == 0)).collect())
    };
    let entry = |plane: &Plane| {
        let maps = plane.maps.maps();
        let is = |b: &&layout::Backend| IpAddr::from(b.address) == IpAddr::from([10, 244, 0, 1]);
        maps.backends.iter().find(|(_, b)| is(b)).map(|(id, b)| (*id, b.in_use(), b.is_there()))
    };
    for last in [1, 2] {
        plane.set(udp(last), &of(&[1, 2], &[1, 2])).unwrap();
    }
    let (id, ..) = entry(&plane).unwrap();
    for last in [1, 2] {
        plane.set(udp(last), &of(&[2], &[1, 2])).unwrap();
    }
    assert_eq!(plane.reaches(udp(1)), [addresses(&[2]), addresses(&[2])]);
    assert_eq!(entry(&plane), Some((id, false, true)), "no set has it, its flows go on");
    assert_eq!(plane.table.take_gone(), []);
    // A new daemon finds it as it is.
    let mut later = Plane { table: Table::new(plane.maps.clone(), CAPACITY), ..plane };
    let found: HashMap<Key, Value> = later.table.adopt_all().unwrap().into_iter().collect();
    let wanted = Lowering::default().lower(&udp(1), &of(&[2], &[1, 2]));
    assert!(wanted.iter().all(|(key, value)| found.get(key) == Some(value)), "{found:?}");
    later.set(udp(1), &of(&[2], &[2])).unwrap();
    assert_eq!(later.table.take_gone(), [], "the other frontend knows it");
    later.set(udp(2), &of(&[2], &[2])).unwrap();
    assert_eq!(later.table.take_gone().len(), 1);
    assert_eq!(entry(&later), Some((id, false, false)), "it rests");
    assert_eq!(later.table.used(), [2, 1, 1]);
}

#[test]
fn what_merely_serves_is_led_to_by_nobody_and_is_its_services_only() {
    let udp = FrontendKey { protocol: Protocol::Udp, ..key(1) };
    let mut plane = Plane::new();
    let mut endpoints = known(&[1, 2, 3]).to_vec();
    endpoints[2].serving = false;
    let serves = Frontend { endpoints: endpoints.into(), ..frontend("a", vec![backend(1, false)]) };
    plane.set(udp, &serves).unwrap();
    // Of a Service that went while no daemon ran.
    let service = ServiceId::new(4711);
    let (flags, port) = (layout::Backend::SERVING, layout::Backend::default().port);
    let address = IpAddr::from([10, 244, 0, 9]).into();
    let stray = layout::Backend { address, port, flags, service };
    plane.maps.set_backends(&[(BackendId(20), stray)]).unwrap();
    let mut later = Table::new(plane.maps.clone(), CAPACITY).with_locals(true);
    later.adopt_all().unwrap();
    assert_eq!(later.used(), [1, 1, 2]);
    assert!(plane.maps.maps().locals.is_empty(), "other nodes send nothing to it");
}

#[test]
fn source_ranges_come_and_go_with_their_frontends() {
    let mut plane = Plane::new();
    let guarded = Frontend {
        source_ranges: Arc::from(["192.0.2.0/24".parse().unwrap()]),
        ..frontend("a", vec![backend(1, false)])
    };
    plane.set(key(1), &guarded).unwrap();
    plane.set(key(2), &guarded).unwrap();
    assert_eq!(plane.maps.maps().source_ranges.len(), 1);
    assert_eq!(plane.maps.maps().source_ranges[0].1, 96 + 24);
    plane.delete(key(1));
    assert_eq!(plane.maps.maps().source_ranges.len(), 1);
    plane.delete(key(2));
    assert!(plane.maps.maps().source_ranges.is_empty());
}

/// Every object as a later readback finds it, which need not remember much.
fn read(maps: &Memory) -> HashMap<Key, Value> {
    let mut all = HashMap::new();
    Reading::new(maps)
        .remembering(1)
        .run(|found| {
            all.insert(found.key, found.value);
        })
        .unwrap();
    all
}

#[test]
fn a_readback_is_a_few_reads_however_many_sets_there_are() {
    let maps = Memory::default();
    let capacity = Capacity { frontends: 300, slots: 3000, backends: 3000, ..CAPACITY };
    let mut plane = Plane { table: Table::new(maps.clone(), capacity), maps, now: Instant::now() };
    for last in 0..=250 {
        let backends = (0..10).map(|n| backend(n, false)).collect();
        plane.set(key(last), &frontend(&format!("s{last}"), backends)).unwrap();
    }
    assert_eq!(plane.maps.maps().reads, 0, "what is written is known");
    assert_eq!(read(&plane.maps).len(), 2 * 251);
    // Source ranges, frontends, 2510 slots, and as many backends in three parts.
    assert_eq!(plane.maps.maps().reads, 6);
    // Who merely serves is looked for in all parts.
    let udp = FrontendKey { protocol: Protocol::Udp, ..key(1) };
    let serves = Frontend { endpoints: known(&[1]), ..frontend("dns", vec![]) };
    plane.set(udp, &serves).unwrap();
    let found = read(&plane.maps);
    for (key, value) in Lowering::default().lower(&udp, &serves) {
        assert_eq!(found.get(&key), Some(&value));
    }
}

#[test]
fn what_somebody_else_wrote_is_repaired_where_it_is() {
    let mut plane = Plane::new();
    let guarded = Frontend {
        source_ranges: Arc::from(["192.0.2.0/24".parse().unwrap()]),
        ..frontend("a", vec![backend(1, true), backend(2, false)])
    };
    plane.set(key(1), &guarded).unwrap();
    let good = read(&plane.maps);
    for (key, value) in &good {
        plane.table.found(key, value).unwrap();
    }
    let before = plane.maps.maps().writes;
    let spoil: [fn(&mut super::super::store::Maps); 4] = [
        |maps| maps.slots.values_mut().for_each(|slot| *slot = BackendId(9)),
        |maps| maps.backends.values_mut().for_each(|backend| *backend = layout::Backend::default()),
        |maps| maps.source_ranges.clear(),
        |maps| maps.source_ranges[0].0.address = IpAddr::from([198, 51, 100, 0]).into(),
    ];
    for (nth, spoil) in spoil.into_iter().enumerate() {
        spoil(&mut plane.maps.maps());
        let found = read(&plane.maps);
        assert_ne!(found, good, "{nth}");
        for (key, value) in &found {
            plane.table.found(key, value).unwrap();
        }
        // What the engine does about a value that is not the one wanted.
        for (key, value) in &good {
            plane.table.apply(&Op::Update(*key, value.clone()), plane.now).unwrap();
        }
        assert_eq!(read(&plane.maps), good, "{nth}");
        assert_eq!(plane.table.used(), [1, 2, 2], "{nth}");
    }
    assert!(plane.maps.maps().writes > before);
}

fn any_frontend() -> impl Strategy<Value = Frontend> {
    let backends = || prop::collection::btree_set((1_u8..8, any::<bool>()), 0..6);
    (0_u8..3, backends(), backends(), any::<(bool, bool, bool)>()).prop_map(
        |(service, own, other, (local, short_circuit, guarded))| {
            let list = |set: std::collections::BTreeSet<(u8, bool)>| -> Vec<Backend> {
                let mut list: Vec<Backend> =
                    set.into_iter().map(|(last, _)| backend(last, last % 2 == 0)).collect();
                list.dedup();
                list
            };
            Frontend {
                local_only: local,
                short_circuit_set: short_circuit.then(|| BackendSet::from(list(other))),
                source_ranges: if guarded {
                    Arc::from(["192.0.2.0/24".parse().unwrap()])
                } else {
                    Arc::from([])
                },
                // The same for all frontends of a Service, as in one state of the API.
                endpoints: known(&[service + 1, service + 2, service + 5]),
                ..frontend(&format!("s{service}"), list(own))
            }
        },
    )
}

proptest! {
    /// Whatever came before: the maps lead where they should, a new daemon reads from them
    /// exactly what the old one wrote, and nothing leaks.
    #[test]
    fn readback_is_what_was_applied(
        steps in prop::collection::vec((1_u8..6, prop::option::weighted(0.8, any_frontend())), 1..25),
    ) {
        let key = |last: u8| match last {
            1 | 2 => FrontendKey { protocol: Protocol::Udp, ..key(last) },
            _ => key(last),
        };
        let mut plane = Plane::new();
        let mut wanted: HashMap<Key, Value> = HashMap::new();
        for (last, step) in steps {
            match step {
                Some(frontend) => {
                    plane.set(key(last), &frontend).unwrap();
                    wanted.extend(Lowering::default().lower(&key(last), &frontend));
                }
                None => {
                    plane.delete(key(last));
                    wanted.remove(&Key::Frontend(key(last)));
                }
            }
            for (key, value) in &wanted {
                let (Key::Frontend(key), Value::Frontend(value)) = (key, value) else { continue };
                let flat = |set: &Set| -> Vec<IpAddr> {
                    set.slots().map(|slot| set.members.get(slot).unwrap().address).collect()
                };
                prop_assert_eq!(plane.reaches(*key), [flat(&value.node), flat(&value.outside)]);
            }
        }
        let before = plane.table.used();
        let writes = plane.maps.maps().writes;
        let mut restarted = Table::new(plane.maps.clone(), CAPACITY);
        let found: HashMap<Key, Value> = restarted.adopt_all().unwrap().into_iter().collect();
        prop_assert_eq!(found, wanted.clone());
        prop_assert_eq!(restarted.used(), before);
        for (key, value) in wanted.clone() {
            restarted.apply(&Op::Update(key, value), plane.now).unwrap();
        }
        prop_assert_eq!(restarted.used(), before, "writing the same changes nothing");
        let _ = writes;
        for key in wanted.keys() {
            restarted.apply(&Op::Delete(*key), plane.now).unwrap();
        }
        prop_assert_eq!(restarted.used(), [0; 3]);
        prop_assert!(plane.maps.maps().backends.values().all(|b| !b.is_there()));
    }
}

#[test]
fn an_id_that_counted_for_another_begins_at_zero() {
    let mut plane = Plane::new();
    plane.set(key(1), &frontend("a", vec![backend(1, true)])).unwrap();
    plane.set(key(2), &frontend("b", vec![backend(2, true)])).unwrap();
    let zeroed = |plane: &Plane| plane.maps.maps().zeroed.clone();
    assert_eq!(zeroed(&plane), (vec![], vec![]), "nobody had these before");
    plane.delete(key(1));
    plane.set(key(3), &frontend("c", vec![backend(3, true)])).unwrap();
    let (frontends, backends) = zeroed(&plane);
    assert_eq!((frontends, backends), (vec![FrontendId(0)], vec![BackendId(0)]));
    // A daemon that takes the maps over does not know who had which id.
    plane.maps.maps().taken_over = true;
    let mut later = Plane { table: Table::new(plane.maps.clone(), CAPACITY), ..plane };
    later.table.adopt_all().unwrap();
    later.set(key(1), &frontend("a", vec![backend(1, true)])).unwrap();
    let (frontends, backends) = zeroed(&later);
    assert_eq!(
        (frontends[1..].to_vec(), backends[1..].to_vec()),
        (vec![FrontendId(2)], vec![BackendId(2)])
    );
}

#[test]
fn backends_of_this_node_are_found_by_their_addresses_where_somebody_looks() {
    let locals = |maps: &Memory| {
        let maps = maps.maps();
        let mut all: Vec<(IpAddr, bool)> = maps
            .locals
            .iter()
            .map(|(key, id)| {
                let any = key.service == LocalKey::ANY;
                let backend = maps.backends[&id.0];
                assert!(any || backend.has(proxy_ebpf::layout::Backend::LOCAL));
                assert!(any || (backend.service, backend.address) == (key.service, key.address));
                (key.address.into(), any)
            })
            .collect();
        all.sort_unstable();
        all
    };
    let entries = |lasts: &[u8]| -> Vec<(IpAddr, bool)> {
        addresses(lasts).into_iter().flat_map(|it| [(it, false), (it, true)]).collect()
    };
    let all = || vec![backend(1, true), backend(2, false), backend(3, true)];
    let mut off = Plane::new();
    off.set(key(1), &frontend("a", all())).unwrap();
    assert_eq!(locals(&off.maps), []);

    let maps = off.maps.clone();
    maps.maps().taken_over = true;
    let table = || Table::new(maps.clone(), CAPACITY);
    let mut on =
        Plane { table: table().with_locals(true), maps: maps.clone(), now: Instant::now() };
    on.table.adopt_all().unwrap();
    assert_eq!(locals(&maps), entries(&[1, 3]), "what was there before is entered");
    on.set(key(1), &frontend("a", vec![backend(2, true), backend(3, false)])).unwrap();
    assert_eq!(locals(&maps), entries(&[2]));
    // By two frontends.
    on.set(key(2), &frontend("a", vec![backend(2, true)])).unwrap();
    on.delete(key(1));
    assert_eq!(locals(&maps), entries(&[2]));
    on.delete(key(2));
    assert_eq!(locals(&maps), []);
    on.set(key(1), &frontend("a", all())).unwrap();
    table().adopt_all().unwrap();
    assert_eq!(locals(&maps), [], "nobody looks there any more");
}
