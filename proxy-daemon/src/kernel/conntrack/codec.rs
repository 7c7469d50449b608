//! Conntrack entries as netlink messages, read and addressed for deletion. Pure.
//!
//! Numbers are those of `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Flow, Tuple};
use crate::kernel::netlink::Message;
use crate::kernel::nftables::{Attribute, Malformed, Writer, attributes};
use crate::model::{Family, Protocol};

/// `NFNL_SUBSYS_CTNETLINK << 8`, with `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;

/// `sizeof(struct nfgenmsg)`.
const HEADER: usize = 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;

/// `enum ctattr_type`.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
/// `CTA_FILTER_ORIG_FLAGS`.
const FILTER_ORIG_FLAGS: u16 = 1;
/// `CTA_FILTER_F_CTA_PROTO_NUM` of `net/netfilter/nf_internals.h`.
const BY_PROTOCOL: u32 = 1 << 3;
/// `enum ctattr_tuple`.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
/// `enum ctattr_ip`.
const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const IP_V6_SRC: u16 = 3;
const IP_V6_DST: u16 = 4;
/// `enum ctattr_l4proto`.
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;

/// `struct nfgenmsg` with the family's `NFPROTO_*`.
const fn header(family: Family) -> [u8; HEADER] {
    match family {
        Family::V4 => [2, 0, 0, 0],
        Family::V6 => [10, 0, 0, 0],
    }
}

/// A dump of one family's entries. With a filter of that protocol only, from kernel 5.8 on;
/// older ones do not know the attribute and send every protocol.
pub(super) fn dump(family: Family, filter: Option<Protocol>) -> Message {
    let mut w = Writer::after(&header(family));
    if let Some(protocol) = filter {
        w.nest(TUPLE_ORIG, |w| {
            w.nest(TUPLE_PROTO, |w| w.put(PROTO_NUM, &[protocol.number()]));
        });
        w.nest(FILTER, |w| w.put(FILTER_ORIG_FLAGS, &BY_PROTOCOL.to_ne_bytes()));
    }
    Message { kind: GET, flags: 0, payload: w.finish() }
}

/// One entry of a dump. What names it to the kernel is kept as it came, so that
/// tuples with a zone of their own direction are named as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    pub flow: Flow,
    original: &'a [u8],
    zone: Option<&'a [u8]>,
    id: Option<&'a [u8]>,
}

impl Entry<'_> {
    /// Deletes this entry and not one that came after it: with the id the kernel refuses
    /// (ENOENT) another entry of the same tuple, unless that took the same place in memory
    /// (`nf_ct_get_id` in `net/netfilter/nf_conntrack_core.c`).
    pub(super) fn delete(&self) -> Message {
        let mut w = Writer::after(&header(self.flow.family()));
        w.put(TUPLE_ORIG | NESTED, self.original);
        if let Some(zone) = self.zone {
            w.put(ZONE, zone);
        }
        if let Some(id) = self.id {
            w.put(ID, id);
        }
        Message { kind: DELETE, flags: 0, payload: w.finish() }
    }
}

/// Reads one part of a dump; `None` for other protocols.
///
/// # Errors
/// When it is not what the kernel writes.
pub fn decode(payload: &[u8], protocol: Protocol) -> Result<Option<Entry<'_>>, Malformed> {
    let body = payload.get(HEADER..).ok_or(Malformed("entry without its header"))?;
    let (mut original, mut reply, mut zone, mut id) = (None, None, None, None);
    for attribute in attributes(body) {
        let Attribute { kind, value } = attribute?;
        match kind {
            TUPLE_ORIG => original = Some(value),
            TUPLE_REPLY => reply = Some(value),
            ZONE => zone = Some(value),
            ID => id = Some(value),
            _ => {}
        }
    }
    let original = original.ok_or(Malformed("entry without its original tuple"))?;
    let reply = reply.ok_or(Malformed("entry without its reply tuple"))?;
    let (Some(from_client), Some(from_endpoint)) =
        (tuple(original, protocol)?, tuple(reply, protocol)?)
    else {
        return Ok(None);
    };
    let flow = Flow { original: from_client, reply: from_endpoint };
    Ok(Some(Entry { flow, original, zone, id }))
}

fn tuple(bytes: &[u8], protocol: Protocol) -> Result<Option<Tuple>, Malformed> {
    let (mut addresses, mut ports) = (None, None);
    for attribute in attributes(bytes) {
        let Attribute { kind, value } = attribute?;
        match kind {
            TUPLE_IP => addresses = Some(read_addresses(value)?),
            TUPLE_PROTO => match read_ports(value, protocol)? {
                Some(read) => ports = Some(read),
                None => return Ok(None),
            },
            _ => {}
        }
    }
    let (source, destination) = addresses.ok_or(Malformed("tuple without addresses"))?;
    let (source_port, destination_port) = ports.ok_or(Malformed("tuple without a protocol"))?;
    Ok(Some(Tuple {
        source: SocketAddr::new(source, source_port),
        destination: SocketAddr::new(destination, destination_port),
    }))
}

fn read_addresses(bytes: &[u8]) -> Result<(IpAddr, IpAddr), Malformed> {
    let (mut source, mut destination) = (None, None);
    for attribute in attributes(bytes) {
        let Attribute { kind, value } = attribute?;
        match kind {
            IP_V4_SRC | IP_V6_SRC => source = Some(address(value)?),
            IP_V4_DST | IP_V6_DST => destination = Some(address(value)?),
            _ => {}
        }
    }
    source.zip(destination).ok_or(Malformed("tuple without both addresses"))
}

fn address(bytes: &[u8]) -> Result<IpAddr, Malformed> {
    let v4 = || <[u8; 4]>::try_from(bytes).map(|octets| Ipv4Addr::from(octets).into());
    let v6 = || <[u8; 16]>::try_from(bytes).map(|octets| Ipv6Addr::from(octets).into());
    v4().or_else(|_| v6()).map_err(|_| Malformed("address is neither 4 nor 16 bytes"))
}

/// `None` when the protocol is another one.
fn read_ports(bytes: &[u8], wanted: Protocol) -> Result<Option<(u16, u16)>, Malformed> {
    let (mut protocol, mut source, mut destination) = (None, None, None);
    for attribute in attributes(bytes) {
        let Attribute { kind, value } = attribute?;
        let port = || {
            let bytes = value.try_into().map_err(|_| Malformed("port is not two bytes"));
            bytes.map(u16::from_be_bytes)
        };
        match kind {
            PROTO_NUM => protocol = value.first().copied(),
            PROTO_SRC_PORT => source = Some(port()?),
            PROTO_DST_PORT => destination = Some(port()?),
            _ => {}
        }
    }
    if protocol.ok_or(Malformed("tuple without its protocol's number"))? != wanted.number() {
        return Ok(None);
    }
    source.zip(destination).map(Some).ok_or(Malformed("tuple without its ports"))
}

/// The payload of an entry as the kernel dumps it, and as it is created.
#[cfg(test)]
pub(super) fn encode(flow: &Flow, protocol: u8) -> Vec<u8> {
    let mut w = Writer::after(&header(flow.family()));
    for (kind, tuple) in [(TUPLE_ORIG, flow.original), (TUPLE_REPLY, flow.reply)] {
        w.nest(kind, |w| {
            w.nest(TUPLE_IP, |w| match (tuple.source.ip(), tuple.destination.ip()) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    w.put(IP_V4_SRC, &source.octets());
                    w.put(IP_V4_DST, &destination.octets());
                }
                (IpAddr::V6(source), IpAddr::V6(destination)) => {
                    w.put(IP_V6_SRC, &source.octets());
                    w.put(IP_V6_DST, &destination.octets());
                }
                families => unreachable!("one family: {families:?}"),
            });
            w.nest(TUPLE_PROTO, |w| {
                w.put(PROTO_NUM, &[protocol]);
                w.put(PROTO_SRC_PORT, &tuple.source.port().to_be_bytes());
                w.put(PROTO_DST_PORT, &tuple.destination.port().to_be_bytes());
            });
        });
    }
    /// `CTA_TIMEOUT`, seconds.
    const TIMEOUT: u16 = 7;
    w.put_u32(TIMEOUT, 600);
    w.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addresses() -> impl Strategy<Value = (IpAddr, IpAddr, IpAddr, IpAddr)> {
        let v4 = any::<[[u8; 4]; 4]>().prop_map(|a| a.map(IpAddr::from));
        let v6 = any::<[[u8; 16]; 4]>().prop_map(|a| a.map(IpAddr::from));
        prop_oneof![v4, v6].prop_map(|[a, b, c, d]| (a, b, c, d))
    }

    fn flow() -> impl Strategy<Value = Flow> {
        (addresses(), any::<[u16; 4]>()).prop_map(|((a, b, c, d), [e, f, g, h])| {
            let at = SocketAddr::new;
            Flow {
                original: Tuple { source: at(a, e), destination: at(b, f) },
                reply: Tuple { source: at(c, g), destination: at(d, h) },
            }
        })
    }

    proptest! {
        #[test]
        fn an_entry_is_read_as_it_was_written(flow in flow()) {
            let payload = encode(&flow, 17);
            prop_assert_eq!(decode(&payload, Protocol::Udp).unwrap().unwrap().flow, flow);
            let tcp = encode(&flow, 6);
            prop_assert_eq!(decode(&tcp, Protocol::Udp).unwrap(), None);
            prop_assert_eq!(decode(&tcp, Protocol::Tcp).unwrap().unwrap().flow, flow);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, Protocol::Udp);
        }

        #[test]
        fn a_damaged_entry_is_refused_or_read(
            flow in flow(),
            at in any::<proptest::sample::Index>(),
            to in any::<u8>(),
        ) {
            let mut payload = encode(&flow, 17);
            let at = at.index(payload.len());
            payload[at] = to;
            let _ = decode(&payload, Protocol::Udp);
            let _ = decode(&payload[..at], Protocol::Udp);
        }
    }

    #[test]
    fn a_deletion_names_tuple_zone_and_id_as_they_came() {
        let client = SocketAddr::from(([10, 244, 0, 9], 40_000));
        let tuple = Tuple { source: client, destination: SocketAddr::from(([10, 96, 0, 10], 53)) };
        let mut payload = encode(&Flow { original: tuple, reply: tuple }, 17);
        let mut tail = Writer::default();
        tail.put(ZONE, &7_u16.to_be_bytes());
        tail.put_u32(ID, 0xfeed);
        payload.extend(tail.finish());
        let delete = decode(&payload, Protocol::Udp).unwrap().unwrap().delete();
        assert_eq!((delete.kind, &delete.payload[..HEADER]), (DELETE, &[2, 0, 0, 0][..]));
        let read: Vec<_> = attributes(&delete.payload[HEADER..]).map(Result::unwrap).collect();
        let original = attributes(&payload[HEADER..]).next().unwrap().unwrap();
        assert_eq!(read[0], original);
        assert_eq!(read[1], Attribute { kind: ZONE, value: &7_u16.to_be_bytes() });
        assert_eq!(read[2], Attribute { kind: ID, value: &0xfeed_u32.to_be_bytes() });
        assert_eq!(read.len(), 3);
    }
}
