//! An address with a port, without what `SocketAddr` has besides.

use std::fmt;
use std::net::{AddrParseError, IpAddr, SocketAddr};
use std::str::FromStr;

/// 20 bytes instead of 32: keys hold one for every endpoint of every frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    pub address: IpAddr,
    pub port: u16,
}

impl HostPort {
    #[must_use]
    pub const fn new(address: IpAddr, port: u16) -> Self {
        Self { address, port }
    }
}

/// Flow label and scope of IPv6 are left out.
impl From<SocketAddr> for HostPort {
    fn from(socket: SocketAddr) -> Self {
        Self::new(socket.ip(), socket.port())
    }
}

impl From<HostPort> for SocketAddr {
    fn from(HostPort { address, port }: HostPort) -> Self {
        Self::new(address, port)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&SocketAddr::from(*self), f)
    }
}

impl FromStr for HostPort {
    type Err = AddrParseError;

    fn from_str(text: &str) -> Result<Self, AddrParseError> {
        text.parse::<SocketAddr>().map(Self::from)
    }
}
