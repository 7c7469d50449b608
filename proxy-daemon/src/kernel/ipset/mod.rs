//! ipset over netlink (`net/netfilter/ipset/ip_set_core.c`): which sets there are, what
//! is in them, and destroying them. Numbers are those of
//! `include/uapi/linux/netfilter/ipset/ip_set.h`.

mod fake;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use nix::libc;

use super::netlink::{Errno, Message, Netlink, NetlinkError};
use super::nftables::{Attribute, Malformed, Writer, attributes};

pub use fake::FakeIpSets;

/// `NFNL_SUBSYS_IPSET`, in the upper byte of a message's type.
const SUBSYSTEM: u16 = 6 << 8;
/// `IPSET_CMD_DESTROY`, `IPSET_CMD_LIST`.
const DESTROY: u16 = SUBSYSTEM | 3;
const LIST: u16 = SUBSYSTEM | 7;
/// `IPSET_PROTOCOL_MIN`: what kernels before 4.20 speak and later ones still take.
const PROTOCOL: u8 = 6;
/// `IPSET_ATTR_PROTOCOL`, `_SETNAME`, `_FLAGS`, `_DATA`, `_ADT`.
const ATTR_PROTOCOL: u16 = 1;
const ATTR_SETNAME: u16 = 2;
const ATTR_FLAGS: u16 = 6;
const ATTR_DATA: u16 = 7;
const ATTR_ADT: u16 = 8;
/// Within a member: `IPSET_ATTR_IP`, `_PORT`, `_PROTO`.
const MEMBER_IP: u16 = 1;
const MEMBER_PORT: u16 = 4;
const MEMBER_PROTO: u16 = 7;
/// `IPSET_ATTR_IPADDR_IPV4`, `_IPV6`.
const IPADDR_V4: u16 = 1;
const IPADDR_V6: u16 = 2;
/// `IPSET_FLAG_LIST_SETNAME`: neither headers nor members.
const LIST_SETNAME: u32 = 1 << 1;
/// `sizeof(struct nfgenmsg)`.
const HEADER: usize = 4;
/// `NFPROTO_IPV4`: the family in the header says nothing about the sets.
const ANY_FAMILY: [u8; HEADER] = [2, 0, 0, 0];

/// `IPSET_ERR_BUSY`: something still refers to the set.
pub const BUSY: Errno = Errno(4100);

/// What of a set's member is of interest; which of these it has follows from the type
/// of the set (`hash:ip,port`, `bitmap:port`, ...).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Member {
    pub address: Option<IpAddr>,
    pub port: Option<u16>,
    /// Transport protocol number.
    pub protocol: Option<u8>,
}

/// The seam; [`FakeIpSets`] is the other implementation.
pub trait IpSets: Send {
    /// The names of all sets of the network namespace. A kernel without ipset has none,
    /// and does not load it because of the question.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn names(&mut self) -> Result<Vec<String>, NetlinkError>;

    /// The members of one set.
    ///
    /// # Errors
    /// `ENOENT` when there is no such set.
    fn members(&mut self, set: &str) -> Result<Vec<Member>, NetlinkError>;

    /// Destroys sets with what is in them; one result each, [`BUSY`] for a set that
    /// something refers to. One that is gone already is a success.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn destroy(&mut self, sets: &[&str]) -> Result<Vec<Result<(), Errno>>, NetlinkError>;
}

/// The real one, on a socket of [`super::netlink::Subsystem::Netfilter`].
#[derive(Debug)]
pub struct NetlinkIpSets<N> {
    netlink: N,
    module: PathBuf,
}

impl<N: Netlink> NetlinkIpSets<N> {
    /// `modules` is `/sys/module`.
    pub fn new(netlink: N, modules: &Path) -> Self {
        Self { netlink, module: modules.join("ip_set") }
    }

    /// A request of this subsystem makes the kernel load `ip_set`. Built in or loaded, it
    /// has a directory here, for its parameter `max_sets`.
    fn absent(&self) -> bool {
        self.module.parent().is_some_and(Path::exists) && !self.module.exists()
    }
}

impl<N: Netlink> IpSets for NetlinkIpSets<N> {
    fn names(&mut self) -> Result<Vec<String>, NetlinkError> {
        if self.absent() {
            return Ok(Vec::new());
        }
        let request = message(LIST, |w| w.put_u32(ATTR_FLAGS, LIST_SETNAME));
        match self.netlink.dump(&request) {
            Ok(parts) => parts.iter().map(|part| Ok(decode_name(part)?)).collect(),
            // `nfnetlink_rcv_msg`: no such subsystem, and no module for it.
            Err(NetlinkError::Refused { errno: Errno(libc::EINVAL), .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn members(&mut self, set: &str) -> Result<Vec<Member>, NetlinkError> {
        let request = message(LIST, |w| w.put_str(ATTR_SETNAME, set));
        let mut members = Vec::new();
        for part in self.netlink.dump(&request)? {
            members.extend(decode_members(&part)?);
        }
        Ok(members)
    }

    fn destroy(&mut self, sets: &[&str]) -> Result<Vec<Result<(), Errno>>, NetlinkError> {
        let requests: Vec<_> =
            sets.iter().map(|set| message(DESTROY, |w| w.put_str(ATTR_SETNAME, set))).collect();
        let results = self.netlink.request_all(&requests)?;
        let gone = |result: &Result<(), Errno>| *result == Err(Errno(libc::ENOENT));
        Ok(results.into_iter().map(|r| if gone(&r) { Ok(()) } else { r }).collect())
    }
}

/// The meaning of an errno of this subsystem, some of which are its own.
#[must_use]
pub fn explain(errno: Errno) -> String {
    match errno {
        BUSY => "a rule or another set still refers to it".to_owned(),
        errno => errno.to_string(),
    }
}

fn message(kind: u16, fill: impl FnOnce(&mut Writer)) -> Message {
    let mut writer = Writer::after(&ANY_FAMILY);
    writer.put(ATTR_PROTOCOL, &[PROTOCOL]);
    fill(&mut writer);
    Message { kind, flags: 0, payload: writer.finish() }
}

fn body(
    message: &Message,
) -> Result<impl Iterator<Item = Result<Attribute<'_>, Malformed>>, Malformed> {
    message
        .payload
        .get(HEADER..)
        .map(attributes)
        .ok_or(Malformed("the header of an ipset message is cut off"))
}

fn decode_name(message: &Message) -> Result<String, Malformed> {
    for attribute in body(message)? {
        let attribute = attribute?;
        if attribute.kind == ATTR_SETNAME {
            return attribute.string().map(str::to_owned);
        }
    }
    Err(Malformed("an ipset without a name"))
}

fn decode_members(message: &Message) -> Result<Vec<Member>, Malformed> {
    let mut members = Vec::new();
    for list in body(message)? {
        let list = list?;
        if list.kind != ATTR_ADT {
            continue;
        }
        for data in attributes(list.value) {
            let data = data?;
            if data.kind == ATTR_DATA {
                members.push(decode_member(data.value)?);
            }
        }
    }
    Ok(members)
}

fn decode_member(bytes: &[u8]) -> Result<Member, Malformed> {
    let mut member = Member::default();
    for attribute in attributes(bytes) {
        let attribute = attribute?;
        match (attribute.kind, attribute.value) {
            (MEMBER_IP, address) => member.address = decode_address(address)?,
            (MEMBER_PORT, &[high, low]) => member.port = Some(u16::from_be_bytes([high, low])),
            (MEMBER_PROTO, &[protocol]) => member.protocol = Some(protocol),
            _ => {}
        }
    }
    Ok(member)
}

fn decode_address(bytes: &[u8]) -> Result<Option<IpAddr>, Malformed> {
    for attribute in attributes(bytes) {
        let attribute = attribute?;
        let wrong = |_| Malformed("an address of the wrong length");
        match attribute.kind {
            IPADDR_V4 => {
                let octets: [u8; 4] = attribute.value.try_into().map_err(wrong)?;
                return Ok(Some(Ipv4Addr::from(octets).into()));
            }
            IPADDR_V6 => {
                let octets: [u8; 16] = attribute.value.try_into().map_err(wrong)?;
                return Ok(Some(Ipv6Addr::from(octets).into()));
            }
            _ => {}
        }
    }
    Ok(None)
}
