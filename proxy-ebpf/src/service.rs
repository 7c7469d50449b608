//! Frontend lookup, selection and counting.

use crate::layout::{
    Backend, BackendCounters, BackendId, Frontend, FrontendCounters, FrontendId, FrontendKey,
    SlotRange,
};
use crate::parse::{self, FiveTuple};
use crate::verdict::{Reason, Verdict};

/// The maps, so that the same logic runs in the kernel and against tables in a test.
pub trait Tables {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    fn slot(&self, index: u32) -> Option<BackendId>;
    fn backend(&self, id: BackendId) -> Option<Backend>;
    fn count_frontend(&self, id: FrontendId, update: impl FnOnce(&mut FrontendCounters));
    fn count_backend(&self, id: BackendId, update: impl FnOnce(&mut BackendCounters));
    fn count_drop(&self, reason: Reason);
}

/// Where a client is, seen from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// The node or a pod on it.
    Node,
    Outside,
}

/// A hook that counts packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Tc,
    Xdp,
}

/// A socket on this node connects to `key`. `random` picks the backend.
#[inline(always)]
pub fn connect(tables: &impl Tables, key: &FrontendKey, random: u32) -> Verdict {
    // Nothing but these is in the table; most connects of other kinds end here without
    // a lookup.
    if !matches!(key.protocol(), parse::TCP | parse::UDP | parse::SCTP) {
        return Verdict::Pass;
    }
    let Some(frontend) = tables.frontend(key) else {
        return Verdict::Pass;
    };
    let verdict = match select(tables, &frontend, Client::Node, random) {
        Ok((backend, Backend { address, port, .. })) => {
            tables.count_backend(backend, |counters| counters.connections += 1);
            Verdict::Translate { backend, address, port }
        }
        Err(reason) => {
            tables.count_drop(reason);
            Verdict::Drop(reason)
        }
    };
    tables.count_frontend(frontend.id, |counters| match verdict {
        Verdict::Translate { .. } => counters.connections += 1,
        Verdict::Drop(_) => counters.refused += 1,
        Verdict::Pass => {}
    });
    verdict
}

/// Counts a packet that is addressed to a frontend. It goes on as it came.
#[inline(always)]
pub fn observe(
    tables: &impl Tables,
    packet: &FiveTuple,
    hook: Hook,
    packets: u64,
    bytes: u64,
) -> Verdict {
    let key = FrontendKey::new(packet.destination, packet.destination_port, packet.protocol);
    if let Some(frontend) = tables.frontend(&key) {
        tables.count_frontend(frontend.id, |counters| {
            let traffic = match hook {
                Hook::Tc => &mut counters.tc,
                Hook::Xdp => &mut counters.xdp,
            };
            traffic.packets += packets;
            traffic.bytes += bytes;
        });
    }
    Verdict::Pass
}

/// The backend that `number` (random, or a hash of the flow) falls on.
///
/// # Errors
/// The reason to refuse.
#[inline(always)]
pub fn select(
    tables: &impl Tables,
    frontend: &Frontend,
    client: Client,
    number: u32,
) -> Result<(BackendId, Backend), Reason> {
    let range = match client {
        Client::Node => frontend.node,
        Client::Outside => frontend.outside,
    };
    let index = slot_index(range, number).ok_or(Reason::NoEndpoint)?;
    let id = tables.slot(index).ok_or(Reason::VacantSlot)?;
    let backend = tables.backend(id).filter(Backend::in_use).ok_or(Reason::VacantSlot)?;
    Ok((id, backend))
}

/// Scales `number` to the range by multiplication: no division, and as even as a modulus
/// (the bias is below len / 2^32).
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the product's upper half is below len")]
fn slot_index(range: SlotRange, number: u32) -> Option<u32> {
    if range.len == 0 {
        return None;
    }
    let offset = (u64::from(number) * u64::from(range.len)) >> 32;
    Some(range.base.wrapping_add(offset as u32))
}

#[cfg(test)]
mod tests;
