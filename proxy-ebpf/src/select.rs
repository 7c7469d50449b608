//! Which backend a client gets.

use crate::layout::{
    Affinity, AffinityKey, Backend, BackendId, Config, Frontend, SlotRange, Tuple,
};
use crate::tables::Tables;
use crate::verdict::Reason;

pub const SECOND: u64 = 1_000_000_000;

/// Where a client is, seen from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// The node or a pod on it.
    Node,
    Outside,
}

impl Frontend {
    #[inline(always)]
    const fn range(&self, client: Client) -> SlotRange {
        match client {
            Client::Node => self.node,
            Client::Outside => self.outside,
        }
    }

    /// The set of backends that the range is filled from.
    #[inline(always)]
    pub(crate) const fn set(&self, client: Client) -> u16 {
        let local = match client {
            Client::Node => Self::NODE_LOCAL_SET,
            Client::Outside => Self::OUTSIDE_LOCAL_SET,
        };
        if self.flags & local == 0 { Backend::IN_CLUSTER_SET } else { Backend::IN_LOCAL_SET }
    }

    /// Why a client with an empty range gets nowhere, which says whether it is told.
    #[inline(always)]
    #[must_use]
    pub const fn empty(&self, client: Client) -> Reason {
        let drops = match client {
            Client::Node => Self::NODE_DROPS,
            Client::Outside => Self::OUTSIDE_DROPS,
        };
        if self.flags & drops == 0 { Reason::NoEndpoint } else { Reason::NoLocalEndpoint }
    }
}

/// The backend that `number` (random, or a hash of the flow) falls on, or the one that the
/// client had before.
///
/// # Errors
/// The reason to refuse.
#[inline(always)]
pub fn select(
    tables: &impl Tables,
    frontend: &Frontend,
    client: Client,
    affinity: &AffinityKey,
    number: u32,
    now: u64,
) -> Result<(BackendId, Backend), Reason> {
    if frontend.affinity != 0
        && let Some(before) = tables.affinity(affinity)
        && now.saturating_sub(before.seen) < u64::from(frontend.affinity) * SECOND
        && let Some(backend) = tables.backend(before.backend)
        // Ids are used again, and an endpoint that left the set is forgotten at once.
        && backend.service == frontend.service
        && backend.has(frontend.set(client))
        && (before.place == 0 || before.place == backend.place())
    {
        tables.set_affinity(affinity, &Affinity { seen: now, ..before });
        return Ok((before.backend, backend));
    }
    let index = slot_index(frontend.range(client), number).ok_or(frontend.empty(client))?;
    let id = tables.slot(index).ok_or(Reason::VacantSlot)?;
    // One that left since the frontend was read is what it was an instant ago.
    let chosen = |backend: &Backend| backend.has(Backend::IN_USE | Backend::LEAVING);
    let backend = tables.backend(id).filter(chosen).ok_or(Reason::VacantSlot)?;
    if frontend.affinity != 0 {
        tables.set_affinity(affinity, &Affinity { seen: now, backend: id, place: backend.place() });
    }
    Ok((id, backend))
}

/// Scales `number` to the range by multiplication: no division, and as even as a modulus
/// (the bias is below len / 2^32).
#[inline(always)]
fn slot_index(range: SlotRange, number: u32) -> Option<u32> {
    if range.len == 0 {
        return None;
    }
    Some(range.base.wrapping_add(scale(number, range.len)))
}

/// `number` of 2^32, as a share of `len`.
#[inline(always)]
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "the product's upper half is below len")]
pub const fn scale(number: u32, len: u32) -> u32 {
    ((number as u64 * len as u64) >> 32) as u32
}

/// MurmurHash3 (Austin Appleby, public domain), for words: every bit of the input changes
/// the upper bits, which [`scale`] goes by.
#[derive(Debug, Clone, Copy)]
pub struct Hash(u32);

impl Hash {
    #[inline(always)]
    #[must_use]
    pub const fn new(config: &Config) -> Self {
        Self(config.seed)
    }

    /// Of a node's own affair: others need not agree.
    #[inline(always)]
    #[must_use]
    pub const fn of_words(first: u32) -> Self {
        Self(0).word(first)
    }

    #[inline(always)]
    #[must_use]
    pub const fn word(self, word: u32) -> Self {
        let mixed = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
        Self((self.0 ^ mixed).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64))
    }

    #[inline(always)]
    #[must_use]
    pub const fn finish(self) -> u32 {
        let h = self.0;
        let h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        let h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
        h ^ (h >> 16)
    }

    /// The same on every node for the same flow: it depends on the wire alone.
    #[inline(always)]
    #[must_use]
    pub fn of(config: &Config, tuple: &Tuple) -> u32 {
        let mut hash = Self::new(config);
        let (source, destination) = (tuple.source.words(), tuple.destination.words());
        let mut i = 0;
        while i < 4 {
            hash = hash.word(source[i].to_kernel()).word(destination[i].to_kernel());
            i += 1;
        }
        let ports = tuple.source_port.to_kernel() << 16 | tuple.destination_port.to_kernel();
        hash.word(ports).word(u32::from(tuple.protocol)).finish()
    }
}

#[cfg(test)]
mod tests;
