//! The data planes behind one trait.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::model::{Family, Node};
use crate::plan::{ObjectKey, Op};
use crate::policy::{Frontend, FrontendKey};

pub mod ebpf;
pub mod fake;
pub mod ipvs;
pub mod kubeproxy;
mod readback;
pub mod traffic;

pub use readback::{Give, Piece, Pieces, Reader};

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

/// How much of a kernel table that can be full is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    pub table: &'static str,
    pub used: u32,
    pub capacity: u32,
    /// How often it was replaced by a larger one.
    pub growths: u64,
}

/// What the Services stand in.
#[derive(Debug, Clone, Copy, Default)]
pub struct Surroundings<'a> {
    pub node: Option<&'a Node>,
    /// The ranges that ClusterIPs are taken from, as far as they are known.
    pub service_cidrs: &'a [IpNetwork],
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

    /// The surroundings are now these. True when what [`Dataplane::prepare`] makes depends
    /// on what changed, so that it has to be called again, and frontends are lowered again.
    fn surroundings_changed(&mut self, now: Surroundings<'_>) -> bool;

    /// The node has these addresses now. Called before frontends are lowered again.
    fn addresses_changed(&mut self, _addresses: &[IpAddr]) {}

    /// Makes what all frontends stand on: links, tables, sysctls. Idempotent.
    fn prepare(&mut self) -> Result<(), PlaneError>;

    /// What reads back all that the kernel holds; another thread may run it while
    /// operations go on.
    fn reader(&mut self) -> Result<Reader<Self::Key>, PlaneError>;

    /// A readback found this object, of our making.
    fn found(&mut self, _key: &Self::Key, _value: &<Self::Key as ObjectKey>::Value) {}

    /// Applies the operations in order; one result each.
    fn apply(&mut self, ops: &[Op<Self::Key>]) -> Vec<Result<(), OpError>>;

    /// Of these retired objects, those that no connection uses any more.
    fn unused(&mut self, retired: &[Self::Key]) -> Result<Vec<Self::Key>, PlaneError>;

    /// Everything wanted is in the kernel. Of the unwanted foreign objects, those that an
    /// earlier proxy left and that are to be deleted now. What else it left is removed
    /// besides, without keeping the caller waiting.
    fn superseded(
        &mut self,
        _foreign: &HashMap<Self::Key, <Self::Key as ObjectKey>::Value>,
    ) -> Vec<Self::Key> {
        Vec::new()
    }

    fn work(&self) -> WorkDone;

    /// Tables that can be full.
    fn fill(&self) -> Vec<Fill> {
        Vec::new()
    }

    /// How many things that [`Dataplane::prepare`] makes somebody had taken away, since the last call
    /// of this.
    fn take_put_back(&mut self) -> u64 {
        0
    }

    /// What was done about flows of endpoints that are gone, since the last call of this.
    fn take_releases(&mut self) -> Vec<FlowRelease> {
        Vec::new()
    }
}
