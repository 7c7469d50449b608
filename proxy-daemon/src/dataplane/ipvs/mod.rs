//! IPVS data plane.

pub mod codec;
pub mod proc;
