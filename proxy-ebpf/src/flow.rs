//! Connection tracking: two entries a flow, made together, each naming the other; or one alone,
//! when replies do not come by here ([`Flow::DIRECT`]).

use crate::direct;
use crate::layout::config::client;
use crate::layout::{Config, Flow, Timeouts, Tuple};
use crate::order::Be16;
use crate::parse::{SCTP, TCP, UDP, tcp};
use crate::select::{SECOND, scale};
use crate::tables::{Network, Tables};
use crate::verdict::Reason;

/// How often a source port is tried that turns out to be taken. Bounds the loop for the
/// verifier; with nine of ten ports taken, one new flow in thirty finds none.
const ATTEMPTS: u32 = 32;

/// Seconds without a packet in either direction after which a flow is over.
#[must_use]
#[inline(always)]
pub const fn timeout(protocol: u8, flags: u32, timeouts: &Timeouts) -> u32 {
    match protocol {
        TCP | SCTP if Flow::is_closing(flags) => timeouts.tcp_closing,
        TCP | SCTP if flags & Flow::OPENING != 0 => timeouts.tcp_opening,
        TCP if flags & Flow::REPLIED == 0 || is_ending(flags) => timeouts.tcp_opening,
        TCP if flags & (Flow::FIN | Flow::PEER_FIN) != 0 => half_closed(timeouts),
        TCP => timeouts.tcp_established,
        SCTP if flags & (Flow::REPLIED | Flow::DIRECT) == 0 => timeouts.tcp_opening,
        UDP if flags & Flow::REPLIED == 0 => timeouts.udp,
        UDP => timeouts.udp_replied,
        _ => timeouts.sctp,
    }
}

/// One side goes on sending, or has vanished: an hour, as kube-proxy has conntrack wait for
/// (`--conntrack-tcp-timeout-close-wait`), and less as what opens has less.
#[inline(always)]
const fn half_closed(timeouts: &Timeouts) -> u32 {
    timeouts.tcp_opening * 60
}

/// The client of a flow whose replies are not seen has sent its last byte. It may go on to receive
/// and to acknowledge.
#[inline(always)]
const fn is_ending(flags: u32) -> bool {
    flags & (Flow::DIRECT | Flow::FIN) == Flow::DIRECT | Flow::FIN
}

/// The flow that a packet belongs to, told of the packet and copied to `known`. False when
/// there is none, or when it must not go on: the packet begins a new one then.
#[inline(always)]
pub fn advance(
    tables: &impl Tables,
    key: &Tuple,
    tcp_flags: u8,
    now: u64,
    known: &mut Flow,
) -> bool {
    let Some(first) = tables.flow(key, |flow| {
        let first = flow.seen == 0;
        flow.seen = now;
        *known = *flow;
        first
    }) else {
        return false;
    };
    let direct = Flow::is_direct(known.flags);
    if known.flags & Flow::REPLY == 0 && is_over(tables, known, tcp_flags) {
        if !direct {
            tables.remove_flow(&known.to.inverse());
        }
        tables.remove_flow(key);
        return false;
    }
    let mut news = 0;
    let mut told = if first { Flow::REPLIED } else { 0 };
    if key.protocol != UDP {
        if tcp_flags & tcp::RST != 0 {
            news |= Flow::RESET;
            told |= Flow::RESET;
        }
        if tcp_flags & tcp::FIN != 0 {
            news |= Flow::FIN;
            told |= Flow::PEER_FIN;
        }
        // The client acknowledges what it was sent.
        if tcp_flags & (tcp::SYN | tcp::ACK) == tcp::ACK {
            if direct {
                news |= Flow::REPLIED;
            }
            if known.flags & Flow::OPENING != 0 {
                tables.flow(key, |flow| flow.flags &= !Flow::OPENING);
            }
        }
    }
    let changed = known.flags & news != news;
    if changed {
        tables.flow(key, |flow| flow.flags |= news);
    }
    if !direct && (first || changed) {
        tables.flow(&known.to.inverse(), |flow| flow.flags |= told);
    }
    true
}

/// A client's packet that must not follow its flow: a new connection from a port that was
/// used before, and everything of UDP, looks for a backend again when the old one is gone.
#[inline(always)]
fn is_over(tables: &impl Tables, flow: &Flow, tcp_flags: u8) -> bool {
    match flow.to.protocol {
        TCP | SCTP => {
            tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN
                && (Flow::is_closing(flow.flags)
                    || is_ending(flow.flags)
                    || !still_there(tables, flow))
        }
        _ => !still_there(tables, flow),
    }
}

/// Whether the backend of a flow is one still.
#[inline(always)]
pub(crate) fn still_there(tables: &impl Tables, flow: &Flow) -> bool {
    // The id may be another backend's by now.
    tables.backend(flow.backend).is_some_and(|backend| {
        backend.is_there()
            && backend.address == flow.to.destination
            && backend.port == flow.to.destination_port
    })
}

/// What a new flow is made of, filled in step by step; see [`Work`](crate::device::Work)
/// for why it is no value that functions return.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Opening {
    /// The entry for the client's packets. `to` is the backend's already.
    pub request: Flow,
    pub reply_key: Tuple,
    pub reply: Flow,
    pub hash: u32,
    /// The backend sees the node's address instead of the client's.
    pub masquerade: bool,
    /// Its packets go on inside others: there is no entry for replies.
    pub direct: bool,
    pub pad: [u8; 2],
}

/// Enters a flow: the reply's entry first, since entering it claims its tuple, and the
/// tuple of a reply must lead to one client only.
///
/// # Errors
/// No tuple could be claimed.
#[inline(always)]
pub fn open(
    tables: &impl Tables,
    network: &impl Network,
    config: &Config,
    key: &Tuple,
    opening: &mut Opening,
) -> Result<(), Reason> {
    // A frontend's address that is this node's own proves to the other node that it is a node
    // port of somebody's.
    let own = opening.direct && tables.client(&key.destination) & client::NODE != 0;
    let source = if own {
        key.destination
    } else if opening.masquerade {
        network.source_for(&opening.request.to.destination)
    } else {
        key.source
    };
    if source.is_unset() {
        return Err(Reason::NoSource);
    }
    opening.request.to.source = source;
    if opening.direct {
        return open_direct(tables, key, opening);
    }
    opening.request.to.source_port = key.source_port;
    opening.reply_key = opening.request.to.inverse();
    opening.reply.to = key.inverse();
    claim(tables, network, config, opening)?;
    opening.request.to.source_port = opening.reply_key.destination_port;
    if tables.add_flow(key, &opening.request) {
        return Ok(());
    }
    // Another CPU was first with a packet of the same flow; what it chose holds. When its
    // claim was the same, that stays.
    let Some((theirs, flags)) = tables.flow(key, |flow| (flow.to, flow.flags)) else {
        tables.remove_flow(&opening.reply_key);
        return Err(Reason::FlowsFull);
    };
    if theirs != opening.request.to {
        tables.remove_flow(&opening.reply_key);
        opening.request.to = theirs;
        opening.request.flags = flags;
    }
    Ok(())
}

/// One entry that claims nothing: the backend's node sees to it that replies lead to one client.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn open_direct(tables: &impl Tables, key: &Tuple, opening: &mut Opening) -> Result<(), Reason> {
    opening.request.to.source_port = direct::source_port(opening.hash);
    if tables.add_flow(key, &opening.request) {
        return Ok(());
    }
    let theirs = tables.flow(key, |flow| (flow.to, flow.flags));
    let Some((to, flags)) = theirs else {
        return Err(Reason::FlowsFull);
    };
    opening.request.to = to;
    opening.request.flags = flags;
    Ok(())
}

/// Finds a source port such that the tuple of the reply is nobody's yet, and enters that.
#[inline(always)]
fn claim(
    tables: &impl Tables,
    network: &impl Network,
    config: &Config,
    opening: &mut Opening,
) -> Result<(), Reason> {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        match try_claim(tables, network, config, opening, attempt) {
            CLAIMED => return Ok(()),
            FULL => return Err(Reason::FlowsFull),
            _ => attempt += 1,
        }
    }
    Err(Reason::PortsExhausted)
}

/// What an attempt comes to.
const CLAIMED: u32 = 0;
const TAKEN: u32 = 1;
/// The table has no room: no other port would find any.
const FULL: u32 = 2;

/// A function of its own, so that all its ways are one to the verifier when the next attempt
/// begins.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn try_claim(
    tables: &impl Tables,
    network: &impl Network,
    config: &Config,
    opening: &mut Opening,
    attempt: u32,
) -> u32 {
    // The client's own port belongs to it only together with its own address.
    let own = attempt == 0 && !opening.masquerade;
    if !own {
        let span = u32::from(config.port_high.wrapping_sub(config.port_low)) + 1;
        let number = mix(opening.hash.wrapping_add(attempt));
        #[allow(clippy::cast_possible_truncation, reason = "the share of 16 bits")]
        let offset = scale(number, span) as u16;
        opening.reply_key.destination_port = Be16::from_host(config.port_low.wrapping_add(offset));
    }
    if opening.masquerade && !own && network.has_socket(&opening.reply_key) {
        return TAKEN;
    }
    if tables.add_flow(&opening.reply_key, &opening.reply) {
        return CLAIMED;
    }
    displace(tables, config, opening)
}

/// The tuple is taken, but by this very flow (another CPU, or an entry whose other half
/// made room), or by one that has ended.
#[inline(always)]
fn displace(tables: &impl Tables, config: &Config, opening: &Opening) -> u32 {
    let key = &opening.reply_key;
    let Some((to, seen, flags)) = tables.flow(key, |flow| (flow.to, flow.seen, flow.flags)) else {
        // Not taken. Unless it was until just now, there is no room.
        return if tables.add_flow(key, &opening.reply) { CLAIMED } else { FULL };
    };
    if to == opening.reply.to {
        return CLAIMED;
    }
    let request = to.inverse();
    let direct = Flow::is_direct(flags);
    let other = if direct { None } else { tables.flow(&request, |flow| (flow.seen, flow.flags)) };
    // Its other half may be entered by another CPU right now. If not, the daemon's sweep finds it.
    if other.is_none() && seen == 0 {
        return TAKEN;
    }
    let (request_seen, request_flags) = other.unwrap_or((0, flags));
    let last = if seen > request_seen { seen } else { request_seen };
    let limit = timeout(key.protocol, request_flags, &config.timeouts);
    if opening.request.seen.saturating_sub(last) < u64::from(limit) * SECOND {
        return TAKEN;
    }
    // Of several CPUs that see this, the one that removes it goes on.
    if !tables.remove_flow(key) {
        return TAKEN;
    }
    if !direct {
        tables.remove_flow(&request);
    }
    if tables.add_flow(key, &opening.reply) { CLAIMED } else { TAKEN }
}

#[inline(always)]
const fn mix(number: u32) -> u32 {
    let h = number.wrapping_mul(0x9e37_79b1);
    let h = (h ^ (h >> 15)).wrapping_mul(0x85eb_ca77);
    h ^ (h >> 13)
}

#[cfg(test)]
mod tests;
