//! Sources of objects: the Kubernetes API or a directory of manifests.
//!
//! Wire types end here: what leaves is [`crate::model::Event`]. Both sources hand every
//! object to the same conversion ([`convert`]) and the same book-keeping (what was
//! rejected, what was already logged), so that a manifest behaves like an API object.

pub mod announce;
pub mod convert;
mod intake;
pub mod kube;
pub mod manifests;
mod outage;
pub mod stats;
mod wire;

pub use intake::Outlet;
pub use stats::{Cause, ObjectKind, SourceStats};
