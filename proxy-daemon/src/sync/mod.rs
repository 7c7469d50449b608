//! The engine: single owner of all state, one thread, no locks.
pub mod report;

pub use report::{Failing, HealthCheck, Observer, SyncKind, SyncReport, Totals, Work};
