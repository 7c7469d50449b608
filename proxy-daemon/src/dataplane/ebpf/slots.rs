//! How a range of slots is filled with backends. Pure: the programs only ever index it.
//!
//! * *Plain*: each backend once, or as often as its weight says. The smallest range; a change
//!   of the set moves most flows that are not tracked yet.
//! * *Maglev* (Eisenbud et al., NSDI 2016, section 3.4): a table of prime size in which every
//!   backend claims places by a permutation of its own, taking turns. All nodes make the same
//!   table of the same set, and a backend that comes or goes moves few other places.

/// A backend's share of the new flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Tells backends apart, the same on every node: [`key_of`].
    pub key: u64,
    /// 0: none.
    pub weight: u16,
}

/// How the range of a frontend is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fill {
    #[default]
    Plain,
    Maglev,
}

/// A table at least this many times as long as the set keeps the shares within about one in
/// a hundred of each other (the paper's figure) and the disruption low.
const MAGLEV_FACTOR: usize = 100;

/// Primes, each about twice the one before: a set that grows by a few backends keeps its
/// table's size, or else every place would move.
const PRIMES: [usize; 10] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];

/// Longest range of the plain kind: weights are scaled down to fit.
const MAX_PLAIN: usize = 4096;

/// From an address and port as bytes. FNV-1a and a final mix, so that neighbouring
/// addresses have nothing in common.
#[must_use]
pub fn key_of(bytes: &[u8]) -> u64 {
    let state = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |state, byte| {
        (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    mix(state)
}

/// The finalizer of MurmurHash3.
const fn mix(h: u64) -> u64 {
    let h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// For each slot the index of its backend; empty when nobody has a share.
#[must_use]
pub fn fill(kind: Fill, shares: &[Share]) -> Vec<u32> {
    if shares.iter().all(|share| share.weight == 0) {
        return Vec::new();
    }
    match kind {
        Fill::Plain => plain(shares),
        Fill::Maglev => maglev(shares, size(shares.len())),
    }
}

fn size(backends: usize) -> usize {
    let wanted = backends.saturating_mul(MAGLEV_FACTOR);
    let fits = PRIMES.into_iter().find(|prime| *prime >= wanted);
    fits.unwrap_or(PRIMES[PRIMES.len() - 1])
}

/// Each as often as its weight, in turns, so that any part of the range is as even as the
/// whole. Weights lose their common divisor, and what is too long is scaled.
fn plain(shares: &[Share]) -> Vec<u32> {
    let divisor = shares.iter().fold(0, |divisor, share| gcd(divisor, share.weight)).max(1);
    let mut left: Vec<usize> = shares.iter().map(|s| usize::from(s.weight / divisor)).collect();
    let total: usize = left.iter().sum();
    if total > MAX_PLAIN.max(shares.len()) {
        for count in &mut left {
            // Nobody who has a share loses it.
            *count = (*count * MAX_PLAIN / total).max(usize::from(*count > 0));
        }
    }
    let mut slots = Vec::with_capacity(left.iter().sum());
    while left.iter().any(|count| *count > 0) {
        for (index, count) in (0_u32..).zip(&mut left) {
            if *count > 0 {
                *count -= 1;
                slots.push(index);
            }
        }
    }
    slots
}

const fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A backend's way through the table.
struct Permutation {
    next: usize,
    skip: usize,
    /// Turns it may take: it gains its weight each round and pays the greatest for a turn.
    credit: u32,
}

fn maglev(shares: &[Share], size: usize) -> Vec<u32> {
    const VACANT: u32 = u32::MAX;
    let greatest = shares.iter().map(|share| u32::from(share.weight)).max().unwrap_or(1);
    let mut ways: Vec<Permutation> = shares.iter().map(|share| permutation(share, size)).collect();
    // The order of turns decides who gets a contested place, so it must not depend on the
    // order of the list.
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_unstable_by_key(|index| shares[*index].key);
    let mut table = vec![VACANT; size];
    let mut filled = 0;
    while filled < size {
        for &index in &order {
            let way = &mut ways[index];
            way.credit += u32::from(shares[index].weight);
            if way.credit < greatest || filled == size {
                continue;
            }
            way.credit -= greatest;
            while table[way.next] != VACANT {
                way.next = (way.next + way.skip) % size;
            }
            table[way.next] = u32::try_from(index).unwrap_or(VACANT);
            filled += 1;
        }
    }
    table
}

/// `size` is prime, so that any skip reaches every place.
fn permutation(share: &Share, size: usize) -> Permutation {
    let below =
        |number: u64, limit: usize| usize::try_from(number % limit as u64).unwrap_or_default();
    let (offset, skip) = (mix(share.key), mix(!share.key));
    Permutation { next: below(offset, size), skip: below(skip, size - 1) + 1, credit: 0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shares(keys: impl IntoIterator<Item = u64>) -> Vec<Share> {
        keys.into_iter().map(|key| Share { key: mix(key), weight: 1 }).collect()
    }

    fn counts(slots: &[u32], backends: usize) -> Vec<usize> {
        let mut counts = vec![0; backends];
        slots.iter().for_each(|slot| counts[*slot as usize] += 1);
        counts
    }

    #[test]
    fn plain_has_each_backend_as_often_as_it_weighs() {
        let of = |weights: &[u16]| {
            let shares: Vec<_> = weights.iter().map(|&weight| Share { key: 0, weight }).collect();
            fill(Fill::Plain, &shares)
        };
        assert_eq!(of(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(of(&[100, 300, 0, 200]), [0, 1, 3, 1, 3, 1]);
        assert_eq!(of(&[0, 0]), [0_u32; 0]);
        assert_eq!(of(&[]), [0_u32; 0]);
        let long = of(&[1, u16::MAX]);
        assert!(long.len() <= MAX_PLAIN + 1);
        assert_eq!(long.iter().filter(|slot| **slot == 0).count(), 1);
    }

    #[test]
    fn the_order_of_the_list_changes_nothing() {
        let list = shares(0..20);
        let mut backwards = list.clone();
        backwards.reverse();
        let names = |list: &[Share]| -> Vec<u64> {
            fill(Fill::Maglev, list).iter().map(|slot| list[*slot as usize].key).collect()
        };
        assert_eq!(names(&list), names(&backwards));
    }

    /// Places that change hands when one of `n` backends leaves, over those that must.
    fn disruption(n: u64) -> f64 {
        let list = shares(0..n);
        let before = fill(Fill::Maglev, &list);
        let mut excess: f64 = 0.0;
        for gone in 0..n.min(10) as usize {
            let mut rest = list.clone();
            rest.remove(gone);
            let after = maglev(&rest, before.len());
            let name = |list: &[Share], slot: u32| list[slot as usize].key;
            let moved = before
                .iter()
                .zip(&after)
                .filter(|(old, new)| name(&list, **old) != name(&rest, **new))
                .count();
            let least = before.iter().filter(|slot| **slot as usize == gone).count();
            excess = excess.max((moved - least) as f64 / before.len() as f64);
        }
        excess
    }

    /// Measured: printed with `--nocapture`.
    #[test]
    fn few_other_places_move_when_a_backend_leaves() {
        for n in [2, 5, 10, 50, 100, 500] {
            let excess = disruption(n);
            println!("{n} backends: {:.2} % of the places move needlessly", excess * 100.0);
            assert!(excess < 0.06, "{n}: {excess}");
        }
    }

    proptest! {
        #[test]
        fn maglev_shares_are_as_the_weights(weights in prop::collection::vec(0_u16..=10, 1..40)) {
            let list: Vec<Share> = (0_u64..)
                .zip(&weights)
                .map(|(key, &weight)| Share { key: mix(key), weight })
                .collect();
            let slots = fill(Fill::Maglev, &list);
            let total: usize = weights.iter().map(|w| usize::from(*w)).sum();
            prop_assert_eq!(slots.is_empty(), total == 0);
            for (count, weight) in counts(&slots, weights.len()).into_iter().zip(weights) {
                let expected = slots.len() * usize::from(weight) / total.max(1);
                // A turn more or less in each of few rounds.
                prop_assert!(count.abs_diff(expected) <= 2 + expected / 50, "{count}, {expected}");
                prop_assert_eq!(count == 0, weight == 0);
            }
        }

        #[test]
        fn plain_shares_are_as_the_weights(weights in prop::collection::vec(0_u16..=300, 1..40)) {
            let list: Vec<Share> =
                weights.iter().map(|&weight| Share { key: 0, weight }).collect();
            let slots = fill(Fill::Plain, &list);
            prop_assert!(slots.len() <= MAX_PLAIN + weights.len());
            let total: usize = weights.iter().map(|w| usize::from(*w)).sum();
            for (count, weight) in counts(&slots, weights.len()).into_iter().zip(weights) {
                prop_assert_eq!(count == 0, weight == 0);
                let expected = slots.len() * usize::from(weight) / total.max(1);
                prop_assert!(count.abs_diff(expected) <= 2 + expected / 20, "{count}, {expected}");
            }
        }
    }
}
