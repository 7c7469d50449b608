//! How endpoints stand that frontends do not lead to any more. Nothing of it is kept: it is asked
//! for few objects, and the Services know.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Instant;

use super::super::queue::Urgency;
use super::super::report::Observer;
use super::Engine;
use crate::dataplane::Dataplane;
use crate::model::ObjectName;
use crate::plan::{ObjectKey as _, Op, Standing, diff};
use crate::policy::{FrontendKey, KnownSet};

/// What was asked for already, as long as nothing changes.
#[derive(Debug, Default)]
pub(super) struct Standings(HashMap<FrontendKey, KnownSet>);

impl<D: Dataplane, O: Observer> Engine<D, O> {
    /// What is to be done about these.
    pub(super) fn differences(&self, keys: &BTreeSet<D::Key>) -> Vec<Op<D::Key>> {
        let mut standings = Standings::default();
        diff(keys, &self.ledger, |key| self.standing(key, &mut standings))
    }

    pub(super) fn standing(&self, key: &D::Key, known: &mut Standings) -> Standing {
        let Some((frontend, at)) = key.leads_to() else { return Standing::Gone };
        let Some(holder) = self.claims.holder(&frontend) else { return Standing::Gone };
        if !known.0.contains_key(&frontend) {
            let all = self.lowered(holder).frontends;
            known.0.extend(all.into_iter().map(|(key, frontend)| (key, frontend.endpoints)));
        }
        let endpoints = known.0.get(&frontend).map_or(&[][..], |endpoints| endpoints);
        match endpoints.binary_search_by_key(&at, |endpoint| endpoint.at) {
            Ok(place) if endpoints[place].serving => Standing::Serving,
            Ok(_) => Standing::Present,
            Err(_) => Standing::Gone,
        }
    }

    /// Connections may go through what the kernel holds for the frontend.
    pub(super) fn connects(&self, frontend: &FrontendKey) -> bool {
        D::Key::server_of(frontend).is_some_and(|server| self.ledger.holds_children(&server))
    }

    /// With its last endpoint a frontend may have lost what it was there for.
    pub(super) fn look_at_holder(&mut self, deleted: &D::Key) {
        let Some((frontend, _)) = deleted.leads_to() else { return };
        if let Some(holder) = self.claims.holder(&frontend)
            && !self.connects(&frontend)
        {
            self.queue.push(holder.clone(), Urgency::Compared);
        }
    }

    /// An endpoint that is drained may be gone now, or serve no longer, or be there again.
    pub(super) fn review_drains(
        &mut self,
        lowered: &[ObjectName],
        touched: &mut BTreeSet<D::Key>,
        now: Instant,
    ) {
        if self.drain.is_empty() {
            return;
        }
        let lowered: HashSet<&ObjectName> = lowered.iter().collect();
        let holder =
            |key: &&D::Key| key.leads_to().and_then(|(frontend, _)| self.claims.holder(&frontend));
        let is_lowered = |key: &&D::Key| holder(key).is_some_and(|name| lowered.contains(name));
        let keys: BTreeSet<D::Key> = self.drain.keys().filter(is_lowered).cloned().collect();
        self.resume_drains(&keys, now);
        touched.extend(keys);
    }
}
