//! Services that wait to be lowered again, most urgent first.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use crate::model::ObjectName;
use crate::state::{DirtySet, Trigger};

/// What waits, and since when.
#[derive(Debug, Default)]
pub struct Queue {
    /// `default/kubernetes` first: a node that joins needs the API server's own address
    /// before any other. Then Services that changed, then those that are only compared
    /// again; among equals in the order of arrival, so that none is passed over for ever.
    waiting: BTreeMap<Place, ObjectName>,
    places: HashMap<ObjectName, Place>,
    arrivals: u64,
    triggers: BTreeMap<ObjectName, Vec<Trigger>>,
    service_changes: usize,
    slice_changes: usize,
    oldest: Option<Instant>,
}

type Place = (Urgency, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    ApiServer,
    Changed,
    Compared,
}

/// What one round takes from the queue.
#[derive(Debug, Default)]
pub struct Taken {
    pub services: Vec<ObjectName>,
    pub triggers: Vec<Trigger>,
    pub service_changes: usize,
    pub slice_changes: usize,
}

impl Queue {
    pub fn push(&mut self, name: ObjectName, urgency: Urgency) {
        let urgency = if &*name.namespace == "default" && &*name.name == "kubernetes" {
            Urgency::ApiServer
        } else {
            urgency
        };
        if let Some(held) = self.places.get(&name).copied() {
            if held.0 <= urgency {
                return;
            }
            self.waiting.remove(&held);
        }
        self.arrivals += 1;
        let place = (urgency, self.arrivals);
        self.places.insert(name.clone(), place);
        self.waiting.insert(place, name);
    }

    pub fn changed(&mut self, dirty: DirtySet, now: Instant) {
        if !dirty.services.is_empty() {
            self.oldest.get_or_insert(now);
        }
        self.service_changes += dirty.service_changes;
        self.slice_changes += dirty.slice_changes;
        for name in dirty.services {
            self.push(name, Urgency::Changed);
        }
        for (service, trigger) in dirty.triggers {
            self.triggers.entry(service).or_default().push(trigger);
        }
    }

    /// Takes at most `limit` Services. The changes they came from count as programmed
    /// with the last Service of the backlog.
    pub fn take(&mut self, limit: usize) -> Taken {
        let mut taken = Taken::default();
        while taken.services.len() < limit {
            let Some((_, name)) = self.waiting.pop_first() else {
                break;
            };
            self.places.remove(&name);
            taken.triggers.extend(self.triggers.remove(&name).unwrap_or_default());
            taken.services.push(name);
        }
        if self.waiting.is_empty() {
            taken.service_changes = std::mem::take(&mut self.service_changes);
            taken.slice_changes = std::mem::take(&mut self.slice_changes);
            self.oldest = None;
            // It had room for every Service there is.
            self.places = HashMap::new();
        }
        taken
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub const fn pending_changes(&self) -> (usize, usize) {
        (self.service_changes, self.slice_changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(queue: &mut Queue, limit: usize) -> Vec<String> {
        queue.take(limit).services.iter().map(|name| name.name.to_string()).collect()
    }

    #[test]
    fn changes_go_before_comparisons_and_who_waits_keeps_the_place() {
        let mut queue = Queue::default();
        for name in ["b", "a", "kubernetes", "c"] {
            queue.push(ObjectName::new("default", name), Urgency::Compared);
        }
        queue.push(ObjectName::new("default", "c"), Urgency::Changed);
        assert_eq!(names(&mut queue, 3), ["kubernetes", "c", "b"]);
        // Everything is to be compared once more: `a` has waited longest.
        for name in ["b", "a", "c"] {
            queue.push(ObjectName::new("default", name), Urgency::Compared);
        }
        assert_eq!(names(&mut queue, 9), ["a", "b", "c"]);
        assert!(queue.is_empty());
    }
}
