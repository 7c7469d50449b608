//! The data planes behind one trait.
pub mod ebpf;
pub mod ipvs;
