//! IPVS data plane.

pub mod proc;
