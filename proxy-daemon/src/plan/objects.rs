//! What a kernel object is to the plan.

use std::fmt;
use std::hash::Hash;
use std::ops::RangeInclusive;

use crate::model::HostPort;
use crate::policy::FrontendKey;

/// What an endpoint that a frontend does not lead to is to the Service: an endpoint may be out of
/// every set that clients reach, and be there all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// In no slice.
    Gone,
    /// In a slice, and serves nobody.
    Present,
    /// It serves those who reach it: it is terminating, or others are nearer.
    Serving,
}

/// A kernel object of a data plane: identity, with a value that can be updated in place.
pub trait ObjectKey: Clone + Eq + Hash + Ord + fmt::Debug + fmt::Display + Send + 'static {
    type Value: Clone + PartialEq + fmt::Debug + Send + 'static;

    /// Position among the creations and updates of one round: lower goes first.
    fn create_phase(&self) -> u8;

    /// Position among the deletions of one round, all of which come after all creations.
    fn delete_phase(&self) -> u8;

    /// The object goes before anything is created in the same round, since it may stand
    /// in the way of what replaces it.
    fn deleted_first(&self) -> bool {
        false
    }

    /// The value under which the object takes no new connection but keeps those it has;
    /// `None` for objects that are deleted at once, as the endpoint stands.
    fn retired(&self, value: &Self::Value, standing: Standing) -> Option<Self::Value>;

    /// The frontend and the endpoint whose connections go through the object.
    fn leads_to(&self) -> Option<(FrontendKey, HostPort)> {
        None
    }

    /// The object that those of a frontend are the children of, where there is such a one.
    fn server_of(_frontend: &FrontendKey) -> Option<Self> {
        None
    }

    /// The objects that a frontend wants as a rule, as its key tells them, always in the same
    /// order: which of the first sixteen it does want takes a bit each to remember.
    fn usual(_frontend: &FrontendKey) -> Vec<Self> {
        Vec::new()
    }

    /// The object that this one lives in: when that goes, there is nothing to keep.
    fn parent(&self) -> Option<Self>;

    /// Where in the order the objects are that live in this one, when all of them are
    /// together and nobody wants one but the frontend that wants this one.
    fn children(&self) -> Option<RangeInclusive<Self>> {
        None
    }
}
