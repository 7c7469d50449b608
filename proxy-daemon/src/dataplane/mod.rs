//! The data planes behind one trait.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::model::{Family, Node};
use crate::plan::{ObjectKey, Op};
use crate::policy::{Frontend, FrontendKey};

pub mod ebpf;
pub mod fake;
pub mod ipvs;

/// Why one operation did not take effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// The kernel said no: the object is as it was before.
    #[error("{0}")]
    Refused(String),
    /// It is not known what the kernel holds now: it must be read back.
    #[error("{0}; what the kernel holds is unknown")]
    Unknown(String),
}

/// Something that concerns the whole data plane, not one object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {reason}")]
pub struct PlaneError {
    pub what: &'static str,
    pub reason: String,
}

impl PlaneError {
    pub fn new(what: &'static str, reason: impl std::fmt::Display) -> Self {
        Self { what, reason: reason.to_string() }
    }
}

/// What the kernel holds.
#[derive(Debug)]
pub struct Readback<K: ObjectKey> {
    /// Objects that carry our mark of ownership.
    pub ours: HashMap<K, K::Value>,
    /// Others of the same kind: adopted if wanted, never touched if not.
    pub foreign: HashMap<K, K::Value>,
}

impl<K: ObjectKey> Default for Readback<K> {
    fn default() -> Self {
        Self { ours: HashMap::new(), foreign: HashMap::new() }
    }
}

/// Requests sent so far, as the kernel seams count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkDone {
    pub requests: u64,
    pub dumps: u64,
    pub sends: u64,
}

/// One look for flows that are bound to endpoints which serve no longer, in the tables of
/// one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowRelease {
    pub family: Family,
    pub duration: Duration,
    /// Flows that were released, or `None` when it failed.
    pub released: Option<usize>,
}

/// A data plane: lowers frontends to its kernel objects and applies operations on them.
pub trait Dataplane: Send {
    type Key: ObjectKey;

    /// The kernel objects that make `frontend` work. Depends on nothing else but on what
    /// the kernel can do, which is asked at most once.
    fn lower(
        &mut self,
        key: &FrontendKey,
        frontend: &Frontend,
    ) -> Vec<(Self::Key, <Self::Key as ObjectKey>::Value)>;

    /// The Node is now this. True when what [`Dataplane::prepare`] makes depends on what
    /// changed, so that it has to be called again.
    fn node_changed(&mut self, node: Option<&Node>) -> bool;

    /// The node has these addresses now. Called before frontends are lowered again.
    fn addresses_changed(&mut self, _addresses: &[IpAddr]) {}

    /// Makes what all frontends stand on: links, tables, sysctls. Idempotent.
    fn prepare(&mut self) -> Result<(), PlaneError>;

    fn readback(&mut self) -> Result<Readback<Self::Key>, PlaneError>;

    /// Applies the operations in order; one result each.
    fn apply(&mut self, ops: &[Op<Self::Key>]) -> Vec<Result<(), OpError>>;

    /// Of these retired objects, those that no connection uses any more.
    fn unused(&mut self, retired: &[Self::Key]) -> Result<Vec<Self::Key>, PlaneError>;

    fn work(&self) -> WorkDone;

    /// What was done about flows of endpoints that are gone, since the last call of this.
    fn take_releases(&mut self) -> Vec<FlowRelease> {
        Vec::new()
    }
}
