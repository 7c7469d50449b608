//! Virtual servers and real servers as values.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;
use std::ops::BitOr;
use std::str::FromStr;
use std::sync::Arc;

use crate::model::{Family, Protocol};

/// What makes a virtual server one of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VirtualServerKey {
    Address {
        addr: IpAddr,
        protocol: Protocol,
        /// 0: every port (only with persistence).
        port: u16,
    },
    /// Packets with this firewall mark.
    FwMark { mark: NonZeroU32, family: Family },
}

impl VirtualServerKey {
    #[must_use]
    pub const fn family(&self) -> Family {
        match self {
            Self::Address { addr, .. } => Family::of(*addr),
            Self::FwMark { family, .. } => *family,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no name of an IPVS scheduler: 1 to 15 bytes without spaces or NUL")]
pub struct InvalidName {
    pub name: String,
}

/// The name of a scheduler: the kernel loads the module `ip_vs_<name>` for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SchedulerName(Arc<str>);

impl SchedulerName {
    /// `IP_VS_SCHEDNAME_MAXLEN` is 16, with the terminating NUL.
    pub fn new(name: &str) -> Result<Self, InvalidName> {
        let usable =
            (1..16).contains(&name.len()) && !name.chars().any(|c| c == '\0' || c.is_whitespace());
        if usable { Ok(Self(name.into())) } else { Err(InvalidName { name: name.to_owned() }) }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The module that provides it.
    #[must_use]
    pub fn module(&self) -> String {
        format!("ip_vs_{}", self.0)
    }
}

impl FromStr for SchedulerName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        Self::new(name)
    }
}

impl fmt::Display for SchedulerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `IP_VS_SVC_F_*` that users set. `IP_VS_SVC_F_HASHED` is none of them: it is the
/// kernel's own note, cleared here when read and never sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ServiceFlags(u32);

impl ServiceFlags {
    const HASHED: u32 = 0x2;

    /// A client stays with its real server for the timeout.
    pub const PERSISTENT: Self = Self(0x1);
    /// Each datagram is scheduled by itself.
    pub const ONE_PACKET: Self = Self(0x4);
    /// The meaning of these three is the scheduler's: for `sh` fallback and port, for
    /// `mh` likewise.
    pub const SCHEDULER_1: Self = Self(0x8);
    pub const SCHEDULER_2: Self = Self(0x10);
    pub const SCHEDULER_3: Self = Self(0x20);

    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits & !Self::HASHED)
    }

    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// All flags are replaced by a request, but for the kernel's own.
    pub(super) const MASK: u32 = !Self::HASHED;
}

impl BitOr for ServiceFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Clients that this does not tell apart share one persistent real server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Netmask {
    V4(Ipv4Addr),
    /// 1 to 128 bits: the kernel takes a prefix length for IPv6.
    V6(u8),
}

impl Netmask {
    /// Every address is a client of its own.
    #[must_use]
    pub const fn host(family: Family) -> Self {
        match family {
            Family::V4 => Self::V4(Ipv4Addr::BROADCAST),
            Family::V6 => Self::V6(128),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualServer {
    pub key: VirtualServerKey,
    pub scheduler: SchedulerName,
    pub flags: ServiceFlags,
    /// Of persistence, seconds.
    pub timeout: u32,
    pub netmask: Netmask,
    /// The persistence engine (`sip`), which finds the client in the payload.
    pub persistence_engine: Option<SchedulerName>,
}

impl VirtualServer {
    /// Without persistence.
    #[must_use]
    pub const fn new(key: VirtualServerKey, scheduler: SchedulerName) -> Self {
        Self {
            key,
            scheduler,
            flags: ServiceFlags(0),
            timeout: 0,
            netmask: Netmask::host(key.family()),
            persistence_engine: None,
        }
    }
}

/// `IP_VS_CONN_F_FWD_MASK`: how packets get to the real server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Forward {
    #[default]
    Masquerade,
    Local,
    Tunnel,
    DirectRoute,
    Bypass,
    /// 5 to 7: no kernel so far.
    Other(u8),
}

impl Forward {
    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Masquerade => 0,
            Self::Local => 1,
            Self::Tunnel => 2,
            Self::DirectRoute => 3,
            Self::Bypass => 4,
            Self::Other(number) => (number & 7) as u32,
        }
    }

    pub(super) const fn from_number(number: u32) -> Self {
        match number & 7 {
            0 => Self::Masquerade,
            1 => Self::Local,
            2 => Self::Tunnel,
            3 => Self::DirectRoute,
            4 => Self::Bypass,
            5 => Self::Other(5),
            6 => Self::Other(6),
            _ => Self::Other(7),
        }
    }
}

/// Encapsulation of [`Forward::Tunnel`] (kernel 5.2 on). All 0 is IP in IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tunnel {
    /// `IP_VS_CONN_F_TUNNEL_TYPE_*`.
    pub kind: u8,
    /// Of GUE.
    pub port: u16,
    /// `IP_VS_TUNNEL_ENCAP_FLAG_*`.
    pub flags: u16,
}

/// What makes a real server one of its virtual server's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RealServerKey {
    pub addr: IpAddr,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RealServer {
    pub key: RealServerKey,
    pub forward: Forward,
    /// 0: no new connections; at most `i32::MAX`, else ERANGE.
    pub weight: u32,
    /// Connections at which the server takes no more; 0 is no bound.
    pub upper_threshold: u32,
    /// Connections below which it takes them again; 0 is 3/4 of the upper one.
    pub lower_threshold: u32,
    pub tunnel: Tunnel,
}

impl RealServer {
    /// Masqueraded, without thresholds.
    #[must_use]
    pub fn new(addr: IpAddr, port: u16, weight: u32) -> Self {
        Self {
            key: RealServerKey { addr, port },
            forward: Forward::Masquerade,
            weight,
            upper_threshold: 0,
            lower_threshold: 0,
            tunnel: Tunnel::default(),
        }
    }
}

/// `IPVS_STATS_ATTR_*` of the 64-bit kind: totals, and rates per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    pub connections: u64,
    pub in_packets: u64,
    pub out_packets: u64,
    pub in_bytes: u64,
    pub out_bytes: u64,
    pub connection_rate: u64,
    pub in_packet_rate: u64,
    pub out_packet_rate: u64,
    pub in_byte_rate: u64,
    pub out_byte_rate: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConnectionCounts {
    pub active: u32,
    pub inactive: u32,
    /// Persistence templates.
    pub persistent: u32,
}

/// A virtual server as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualServerStatus {
    pub server: VirtualServer,
    pub stats: Stats,
}

/// A real server as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RealServerStatus {
    pub server: RealServer,
    pub connections: ConnectionCounts,
    pub stats: Stats,
}

/// Seconds. `None`: leave as it is, or not reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timeouts {
    /// Of established TCP connections without traffic.
    pub tcp: Option<u32>,
    /// After a FIN.
    pub tcp_fin: Option<u32>,
    pub udp: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// `IP_VS_VERSION_CODE`, 1.2.1 since 2.6.
    pub version: (u8, u8, u8),
    pub connection_table_size: u32,
}
