//! What is to become of a connect or a packet, and why.

use crate::layout::BackendId;
use crate::order::{Address, Be16};

/// Index into `DROPS`.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The frontend exists and has no usable backend.
    NoEndpoint = 0,
    /// The slot or its backend is vacant: the table is not consistent.
    VacantSlot = 1,
    /// Endpoints exist, but not where the Service's policy lets this client go.
    NoLocalEndpoint = 2,
    /// The client is in none of `loadBalancerSourceRanges`.
    SourceRange = 3,
    /// A port of a Service's address that is no Service.
    UnusedPort = 4,
    /// An address of the Service range that no Service holds.
    UnusedAddress = 5,
    /// A reset or an end of a connection that is not known.
    NoFlow = 6,
    /// No source port is left for this backend.
    PortsExhausted = 7,
    /// The table of flows has no room.
    FlowsFull = 8,
    /// A fragment of SCTP whose port would have to change: the checksum covers the whole packet.
    SctpPort = 9,
    /// No route to the backend or back to the client.
    NoRoute = 10,
    /// No hop is left.
    TimeToLive = 11,
    /// Larger than the route takes, and not to be answered.
    TooBig = 12,
    /// The kernel did not let the packet be changed.
    Unwritable = 13,
    /// A packet that has to be answered, and cannot be.
    Unanswerable = 14,
    /// The node has no address of the packet's family to masquerade with.
    NoSource = 15,
    /// Another node sent it on to an endpoint here, and this node knows no such frontend or no
    /// such endpoint of it.
    Misdirected = 16,
}

impl Reason {
    pub const ALL: [Self; 17] = [
        Self::NoEndpoint,
        Self::VacantSlot,
        Self::NoLocalEndpoint,
        Self::SourceRange,
        Self::UnusedPort,
        Self::UnusedAddress,
        Self::NoFlow,
        Self::PortsExhausted,
        Self::FlowsFull,
        Self::SctpPort,
        Self::NoRoute,
        Self::TimeToLive,
        Self::TooBig,
        Self::Unwritable,
        Self::Unanswerable,
        Self::NoSource,
        Self::Misdirected,
    ];

    /// Entries of `DROPS`; more than there are reasons, so that a new reason does not
    /// change the map.
    pub const CAPACITY: u32 = 32;

    /// For metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::VacantSlot => "vacant_slot",
            Self::NoLocalEndpoint => "no_local_endpoint",
            Self::SourceRange => "source_range",
            Self::UnusedPort => "unused_port",
            Self::UnusedAddress => "unused_address",
            Self::NoFlow => "no_flow",
            Self::PortsExhausted => "ports_exhausted",
            Self::FlowsFull => "flows_full",
            Self::SctpPort => "sctp_port",
            Self::NoRoute => "no_route",
            Self::TimeToLive => "time_to_live",
            Self::TooBig => "too_big",
            Self::Unwritable => "unwritable",
            Self::Unanswerable => "unanswerable",
            Self::NoSource => "no_source",
            Self::Misdirected => "misdirected",
        }
    }
}

/// A verdict that is computed and then lost sends traffic the wrong way, silently.
#[must_use = "a verdict has to be carried out"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketVerdict {
    /// Not ours, or better left to the devices: on as it came.
    Pass,
    /// To this backend instead.
    Translate { backend: BackendId, address: Address, port: Be16 },
    /// The caller is told at once that nobody listens; counted under the reason.
    Refuse(Reason),
}

#[must_use = "a verdict has to be carried out"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, or nothing to do: on as it came.
    Pass,
    /// Make it look like `Work::to`, and send it on: by the stack, or by the program itself
    /// when `forward` (see `Flow::FORWARD`).
    Translate { forward: bool },
    /// Send it on inside another one, between the addresses of `Work::to` (see
    /// [`crate::direct`]).
    Encapsulate,
    /// Answer that nobody listens; counted under the reason.
    Reject(Reason),
    /// Counted under the reason.
    Drop(Reason),
}
