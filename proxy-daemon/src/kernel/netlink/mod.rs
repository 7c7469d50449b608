//! A blocking netlink socket that pipelines requests, and its fakeable trait.

pub mod fake;
pub mod generic;
mod socket;
#[cfg(test)]
mod tests;
mod wire;

use std::fmt;

pub use fake::FakeNetlink;
pub use socket::{Socket, Subsystem};

/// A request or a reply without its `nlmsghdr`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `NLM_F_*` beyond `NLM_F_REQUEST` and `NLM_F_ACK`, which the socket adds.
    pub flags: u16,
    /// Everything after the header: family header and attributes.
    pub payload: Vec<u8>,
}

/// A positive errno as the kernel returned it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&nix::errno::Errno::from_raw(self.0), f)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errno = nix::errno::Errno::from_raw(self.0);
        write!(f, "{errno:?}: {}", errno.desc())
    }
}

impl std::error::Error for Errno {}

/// The socket itself failed; nothing is known about the requests under way.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("netlink {operation}: {source}")]
    Io { operation: &'static str, source: std::io::Error },
    #[error("netlink reply cannot be read: {0}")]
    Malformed(&'static str),
    #[error("netlink {operation} refused: {errno}")]
    Refused { operation: &'static str, errno: Errno },
    /// Replies did not come in time, or the receive buffer overflowed and some are
    /// lost: requests may or may not have been carried out.
    #[error("netlink {operation}: {lost} of the replies never came")]
    Lost { operation: &'static str, lost: usize },
    /// Every attempt at a dump met a change under way.
    #[error("netlink dump was interrupted by changes {tries} times in a row")]
    Interrupted { tries: u32 },
}

/// Operation counts, for tests and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    pub requests: u64,
    pub dumps: u64,
    /// `sendmsg` calls: pipelining shows as fewer of these than requests.
    pub sends: u64,
}

pub trait Netlink: Send {
    /// Sends all requests, each acknowledged, without waiting in between; the results
    /// are in the order of the requests. Splits into bounded sends by itself so that
    /// neither socket buffer overflows.
    fn request_all(&mut self, requests: &[Message])
    -> Result<Vec<Result<(), Errno>>, NetlinkError>;

    /// All requests in one `sendmsg` (nf_tables transactions: batch begin to batch end).
    /// `Ok(Err((index, errno)))` names the first refused request; the kernel then
    /// applied none.
    fn transaction(
        &mut self,
        requests: &[Message],
    ) -> Result<Result<(), (usize, Errno)>, NetlinkError>;

    /// `NLM_F_DUMP`, restarted when the kernel marks it interrupted (`NLM_F_DUMP_INTR`);
    /// every part of one consistent dump is returned.
    fn dump(&mut self, request: &Message) -> Result<Vec<Message>, NetlinkError>;

    /// Like [`Netlink::dump`], but hands over the payload of each part as it arrives and
    /// keeps none: for tables that others fill and that may be large. When a dump has to
    /// be restarted, parts come again.
    fn dump_each(
        &mut self,
        request: &Message,
        part: &mut dyn FnMut(&[u8]),
    ) -> Result<(), NetlinkError> {
        for message in self.dump(request)? {
            part(&message.payload);
        }
        Ok(())
    }

    /// A request that is answered by one message (not a dump): that message.
    fn get(&mut self, request: &Message) -> Result<Result<Message, Errno>, NetlinkError>;

    fn counters(&self) -> Counters;
}
