//! Connections of the node itself whose port is a node port as well.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use proxy_ebpf::layout::config::client;

use super::wire::{CLIENT, POD, Wire};
use super::{PATIENCE, in_netns};

/// The node's server goes on with whom it had before the node port was one, and its client has the
/// answers that come to the port to which it is bound. What begins there is the Service's.
///
/// # Errors
/// What differed.
pub fn own_connections() -> Result<()> {
    in_netns(|| {
        let mut wire = Wire::new()?;
        wire.attach(&[CLIENT.link, POD.link])?;
        for family in 0..2 {
            of_family(&mut wire, family).with_context(|| CLIENT.node[family])?;
        }
        Ok(())
    })
}

fn of_family(wire: &mut Wire, family: usize) -> Result<()> {
    let node_port = SocketAddr::new(CLIENT.node[family].parse()?, 80);
    let outside = SocketAddr::new(CLIENT.other[family].parse()?, 7000);
    let (client_side, pod) = (wire.net.client.try_clone()?, wire.net.pod.try_clone()?);

    let listener = TcpListener::bind(node_port)?;
    let older = wire.at(&client_side, || Ok(TcpStream::connect_timeout(&node_port, PATIENCE)?))?;
    let (served, _) = listener.accept()?;
    drop(listener);
    wire.programs.tables().set_prefix(node_port.ip().into(), 128, client::NODE)?;
    let backend = SocketAddr::new(POD.other[family].parse()?, 8080);
    wire.frontend(CLIENT.node[family], Some(backend), 0)?;
    speak(&older, &served).context("the server's connection from before")?;

    let server = wire.at(&client_side, || Ok(TcpListener::bind(outside)?))?;
    let stream = connect_from(node_port, outside).context("a client bound to the node port")?;
    let (accepted, peer) = server.accept()?;
    ensure!(peer == node_port, "it comes from {peer}");
    speak(&stream, &accepted).context("the client's connection")?;

    let server = wire.at(&client_side, || Ok(UdpSocket::bind(outside)?))?;
    let socket = UdpSocket::bind(node_port)?;
    socket.connect(outside)?;
    socket.send(b"query")?;
    server.set_read_timeout(Some(PATIENCE))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let (_, peer) = server.recv_from(&mut [0; 9])?;
    server.send_to(b"reply", peer)?;
    ensure!(socket.recv(&mut [0; 9]).context("the reply to the client's datagram")? == 5);

    let server = wire.tcp_server(&pod, POD.other[family])?;
    wire.exchange(&server, CLIENT.node[family], 5).context("a connection to the node port")?;
    Ok(())
}

/// Both ways.
fn speak(one: &TcpStream, other: &TcpStream) -> Result<()> {
    for (mut from, mut to) in [(one, other), (other, one)] {
        to.set_read_timeout(Some(PATIENCE))?;
        from.write_all(b"hello")?;
        to.read_exact(&mut [0; 5])?;
    }
    Ok(())
}

fn connect_from(own: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    let family = if own.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::empty(), None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::TcpUserTimeout, &u32::try_from(PATIENCE.as_millis())?)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(own))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(TcpStream::from(fd))
}
