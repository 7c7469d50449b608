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
}

impl Reason {
    pub const ALL: [Self; 2] = [Self::NoEndpoint, Self::VacantSlot];

    /// Entries of `DROPS`; more than there are reasons, so that a new reason does not
    /// change the map.
    pub const CAPACITY: u32 = 32;

    /// For metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::VacantSlot => "vacant_slot",
        }
    }
}

/// A verdict that is computed and then lost sends traffic the wrong way, silently.
#[must_use = "a verdict has to be carried out"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, or nothing to do: on as it came.
    Pass,
    /// To this backend instead.
    Translate { backend: BackendId, address: Address, port: Be16 },
    /// Refused or dropped, and counted under the reason.
    Drop(Reason),
}
