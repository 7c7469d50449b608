//! Sockets of all three protocols as tokio sees them.
//!
//! A one-to-one SCTP socket takes the same calls as a TCP one, so it travels in the same
//! types; only its creation differs, which is why sockets are made here by hand.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect,
    listen, setsockopt, socket, sockopt,
};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::Protocol;

fn open(protocol: Protocol, like: SocketAddr) -> io::Result<OwnedFd> {
    let family = if like.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let (kind, number) = match protocol {
        Protocol::Tcp => (SockType::Stream, SockProtocol::Tcp),
        Protocol::Udp => (SockType::Datagram, SockProtocol::Udp),
        Protocol::Sctp => (SockType::Stream, SockProtocol::Sctp),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, kind, flags, number)?;
    if like.is_ipv6() {
        // `[::]` and `0.0.0.0` are listened on by different sockets, as the tests name them.
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    Ok(fd)
}

fn bind_to(fd: &OwnedFd, address: SocketAddr) -> io::Result<()> {
    Ok(bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?)
}

/// A listening socket, not yet registered with a runtime.
pub(super) fn listener(protocol: Protocol, address: SocketAddr) -> io::Result<OwnedFd> {
    let fd = open(protocol, address)?;
    if protocol != Protocol::Udp {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    }
    bind_to(&fd, address)?;
    if protocol != Protocol::Udp {
        listen(&fd, Backlog::MAXCONN)?;
    }
    Ok(fd)
}

pub(super) fn local_address(protocol: Protocol, fd: OwnedFd) -> io::Result<(SocketAddr, OwnedFd)> {
    if protocol == Protocol::Udp {
        let socket = std::net::UdpSocket::from(fd);
        Ok((socket.local_addr()?, socket.into()))
    } else {
        let socket = std::net::TcpListener::from(fd);
        Ok((socket.local_addr()?, socket.into()))
    }
}

pub(super) fn into_listener(fd: OwnedFd) -> io::Result<TcpListener> {
    TcpListener::from_std(fd.into())
}

pub(super) fn into_udp(fd: OwnedFd) -> io::Result<UdpSocket> {
    UdpSocket::from_std(fd.into())
}

/// A socket ready to connect, bound to `source` when one is asked for. A source port may
/// be one that an earlier connection still waits on (`SO_REUSEADDR`).
fn client(
    protocol: Protocol,
    target: SocketAddr,
    source: Option<SocketAddr>,
) -> io::Result<OwnedFd> {
    let fd = open(protocol, target)?;
    if let Some(source) = source {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        bind_to(&fd, source)?;
    }
    Ok(fd)
}

/// Opens a TCP connection or SCTP association.
pub(super) async fn connected_stream(
    protocol: Protocol,
    target: SocketAddr,
    source: Option<SocketAddr>,
) -> io::Result<TcpStream> {
    let fd = client(protocol, target, source)?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(target)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let stream = TcpStream::from_std(fd.into())?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// The second SYN of a client leaves after one second: this one had no answer either.
const SLOW: Duration = Duration::from_millis(1500);

/// The same without a runtime; the error names the socket's own address. `slow` is told that
/// address when nothing was heard for long, and the connection goes on trying.
pub(super) fn connect_within(
    target: SocketAddr,
    limit: Duration,
    slow: impl FnOnce(SocketAddr),
) -> Result<std::net::TcpStream> {
    let fd = client(Protocol::Tcp, target, None)?;
    let connecting = connect(fd.as_raw_fd(), &SockaddrStorage::from(target));
    let stream = std::net::TcpStream::from(fd);
    let own = stream.local_addr()?;
    let what = || format!("connect to {target} from {own}");
    match connecting {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(errno) => return Err(io::Error::from(errno)).with_context(what),
    }
    let mut ready = wait(&stream, limit.min(SLOW))?;
    if !ready && limit > SLOW {
        slow(own);
        ready = wait(&stream, limit.saturating_sub(SLOW))?;
    }
    let failed = if ready { stream.take_error()? } else { Some(io::ErrorKind::TimedOut.into()) };
    if let Some(error) = failed {
        return Err(error).with_context(what);
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// False when it neither connected nor failed in time.
fn wait(stream: &std::net::TcpStream, limit: Duration) -> Result<bool> {
    let mut ready = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    loop {
        match poll(&mut ready, PollTimeout::try_from(limit)?) {
            Err(Errno::EINTR) => {}
            ended => return Ok(ended? > 0),
        }
    }
}

/// A UDP socket that hears ICMP errors of its target.
pub(super) fn connected_udp(
    target: SocketAddr,
    source: Option<SocketAddr>,
) -> io::Result<UdpSocket> {
    let fd = client(Protocol::Udp, target, source)?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(target))?;
    into_udp(fd)
}

/// A UDP socket that takes answers from anywhere.
pub(super) fn unconnected_udp(
    target: SocketAddr,
    source: Option<SocketAddr>,
) -> io::Result<UdpSocket> {
    let any = if target.is_ipv6() {
        IpAddr::from(Ipv6Addr::UNSPECIFIED)
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    into_udp(client(Protocol::Udp, target, Some(source.unwrap_or(SocketAddr::new(any, 0))))?)
}
