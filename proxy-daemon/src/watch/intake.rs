//! From one API object to one event: conversion, counting, and saying once what was
//! wrong with it.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Debug;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::announce::{Announcement, Announcer, Regarding};
use super::convert::{self, Complaint, Converted};
use super::stats::{KindStats, ObjectKind, SourceStats};
use super::wire::{self, Object as _};
use crate::model::{
    Change, EndpointSlice, Event, Node, ObjectName, Rejected, Service, ServiceCidr,
};

/// The receiver of events is gone: the source has nothing left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Closed;

/// One kind of object that a source delivers.
pub(super) trait Kind: Send + 'static {
    type Object: wire::Object;
    type Model: Debug + Send;
    const KIND: ObjectKind;
    /// Whether there are API servers without this kind that are good enough for us.
    const OPTIONAL: bool = false;
    fn convert(object: &Self::Object) -> Converted<Self::Model>;
    /// `None` when the change tells nothing.
    fn event(change: Change<Self::Model>) -> Option<Event>;
}

#[derive(Debug)]
pub(super) struct Services;

impl Kind for Services {
    type Object = wire::Service;
    type Model = Service;
    const KIND: ObjectKind = ObjectKind::Service;

    fn convert(object: &wire::Service) -> Converted<Service> {
        convert::service(object)
    }

    fn event(change: Change<Service>) -> Option<Event> {
        Some(Event::Services(change))
    }
}

#[derive(Debug)]
pub(super) struct Slices;

impl Kind for Slices {
    type Object = wire::EndpointSlice;
    type Model = EndpointSlice;
    const KIND: ObjectKind = ObjectKind::EndpointSlice;

    fn convert(object: &wire::EndpointSlice) -> Converted<EndpointSlice> {
        convert::slice(object)
    }

    fn event(change: Change<EndpointSlice>) -> Option<Event> {
        Some(Event::Slices(change))
    }
}

/// The one Node of this proxy: its source selects it by name.
#[derive(Debug)]
pub(super) struct Nodes;

impl Kind for Nodes {
    type Object = wire::Node;
    type Model = Node;
    const KIND: ObjectKind = ObjectKind::Node;

    fn convert(object: &wire::Node) -> Converted<Node> {
        convert::node(object)
    }

    fn event(change: Change<Node>) -> Option<Event> {
        match change {
            Change::Applied(node) => Some(Event::Node(Some(node))),
            Change::Gone(_) => Some(Event::Node(None)),
            // It exists, but cannot be used: the last good version stays.
            Change::Reset { objects, rejected } if objects.is_empty() && !rejected.is_empty() => {
                None
            }
            Change::Reset { mut objects, .. } => Some(Event::Node(objects.pop())),
        }
    }
}

#[derive(Debug)]
pub(super) struct ServiceCidrs;

impl Kind for ServiceCidrs {
    type Object = wire::ServiceCIDR;
    type Model = ServiceCidr;
    const KIND: ObjectKind = ObjectKind::ServiceCidr;
    /// Since Kubernetes 1.33.
    const OPTIONAL: bool = true;

    fn convert(object: &wire::ServiceCIDR) -> Converted<ServiceCidr> {
        convert::service_cidr(object)
    }

    fn event(change: Change<ServiceCidr>) -> Option<Event> {
        Some(Event::ServiceCidrs(change))
    }
}

/// A list while it comes in.
#[derive(Debug)]
pub(super) struct Listing<M> {
    objects: Vec<M>,
    rejected: Vec<Rejected>,
}

impl<M> Default for Listing<M> {
    fn default() -> Self {
        Self { objects: Vec::new(), rejected: Vec::new() }
    }
}

/// Where a source delivers, counts and announces.
#[derive(Debug, Clone)]
pub struct Outlet {
    pub events: mpsc::Sender<Event>,
    pub stats: Arc<SourceStats>,
    pub announcer: Announcer,
}

/// Turns objects of one kind into events.
#[derive(Debug)]
pub(super) struct Intake<K> {
    outlet: Outlet,
    notices: Notices,
    kind: PhantomData<K>,
}

impl<K: Kind> Intake<K> {
    pub(super) fn new(outlet: Outlet) -> Self {
        Self { outlet, notices: Notices::default(), kind: PhantomData }
    }

    pub(super) fn stats(&self) -> &KindStats {
        self.outlet.stats.kind(K::KIND)
    }

    /// One object of a list, or why it could not even be decoded.
    pub(super) fn list(
        &mut self,
        name: &ObjectName,
        object: Result<&K::Object, String>,
        listing: &mut Listing<K::Model>,
    ) {
        match self.convert(name, object) {
            Converted::Ours(model, _) => listing.objects.push(model),
            Converted::NotOurs(_) => {}
            Converted::Rejected(rejected) => listing.rejected.push(rejected),
        }
    }

    /// The list is whole.
    pub(super) async fn listed(&mut self, listing: Listing<K::Model>) -> Result<(), Closed> {
        let Listing { objects, rejected } = listing;
        self.stats().count_list();
        self.notices.end_of_list();
        let reset = Change::Reset {
            objects,
            rejected: rejected.iter().map(|one| one.name.clone()).collect(),
        };
        self.send(K::event(reset)).await?;
        for rejected in rejected {
            self.send(Some(Event::Rejected(rejected))).await?;
        }
        Ok(())
    }

    /// A single object was added or modified.
    pub(super) async fn applied(
        &mut self,
        name: &ObjectName,
        object: Result<&K::Object, String>,
    ) -> Result<(), Closed> {
        self.stats().count_applied();
        match self.convert(name, object) {
            Converted::Ours(model, _) => self.send(K::event(Change::Applied(model))).await,
            Converted::NotOurs(_) => self.gone(name).await,
            Converted::Rejected(rejected) => self.send(Some(Event::Rejected(rejected))).await,
        }
    }

    pub(super) async fn gone(&mut self, name: &ObjectName) -> Result<(), Closed> {
        self.stats().count_gone();
        self.notices.forget(name);
        self.send(K::event(Change::Gone(name.clone()))).await
    }

    pub(super) fn is_closed(&self) -> bool {
        self.outlet.events.is_closed()
    }

    async fn send(&self, event: Option<Event>) -> Result<(), Closed> {
        match event {
            Some(event) => self.outlet.events.send(event).await.map_err(|_| Closed),
            None => Ok(()),
        }
    }

    fn convert(
        &mut self,
        name: &ObjectName,
        object: Result<&K::Object, String>,
    ) -> Converted<K::Model> {
        let kind = K::KIND.label();
        let uid = object.as_ref().ok().and_then(|object| object.metadata().uid.clone());
        let converted = match object {
            Ok(object) => K::convert(object),
            Err(reason) => Converted::Rejected(Rejected { kind, name: name.clone(), reason }),
        };
        match &converted {
            Converted::Ours(_, complaints) => {
                for complaint in complaints {
                    self.stats().count_complaint(complaint.part);
                }
                if self.notices.is_news(name, complaints) {
                    let what = brief(complaints);
                    warn!(%kind, object = %name, "not used: {what}");
                    self.announce(name, uid, "PartlyRejected", format!("not used: {what}"));
                }
            }
            Converted::NotOurs(why) => debug!(%kind, object = %name, "not ours: {why}"),
            Converted::Rejected(rejected) => {
                self.stats().count_rejected();
                if self.notices.is_news(name, &rejected.reason) {
                    let reason = &rejected.reason;
                    warn!(%kind, object = %name, "rejected, its last good version stays: {reason}");
                    let note = format!("rejected, its last good version stays: {reason}");
                    self.announce(name, uid, "Rejected", note);
                }
            }
        }
        converted
    }

    fn announce(&self, name: &ObjectName, uid: Option<String>, reason: &'static str, note: String) {
        let name = name.clone();
        self.outlet.announcer.announce(Announcement {
            regarding: Regarding { kind: K::KIND.label(), name, uid },
            warning: true,
            reason,
            action: "Convert",
            note,
        });
    }
}

/// A slice can hold a thousand bad endpoints: the log line names the first few.
fn brief(complaints: &[Complaint]) -> String {
    const NAMED: usize = 5;
    let mut text: Vec<String> = complaints.iter().take(NAMED).map(ToString::to_string).collect();
    if complaints.len() > NAMED {
        text.push(format!("and {} more", complaints.len() - NAMED));
    }
    text.join("; ")
}

/// What was said about which object, so that lists and updates that change nothing
/// about it do not repeat it. As large as the number of objects with faults.
#[derive(Debug, Default)]
struct Notices {
    said: HashMap<ObjectName, Said>,
    list: u64,
}

#[derive(Debug)]
struct Said {
    hash: u64,
    /// The list during which it was last found.
    list: u64,
}

impl Notices {
    /// Whether this was not yet said of the object. Nothing to say is never news.
    fn is_news<T: Hash + Empty + ?Sized>(&mut self, name: &ObjectName, what: &T) -> bool {
        if what.is_empty() {
            self.said.remove(name);
            return false;
        }
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        let said = Said { hash: hasher.finish(), list: self.list };
        let hash = said.hash;
        self.said.insert(name.clone(), said).is_none_or(|before| before.hash != hash)
    }

    fn forget(&mut self, name: &ObjectName) {
        self.said.remove(name);
    }

    /// What the list that ends now did not hold is forgotten.
    fn end_of_list(&mut self) {
        let list = self.list;
        self.said.retain(|_, said| said.list == list);
        self.list += 1;
    }
}

trait Empty {
    fn is_empty(&self) -> bool;
}

impl Empty for Vec<Complaint> {
    fn is_empty(&self) -> bool {
        Self::is_empty(self)
    }
}

impl Empty for String {
    fn is_empty(&self) -> bool {
        Self::is_empty(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_fault_is_news_once_until_it_changes_or_the_object_goes() {
        let mut notices = Notices::default();
        let name = ObjectName::new("shop", "web");
        let fault = "port 70000".to_owned();
        assert!(notices.is_news(&name, &fault));
        assert!(!notices.is_news(&name, &fault));
        notices.end_of_list();
        assert!(!notices.is_news(&name, &fault));
        assert!(notices.is_news(&name, &"port 70001".to_owned()));
        assert!(!notices.is_news(&name, &String::new()));
        assert!(notices.is_news(&name, &fault));
        notices.forget(&name);
        assert!(notices.is_news(&name, &fault));
    }

    #[test]
    fn faults_of_objects_that_left_the_list_are_forgotten() {
        let mut notices = Notices::default();
        let name = ObjectName::new("shop", "web");
        assert!(notices.is_news(&name, &"fault".to_owned()));
        notices.end_of_list();
        assert_eq!(notices.said.len(), 1);
        notices.end_of_list();
        assert_eq!(notices.said.len(), 0);
    }

    #[test]
    fn a_node_that_cannot_be_used_is_not_a_node_that_is_gone() {
        let name = ObjectName::new("", "node-a");
        let unusable = Change::Reset { objects: vec![], rejected: vec![name.clone()] };
        assert_eq!(Nodes::event(unusable), None);
        let absent = Change::Reset { objects: vec![], rejected: vec![] };
        assert_eq!(Nodes::event(absent), Some(Event::Node(None)));
        assert_eq!(Nodes::event(Change::Gone(name)), Some(Event::Node(None)));
    }
}
