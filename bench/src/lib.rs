//! The benchmarks: our ipvs mode against kube-proxy's iptables rules, interleaved in one
//! guest; and what ebpf mode's programs cost on this machine. `docs/benchmarks.md` says what
//! is measured and what the numbers are worth.

pub mod ebpf;
pub mod iptables;
pub mod measure;
pub mod network;
pub mod peer;
pub mod plot;
pub mod record;
pub mod report;
