//! The engine: single owner of all state, one thread, no locks.
//!
//! [`Engine::step`] is a function of the inputs and the time passed in; [`run`] is the
//! thread around it.

mod engine;
mod node_ports;
mod queue;
mod reading;
mod report;
mod retry;
mod runner;

pub use engine::{Engine, EngineConfig};
pub use node_ports::NodePortAddresses;
pub use reading::{Background, Threads};
pub use report::{Failing, HealthCheck, Observer, SyncKind, SyncReport, Totals, Work};
pub use runner::{Input, run};

#[cfg(test)]
mod prop_tests;
#[cfg(test)]
mod tests;
