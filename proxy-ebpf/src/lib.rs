#![no_std]
//! What the daemon and the eBPF programs must agree on, and the packet logic.
//!
//! * [`layout`]: the structs in the maps, their version, and the limits.
//! * [`order`]: byte-order newtypes, so that a port cannot be stored the wrong way round.
//! * [`parse`]: bytes of a frame to the five-tuple.
//! * [`service`]: frontend lookup, selection and counting, generic over [`service::Tables`].
//! * [`verdict`]: what is to become of a packet or a connect, and why.
//!
//! Nothing here knows of eBPF: the same code is compiled into the programs
//! (`src/programs`, feature `programs`, target `bpfel-unknown-none`) and into unit tests
//! on the host. Functions are `#[inline(always)]` where the verifier has to follow a
//! packet pointer through them: it does not track bounds through memory or calls.

#[cfg(test)]
extern crate std;

pub mod layout;
pub mod order;
pub mod parse;
pub mod service;
pub mod verdict;
