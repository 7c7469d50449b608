//! Which Service holds a frontend that several claim.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};

use crate::model::ObjectName;
use crate::policy::FrontendKey;

/// The older Service wins; among equals the one whose name sorts first, so that every
/// node decides alike.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    created: i64,
    service: ObjectName,
}

/// All frontends claimed by all Services. What a Service wants of a frontend is not kept: it
/// can be had again from the Service, and would be the largest part of this.
#[derive(Debug, Default)]
pub struct Claims {
    holders: HashMap<FrontendKey, Rank>,
    /// Of frontends that several claim, in the order of their ranks.
    losers: HashMap<FrontendKey, Vec<Rank>>,
    by_service: HashMap<ObjectName, (i64, Box<[FrontendKey]>)>,
    conflicts: usize,
}

/// A frontend that one Service wants and another, older one holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    pub key: FrontendKey,
    pub loser: ObjectName,
    pub holder: ObjectName,
}

/// What a Service's new claims changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Replaced {
    /// Frontends that the Service holds, since it may want something else there now, and
    /// those that it held before; with their holder.
    pub changed: Vec<(FrontendKey, Option<ObjectName>)>,
    /// Conflicts that begin with these claims, each told once.
    pub conflicts: Vec<Conflict>,
}

impl Claims {
    /// Replaces everything that `service` claims.
    pub fn replace(
        &mut self,
        service: &ObjectName,
        created: i64,
        new: &BTreeSet<FrontendKey>,
    ) -> Replaced {
        let mut replaced = Replaced::default();
        let mut held_before = Vec::new();
        if let Some((old_created, keys)) = self.by_service.remove(service) {
            let rank = Rank { created: old_created, service: service.clone() };
            // Re-created under the same name: its old rank must not linger.
            let gone = |key: &&FrontendKey| old_created != created || !new.contains(*key);
            for key in keys.iter().filter(gone) {
                if self.holder(key) == Some(service) {
                    held_before.push(*key);
                }
                self.remove(key, &rank);
            }
        }
        if !new.is_empty() {
            let rank = Rank { created, service: service.clone() };
            self.by_service.insert(service.clone(), (created, new.iter().copied().collect()));
            for key in new {
                self.insert(key, &rank, &mut replaced.conflicts);
            }
        }
        let holds = |key: &&FrontendKey| self.holder(key) == Some(service);
        let now_others = held_before.iter().filter(|key| !holds(key));
        let changed = new.iter().filter(holds).chain(now_others);
        replaced.changed = changed.map(|key| (*key, self.holder(key).cloned())).collect();
        replaced
    }

    fn insert(&mut self, key: &FrontendKey, rank: &Rank, conflicts: &mut Vec<Conflict>) {
        let holder = match self.holders.entry(*key) {
            Entry::Vacant(vacant) => {
                vacant.insert(rank.clone());
                return;
            }
            Entry::Occupied(occupied) => occupied.into_mut(),
        };
        if holder == rank {
            return;
        }
        let mut loser = rank.clone();
        if loser < *holder {
            std::mem::swap(&mut loser, holder);
        }
        let losers = self.losers.entry(*key).or_default();
        if let Err(at) = losers.binary_search(&loser) {
            self.conflicts += 1;
            conflicts.push(Conflict {
                key: *key,
                loser: loser.service.clone(),
                holder: holder.service.clone(),
            });
            losers.insert(at, loser);
        }
    }

    fn remove(&mut self, key: &FrontendKey, rank: &Rank) {
        let Some(holder) = self.holders.get_mut(key) else { return };
        let holds = holder == rank;
        let Some(losers) = self.losers.get_mut(key) else {
            if holds {
                self.holders.remove(key);
            }
            return;
        };
        let before = losers.len();
        if holds {
            *holder = losers.remove(0);
        } else {
            losers.retain(|held| held != rank);
        }
        self.conflicts -= before - losers.len();
        if losers.is_empty() {
            self.losers.remove(key);
        }
    }

    /// Whose claim wins.
    #[must_use]
    pub fn holder(&self, key: &FrontendKey) -> Option<&ObjectName> {
        self.holders.get(key).map(|holder| &holder.service)
    }

    /// Frontends that have a holder.
    #[must_use]
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }

    /// Claims that lost to an older Service.
    #[must_use]
    pub const fn conflicts(&self) -> usize {
        self.conflicts
    }

    pub fn services(&self) -> impl Iterator<Item = &ObjectName> {
        self.by_service.keys()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::model::Protocol;

    fn key() -> FrontendKey {
        let port = NonZeroU16::new(80).unwrap();
        FrontendKey { address: [198, 51, 100, 1].into(), protocol: Protocol::Tcp, port }
    }

    fn name(name: &str) -> ObjectName {
        ObjectName::new("ns", name)
    }

    fn claim(claims: &mut Claims, service: &str, created: i64) -> Replaced {
        claims.replace(&name(service), created, &BTreeSet::from([key()]))
    }

    fn conflict(loser: &str, holder: &str) -> Conflict {
        Conflict { key: key(), loser: name(loser), holder: name(holder) }
    }

    #[test]
    fn a_conflict_is_told_once_whichever_service_comes_second() {
        for [first, second] in [[("older", 1), ("younger", 2)], [("younger", 2), ("older", 1)]] {
            let mut claims = Claims::default();
            assert_eq!(claim(&mut claims, first.0, first.1).conflicts, []);
            let told = claim(&mut claims, second.0, second.1).conflicts;
            assert_eq!(told, [conflict("younger", "older")], "{} comes second", second.0);
            // The same again is no new one.
            for (service, created) in [first, second] {
                assert_eq!(claim(&mut claims, service, created).conflicts, []);
            }
            assert_eq!(claims.conflicts(), 1);
        }
    }

    #[test]
    fn what_changes_is_what_the_service_holds_or_held() {
        let mut claims = Claims::default();
        let held_by = |service: &str| vec![(key(), Some(name(service)))];
        assert_eq!(claim(&mut claims, "older", 1).changed, held_by("older"));
        assert_eq!(claim(&mut claims, "younger", 2).changed, []);
        // What it wants may be another thing each time.
        assert_eq!(claim(&mut claims, "older", 1).changed, held_by("older"));
        // Made anew, it is the younger of the two.
        assert_eq!(claim(&mut claims, "older", 3).changed, held_by("younger"));
        assert_eq!(claim(&mut claims, "older", 1).changed, held_by("older"));
        let gone = claims.replace(&name("older"), 0, &BTreeSet::new());
        assert_eq!(gone.changed, held_by("younger"));
        let gone = claims.replace(&name("younger"), 0, &BTreeSet::new());
        assert_eq!(gone.changed, [(key(), None)]);
        assert!(claims.is_empty() && claims.conflicts() == 0);
    }
}
