//! The real socket.
//!
//! The kernel works off a datagram of requests inside `sendmsg`, one after the other
//! (net/netlink/af_netlink.c `netlink_rcv_skb`), and queues each acknowledgement on
//! our receive buffer. So pipelining is one `sendmsg` with many messages, and what
//! bounds it is that buffer: acknowledgements that do not fit are dropped.

use std::io;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::{Counters, Errno, Message, Netlink, NetlinkError, wire};

/// `NETLINK_*` protocol numbers (include/uapi/linux/netlink.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subsystem {
    Route,
    SockDiag,
    Netfilter,
    Generic,
}

impl Subsystem {
    const fn number(self) -> isize {
        match self {
            Self::Route => 0,
            Self::SockDiag => 4,
            Self::Netfilter => 12,
            Self::Generic => 16,
        }
    }
}

/// The kernel doubles it. With CAP_NET_ADMIN it is not bounded by `rmem_max`.
const RECEIVE_BUFFER: usize = 4 << 20;
/// What one acknowledgement is charged to the receive buffer: its `truesize`, an
/// sk_buff (256) and a data area with `skb_shared_info` (512), and room for an
/// explanation.
const ACK_CHARGE: usize = 1280;
/// The largest datagram of pipelined requests. The kernel copies it into one buffer,
/// so larger ones gain nothing and ask for large allocations.
const SEND_BYTES: usize = 128 << 10;
const SEND_REQUESTS: usize = 1024;
/// Receive buffers beyond 32 KiB do not make the kernel's dump parts larger
/// (`netlink_recvmsg` caps `max_recvmsg_len`), but other replies may be.
const DATAGRAM: usize = 64 << 10;
/// All replies are queued when `sendmsg` returns (but for further parts of dumps), so
/// this only bounds the wait for something lost.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(10);
const DUMP_TRIES: u32 = 10;
/// `NFNL_MSG_BATCH_END` (include/uapi/linux/netfilter/nfnetlink.h).
const BATCH_END: u16 = 0x11;

#[derive(Debug)]
struct Limits {
    requests: usize,
    bytes: usize,
}

impl Limits {
    /// How many of `requests` go into the next datagram: at least one.
    fn take(&self, requests: &[Message]) -> usize {
        let mut bytes = 0;
        let fitting = requests
            .iter()
            .take(self.requests)
            .take_while(|request| {
                bytes += wire::framed_length(request);
                bytes <= self.bytes
            })
            .count();
        fitting.max(1).min(requests.len())
    }
}

pub struct Socket {
    inner: netlink_sys::Socket,
    /// The last datagram received.
    buffer: Vec<u8>,
    sequence: u32,
    limits: Limits,
    send_buffer: usize,
    /// The last exchange ended early: replies to it may still come.
    dirty: bool,
    counters: Counters,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket")
            .field("sequence", &self.sequence)
            .field("limits", &self.limits)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

fn io_error(operation: &'static str) -> impl FnOnce(io::Error) -> NetlinkError {
    move |source| NetlinkError::Io { operation, source }
}

fn option_error(operation: &'static str) -> impl FnOnce(nix::errno::Errno) -> NetlinkError {
    move |errno| NetlinkError::Io { operation, source: errno.into() }
}

impl Socket {
    /// Opens a socket in the network namespace of the calling thread; it stays there.
    pub fn open(subsystem: Subsystem) -> Result<Self, NetlinkError> {
        let mut inner = netlink_sys::Socket::new(subsystem.number()).map_err(io_error("socket"))?;
        inner.bind_auto().map_err(io_error("bind"))?;
        setsockopt(&inner, sockopt::ReceiveTimeout, &timeval(RECEIVE_TIMEOUT))
            .map_err(option_error("receive timeout"))?;
        // Since kernels 4.2 and 4.12. Acknowledgements then carry no copy of the
        // request, and errors a sentence; neither is needed to work.
        if let Err(error) = inner.set_cap_ack(true).and_then(|()| inner.set_ext_ack(true)) {
            tracing::debug!(%error, "short or extended acknowledgements are not available");
        }
        if setsockopt(&inner, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            // Without CAP_NET_ADMIN in the initial user namespace.
            inner.set_rx_buf_sz(clamped(RECEIVE_BUFFER)).map_err(io_error("receive buffer"))?;
        }
        let receive_buffer = inner.get_rx_buf_sz().map_err(io_error("receive buffer"))?;
        let send_buffer = nix::sys::socket::getsockopt(&inner, sockopt::SndBuf)
            .map_err(option_error("send buffer"))?;
        let limits = Limits {
            requests: (receive_buffer / ACK_CHARGE).clamp(1, SEND_REQUESTS),
            bytes: SEND_BYTES.min(send_buffer / 2),
        };
        Ok(Self {
            inner,
            buffer: Vec::with_capacity(DATAGRAM),
            sequence: 0,
            limits,
            send_buffer,
            dirty: false,
            counters: Counters::default(),
        })
    }

    #[cfg(test)]
    pub(super) fn shrink_receive_buffer(&mut self) {
        self.inner.set_rx_buf_sz::<libc::c_int>(32 << 10).expect("a smaller receive buffer");
    }

    /// Frames `requests` with consecutive sequence numbers; returns the first.
    fn frame(
        &mut self,
        requests: &[Message],
        flags: impl Fn(usize) -> u16,
    ) -> Result<(u32, Vec<u8>), NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        let length = requests.iter().map(wire::framed_length).sum();
        let mut datagram = Vec::with_capacity(length);
        for (index, request) in requests.iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let flags = wire::FLAG_REQUEST | flags(index);
            wire::append(&mut datagram, request, flags, self.sequence)?;
        }
        Ok((first, datagram))
    }

    fn send(&mut self, datagram: &[u8]) -> Result<(), NetlinkError> {
        if self.dirty {
            self.drain();
        }
        // `netlink_sendmsg` refuses (EMSGSIZE) what is larger than the send buffer.
        if datagram.len() + 1024 > self.send_buffer {
            let wanted = datagram.len() + 1024;
            setsockopt(&self.inner, sockopt::SndBufForce, &wanted)
                .map_err(option_error("send buffer"))?;
            self.send_buffer = wanted;
        }
        self.counters.sends += 1;
        loop {
            match self.inner.send(datagram, 0) {
                Ok(sent) if sent == datagram.len() => break,
                Ok(_) => return Err(NetlinkError::Malformed("a datagram was sent in part")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_error("send")(error)),
            }
        }
        // Until the exchange is complete.
        self.dirty = true;
        Ok(())
    }

    /// Takes one datagram into `buffer`. `Ok(false)` when none came in time.
    fn receive(&mut self, flags: libc::c_int) -> Result<bool, NetlinkError> {
        loop {
            self.buffer.clear();
            match self.inner.recv_from(&mut self.buffer, flags | libc::MSG_TRUNC) {
                Ok((_, sender)) if sender.port_number() != 0 => {
                    // Another process wrote to our port id; only the kernel is 0.
                }
                Ok((length, _)) if length > self.buffer.len() => {
                    return Err(NetlinkError::Malformed("a reply larger than the buffer"));
                }
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(io_error("receive")(error)),
            }
        }
    }

    /// Throws away what an exchange that ended early left behind. Reading also takes
    /// an unfinished dump to its end, without which the next one would be EBUSY.
    fn drain(&mut self) {
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(false) => break,
                // ENOBUFS is reported once, then the queue can be read again.
                Ok(true) | Err(NetlinkError::Malformed(_)) => {}
                Err(NetlinkError::Io { source, .. })
                    if source.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => {
                    tracing::debug!(%error, "draining a netlink socket");
                    break;
                }
            }
        }
        self.dirty = false;
    }

    /// Receives until `handle`, given every message of this exchange, says it is over.
    /// `Ok(false)`: replies were lost before that.
    fn collect(
        &mut self,
        first: u32,
        count: usize,
        mut handle: impl FnMut(usize, wire::Frame<'_>) -> Result<bool, NetlinkError>,
    ) -> Result<bool, NetlinkError> {
        let mut wait = 0;
        loop {
            match self.receive(wait) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(NetlinkError::Io { source, .. })
                    if source.raw_os_error() == Some(libc::ENOBUFS) =>
                {
                    // Told ahead of the replies that did fit: these are still read, as
                    // far as they go. And fewer at a time from now on.
                    self.limits.requests = (self.limits.requests / 2).max(1);
                    wait = libc::MSG_DONTWAIT;
                    continue;
                }
                Err(error) => return Err(error),
            }
            let mut over = false;
            for frame in wire::Frames::new(&self.buffer) {
                let frame = frame?;
                if frame.kind == wire::OVERRUN {
                    return Ok(false);
                }
                let index = frame.sequence.wrapping_sub(first);
                let Some(index) = usize::try_from(index).ok().filter(|index| *index < count) else {
                    // A late reply to an exchange that was given up.
                    continue;
                };
                if frame.kind != wire::NOOP {
                    over |= handle(index, frame)?;
                }
            }
            if over {
                self.dirty = false;
                return Ok(true);
            }
        }
    }

    /// One datagram of requests and all its acknowledgements.
    fn acknowledged(
        &mut self,
        requests: &[Message],
    ) -> Result<Vec<Result<(), Errno>>, NetlinkError> {
        let (first, datagram) = self.frame(requests, |_| wire::FLAG_ACK)?;
        self.send(&datagram)?;
        self.counters.requests += requests.len() as u64;
        let mut results: Vec<Option<Result<(), Errno>>> = requests.iter().map(|_| None).collect();
        let mut missing = requests.len();
        let complete = self.collect(first, requests.len(), |index, frame| {
            if frame.kind == wire::ERROR
                && let Some(slot @ None) = results.get_mut(index)
            {
                *slot = Some(outcome(&frame)?);
                missing -= 1;
            }
            Ok(missing == 0)
        })?;
        if !complete {
            return Err(NetlinkError::Lost { operation: "request", lost: missing });
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// One attempt at a dump: false when it was interrupted.
    fn dump_once(
        &mut self,
        request: &Message,
        part: &mut dyn FnMut(wire::Frame<'_>),
    ) -> Result<bool, NetlinkError> {
        let one = std::slice::from_ref(request);
        let (first, datagram) = self.frame(one, |_| wire::FLAG_DUMP)?;
        self.send(&datagram)?;
        self.counters.dumps += 1;
        let mut interrupted = false;
        let mut refused = None;
        let complete = self.collect(first, 1, |_, frame| {
            interrupted |= frame.flags & wire::FLAG_DUMP_INTERRUPTED != 0;
            match frame.kind {
                wire::DONE | wire::ERROR => {
                    // Old kernels end some dumps with an empty `NLMSG_DONE`.
                    if frame.kind == wire::ERROR || !frame.payload.is_empty() {
                        refused = outcome(&frame)?.err();
                    }
                    Ok(true)
                }
                _ => {
                    part(frame);
                    Ok(false)
                }
            }
        })?;
        if !complete {
            return Err(NetlinkError::Lost { operation: "dump", lost: 1 });
        }
        match refused {
            // A dump that saw its table change may also end with EINTR.
            Some(Errno(libc::EINTR | libc::EAGAIN)) => Ok(false),
            Some(errno) => Err(NetlinkError::Refused { operation: "dump", errno }),
            None => Ok(!interrupted),
        }
    }
}

fn outcome(frame: &wire::Frame<'_>) -> Result<Result<(), Errno>, NetlinkError> {
    let outcome = frame.outcome()?;
    if let (Err(errno), Some(explanation)) = (&outcome, frame.explanation()) {
        tracing::debug!(%errno, explanation, "netlink request refused");
    }
    Ok(outcome)
}

impl Netlink for Socket {
    fn request_all(
        &mut self,
        requests: &[Message],
    ) -> Result<Vec<Result<(), Errno>>, NetlinkError> {
        let mut results = Vec::with_capacity(requests.len());
        let mut rest = requests;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.limits.take(rest));
            results.extend(self.acknowledged(now)?);
            rest = later;
        }
        Ok(results)
    }

    /// Only the last message before the batch end asks for an acknowledgement: errors
    /// come unasked, in the order of the messages and before it, when the batch has
    /// been committed or aborted (net/netfilter/nfnetlink.c `nfnetlink_rcv_batch`).
    /// A refusal of the batch as a whole (permission, failed commit) names the first
    /// message.
    fn transaction(
        &mut self,
        requests: &[Message],
    ) -> Result<Result<(), (usize, Errno)>, NetlinkError> {
        let Some(last) = requests.iter().rposition(|request| request.kind != BATCH_END) else {
            return Ok(Ok(()));
        };
        let acknowledge = |index| if index == last { wire::FLAG_ACK } else { 0 };
        let (first, datagram) = self.frame(requests, acknowledge)?;
        self.send(&datagram)?;
        self.counters.requests += requests.len() as u64;
        let mut refused: Option<(usize, Errno)> = None;
        let complete = self.collect(first, requests.len(), |index, frame| {
            if frame.kind != wire::ERROR {
                return Ok(false);
            }
            if let Err(errno) = outcome(&frame)?
                && refused.is_none_or(|(earlier, _)| index < earlier)
            {
                refused = Some((index, errno));
            }
            Ok(index == last || refused.is_some_and(|(index, _)| index == 0))
        })?;
        // After a refusal more replies may be queued behind the one that told.
        self.dirty |= refused.is_some();
        match refused {
            Some(refused) => Ok(Err(refused)),
            None if complete => Ok(Ok(())),
            None => Err(NetlinkError::Lost { operation: "transaction", lost: 1 }),
        }
    }

    fn dump(&mut self, request: &Message) -> Result<Vec<Message>, NetlinkError> {
        for _ in 0..DUMP_TRIES {
            let mut messages = Vec::new();
            if self.dump_once(request, &mut |frame| messages.push(frame.to_message()))? {
                return Ok(messages);
            }
        }
        Err(NetlinkError::Interrupted { tries: DUMP_TRIES })
    }

    fn dump_each(
        &mut self,
        request: &Message,
        part: &mut dyn FnMut(&[u8]),
    ) -> Result<(), NetlinkError> {
        for _ in 0..DUMP_TRIES {
            if self.dump_once(request, &mut |frame| part(frame.payload))? {
                return Ok(());
            }
        }
        Err(NetlinkError::Interrupted { tries: DUMP_TRIES })
    }

    fn get(&mut self, request: &Message) -> Result<Result<Message, Errno>, NetlinkError> {
        let one = std::slice::from_ref(request);
        let (first, datagram) = self.frame(one, |_| wire::FLAG_ACK)?;
        self.send(&datagram)?;
        self.counters.requests += 1;
        let mut reply = None;
        let mut acknowledged = None;
        let complete = self.collect(first, 1, |_, frame| {
            if frame.kind == wire::ERROR {
                acknowledged = Some(outcome(&frame)?);
            } else if reply.is_none() {
                reply = Some(frame.to_message());
            }
            Ok(acknowledged.is_some())
        })?;
        match (acknowledged, reply) {
            (Some(Err(errno)), _) => Ok(Err(errno)),
            (Some(Ok(())), Some(reply)) => Ok(Ok(reply)),
            (Some(Ok(())), None) => Err(NetlinkError::Malformed("an answer without content")),
            (None, _) => {
                debug_assert!(!complete, "an exchange is complete when acknowledged");
                Err(NetlinkError::Lost { operation: "get", lost: 1 })
            }
        }
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

fn clamped(size: usize) -> libc::c_int {
    libc::c_int::try_from(size).unwrap_or(libc::c_int::MAX)
}

const fn timeval(duration: Duration) -> TimeVal {
    TimeVal::new(duration.as_secs().cast_signed(), 0)
}
