//! What the daemon tells the programs besides the service table.

use super::ServiceId;
use crate::order::{Address, Be16, Be32};

/// The one value of `CONFIG`. All zero is a working configuration without any feature.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// `Config::OPT_OUTS | ..`
    pub features: u32,
    /// Of the hash that chooses backends; the same on all nodes, so that they agree.
    pub seed: u32,
    /// Source of masqueraded packets where the device has none of its own.
    pub source4: Address,
    pub source6: Address,
    /// Ports of masqueraded packets, inclusive.
    pub port_low: u16,
    pub port_high: u16,
    /// How many of `service_prefixes` there are.
    pub prefixes: u32,
    /// Where addresses of Services are.
    pub service_prefixes: [Prefix; Self::MAX_PREFIXES],
    pub timeouts: Timeouts,
    /// How many of `service_prefixes`, the first ones, hold nothing but Services: what is
    /// nobody's there goes nowhere. The others only say where to look for a Service's address.
    pub dropping: u32,
    /// UDP port of packets inside others ([`crate::direct`]).
    pub direct_port: Be16,
    pub pad: u16,
    /// Cookie of the node's network namespace, where 127.0.0.1 is the node; 0: not known.
    pub namespace: u64,
}

impl Config {
    /// `OPT_OUTS` is not empty.
    pub const OPT_OUTS: u32 = 1;
    /// TCP peers are recorded, so that `getpeername(2)` tells the Service's address.
    pub const TCP_PEER_NAMES: u32 = 1 << 1;
    /// Connections to frontends may go through another proxy's translation: packets that neither
    /// begin one nor belong to a flow are left to that.
    pub const OTHERS_CONNECTIONS: u32 = 1 << 2;
    /// Packets that another node sends on inside others are taken.
    pub const DIRECT_ACCEPT: u32 = 1 << 3;
    /// And sent: a client's packet to a backend of another node.
    pub const DIRECT_SEND: u32 = 1 << 4;

    /// Prefixes of `PREFIXES` with [`client::SERVICE`] hold nothing but Services either.
    pub const MORE_RANGES: u32 = 1 << 5;

    pub const MAX_PREFIXES: usize = 4;
}

/// In seconds.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    pub tcp_opening: u32,
    pub tcp_established: u32,
    pub tcp_closing: u32,
    pub udp: u32,
    pub udp_replied: u32,
    pub sctp: u32,
}

impl Default for Timeouts {
    /// As the kernel's conntrack has them, except for the established TCP connection,
    /// where kube-proxy asks for a day.
    fn default() -> Self {
        Self {
            tcp_opening: 60,
            tcp_established: 86_400,
            tcp_closing: 10,
            udp: 30,
            udp_replied: 120,
            sctp: 3_600,
        }
    }
}

/// The addresses `a` for which `a & mask == address`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prefix {
    pub address: Address,
    pub mask: Address,
}

impl Prefix {
    /// `length` counts from the front of the 128 bits: that of an IPv4 prefix is 96 more.
    #[must_use]
    pub fn new(address: Address, length: u32) -> Self {
        let mut mask = [Be32::default(); 4];
        let mut network = address.words();
        let mut left = length.min(128);
        for (mask, word) in mask.iter_mut().zip(&mut network) {
            let bits = left.min(32);
            left -= bits;
            *mask = Be32::from_host(u32::MAX.checked_shl(32 - bits).unwrap_or(0));
            *word = word.masked(*mask);
        }
        Self { address: Address::v6(network), mask: Address::v6(mask) }
    }

    #[must_use]
    #[inline(always)]
    pub fn contains(&self, address: &Address) -> bool {
        let (words, masks, network) = (address.words(), self.mask.words(), self.address.words());
        let mut differs = 0;
        let mut i = 0;
        while i < 4 {
            differs |= words[i].masked(masks[i]).to_kernel() ^ network[i].to_kernel();
            i += 1;
        }
        differs == 0
    }
}

/// Value of `DEVICES`: one that has our programs.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Device {
    /// Source of packets that are masqueraded and leave here; zero: that of `Config`.
    pub source4: Address,
    pub source6: Address,
    /// `Device::PODS | ..`
    pub flags: u32,
    /// Its Ethernet address; zero: not known.
    pub mac: [u8; 6],
    pub pad: [u8; 2],
}

impl Device {
    /// Pods of this node are behind it (local detection by interface).
    pub const PODS: u32 = 1;
    /// A bridge's port. What leaves by it without having been routed is a reply of a flow
    /// that began at the bridge itself, or nothing of ours.
    pub const PORT: u32 = 1 << 1;
    /// XDP may send a frame back by it that came in by it, with `XDP_TX`.
    pub const XDP_TX: u32 = 1 << 2;
    /// It takes frames that XDP redirects. A device that does not loses them, and tells nobody.
    pub const XDP_TAKES: u32 = 1 << 3;
    /// XDP at it is generic: what is redirected goes the way of any packet, to any device.
    pub const XDP_GENERIC: u32 = 1 << 4;

    /// Hardware, or what has one of the Node's addresses: packets of other machines come in by it.
    pub const UPLINK: u32 = 1 << 5;

    /// Its packets have no link header: WireGuard, tunnels. XDP sends none by it.
    pub const BARE: u32 = 1 << 8;

    pub const XDP: u32 = Self::XDP_TX | Self::XDP_TAKES | Self::XDP_GENERIC;

    /// Whether XDP may redirect to a device what came in at one with these flags.
    #[must_use]
    #[inline(always)]
    pub const fn xdp_may_redirect(came_in: u32, out: u32) -> bool {
        // From XDP a frame leaves with the Ethernet header that it has.
        out & Self::BARE == 0 && (came_in & Self::XDP_GENERIC != 0 || out & Self::XDP_TAKES != 0)
    }
}

/// Values of `PREFIXES`: what kind of client has such an address, if one has.
pub mod client {
    /// The node itself.
    pub const NODE: u32 = 1;
    /// Inside the cluster, as local detection tells.
    pub const CLUSTER: u32 = 1 << 1;
    /// All that there are.
    pub const ANY: u32 = NODE | CLUSTER;
    /// No client, but where addresses of Services are ([`Config::MORE_RANGES`](super::Config)).
    pub const SERVICE: u32 = 1 << 2;
}

/// A socket that is not translated: its packets are, at the devices.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct OptOut {
    pub id: u64,
    /// `OptOut::NAMESPACE` or `OptOut::CGROUP`
    pub kind: u32,
    pub pad: u32,
}

impl OptOut {
    /// `id` is a network namespace's cookie.
    pub const NAMESPACE: u32 = 0;
    /// `id` is the inode of a cgroup v2 directory.
    pub const CGROUP: u32 = 1;
}

/// Key of `LOCALS`: a backend of this node, whose id is the value.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LocalKey {
    /// [`LocalKey::ANY`] says only that the address is some local backend's.
    pub service: ServiceId,
    pub address: Address,
}

impl LocalKey {
    /// No Service's.
    pub const ANY: ServiceId = ServiceId::new(0);
}

/// What a prefix of `SOURCE_RANGES` is compared with, after the length.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RangeData {
    pub service: ServiceId,
    pub address: Address,
}

impl RangeData {
    /// Bits of the Service id, all of which count.
    pub const SERVICE_BITS: u32 = 64;
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn xdp_sends_no_frame_where_it_would_be_taken_for_a_packet() {
        let (generic, takes) = (Device::XDP_GENERIC, Device::XDP_TAKES);
        assert!(Device::xdp_may_redirect(generic, 0) && Device::xdp_may_redirect(0, takes));
        assert!(!Device::xdp_may_redirect(0, 0));
        assert!(!Device::xdp_may_redirect(generic, Device::BARE));
        assert!(!Device::xdp_may_redirect(0, Device::BARE | takes));
    }

    #[test]
    fn prefixes_contain_their_addresses_only() {
        let v4 = Prefix::new(address("10.96.3.0"), 96 + 12);
        assert!(v4.contains(&address("10.111.255.255")) && v4.contains(&address("10.96.0.0")));
        assert!(!v4.contains(&address("10.112.0.0")) && !v4.contains(&address("fd00::1")));
        let v6 = Prefix::new(address("fd00:96::"), 108);
        assert!(v6.contains(&address("fd00:96::f:ffff")));
        assert!(!v6.contains(&address("fd00:96::10:0")));
        assert!(Prefix::new(address("::"), 0).contains(&address("1.2.3.4")));
        assert!(!Prefix::new(address("::1"), 128).contains(&address("::2")));
    }
}
