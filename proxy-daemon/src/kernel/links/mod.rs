//! Links and addresses (rtnetlink): the dummy link that holds the Services' addresses,
//! and the node's own addresses.

mod fake;
#[cfg(test)]
mod kernel_tests;
mod monitor;

use std::net::IpAddr;

use netlink_packet_core::{Emitable, NlasIterator};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeader, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use nix::libc;

use super::modules::MissingModule;
use super::netlink::{Counters, Errno, Message, Netlink, NetlinkError};

pub use fake::FakeLinks;
pub use monitor::AddressMonitor;

/// Message types (include/uapi/linux/rtnetlink.h).
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;

/// Attributes of addresses (include/uapi/linux/if_addr.h) and links (if_link.h).
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_MASTER: u16 = 10;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_SLAVE_KIND: u16 = 4;

/// Links that carry Ethernet frames, and those whose packets have no link header
/// (include/uapi/linux/if_arp.h). GRE is not among them: it writes its own header first.
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_PPP: u16 = 512;
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_TUNNEL: u16 = 768;
const ARPHRD_TUNNEL6: u16 = 769;
const ARPHRD_SIT: u16 = 776;
/// WireGuard, tun.
const ARPHRD_NONE: u16 = 0xfffe;

/// Lengths of `struct ifaddrmsg` and `struct ifinfomsg`.
const ADDRESS_HEADER: usize = 8;
const LINK_HEADER: usize = 16;

/// An address with the link that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkAddress {
    pub link: u32,
    pub address: IpAddr,
    /// Length of the network's prefix that is on the link.
    pub prefix: u8,
}

impl LinkAddress {
    /// Alone on its link, as the addresses of Services are.
    #[must_use]
    pub const fn alone(link: u32, address: IpAddr) -> Self {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        Self { link, address, prefix }
    }
}

/// What another link does with a link's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Enslaved {
    /// A bridge's port.
    Bridge,
    /// Of a bond, a team, a VRF: what comes in comes in there.
    Other,
}

/// What a link's packets begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Frames {
    Ethernet,
    /// IP's own header: there is no other.
    Bare,
}

impl Frames {
    /// Of a hardware type; `None`: a header of some other kind.
    const fn of(kind: u16) -> Option<Self> {
        match kind {
            ARPHRD_ETHER => Some(Self::Ethernet),
            ARPHRD_PPP | ARPHRD_RAWIP | ARPHRD_TUNNEL | ARPHRD_TUNNEL6 | ARPHRD_SIT
            | ARPHRD_NONE => Some(Self::Bare),
            _ => None,
        }
    }
}

/// How a program is attached at XDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum XdpAttached {
    /// In the driver.
    Native,
    /// In the stack.
    Generic,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    pub index: u32,
    pub name: String,
    /// `veth`, `dummy` ..; physical ones have none.
    pub kind: Option<String>,
    /// `None`: they begin with a header of another kind.
    pub frames: Option<Frames>,
    pub enslaved: Option<Enslaved>,
    /// Its Ethernet address.
    pub mac: Option<[u8; 6]>,
    /// Anybody's program.
    pub xdp: Option<XdpAttached>,
}

#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Missing(#[from] MissingModule),
    #[error("link {name}: cannot {operation}: {errno}")]
    Refused { operation: &'static str, name: String, errno: Errno },
    #[error("link {0} exists and is not a dummy link: it was not made by a service proxy")]
    NotDummy(String),
}

/// What happens to one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressChange {
    Add(IpAddr),
    Delete(IpAddr),
}

/// The seam; [`FakeLinks`] is the other implementation.
pub trait Links: Send {
    /// The index of the dummy link `name`, which is created when it is not there.
    ///
    /// # Errors
    /// [`LinksError::Missing`] when the kernel knows no dummy links, and
    /// [`LinksError::NotDummy`] when the name is taken.
    fn ensure_dummy(&mut self, name: &str) -> Result<u32, LinksError>;

    /// The index of the link `name` as things are now, of whatever kind it is.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn index(&mut self, name: &str) -> Result<Option<u32>, LinksError>;

    /// Every address of the network namespace, in one dump.
    fn addresses(&mut self) -> Result<Vec<LinkAddress>, LinksError>;

    /// Every device of the network namespace, in one dump.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn devices(&mut self) -> Result<Vec<Device>, LinksError>;

    /// Adds and deletes host addresses (/32, /128) of a link, pipelined; one result
    /// each. An address that is there already, or gone already, is a success.
    fn change_addresses(
        &mut self,
        link: u32,
        changes: &[AddressChange],
    ) -> Result<Vec<Result<(), Errno>>, LinksError>;

    /// Deletes the dummy link; no error when it is not there.
    fn delete_dummy(&mut self, name: &str) -> Result<(), LinksError>;

    fn counters(&self) -> Counters;
}

/// The real one, on a socket of [`super::netlink::Subsystem::Route`].
#[derive(Debug)]
pub struct NetlinkLinks<N> {
    netlink: N,
}

impl<N: Netlink> NetlinkLinks<N> {
    pub const fn new(netlink: N) -> Self {
        Self { netlink }
    }

    /// Index and kind of a link.
    fn find(&mut self, name: &str) -> Result<Option<(u32, Option<String>)>, LinksError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.netlink.get(&request(RTM_GETLINK, 0, &message))? {
            Ok(reply) => Ok(Some(
                decode_link(&reply.payload).ok_or(NetlinkError::Malformed("a link's reply"))?,
            )),
            Err(Errno(libc::ENODEV)) => Ok(None),
            Err(errno) => Err(refused("look up", name, errno)),
        }
    }

    fn one(&mut self, request: Message) -> Result<Result<(), Errno>, NetlinkError> {
        let results = self.netlink.request_all(&[request])?;
        results.into_iter().next().ok_or(NetlinkError::Malformed("no answer to a request"))
    }
}

fn request(kind: u16, flags: i32, message: &impl Emitable) -> Message {
    let mut payload = vec![0; message.buffer_len()];
    message.emit(&mut payload);
    Message { kind, flags: u16::try_from(flags).unwrap_or_default(), payload }
}

fn refused(operation: &'static str, name: &str, errno: Errno) -> LinksError {
    LinksError::Refused { operation, name: name.to_owned(), errno }
}

impl<N: Netlink> Links for NetlinkLinks<N> {
    fn ensure_dummy(&mut self, name: &str) -> Result<u32, LinksError> {
        match self.find(name)? {
            Some((index, Some(kind))) if kind == "dummy" => return Ok(index),
            Some(_) => return Err(LinksError::NotDummy(name.to_owned())),
            None => {}
        }
        let mut message = LinkMessage::default();
        // The link stays down and silent: addresses of a link that is down are local
        // all the same, and nobody may ask for them by ARP.
        message.header.flags = LinkFlags::Noarp;
        message.header.change_mask = LinkFlags::Noarp;
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Dummy)]));
        match self.one(request(RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &message))? {
            Ok(()) => {}
            Err(Errno(libc::EOPNOTSUPP)) => {
                return Err(MissingModule::new("dummy", "dummy network links").into());
            }
            Err(errno) => return Err(refused("create", name, errno)),
        }
        self.find(name)?
            .map(|(index, _)| index)
            .ok_or_else(|| refused("find again", name, Errno(libc::ENODEV)))
    }

    fn index(&mut self, name: &str) -> Result<Option<u32>, LinksError> {
        Ok(self.find(name)?.map(|(index, _)| index))
    }

    fn addresses(&mut self) -> Result<Vec<LinkAddress>, LinksError> {
        let parts = self.netlink.dump(&request(RTM_GETADDR, 0, &AddressMessage::default()))?;
        parts
            .iter()
            .filter(|part| part.kind == RTM_NEWADDR)
            .map(|part| {
                decode_address(&part.payload)
                    .ok_or_else(|| NetlinkError::Malformed("an address in a dump").into())
            })
            .collect()
    }

    fn devices(&mut self) -> Result<Vec<Device>, LinksError> {
        let parts = self.netlink.dump(&request(RTM_GETLINK, 0, &LinkMessage::default()))?;
        parts
            .iter()
            .filter(|part| part.kind == RTM_NEWLINK)
            .map(|part| {
                decode_device(&part.payload)
                    .ok_or_else(|| NetlinkError::Malformed("a link in a dump").into())
            })
            .collect()
    }

    fn change_addresses(
        &mut self,
        link: u32,
        changes: &[AddressChange],
    ) -> Result<Vec<Result<(), Errno>>, LinksError> {
        let requests: Vec<Message> =
            changes.iter().map(|change| change_request(link, *change)).collect();
        let results = self.netlink.request_all(&requests)?;
        Ok(results
            .into_iter()
            .zip(changes)
            .map(|(result, change)| match (result, change) {
                (Err(Errno(libc::EEXIST)), AddressChange::Add(_))
                | (Err(Errno(libc::EADDRNOTAVAIL)), AddressChange::Delete(_)) => Ok(()),
                (result, _) => result,
            })
            .collect())
    }

    fn delete_dummy(&mut self, name: &str) -> Result<(), LinksError> {
        let index = match self.find(name)? {
            Some((index, Some(kind))) if kind == "dummy" => index,
            Some(_) => return Err(LinksError::NotDummy(name.to_owned())),
            None => return Ok(()),
        };
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.one(request(RTM_DELLINK, 0, &message))?.map_err(|errno| refused("delete", name, errno))
    }

    fn counters(&self) -> Counters {
        self.netlink.counters()
    }
}

fn change_request(link: u32, change: AddressChange) -> Message {
    let (kind, flags, address) = match change {
        AddressChange::Add(a) => (RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, a),
        AddressChange::Delete(a) => (RTM_DELADDR, 0, a),
    };
    let (family, prefix_len) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    let mut message = AddressMessage::default();
    message.header = AddressHeader {
        family,
        prefix_len,
        scope: AddressScope::Universe,
        index: link,
        ..AddressHeader::default()
    };
    message.attributes.push(AddressAttribute::Local(address));
    if matches!(change, AddressChange::Add(IpAddr::V6(_))) {
        // Duplicate address detection would keep the address tentative: packets to it
        // would not be taken for local ones.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    } else if address.is_ipv4() {
        message.attributes.push(AddressAttribute::Address(address));
    }
    request(kind, flags, &message)
}

/// Attributes are read by hand: the crate's parser refuses a whole message over one
/// attribute that a newer kernel made longer.
fn attribute(payload: &[u8], header: usize, kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(payload.get(header..)?)
        .filter_map(Result::ok)
        .find(|attribute| attribute.kind() == kind)
        .map(|attribute| attribute.value().to_vec())
}

fn decode_address(payload: &[u8]) -> Option<LinkAddress> {
    let link = u32::from_ne_bytes(payload.get(4..8)?.try_into().ok()?);
    // On point-to-point links IFA_ADDRESS is the peer's and IFA_LOCAL ours; IPv6 has
    // IFA_LOCAL only there.
    let bytes = attribute(payload, ADDRESS_HEADER, IFA_LOCAL)
        .or_else(|| attribute(payload, ADDRESS_HEADER, IFA_ADDRESS))?;
    let address = match *bytes.as_slice() {
        [a, b, c, d] => IpAddr::from([a, b, c, d]),
        ref v6 => IpAddr::from(<[u8; 16]>::try_from(v6).ok()?),
    };
    Some(LinkAddress { link, address, prefix: *payload.get(1)? })
}

fn decode_link(payload: &[u8]) -> Option<(u32, Option<String>)> {
    let index = u32::from_ne_bytes(payload.get(4..8)?.try_into().ok()?);
    attribute(payload, LINK_HEADER, IFLA_IFNAME)?;
    let kind = attribute(payload, LINK_HEADER, IFLA_LINKINFO)
        .and_then(|info| attribute(&info, 0, IFLA_INFO_KIND))
        .map(|kind| String::from_utf8_lossy(&kind).trim_end_matches('\0').to_owned());
    Some((index, kind))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

fn decode_device(payload: &[u8]) -> Option<Device> {
    let kind = u16::from_ne_bytes(payload.get(2..4)?.try_into().ok()?);
    let index = u32::from_ne_bytes(payload.get(4..8)?.try_into().ok()?);
    let name = attribute(payload, LINK_HEADER, IFLA_IFNAME)?;
    let info = attribute(payload, LINK_HEADER, IFLA_LINKINFO).unwrap_or_default();
    let master = attribute(payload, LINK_HEADER, IFLA_MASTER);
    let of = attribute(&info, 0, IFLA_INFO_SLAVE_KIND).map(|kind| text(&kind));
    let xdp = attribute(payload, LINK_HEADER, IFLA_XDP)
        .and_then(|xdp| attribute(&xdp, 0, IFLA_XDP_ATTACHED));
    Some(Device {
        index,
        name: text(&name),
        kind: attribute(&info, 0, IFLA_INFO_KIND).map(|kind| text(&kind)),
        frames: Frames::of(kind),
        enslaved: master.map(|_| match of.as_deref() {
            Some("bridge") => Enslaved::Bridge,
            _ => Enslaved::Other,
        }),
        mac: attribute(payload, LINK_HEADER, IFLA_ADDRESS)
            .and_then(|address| address.try_into().ok()),
        xdp: match xdp.as_deref() {
            // `XDP_ATTACHED_DRV`, `_SKB`; `_MULTI` has several modes at once, and the driver's
            // comes first.
            Some([1 | 4, ..]) => Some(XdpAttached::Native),
            Some([2, ..]) => Some(XdpAttached::Generic),
            _ => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::FakeNetlink;

    #[test]
    fn one_address_is_one_request_and_what_is_done_already_is_a_success() {
        let fake = FakeNetlink::scripted([
            Err(Errno(libc::EEXIST)),
            Err(Errno(libc::EADDRNOTAVAIL)),
            Err(Errno(libc::EPERM)),
        ]);
        let mut links = NetlinkLinks::new(fake.clone());
        let address = IpAddr::from([10, 96, 0, 1]);
        let results = links
            .change_addresses(
                7,
                &[
                    AddressChange::Add(address),
                    AddressChange::Delete(address),
                    AddressChange::Add("fd00::1".parse().unwrap()),
                ],
            )
            .unwrap();
        assert_eq!(results, [Ok(()), Ok(()), Err(Errno(libc::EPERM))]);
        let sent = fake.messages();
        assert_eq!(sent.len(), 3);
        assert_eq!(sent[0].kind, RTM_NEWADDR);
        assert_eq!(sent[0].payload[..8], [2, 32, 0, 0, 7, 0, 0, 0]);
        let nodad = attribute(&sent[2].payload, ADDRESS_HEADER, 8);
        assert_eq!(nodad, Some(vec![2, 0, 0, 0]), "IFA_F_NODAD");
    }

    #[test]
    fn a_kernel_without_dummy_links_is_named() {
        let fake = FakeNetlink::scripted([Err(Errno(libc::ENODEV)), Err(Errno(libc::EOPNOTSUPP))]);
        let error = NetlinkLinks::new(fake).ensure_dummy("kube-ipvs0").unwrap_err();
        assert!(error.to_string().contains("modprobe dummy"), "{error}");
    }

    #[test]
    fn a_device_tells_what_its_packets_begin_with() {
        let frames = |kind: u16| {
            let mut payload = vec![0; LINK_HEADER];
            payload[2..4].copy_from_slice(&kind.to_ne_bytes());
            payload.extend_from_slice(&[8, 0, 3, 0, b'w', b'g', b'0', 0]);
            decode_device(&payload).unwrap().frames
        };
        assert_eq!(frames(1), Some(Frames::Ethernet));
        for (kind, what) in [(65534, "none"), (768, "ipip"), (769, "ip6tnl"), (776, "sit")] {
            assert_eq!(frames(kind), Some(Frames::Bare), "{what}");
        }
        for (kind, what) in [(772, "loopback"), (778, "gre"), (823, "ip6gre"), (32, "infiniband")] {
            assert_eq!(frames(kind), None, "{what}");
        }
    }

    #[test]
    fn a_link_of_another_kind_is_never_touched() {
        let mut payload = vec![0; LINK_HEADER];
        payload[4] = 9;
        payload.extend_from_slice(&[9, 0, 3, 0, b'k', b'u', b'b', b'e', 0, 0, 0, 0]);
        let reply = Message { kind: RTM_NEWLINK, flags: 0, payload };
        let fake = FakeNetlink::scripted([Ok(vec![reply.clone()]), Ok(vec![reply])]);
        let mut links = NetlinkLinks::new(fake.clone());
        assert!(matches!(links.ensure_dummy("kube"), Err(LinksError::NotDummy(_))));
        assert!(matches!(links.delete_dummy("kube"), Err(LinksError::NotDummy(_))));
        assert_eq!(fake.messages().len(), 2, "two look-ups and nothing else");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80),
        ) {
            let _ = (decode_address(&bytes), decode_link(&bytes), decode_device(&bytes));
        }
    }
}
