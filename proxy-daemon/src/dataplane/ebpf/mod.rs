//! eBPF data plane.
