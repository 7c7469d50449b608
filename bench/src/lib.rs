//! The benchmark: our ipvs mode against kube-proxy's iptables rules, interleaved in one
//! guest. `docs/benchmarks.md` says what is measured and what the numbers are worth.

pub mod iptables;
pub mod measure;
pub mod network;
pub mod peer;
pub mod plot;
pub mod record;
pub mod report;
