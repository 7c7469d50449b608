//! What the kernel has counted, as both data planes can tell it.

use std::ops::AddAssign;

use super::PlaneError;
use crate::model::HostPort;
use crate::policy::FrontendKey;

/// Totals of one kernel object since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    pub connections: u64,
    /// Connections and packets refused or dropped.
    pub refused: u64,
    /// From clients to endpoints.
    pub requests: Amount,
    /// The way back.
    pub replies: Amount,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amount {
    pub packets: u64,
    pub bytes: u64,
}

impl Counters {
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    /// What was counted after `before`, or everything when some counter went back: then the
    /// object was made anew, or somebody set it to zero.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        self.checked_since(before).unwrap_or(*self)
    }

    fn checked_since(&self, before: &Self) -> Option<Self> {
        let amount = |now: Amount, before: Amount| {
            Some(Amount {
                packets: now.packets.checked_sub(before.packets)?,
                bytes: now.bytes.checked_sub(before.bytes)?,
            })
        };
        Some(Self {
            connections: self.connections.checked_sub(before.connections)?,
            refused: self.refused.checked_sub(before.refused)?,
            requests: amount(self.requests, before.requests)?,
            replies: amount(self.replies, before.replies)?,
        })
    }
}

impl AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.refused += other.refused;
        self.requests += other.requests;
        self.replies += other.replies;
    }
}

/// Connections that there are now, as IPVS tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Current {
    /// Established ones.
    pub active: u64,
    /// All others, which are for the most part on their way out.
    pub inactive: u64,
}

impl AddAssign for Current {
    fn add_assign(&mut self, other: Self) {
        self.active += other.active;
        self.inactive += other.inactive;
    }
}

/// What is told of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sample {
    /// Another one under the same name has another number, where the kernel lets them be told
    /// apart.
    pub incarnation: u32,
    pub counters: Counters,
    pub current: Current,
}

/// One kernel object that counts for an endpoint of a Service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointKey {
    /// The frontend that it belongs to, or something that stands for a Service port.
    pub owner: u64,
    pub at: HostPort,
}

/// Receives what a source tells.
pub trait Sink {
    fn frontend(&mut self, key: FrontendKey, sample: Sample);
    /// `of` is any frontend of the endpoint's Service port.
    fn endpoint(&mut self, key: EndpointKey, of: FrontendKey, sample: Sample);
    /// Packets and connects of the whole node so far; the kernel may count those of one reason
    /// in several places.
    fn dropped(&mut self, place: u8, reason: &'static str, count: u64);
}

/// What a source can tell besides connections, packets and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    /// What was refused, by frontend.
    pub refused: bool,
    pub current: bool,
}

/// Reads the kernel's counters, on a thread that may wait, with handles of its own.
pub trait TrafficSource: Send {
    fn abilities(&self) -> Abilities;

    /// Tells everything there is, of endpoints only when asked.
    ///
    /// # Errors
    /// The kernel refuses; what was told until then is true all the same.
    fn read(&mut self, endpoints: bool, sink: &mut dyn Sink) -> Result<(), PlaneError>;
}
