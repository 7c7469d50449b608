//! Servers that say who they are, and clients that count who answered.
//!
//! Everything here works in the network namespace of the thread that starts it, is bounded
//! in count and time, and reports in a form that goes to JSON. A server greets a connection
//! with one line of JSON (see [`Greeting`]) and then echoes; it answers a datagram with the
//! same line, which carries the datagram's text back.

mod connect;
mod held;
mod rate;
mod server;
mod socket;
mod stream;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

pub use connect::{Close, ConnectReport, ConnectSpec, Latency, connect};
pub use held::Held;
pub use rate::{RateReport, RateSpec, UdpRate};
pub use server::{Listen, Server};
pub use stream::{StreamChecker, StreamReport, StreamSpec};

/// Somebody ended the socket (`SOCK_DESTROY`: once `ECONNABORTED`, then there is no peer). Its
/// owner connects again, as a resolver does.
#[must_use]
pub fn was_ended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ECONNABORTED | nix::libc::EDESTADDRREQ))
}

/// A transport protocol. SCTP is used one-to-one (RFC 6458, section 4), where a socket
/// behaves like a TCP one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl FromStr for Protocol {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            "sctp" => Ok(Protocol::Sctp),
            _ => bail!("{text:?} is not tcp, udp or sctp"),
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// What a server says of itself and of the client as it saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// The name the server was started with.
    pub server: String,
    /// The client's address as it arrived.
    pub peer: SocketAddr,
    /// The server's own address, unspecified for a datagram to a wildcard socket.
    pub local: SocketAddr,
    /// The text of the datagram that this answers; empty for connections.
    #[serde(default)]
    pub echo: String,
}

/// Ways in which an attempt fails that a test needs to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// TCP reset in answer to the SYN, or ICMP port unreachable.
    Refused,
    /// A connection that was cut by a reset.
    Reset,
    /// Nothing came in time: what a silent drop looks like.
    Timeout,
    /// ICMP host, network or administratively unreachable.
    Unreachable,
    /// The server closed before it said who it is.
    Closed,
    /// Something of the client's own: no free port, no memory, no route.
    Local,
}

/// One failed attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub detail: String,
}

impl Failure {
    fn timeout(what: &str, after: Duration) -> Self {
        Self { kind: FailureKind::Timeout, detail: format!("{what}: nothing within {after:?}") }
    }

    fn io(what: &str, error: &io::Error) -> Self {
        use io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::ConnectionRefused => FailureKind::Refused,
            Io::ConnectionReset | Io::BrokenPipe | Io::ConnectionAborted => FailureKind::Reset,
            Io::TimedOut => FailureKind::Timeout,
            Io::HostUnreachable | Io::NetworkUnreachable => FailureKind::Unreachable,
            Io::UnexpectedEof => FailureKind::Closed,
            // What ICMP "administratively prohibited" arrives as: EACCES for IPv6,
            // EHOSTUNREACH for IPv4 (Linux, icmp_err_convert and tab_unreach).
            Io::PermissionDenied => FailureKind::Unreachable,
            _ => FailureKind::Local,
        };
        Self { kind, detail: format!("{what}: {error}") }
    }
}

/// Counts by server name.
pub type ByServer = BTreeMap<String, u64>;
/// Counts by the client address that servers saw.
pub type BySource = BTreeMap<IpAddr, u64>;

/// `tcp:10.96.0.10:53` or `udp:[fd00::1]:53`.
pub fn parse_endpoint(text: &str) -> anyhow::Result<(Protocol, SocketAddr)> {
    let (protocol, address) =
        text.split_once(':').with_context(|| format!("{text:?}: want PROTOCOL:ADDRESS:PORT"))?;
    let address = address.parse().with_context(|| format!("{address:?}: want ADDRESS:PORT"))?;
    Ok((protocol.parse()?, address))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Everything runs on one thread: the guest's processors are few and emulated.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
