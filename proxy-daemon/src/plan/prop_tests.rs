//! The plan's laws, on random sets of frontends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;

use proptest::prelude::*;

use super::{Claims, Ledger, ObjectKey, Op, Standing, Sweep, diff};
use crate::dataplane::Dataplane;
use crate::dataplane::fake::{Fake, Key};
use crate::model::{ObjectName, Protocol};
use crate::policy::{Backend, Frontend, FrontendKey, sample};

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
    let backend = |last: &u8| Backend {
        address: [10, 244, 0, *last].into(),
        port: port(80),
        local: false,
        weight: 1,
    };
    sample::frontend(service.clone(), backends.iter().map(backend).collect())
}

/// What frontends want, in place of what others wanted before.
fn want(ledger: &mut Ledger<Key>, old: &Wants, new: &Wants) -> BTreeSet<Key> {
    let mut plane = Fake::default();
    let mut touched = BTreeSet::new();
    let service = ObjectName::new("ns", "s");
    let all: BTreeSet<(u8, u16)> = old.keys().chain(new.keys()).copied().collect();
    for (address, number) in all {
        let key = key(address, number);
        let lowered = new
            .get(&(address, number))
            .map(|backends| plane.lower(&key, &frontend(&service, backends)))
            .unwrap_or_default();
        ledger.replace(key, lowered, &mut touched);
    }
    touched
}

fn wanting(wants: &Wants) -> Ledger<Key> {
    let mut ledger = Ledger::default();
    want(&mut ledger, &Wants::new(), wants);
    ledger
}

type Map = BTreeMap<Key, u32>;

fn wanted(ledger: &Ledger<Key>) -> Map {
    ledger.iter().filter_map(|(key, wanted, _)| Some((key.clone(), *wanted?))).collect()
}

fn held(ledger: &Ledger<Key>) -> Map {
    ledger.iter().filter_map(|(key, _, held)| Some((key.clone(), *held?))).collect()
}

fn keys(ledger: &Ledger<Key>) -> Vec<Key> {
    ledger.iter().map(|(key, ..)| key.clone()).collect()
}

/// A kernel that holds all of `a` while all of `b` is wanted.
fn from_to(a: &Wants, b: &Wants) -> (Ledger<Key>, BTreeSet<Key>) {
    let mut ledger = wanting(a);
    let ops = diff(&keys(&ledger), &ledger, gone);
    ops.iter().for_each(|op| ledger.applied(op));
    let touched = want(&mut ledger, a, b);
    (ledger, touched)
}

fn gone(_: &Key) -> Standing {
    Standing::Gone
}

fn without_retired(ledger: &Ledger<Key>) -> Map {
    let retired = |key: &Key, value: &u32| {
        ledger.wanted(key).is_none() && key.retired(value, Standing::Gone) == Some(*value)
    };
    held(ledger).into_iter().filter(|(key, value)| !retired(key, value)).collect()
}

proptest! {
    #[test]
    fn diff_of_equal_sets_is_empty(wants in wants()) {
        let (ledger, touched) = from_to(&wants, &wants);
        prop_assert_eq!(touched.len(), 0);
        prop_assert_eq!(diff(&keys(&ledger), &ledger, gone), vec![]);
    }

    #[test]
    fn applying_the_diff_gives_the_target_once_drained(a in wants(), b in wants()) {
        let (mut ledger, _) = from_to(&a, &b);
        let ops = diff(&keys(&ledger), &ledger, gone);
        ops.iter().for_each(|op| ledger.applied(op));
        prop_assert_eq!(without_retired(&ledger), wanted(&wanting(&b)));
    }

    #[test]
    fn no_backend_is_taken_away_before_all_new_ones_are_there(a in wants(), b in wants()) {
        let (ledger, _) = from_to(&a, &b);
        let ops = diff(&keys(&ledger), &ledger, gone);
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
        let (ledger, _) = from_to(&a, &b);
        let ops = diff(&keys(&ledger), &ledger, gone);
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
        let (ledger, touched) = from_to(&a, &b);
        prop_assert_eq!(diff(&touched, &ledger, gone), diff(&keys(&ledger), &ledger, gone));
        prop_assert_eq!(wanted(&ledger), wanted(&wanting(&b)));
    }

    #[test]
    fn a_sweep_in_slices_finds_every_divergence_once(
        a in wants(), b in wants(), kernel in wants(), slice in 1..9_usize,
    ) {
        // The kernel turns out to hold something else than what was written.
        let (mut ledger, _) = from_to(&a, &b);
        ledger.begin_readback();
        let found = wanted(&wanting(&kernel));
        found.iter().for_each(|(key, value)| ledger.hold(key, *value));
        ledger.end_readback();
        let mut sweep = Sweep::default();
        let mut divergent = Vec::new();
        while !sweep.over {
            divergent.extend(ledger.sweep(&mut sweep, slice));
        }
        let target = wanted(&wanting(&b));
        let wrong = |(key, value): &(&Key, &u32)| found.get(*key) != Some(*value);
        let expected: Vec<Key> = target.iter().filter(wrong).map(|(key, _)| key.clone()).collect();
        prop_assert_eq!(divergent, expected);
        let extra: Vec<Key> =
            found.keys().filter(|key| !target.contains_key(*key)).cloned().collect();
        prop_assert_eq!(sweep.unwanted, extra);
        prop_assert_eq!(held(&ledger), found);
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
            let holder = tried.holder(&key(address, 1)).cloned();
            prop_assert_eq!(holder, ranked.first().map(|(_, name)| name.clone()));
        }
        prop_assert_eq!(tried.conflicts(), losers);
    }
}

fn name(service: u8) -> ObjectName {
    ObjectName::new("ns", &format!("s{service}"))
}

fn replace(claims: &mut Claims, service: u8, created: i64, address: Option<u8>) {
    let frontends = address.map(|a| key(a, 1)).into_iter().collect();
    claims.replace(&name(service), created, &frontends);
}
