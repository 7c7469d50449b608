//! What users of other proxies suffer from, each as a test of its own; how it comes about
//! there is said at each test.
//!
//! The guest is emulated, 10 to 30 times slower than hardware: where a promise names a time
//! the test prints what it measured and asserts what a stalled mechanism breaks (a SYN is
//! repeated after 1 s, a resync comes after 30 s) and a slow processor does not.

mod connections;
mod frontends;
mod objects;
mod restart;
mod scale;
mod stage;
