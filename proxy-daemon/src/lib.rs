//! The node dataplane daemon: Services and EndpointSlices in, IPVS virtual servers
//! or eBPF maps out.
//!
//! Imports between the rooms point down this list only (`cargo xtask lint` checks):
//! `app`, `serve`, `config`, `sync`, `dataplane`, `kernel`, `plan`, `policy`, `state`,
//! `watch`, `model`. `docs/architecture.md` walks one event through all of them.

pub mod app;
pub mod config;
pub mod dataplane;
pub mod kernel;
pub mod model;
pub mod plan;
pub mod policy;
pub mod serve;
pub mod state;
pub mod sync;
pub mod watch;
