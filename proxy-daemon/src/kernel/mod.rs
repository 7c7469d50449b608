//! One thin seam per kernel interface. Each is a trait with a real and a fake
//! implementation; errors keep the errno.
pub mod bpf;
pub mod capabilities;
pub mod conntrack;
pub mod ipset;
pub mod links;
pub mod listeners;
pub mod memory;
pub mod modules;
pub mod namespace;
pub mod netdev;
pub mod netlink;
pub mod nftables;
pub mod sockets;
pub mod sysctl;
pub mod xtables;
