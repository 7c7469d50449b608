//! What the programs at a device do around the library, on a packet in memory.

extern crate std;

use std::vec::Vec;

use super::Fake;
use crate::answer::{self, Error};
use crate::device::{self, Arrival, Hook, Work};
use crate::direct;
use crate::layout::{Device, Traffic};
use crate::order::Address;
use crate::packet::Packet as _;
use crate::parse::{self, ETHERNET, Kind};
use crate::rewrite;
use crate::tables::Tables as _;
use crate::verdict::{Reason, Verdict};

/// What the program returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// On to the next program or the stack, translated or not.
    Next,
    /// Out by a device: this one or another.
    Redirect,
    Drop,
}

/// The only route there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// Ethernet addresses on it: of the neighbour, and our own.
    pub ethernet: [u8; 12],
    pub mtu: u16,
    /// The kernel says what it takes, from 5.12 on.
    pub tells_mtu: bool,
    /// What does not take it: the node's own address in either family.
    pub own: [Address; 2],
}

/// Runs the program of `arrival.hook` on a frame.
pub fn run(tables: &Fake, arrival: &Arrival, way: &Way, frame: &mut Vec<u8>) -> Fate {
    let mut work = Work::default();
    if !is_for_us(arrival.hook, way, frame) {
        return Fate::Next;
    }
    if parse::ethernet(&frame.as_slice(), &mut work.headers).is_err() {
        return Fate::Next;
    }
    let xdp = arrival.hook == Hook::Xdp;
    if xdp && work.headers.kind != Kind::Whole {
        return Fate::Next;
    }
    let failed = |reason| {
        tables.count_drop(reason);
        Fate::Drop
    };
    let wrapped = arrival.hook == Hook::Ingress
        && device::has_one_inside(tables, frame, &work.headers, arrival.device);
    if wrapped {
        unwrap(&mut work, frame);
    }
    if wrapped && parse::ethernet(&frame.as_slice(), &mut work.headers).is_err() {
        return failed(Reason::Misdirected);
    }
    let traffic = Traffic { bytes: frame.len() as u64, ..arrival.traffic };
    let arrival = &Arrival { wrapped, traffic, ..*arrival };
    match device::decide(tables, tables, arrival, &mut work) {
        Verdict::Pass if wrapped => failed(Reason::Misdirected),
        Verdict::Pass => Fate::Next,
        Verdict::Translate { forward: true } => forward(tables, arrival, way, &work, frame, false),
        Verdict::Encapsulate => forward(tables, arrival, way, &work, frame, true),
        Verdict::Translate { forward: false } | Verdict::Reject(_) if xdp => Fate::Next,
        Verdict::Translate { forward: false } => {
            match rewrite::translate(frame, &work.headers, &work.to) {
                Some(()) => Fate::Next,
                None => failed(Reason::Unwritable),
            }
        }
        Verdict::Reject(_) => match answer::refuse(frame, &work.headers) {
            Some(()) => Fate::Redirect,
            None => failed(Reason::Unanswerable),
        },
        Verdict::Drop(_) => Fate::Drop,
    }
}

/// tc is told by the kernel, which counts what is for many as for us too.
fn is_for_us(hook: Hook, way: &Way, frame: &Vec<u8>) -> bool {
    let Some(receiver) = parse::receiver(frame) else {
        return false;
    };
    let own = way.ethernet.ends_with(&receiver);
    match hook {
        Hook::Xdp => own,
        Hook::Ingress => own || receiver[0] & 1 != 0,
        Hook::Egress => true,
    }
}

/// Takes the packet out that is inside.
fn unwrap(work: &mut Work, frame: &mut Vec<u8>) {
    work.sender = work.headers.tuple.source;
    work.via = work.headers.tuple.destination;
    frame.drain(ETHERNET..ETHERNET + direct::overhead(work.headers.version));
}

/// Puts the packet inside another one.
fn wrap(tables: &Fake, work: &Work, frame: &mut Vec<u8>) -> Option<()> {
    let headers = &work.headers;
    rewrite::take_hop(frame, headers)?;
    let room = core::iter::repeat_n(0, direct::overhead(headers.version));
    frame.splice(ETHERNET..ETHERNET, room);
    let port = tables.config.direct_port;
    direct::wrap(frame, &work.to, port, headers.version, headers.length)
}

fn forward(
    tables: &Fake,
    arrival: &Arrival,
    way: &Way,
    work: &Work,
    frame: &mut Vec<u8>,
    direct: bool,
) -> Fate {
    let headers = &work.headers;
    let overhead = if direct { direct::overhead(headers.version) } else { 0 };
    let overhead = u16::try_from(overhead).unwrap_or(u16::MAX);
    let length = headers.length.saturating_add(overhead);
    let egress = arrival.hook == Hook::Egress;
    let failed = |reason| {
        tables.count_drop(reason);
        Fate::Drop
    };
    let local = way.own.contains(&work.to.destination);
    let problem = if !egress && headers.ttl <= 1 {
        Some((Error::TimeExceeded, Reason::TimeToLive))
    } else if !local && length > way.mtu {
        let mtu = if way.tells_mtu { way.mtu } else { answer::next_shorter(length) };
        Some((Error::TooBig(mtu.saturating_sub(overhead)), Reason::TooBig))
    } else {
        None
    };
    if arrival.hook == Hook::Xdp
        && (problem.is_some()
            || rewrite::is_finished(frame, headers) != Some(true)
            || arrival.device & Device::XDP_TX == 0)
    {
        return Fate::Next;
    }
    if let Some((error, reason)) = problem {
        let silent = matches!(error, Error::TooBig(_)) && !headers.dont_fragment && !direct;
        if silent || headers.kind == Kind::IcmpError {
            return failed(reason);
        }
        return match answer::error(frame, headers, error) {
            Some(()) => {
                tables.count_drop(reason);
                Fate::Redirect
            }
            None => failed(reason),
        };
    }
    match (local, arrival.hook) {
        (true, Hook::Xdp) => return Fate::Next,
        (true, _) if direct => return failed(Reason::NoRoute),
        (true, Hook::Egress) => return failed(Reason::NoRoute),
        (true, Hook::Ingress) => {
            return match rewrite::translate(frame, headers, &work.to) {
                Some(()) => Fate::Next,
                None => failed(Reason::Unwritable),
            };
        }
        (false, _) => {}
    }
    let changed = if direct {
        wrap(tables, work, frame)
    } else {
        rewrite::translate(frame, headers, &work.to)
            .and_then(|()| if egress { Some(()) } else { rewrite::take_hop(frame, headers) })
    };
    let changed = changed.and_then(|()| frame.store(0, way.ethernet));
    match changed {
        Some(()) => {
            if arrival.hook == Hook::Xdp {
                device::count_sent(tables, work, arrival.traffic);
            }
            Fate::Redirect
        }
        None => failed(Reason::Unwritable),
    }
}
