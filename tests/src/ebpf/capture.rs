//! Frames as they arrive, checked byte by byte.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};
use proxy_daemon::kernel::links::{Frames, Links as _, NetlinkLinks};
use proxy_daemon::kernel::netlink::{Socket, Subsystem};
use proxy_ebpf::fake::frames::{check, is_partial};

use super::wire::Wire;

/// Frames that come to a namespace from here on.
pub(super) struct Capture {
    socket: OwnedFd,
    /// They have no link header.
    bare: bool,
}

impl Capture {
    pub(super) fn start(wire: &Wire, namespace: &File) -> Result<Self> {
        wire.at(namespace, || {
            let flags = SockFlag::SOCK_NONBLOCK;
            let devices = NetlinkLinks::new(Socket::open(Subsystem::Route)?).devices()?;
            let bare = devices.iter().any(|device| device.frames == Some(Frames::Bare));
            let protocol = SockProtocol::EthAll;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, protocol)?;
            Ok(Self { socket, bare })
        })
    }

    /// Those so far from one of these addresses, each with all of it right or, where that
    /// is left to the "hardware", its checksum right so far: how many of either kind.
    ///
    /// Between veth ends such a checksum is never completed, and what nobody completes
    /// nobody finds wrong: the traffic itself proves nothing about it.
    pub(super) fn verify(&self, from: &[&str]) -> Result<(u32, u32)> {
        let from: Vec<IpAddr> = from.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        let (mut right, mut partial) = (0, 0);
        // With room for the Ethernet header that there may be none of.
        let mut buffer = vec![0; 70_000];
        while let Ok(length) = recv(self.socket.as_raw_fd(), &mut buffer[14..], MsgFlags::empty()) {
            let v6 = buffer[14] >> 4 == 6;
            buffer[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
            let start = if self.bare { 0 } else { 14 };
            let frame = &buffer[start..14 + length];
            if !source(frame).is_some_and(|source| from.contains(&source)) {
                continue;
            }
            if is_partial(frame) {
                partial += 1;
                continue;
            }
            let ended = check(frame).map_err(anyhow::Error::msg);
            ended.with_context(|| format!("{:02x?}", &frame[..length.min(80)]))?;
            right += 1;
        }
        Ok((right, partial))
    }
}

fn source(frame: &[u8]) -> Option<IpAddr> {
    match frame.get(12..14)? {
        [0x08, 0x00] => Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(26..30)?).ok()?)),
        [0x86, 0xdd] => Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(22..38)?).ok()?)),
        _ => None,
    }
}
