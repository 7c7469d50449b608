//! From kernel objects that come and go to series that only grow. Pure.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

use crate::dataplane::traffic::{Counters, Current, Sample};

/// A group's sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Series {
    pub totals: Counters,
    pub current: Current,
    /// The reading in which an object of it was last seen.
    seen: u64,
}

/// Sums of kernel objects `O` by groups `G`, as many of them as there may be; all others are
/// one sum.
///
/// What is added to a sum is always what an object counted since it was last read. So a sum
/// keeps what objects had that are gone, and one that begins anew adds to it.
#[derive(Debug)]
pub struct Accounts<O, G> {
    limit: usize,
    /// Of objects that have counted anything.
    last: HashMap<O, Last>,
    series: BTreeMap<G, Series>,
    others: Series,
    reading: u64,
    /// Groups that have counted nothing may have a series too.
    idle_too: bool,
}

#[derive(Debug, Clone, Copy)]
struct Last {
    incarnation: u32,
    counters: Counters,
    seen: u64,
}

impl<O: Hash + Eq, G: Ord + Clone> Accounts<O, G> {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            last: HashMap::new(),
            series: BTreeMap::new(),
            others: Series::default(),
            reading: 0,
            idle_too: false,
        }
    }

    /// A reading begins. With more groups than series, a series is only for one that has
    /// counted something.
    pub fn begin(&mut self, groups: usize) {
        self.reading += 1;
        self.idle_too = groups <= self.limit;
        self.others.current = Current::default();
        for series in self.series.values_mut() {
            series.current = Current::default();
        }
    }

    /// The reading tells this of an object, once.
    pub fn add(&mut self, object: O, group: &G, sample: Sample) {
        let Sample { incarnation, counters, current } = sample;
        let seen = self.reading;
        let new = match self.last.get_mut(&object) {
            Some(last) => {
                let same = last.incarnation == incarnation;
                let new = if same { counters.since(&last.counters) } else { counters };
                *last = Last { incarnation, counters, seen };
                new
            }
            None => {
                if !counters.is_zero() {
                    self.last.insert(object, Last { incarnation, counters, seen });
                }
                counters
            }
        };
        let series = self.series_of(group, !new.is_zero());
        series.totals += new;
        series.current += current;
        series.seen = seen;
    }

    fn series_of(&mut self, group: &G, counted: bool) -> &mut Series {
        let room = self.series.len() < self.limit && (counted || self.idle_too);
        if room && !self.series.contains_key(group) {
            self.series.insert(group.clone(), Series::default());
        }
        self.series.get_mut(group).unwrap_or(&mut self.others)
    }

    /// The reading told all there is: objects that it did not tell of are gone.
    pub fn end(&mut self) {
        let reading = self.reading;
        self.last.retain(|_, last| last.seen == reading);
    }

    /// As [`Self::end`], and groups are gone with their last object.
    pub fn end_with_groups(&mut self) {
        self.end();
        let reading = self.reading;
        self.series.retain(|_, series| series.seen == reading);
    }

    /// There is no such group any more.
    pub fn forget(&mut self, group: &G) {
        self.series.remove(group);
    }

    pub fn series(&self) -> impl Iterator<Item = (&G, &Series)> {
        self.series.iter()
    }

    /// Of everything that has no series.
    pub const fn others(&self) -> &Series {
        &self.others
    }

    pub fn len(&self) -> usize {
        self.series.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::traffic::Amount;

    fn sample(incarnation: u32, connections: u64) -> Sample {
        let counters = Counters { connections, ..Counters::default() };
        Sample { incarnation, counters, current: Current { active: 1, inactive: 0 } }
    }

    fn read(accounts: &mut Accounts<u32, char>, groups: usize, told: &[(u32, char, Sample)]) {
        accounts.begin(groups);
        for (object, group, sample) in told {
            accounts.add(*object, group, *sample);
        }
        accounts.end();
    }

    fn connections(accounts: &Accounts<u32, char>) -> Vec<(char, u64)> {
        accounts.series().map(|(group, series)| (*group, series.totals.connections)).collect()
    }

    #[test]
    fn a_sum_keeps_what_objects_had_that_are_gone() {
        let mut accounts = Accounts::new(10);
        read(&mut accounts, 1, &[(1, 'a', sample(7, 5)), (2, 'a', sample(8, 3))]);
        assert_eq!(connections(&accounts), [('a', 8)]);
        read(&mut accounts, 1, &[(2, 'a', sample(8, 4))]);
        assert_eq!(connections(&accounts), [('a', 9)]);
        // The same object again, with more than it had: another one by its number.
        read(&mut accounts, 1, &[(2, 'a', sample(9, 6))]);
        assert_eq!(connections(&accounts), [('a', 15)]);
        // And one that cannot be told apart but for having less.
        read(&mut accounts, 1, &[(2, 'a', sample(9, 2))]);
        assert_eq!(connections(&accounts), [('a', 17)]);
        assert_eq!(accounts.series().next().unwrap().1.current.active, 1, "not a sum over time");
    }

    #[test]
    fn one_counter_that_went_back_is_a_new_beginning_of_all() {
        let before = Counters {
            connections: 4,
            requests: Amount { packets: 10, bytes: 1000 },
            ..Counters::default()
        };
        let now = Counters { connections: 5, ..Counters::default() };
        assert_eq!(now.since(&before), now);
        let more = Counters { connections: 6, ..before };
        assert_eq!(more.since(&before), Counters { connections: 2, ..Counters::default() });
    }

    #[test]
    fn beyond_the_limit_groups_share_one_sum_and_come_in_when_there_is_room() {
        let mut accounts = Accounts::new(2);
        let told = [
            (1, 'a', sample(0, 0)),
            (2, 'b', sample(0, 2)),
            (3, 'c', sample(0, 3)),
            (4, 'd', sample(0, 4)),
        ];
        read(&mut accounts, 4, &told);
        assert_eq!(connections(&accounts), [('b', 2), ('c', 3)], "the idle one takes no place");
        assert_eq!(accounts.others().totals.connections, 4);
        accounts.forget(&'b');
        let told = [(1, 'a', sample(0, 0)), (3, 'c', sample(0, 3)), (4, 'd', sample(0, 6))];
        read(&mut accounts, 3, &told);
        assert_eq!(connections(&accounts), [('c', 3), ('d', 2)]);
        assert_eq!(accounts.others().totals.connections, 4, "it keeps what it had");
        accounts.forget(&'d');
        read(&mut accounts, 2, &[(1, 'a', sample(0, 0)), (3, 'c', sample(0, 3))]);
        assert_eq!(connections(&accounts), [('a', 0), ('c', 3)], "with room for all, at 0");
    }

    #[test]
    fn groups_can_end_with_their_objects() {
        let mut accounts: Accounts<u32, char> = Accounts::new(2);
        accounts.begin(1);
        accounts.add(1, &'a', sample(0, 1));
        accounts.end_with_groups();
        assert_eq!(connections(&accounts), [('a', 1)]);
        accounts.begin(1);
        accounts.end_with_groups();
        assert_eq!(connections(&accounts), []);
    }

    /// What happens in the kernel.
    #[derive(Debug, Clone)]
    enum Step {
        Count(u32, u64),
        /// Another object of the same name.
        Replace(u32),
        /// The same object from zero on: seen when it is read before it has as much again.
        Reset(u32),
        Read,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u32..6, 0_u64..50).prop_map(|(object, by)| Step::Count(object, by)),
            (0_u32..6).prop_map(Step::Replace),
            (0_u32..6).prop_map(Step::Reset),
            Just(Step::Read),
        ]
    }

    #[derive(Default)]
    struct Kernel {
        /// Incarnation, count, and how much of that was read.
        objects: BTreeMap<u32, (u32, u64, u64)>,
        read: u64,
    }

    impl Kernel {
        fn read_into(&mut self, accounts: &mut Accounts<u32, char>) {
            let mut told = Vec::new();
            for (object, (incarnation, count, read)) in &mut self.objects {
                let group = char::from(b'a' + u8::try_from(object / 2).unwrap());
                told.push((*object, group, sample(*incarnation, *count)));
                self.read += *count - *read;
                *read = *count;
            }
            read(accounts, 3, &told);
        }
    }

    proptest! {
        /// Nothing that was read is lost or counted twice, and no sum falls.
        #[test]
        fn sums_only_grow_and_have_everything(
            steps in prop::collection::vec(step(), 1..80),
            limit in 0_usize..4,
        ) {
            let mut accounts: Accounts<u32, char> = Accounts::new(limit);
            let mut kernel = Kernel { objects: (0..6).map(|o| (o, (0, 0, 0))).collect(), read: 0 };
            let mut before: BTreeMap<char, u64> = BTreeMap::new();
            let mut others = 0;
            for step in steps {
                match step {
                    Step::Count(object, by) => kernel.objects.get_mut(&object).unwrap().1 += by,
                    Step::Replace(object) => {
                        let held = kernel.objects.get_mut(&object).unwrap();
                        *held = (held.0 + 1, 0, 0);
                    }
                    Step::Reset(object) => {
                        let held = kernel.objects.get_mut(&object).unwrap();
                        *held = (held.0, 0, 0);
                        kernel.read_into(&mut accounts);
                    }
                    Step::Read => kernel.read_into(&mut accounts),
                }
                let now: BTreeMap<char, u64> = connections(&accounts).into_iter().collect();
                for (group, count) in &before {
                    prop_assert!(now.get(group).is_some_and(|now| now >= count));
                }
                prop_assert!(accounts.others().totals.connections >= others);
                prop_assert!(accounts.len() <= limit);
                others = accounts.others().totals.connections;
                prop_assert_eq!(now.values().sum::<u64>() + others, kernel.read);
                before = now;
            }
        }
    }
}
