//! Sources of objects: the Kubernetes API or a directory of manifests.
//!
//! Wire types end here: what leaves is [`crate::model::Event`].

pub mod convert;
