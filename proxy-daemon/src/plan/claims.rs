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
    frontends: HashMap<FrontendKey, BTreeMap<Rank, Frontend>>,
    by_service: HashMap<ObjectName, (i64, Vec<FrontendKey>)>,
    conflicts: usize,
}

/// The holder of a frontend changed, or what it wants there did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    pub key: FrontendKey,
    /// A Service lost this frontend to, or holds it against, this many others.
    pub contenders: usize,
}

impl Claims {
    /// Replaces everything that `service` claims and returns the frontends for which
    /// the winning claim is now another one.
    pub fn replace(
        &mut self,
        service: &ObjectName,
        created: i64,
        new: BTreeMap<FrontendKey, Frontend>,
    ) -> Vec<Changed> {
        let old = self.by_service.remove(service);
        let mut changed = Vec::new();
        if let Some((old_created, keys)) = old {
            let rank = Rank { created: old_created, service: service.clone() };
            for key in keys.into_iter().filter(|key| !new.contains_key(key)) {
                self.update(&key, &rank, None, &mut changed);
            }
            if old_created != created {
                // Re-created under the same name: its old rank must not linger.
                for key in new.keys() {
                    self.update(key, &rank, None, &mut changed);
                }
            }
        }
        if !new.is_empty() {
            let rank = Rank { created, service: service.clone() };
            self.by_service.insert(service.clone(), (created, new.keys().copied().collect()));
            for (key, frontend) in new {
                self.update(&key, &rank, Some(frontend), &mut changed);
            }
        }
        changed
    }

    fn update(
        &mut self,
        key: &FrontendKey,
        rank: &Rank,
        frontend: Option<Frontend>,
        changed: &mut Vec<Changed>,
    ) {
        let claims = self.frontends.entry(*key).or_default();
        self.conflicts -= claims.len().saturating_sub(1);
        let before =
            claims.first_key_value().map(|(rank, frontend)| (rank.clone(), frontend.clone()));
        match frontend {
            Some(frontend) => {
                claims.insert(rank.clone(), frontend);
            }
            None => {
                claims.remove(rank);
            }
        }
        let contenders = claims.len().saturating_sub(1);
        self.conflicts += contenders;
        let differs =
            before.as_ref().map(|(rank, frontend)| (rank, frontend)) != claims.first_key_value();
        if claims.is_empty() {
            self.frontends.remove(key);
        }
        if differs {
            changed.push(Changed { key: *key, contenders });
        }
    }

    /// The winning claim.
    #[must_use]
    pub fn get(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.frontends.get(key).and_then(|claims| claims.values().next())
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
