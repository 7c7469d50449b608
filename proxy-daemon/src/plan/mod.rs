//! From what Services want to an ordered list of kernel operations. Pure.
//!
//! Three steps, each O(change): [`Claims`] settles which Service holds a frontend,
//! [`Objects`] counts the kernel objects that frontends need together (an address
//! serves many ports), and [`diff()`] compares the objects touched with what the kernel
//! is known to hold. [`Drain`] keeps those that may only go when their connections
//! have.
//!
//! The kernel objects themselves belong to the data plane; here they are an
//! [`ObjectKey`] with a value.

mod claims;
mod diff;
mod drain;
mod objects;

pub use claims::{Claims, Conflict, Replaced};
pub use diff::{Op, diff};
pub use drain::Drain;
pub use objects::{ObjectKey, Objects};

#[cfg(test)]
mod prop_tests;
