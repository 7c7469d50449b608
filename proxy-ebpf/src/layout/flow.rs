//! What the programs remember. `FLOWS` is a hash: an idle connection must not make room for new
//! ones, so that a full one refuses these; the daemon removes what has timed out, sooner when the
//! table fills. The others are LRU hashes: the kernel makes room by itself.
//!
//! ```text
//! FLOWS      Tuple       -> Flow           two entries a flow, one for each direction
//! FRAGMENTS  FragmentKey -> FragmentPorts  ports of a datagram whose rest is still to come
//! AFFINITY   AffinityKey -> Affinity
//! SOCKETS    SocketKey   -> SocketPeer     a UDP or TCP peer, and what the program knows it as
//! UDP_PEERS  SocketKey   -> SocketPeer     that of a connected UDP socket, until it is closed
//! ```

use super::{BackendId, FrontendId, ServiceId};
use crate::order::{Address, Be16};

/// Where a packet comes from and goes to. As a key: as the packet looks when it comes by.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tuple {
    pub source: Address,
    pub destination: Address,
    pub source_port: Be16,
    pub destination_port: Be16,
    /// IP protocol number: TCP, UDP or SCTP.
    pub protocol: u8,
    /// Always 0: it is compared like everything else in a key.
    pub pad: [u8; 3],
}

impl Tuple {
    /// That of the reply.
    #[must_use]
    #[inline(always)]
    pub const fn inverse(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
            pad: [0; 3],
        }
    }
}

/// Value of `FLOWS`.
///
/// A packet that looks like the key is made to look like `to`. The entry of the other
/// direction has the key `to.inverse()` and its own `to` is this key's inverse, so either
/// finds the other, and replies are translated by the exact inverse. One with
/// [`Flow::DIRECT`] stands alone.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flow {
    pub to: Tuple,
    /// `bpf_ktime_get_ns` at the last packet of this direction.
    pub seen: u64,
    pub backend: BackendId,
    pub frontend: FrontendId,
    /// `Flow::REPLY | ..`
    pub flags: u32,
    pub pad: u32,
}

impl Flow {
    /// From the backend to the client.
    pub const REPLY: u32 = 1;
    /// Sent on by the program itself. The stack would refuse the packet: its source is,
    /// or becomes, the node's own address.
    pub const FORWARD: u32 = 1 << 1;
    /// The other direction has had packets.
    pub const REPLIED: u32 = 1 << 2;
    /// This direction has sent a FIN.
    pub const FIN: u32 = 1 << 3;
    /// The other direction has.
    pub const PEER_FIN: u32 = 1 << 4;
    /// One side has reset the connection.
    pub const RESET: u32 = 1 << 5;
    /// Sent on inside other packets ([`crate::direct`]), between the addresses of `to`. Replies do
    /// not come by here: there is no entry of the other direction.
    pub const DIRECT: u32 = 1 << 6;
    /// Begun by a SYN (of SCTP: an INIT), and the client has not acknowledged an answer yet: perhaps
    /// it never will. Only in the request's entry. One that lacks it by its age is taken for
    /// established.
    pub const OPENING: u32 = 1 << 7;

    /// Neither side will send data again.
    #[must_use]
    #[inline(always)]
    pub const fn is_closing(flags: u32) -> bool {
        flags & Self::RESET != 0
            || flags & (Self::FIN | Self::PEER_FIN) == Self::FIN | Self::PEER_FIN
    }

    #[must_use]
    #[inline(always)]
    pub const fn is_direct(flags: u32) -> bool {
        flags & Self::DIRECT != 0
    }
}

/// Names the datagram that a fragment is of, RFC 791 section 3.2 and RFC 8200 section 4.5.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FragmentKey {
    pub source: Address,
    pub destination: Address,
    /// As it stands in the packet.
    pub id: u32,
    pub protocol: u8,
    pub pad: [u8; 3],
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FragmentPorts {
    pub source_port: Be16,
    pub destination_port: Be16,
}

/// A client and a Service port. The client is an address, or a network namespace when a
/// socket has none yet ([`AffinityKey::of_namespace`]).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct AffinityKey {
    pub client: Address,
    pub service: ServiceId,
}

impl AffinityKey {
    /// `cookie` in the form of an address of the discard prefix 100::/64 (RFC 6666), which
    /// no client has.
    #[must_use]
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the cookie is split into halves")]
    pub const fn of_namespace(cookie: u64, service: ServiceId) -> Self {
        use crate::order::Be32;
        let client = Address::v6([
            Be32::from_host(0x0100_0000),
            Be32::from_host(0),
            Be32::from_host((cookie >> 32) as u32),
            Be32::from_host(cookie as u32),
        ]);
        Self { client, service }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Affinity {
    /// `bpf_ktime_get_ns` at the client's last connection.
    pub seen: u64,
    pub backend: BackendId,
    /// [`Backend::place`](super::Backend::place) of that one; 0: not known.
    pub place: u32,
}

/// A socket and a backend it was sent to, or (see [`SocketKey::sent`]) a frontend.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SocketKey {
    /// `bpf_get_socket_cookie`: never used again while the kernel runs.
    pub cookie: u64,
    pub address: Address,
    pub port: Be16,
    pub pad: [u8; 6],
}

impl SocketKey {
    #[must_use]
    #[inline(always)]
    pub const fn new(cookie: u64, address: Address, port: Be16) -> Self {
        Self { cookie, address, port, pad: [0; 6] }
    }

    /// Of the frontend that an unconnected UDP socket has sent to: the value says which backend
    /// its datagrams have gone to. Nothing is received under such a key.
    #[must_use]
    #[inline(always)]
    pub const fn sent(cookie: u64, frontend: Address, port: Be16) -> Self {
        Self { cookie, address: frontend, port, pad: [1, 0, 0, 0, 0, 0] }
    }
}

/// The frontend that the socket's owner knows the backend as; the other way round for a frontend.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SocketPeer {
    pub address: Address,
    pub port: Be16,
    pub pad: u16,
    pub backend: BackendId,
}
