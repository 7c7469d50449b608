//! IPVS data plane.
