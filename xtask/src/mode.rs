//! The data planes, as developer commands take them.

use clap::ValueEnum;

/// `--proxy-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// IPVS over netlink
    Ipvs,
    /// eBPF programs and maps
    Ebpf,
}
