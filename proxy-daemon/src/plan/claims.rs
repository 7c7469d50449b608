//! Which Service holds a frontend that several claim.

use std::collections::{BTreeMap, HashMap};

use crate::model::ObjectName;
use crate::policy::{Frontend, FrontendKey};

/// The older Service wins; among equals the one whose name sorts first, so that every
/// node decides alike.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    created: i64,
    service: ObjectName,
}

/// All frontends claimed by all Services.
#[derive(Debug, Default)]
pub struct Claims {
    frontends: HashMap<FrontendKey, Contenders>,
    by_service: HashMap<ObjectName, (i64, Vec<FrontendKey>)>,
    conflicts: usize,
}

/// Claims of one frontend, the winning one first. Nearly always there is one, for which a
/// map would keep room for eleven.
#[derive(Debug, Default)]
struct Contenders(Vec<(Rank, Frontend)>);

impl Contenders {
    fn insert(&mut self, rank: Rank, frontend: Frontend) -> Option<Frontend> {
        match self.0.binary_search_by(|(held, _)| held.cmp(&rank)) {
            Ok(at) => self.0.get_mut(at).map(|(_, held)| std::mem::replace(held, frontend)),
            Err(at) => {
                self.0.reserve_exact(1);
                self.0.insert(at, (rank, frontend));
                None
            }
        }
    }

    fn remove(&mut self, rank: &Rank) {
        self.0.retain(|(held, _)| held != rank);
    }

    fn losers(&self) -> usize {
        self.0.len().saturating_sub(1)
    }
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
    /// Frontends with another holder than before, or whose holder wants something else there.
    pub changed: Vec<FrontendKey>,
    /// Conflicts that begin with these claims, each told once.
    pub conflicts: Vec<Conflict>,
}

impl Claims {
    /// Replaces everything that `service` claims.
    pub fn replace(
        &mut self,
        service: &ObjectName,
        created: i64,
        new: BTreeMap<FrontendKey, Frontend>,
    ) -> Replaced {
        let old = self.by_service.remove(service);
        let mut replaced = Replaced::default();
        if let Some((old_created, keys)) = old {
            let rank = Rank { created: old_created, service: service.clone() };
            for key in keys.into_iter().filter(|key| !new.contains_key(key)) {
                self.update(&key, &rank, None, &mut replaced);
            }
            if old_created != created {
                // Re-created under the same name: its old rank must not linger.
                for key in new.keys() {
                    self.update(key, &rank, None, &mut replaced);
                }
            }
        }
        if !new.is_empty() {
            let rank = Rank { created, service: service.clone() };
            self.by_service.insert(service.clone(), (created, new.keys().copied().collect()));
            for (key, frontend) in new {
                self.update(&key, &rank, Some(frontend), &mut replaced);
            }
        }
        replaced
    }

    fn update(
        &mut self,
        key: &FrontendKey,
        rank: &Rank,
        frontend: Option<Frontend>,
        replaced: &mut Replaced,
    ) {
        let claims = self.frontends.entry(*key).or_default();
        self.conflicts -= claims.losers();
        let before = claims.0.first().cloned();
        match frontend {
            Some(frontend) => {
                let is_new = claims.insert(rank.clone(), frontend).is_none();
                if let (true, Some((other, _))) = (is_new, &before) {
                    let (holder, loser) = if other < rank { (other, rank) } else { (rank, other) };
                    replaced.conflicts.push(Conflict {
                        key: *key,
                        loser: loser.service.clone(),
                        holder: holder.service.clone(),
                    });
                }
            }
            None => {
                claims.remove(rank);
            }
        }
        self.conflicts += claims.losers();
        let differs = before.as_ref() != claims.0.first();
        if claims.0.is_empty() {
            self.frontends.remove(key);
        }
        if differs {
            replaced.changed.push(*key);
        }
    }

    /// The winning claim.
    #[must_use]
    pub fn get(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.frontends.get(key)?.0.first().map(|(_, frontend)| frontend)
    }

    /// Frontends that have a holder.
    #[must_use]
    pub fn len(&self) -> usize {
        self.frontends.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty()
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
    use std::sync::Arc;

    use super::*;
    use crate::model::Protocol;
    use crate::policy::{BackendSet, FrontendKind, Masquerade, PortName, WhenEmpty};

    fn key() -> FrontendKey {
        let port = NonZeroU16::new(80).unwrap();
        FrontendKey { address: [198, 51, 100, 1].into(), protocol: Protocol::Tcp, port }
    }

    fn claim(claims: &mut Claims, name: &str, created: i64, affinity: u64) -> Replaced {
        let service = ObjectName::new("ns", name);
        let frontend = Frontend {
            port: PortName { service: service.clone(), port: "".into() },
            kind: FrontendKind::ExternalIp,
            backends: BackendSet::from([]),
            local_only: false,
            short_circuit_set: None,
            short_circuit: None,
            shared: None,
            when_empty: WhenEmpty::Reject,
            masquerade: Masquerade::Always,
            on_node_address: false,
            affinity: Some(std::time::Duration::from_secs(affinity)),
            source_ranges: Arc::from([]),
            scheduling: None,
        };
        claims.replace(&service, created, BTreeMap::from([(key(), frontend)]))
    }

    fn conflict(loser: &str, holder: &str) -> Conflict {
        let name = |name| ObjectName::new("ns", name);
        Conflict { key: key(), loser: name(loser), holder: name(holder) }
    }

    #[test]
    fn a_conflict_is_told_once_whichever_service_comes_second() {
        for [first, second] in [[("older", 1), ("younger", 2)], [("younger", 2), ("older", 1)]] {
            let mut claims = Claims::default();
            assert_eq!(claim(&mut claims, first.0, first.1, 1).conflicts, []);
            let told = claim(&mut claims, second.0, second.1, 1).conflicts;
            assert_eq!(told, [conflict("younger", "older")], "{} comes second", second.0);
            // The same again, and a change: the conflict is no new one.
            assert_eq!(claim(&mut claims, second.0, second.1, 1), Replaced::default());
            assert_eq!(claim(&mut claims, "older", 1, 2).conflicts, []);
            assert_eq!(claims.conflicts(), 1);
        }
    }
}
