//! Whole-system tests: the servers, networks and machines that the daemon is tested
//! against.

pub mod apiserver;
pub mod bed;
pub mod binary;
pub mod cluster;
pub mod confinement;
pub mod conformance;
pub mod daemon;
pub mod demo;
pub mod ebpf;
pub mod mounts;
pub mod node;
pub mod offload;
pub mod port;
pub mod scale;
pub mod traffic;
pub mod tunnel;
pub mod witness;
