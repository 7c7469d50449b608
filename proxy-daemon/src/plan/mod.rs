//! From what Services want to an ordered list of kernel operations. Pure.
//!
//! Three steps, each O(change): [`Claims`] settles which Service holds a frontend,
//! [`Ledger`] counts the kernel objects that frontends need together (an address serves
//! many ports) beside what the kernel is known to hold, and [`diff()`] compares the objects
//! touched. [`Drain`] keeps those that may only go when their connections have.
//!
//! The kernel objects themselves belong to the data plane; here they are an
//! [`ObjectKey`] with a value.

mod claims;
mod diff;
mod drain;
mod ledger;
mod objects;

pub use claims::{Claims, Conflict, Replaced};
pub use diff::{Op, deletions, diff};
pub use drain::Drain;
pub use ledger::{Ledger, Sweep};
pub use objects::{ObjectKey, Standing};

#[cfg(test)]
mod prop_tests;
