#![no_std]
//! What the daemon and the eBPF programs must agree on, and the packet logic.
//!
//! * [`layout`]: the structs in the maps, their version, and the limits.
//! * [`order`]: byte-order newtypes, so that a port cannot be stored the wrong way round.
//! * [`packet`]: a packet's bytes, read and written; [`checksum`], [`crc32c`]: the sums over
//!   them.
//! * [`parse`]: bytes of a frame to its tuple.
//! * [`tables`]: the maps and the network, as the logic sees them.
//! * [`select`]: which backend; [`flow`]: connection tracking.
//! * [`socket`], [`device`]: decisions, generic over [`tables`].
//! * [`verdict`]: what is to become of a packet or a connect, and why.
//! * [`fast`]: the short way of a flow's packets.
//! * [`rewrite`], [`answer`]: a packet made into another one; [`direct`]: put inside one.
//!
//! Nothing here knows of eBPF: the same code is compiled into the programs
//! (`src/programs`, feature `programs`, target `bpfel-unknown-none`) and into unit tests
//! on the host. Functions are `#[inline(always)]` where the verifier has to follow a
//! packet pointer through them: it does not track bounds through memory or calls.

#[cfg(test)]
extern crate std;

pub mod answer;
pub mod checksum;
pub mod crc32c;
pub mod device;
pub mod direct;
#[cfg(any(test, feature = "host"))]
pub mod fake;
pub mod fast;
pub mod flow;
pub mod layout;
pub mod order;
pub mod packet;
pub mod parse;
pub mod rewrite;
pub mod select;
pub mod socket;
pub mod tables;
pub mod unmatched;
pub mod verdict;
