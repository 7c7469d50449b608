//! The plan's laws, on random sets of frontends.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Claims, ObjectKey, Objects, Op, diff};
use crate::dataplane::Dataplane;
use crate::dataplane::fake::{Fake, Key};
use crate::model::{ObjectName, Protocol};
use crate::policy::{
    Backend, Frontend, FrontendKey, FrontendKind, Masquerade, PortName, WhenEmpty,
};

type Wants = BTreeMap<(u8, u16), BTreeSet<u8>>;

/// Addresses 1..4, ports 1..3, backends 0..6: small enough that frontends share
/// addresses and backends all the time.
fn wants() -> impl Strategy<Value = Wants> {
    proptest::collection::btree_map(
        (1..4u8, 1..3u16),
        proptest::collection::btree_set(0..6u8, 0..5),
        0..6,
    )
}

fn port(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).unwrap()
}

fn key(address: u8, number: u16) -> FrontendKey {
    FrontendKey {
        address: IpAddr::from([10, 96, 0, address]),
        protocol: Protocol::Tcp,
        port: port(number),
    }
}

fn frontend(service: &ObjectName, backends: &BTreeSet<u8>) -> Frontend {
    Frontend {
        port: PortName { service: service.clone(), port: "".into() },
        kind: FrontendKind::ClusterIp,
        backends: backends
            .iter()
            .map(|b| Backend {
                address: [10, 244, 0, *b].into(),
                port: port(80),
                local: false,
                weight: 1,
            })
            .collect(),
        local_only: false,
        short_circuit_set: None,
        short_circuit: None,
        shared: None,
        when_empty: WhenEmpty::Reject,
        masquerade: Masquerade::FromOutside,
        on_node_address: false,
        affinity: None,
        source_ranges: Arc::from([]),
        scheduling: None,
    }
}

fn objects(plane: &mut Fake, wants: &Wants) -> Objects<Key> {
    let mut objects = Objects::default();
    let service = ObjectName::new("ns", "s");
    for ((address, number), backends) in wants {
        let key = key(*address, *number);
        let lowered = plane.lower(&key, &frontend(&service, backends));
        objects.replace(key, lowered, &mut BTreeSet::new());
    }
    objects
}

fn as_map(objects: &Objects<Key>) -> HashMap<Key, u32> {
    objects.iter().map(|(k, v)| (k.clone(), *v)).collect()
}

fn execute(ops: &[Op<Key>], on: &mut HashMap<Key, u32>) {
    for op in ops {
        match op {
            Op::Create(k, v) | Op::Update(k, v) | Op::Retire(k, v) => {
                on.insert(k.clone(), *v);
            }
            Op::Delete(k) => {
                on.remove(k);
            }
        }
    }
}

fn drop_retired(wanted: &Objects<Key>, map: &mut HashMap<Key, u32>) {
    map.retain(|k, v| wanted.get(k).is_some() || k.retired(v) != Some(*v));
}

proptest! {
    #[test]
    fn diff_of_equal_sets_is_empty(wants in wants()) {
        let wanted = objects(&mut Fake::default(), &wants);
        let applied = as_map(&wanted);
        let keys: Vec<Key> = applied.keys().cloned().collect();
        prop_assert_eq!(diff(&keys, &wanted, &applied), vec![]);
    }

    #[test]
    fn applying_the_diff_gives_the_target_once_drained(a in wants(), b in wants()) {
        let mut plane = Fake::default();
        let mut held = as_map(&objects(&mut plane, &a));
        let wanted = objects(&mut plane, &b);
        let keys: BTreeSet<Key> = held.keys().chain(wanted.iter().map(|(key, _)| key)).cloned().collect();
        let ops = diff(&keys, &wanted, &held);
        execute(&ops, &mut held);
        drop_retired(&wanted, &mut held);
        prop_assert_eq!(held, as_map(&wanted));
    }

    #[test]
    fn no_backend_is_taken_away_before_all_new_ones_are_there(a in wants(), b in wants()) {
        let mut plane = Fake::default();
        let held = as_map(&objects(&mut plane, &a));
        let wanted = objects(&mut plane, &b);
        let keys: BTreeSet<Key> = held.keys().chain(wanted.iter().map(|(key, _)| key)).cloned().collect();
        let ops = diff(&keys, &wanted, &held);
        let first_removal =
            ops.iter().position(|op| matches!(op, Op::Retire(..) | Op::Delete(_)));
        let last_creation =
            ops.iter().rposition(|op| matches!(op, Op::Create(..) | Op::Update(..)));
        if let (Some(removal), Some(creation)) = (first_removal, last_creation) {
            prop_assert!(creation < removal);
        }
    }

    #[test]
    fn a_child_comes_after_its_parent_and_goes_before_it(a in wants(), b in wants()) {
        let mut plane = Fake::default();
        let held = as_map(&objects(&mut plane, &a));
        let wanted = objects(&mut plane, &b);
        let keys: BTreeSet<Key> = held.keys().chain(wanted.iter().map(|(key, _)| key)).cloned().collect();
        let ops = diff(&keys, &wanted, &held);
        let at = |wanted: &Op<Key>| ops.iter().position(|op| op == wanted);
        for (i, op) in ops.iter().enumerate() {
            let Some(parent) = op.key().parent() else { continue };
            if matches!(op, Op::Create(..)) {
                let created = at(&Op::Create(parent.clone(), 1));
                prop_assert!(created.is_none_or(|p| p < i));
            }
            if let Some(p) = at(&Op::Delete(parent)) {
                prop_assert!(i < p);
            }
        }
    }

    #[test]
    fn touched_keys_are_enough(a in wants(), b in wants()) {
        // Replacing frontend by frontend and looking only at what that touched gives the
        // same operations as comparing everything.
        let mut plane = Fake::default();
        let mut wanted = objects(&mut plane, &a);
        let held = as_map(&wanted);
        let mut touched = BTreeSet::new();
        let service = ObjectName::new("ns", "s");
        let all: BTreeSet<(u8, u16)> = a.keys().chain(b.keys()).copied().collect();
        for (address, number) in all {
            let key = key(address, number);
            let lowered = b
                .get(&(address, number))
                .map(|backends| plane.lower(&key, &frontend(&service, backends)))
                .unwrap_or_default();
            wanted.replace(key, lowered, &mut touched);
        }
        let everything: BTreeSet<Key> = held.keys().chain(wanted.iter().map(|(key, _)| key)).cloned().collect();
        prop_assert_eq!(diff(&touched, &wanted, &held), diff(&everything, &wanted, &held));
        prop_assert_eq!(as_map(&wanted), as_map(&objects(&mut plane, &b)));
    }

    #[test]
    fn the_oldest_claim_holds_whatever_the_order(
        claims in proptest::collection::vec((0..4u8, 0..3i64, 1..4u8), 1..12),
        removed in proptest::collection::vec(0..4u8, 0..4),
    ) {
        let mut tried = Claims::default();
        let mut last: BTreeMap<u8, (i64, u8)> = BTreeMap::new();
        for (service, created, address) in claims {
            replace(&mut tried, service, created, Some(address));
            last.insert(service, (created, address));
        }
        for service in removed {
            replace(&mut tried, service, 0, None);
            last.remove(&service);
        }
        let mut losers = 0;
        for address in 1..4u8 {
            let mut ranked: Vec<_> = last
                .iter()
                .filter(|(_, (_, a))| *a == address)
                .map(|(service, (created, _))| (*created, name(*service)))
                .collect();
            ranked.sort();
            losers += ranked.len().saturating_sub(1);
            let holder = tried.get(&key(address, 1)).map(|f| f.port.service.clone());
            prop_assert_eq!(holder, ranked.first().map(|(_, name)| name.clone()));
        }
        prop_assert_eq!(tried.conflicts(), losers);
    }
}

fn name(service: u8) -> ObjectName {
    ObjectName::new("ns", &format!("s{service}"))
}

fn replace(claims: &mut Claims, service: u8, created: i64, address: Option<u8>) {
    let frontends = address
        .map(|a| (key(a, 1), frontend(&name(service), &BTreeSet::from([a]))))
        .into_iter()
        .collect();
    claims.replace(&name(service), created, frontends);
}
