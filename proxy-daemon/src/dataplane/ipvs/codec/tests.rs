use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;
use crate::model::Protocol;

const FAMILY_ID: u16 = 0x1d;
const REQUESTS: Requests = Requests::new(FAMILY_ID);

fn protocols() -> impl Strategy<Value = Protocol> {
    prop::sample::select(Protocol::ALL.to_vec())
}

fn families() -> impl Strategy<Value = Family> {
    prop::sample::select(Family::ALL.to_vec())
}

fn addresses() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
        any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
    ]
}

fn keys() -> impl Strategy<Value = VirtualServerKey> {
    prop_oneof![
        (addresses(), protocols(), any::<u16>()).prop_map(|(addr, protocol, port)| {
            VirtualServerKey::Address { addr, protocol, port }
        }),
        (1..=u32::MAX, families()).prop_map(|(mark, family)| VirtualServerKey::FwMark {
            mark: NonZeroU32::new(mark).unwrap(),
            family
        }),
    ]
}

fn names() -> impl Strategy<Value = SchedulerName> {
    "[a-z_]{1,15}".prop_map(|name| SchedulerName::new(&name).unwrap())
}

fn virtual_servers() -> impl Strategy<Value = VirtualServer> {
    let netmask = (any::<u32>(), 1u8..=128);
    (keys(), names(), any::<u32>(), any::<u32>(), netmask, prop::option::of(names())).prop_map(
        |(key, scheduler, flags, timeout, (mask, prefix), persistence_engine)| VirtualServer {
            key,
            scheduler,
            flags: ServiceFlags::from_bits(flags),
            timeout,
            netmask: match key.family() {
                Family::V4 => Netmask::V4(Ipv4Addr::from_bits(mask)),
                Family::V6 => Netmask::V6(prefix),
            },
            persistence_engine,
        },
    )
}

fn real_servers() -> impl Strategy<Value = RealServer> {
    let tunnel = (any::<u8>(), any::<u16>(), any::<u16>());
    let numbers = (any::<u16>(), 0u32..8, any::<u32>(), any::<u32>(), any::<u32>());
    (addresses(), numbers, tunnel).prop_map(
        |(addr, (port, forward, weight, upper, lower), (kind, tunnel_port, flags))| RealServer {
            key: RealServerKey { addr, port },
            forward: Forward::from_number(forward),
            weight,
            upper_threshold: upper,
            lower_threshold: lower,
            tunnel: Tunnel { kind, port: tunnel_port, flags },
        },
    )
}

fn all_stats() -> impl Strategy<Value = Stats> {
    any::<[u64; 10]>().prop_map(|[a, b, c, d, e, f, g, h, i, j]| Stats {
        connections: a,
        in_packets: b,
        out_packets: c,
        in_bytes: d,
        out_bytes: e,
        connection_rate: f,
        in_packet_rate: g,
        out_packet_rate: h,
        in_byte_rate: i,
        out_byte_rate: j,
    })
}

/// The reply a kernel that holds `server` gives: what creates it, and its counters.
pub fn service_reply(server: &VirtualServer, stats: &Stats) -> Message {
    let mut attributes = service::full(server);
    attributes.push(ServiceAttribute::Stats64(stats::encode(stats)));
    REQUESTS.encode(Command::NewService, vec![CommandAttribute::Service(attributes)])
}

pub fn destination_reply(status: &RealServerStatus) -> Message {
    let mut attributes = destination::full(&status.server);
    attributes.extend([
        DestinationAttribute::ActiveConnections(status.connections.active),
        DestinationAttribute::InactiveConnections(status.connections.inactive),
        DestinationAttribute::PersistentConnections(status.connections.persistent),
        DestinationAttribute::Stats64(stats::encode(&status.stats)),
    ]);
    REQUESTS.encode(Command::NewDestination, vec![CommandAttribute::Destination(attributes)])
}

fn destination_statuses() -> impl Strategy<Value = RealServerStatus> {
    (real_servers(), any::<[u32; 3]>(), all_stats()).prop_map(
        |(server, [active, inactive, persistent], stats)| RealServerStatus {
            server,
            connections: ConnectionCounts { active, inactive, persistent },
            stats,
        },
    )
}

/// Every decoder, for what must not panic.
fn decode_all(message: &Message) {
    let _ = decode_service(message);
    let _ = decode_destination(message, Family::V4);
    let _ = decode_destination(message, Family::V6);
    let _ = decode_timeouts(message);
    let _ = decode_info(message);
}

/// One change of a message: what a fuzzer would do to it.
#[derive(Debug, Clone)]
enum Mutation {
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Remove(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Double(prop::sample::Index),
}

fn mutations() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        index().prop_map(Mutation::Cut),
        index().prop_map(Mutation::Remove),
        (index(), prop::collection::vec(any::<u8>(), 1..24))
            .prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        index().prop_map(Mutation::Double),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    if bytes.is_empty() {
        return;
    }
    match mutation {
        Mutation::Set(at, byte) => *at.get_mut(bytes) = *byte,
        Mutation::Cut(at) => bytes.truncate(at.index(bytes.len())),
        Mutation::Remove(at) => {
            bytes.remove(at.index(bytes.len()));
        }
        Mutation::Insert(at, new) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, new.iter().copied());
        }
        Mutation::Double(at) => {
            let tail = bytes[at.index(bytes.len())..].to_vec();
            bytes.extend(tail);
        }
    }
}

/// Dumps of services and destinations of every kind, as the kernels in the names sent
/// them: one part a line, the services first. The guest test of the codec records them.
const DUMPS: [&str; 2] = [include_str!("dump-6.1.hex"), include_str!("dump-6.12.hex")];

fn recorded() -> Vec<Message> {
    let byte =
        |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    DUMPS
        .iter()
        .flat_map(|dump| dump.lines())
        .map(|line| Message {
            kind: FAMILY_ID,
            flags: 0,
            payload: line.as_bytes().chunks(2).map(byte).collect(),
        })
        .collect()
}

#[test]
#[cfg(target_endian = "little")]
fn recorded_dumps_are_read() {
    let messages = recorded();
    let services = messages.iter().filter(|message| decode_service(message).is_ok()).count();
    let destinations = messages
        .iter()
        .filter_map(|message| decode_destination(message, Family::V4).ok())
        .filter(|status| status.server.forward == Forward::Tunnel)
        .count();
    assert_eq!((messages.len(), services, destinations), (40, 18, 8));
}

proptest! {
    #[test]
    fn mutated_dumps_are_read_without_panic(
        part in prop::sample::select(recorded()),
        changes in prop::collection::vec(mutations(), 1..12),
    ) {
        let mut message = part;
        for change in &changes {
            mutate(&mut message.payload, change);
        }
        decode_all(&message);
    }

    #[test]
    fn a_virtual_server_survives_the_round_trip(server in virtual_servers(), stats in all_stats()) {
        let decoded = decode_service(&service_reply(&server, &stats)).unwrap();
        prop_assert_eq!(decoded, VirtualServerStatus { server, stats });
    }

    #[test]
    fn a_real_server_survives_the_round_trip(status in destination_statuses()) {
        let family = Family::of(status.server.key.addr);
        let decoded = decode_destination(&destination_reply(&status), family).unwrap();
        prop_assert_eq!(decoded, status);
    }

    #[test]
    fn timeouts_survive_the_round_trip(
        tcp in any::<Option<u32>>(), tcp_fin in any::<Option<u32>>(), udp in any::<Option<u32>>()
    ) {
        let timeouts = Timeouts { tcp, tcp_fin, udp };
        prop_assert_eq!(decode_timeouts(&REQUESTS.set_timeouts(&timeouts)).unwrap(), timeouts);
    }

    #[test]
    fn any_bytes_are_read_without_panic(
        command in 0u8..20, mut bytes in prop::collection::vec(any::<u8>(), 0..512)
    ) {
        if let Some(first) = bytes.first_mut() {
            *first = command;
        }
        decode_all(&Message { kind: FAMILY_ID, flags: 0, payload: bytes });
    }

    #[test]
    fn mutated_replies_are_read_without_panic(
        server in virtual_servers(),
        status in destination_statuses(),
        changes in prop::collection::vec(mutations(), 1..6),
    ) {
        for mut message in [service_reply(&server, &status.stats), destination_reply(&status)] {
            for change in &changes {
                mutate(&mut message.payload, change);
            }
            decode_all(&message);
        }
    }

    /// Whatever is missing, the error names an attribute.
    #[test]
    fn what_is_missing_is_named(status in destination_statuses(), drop in 0usize..10) {
        let mut attributes = destination::full(&status.server);
        attributes.retain(|attribute| !matches!(attribute, DestinationAttribute::AddressFamily(_)));
        attributes.extend([
            DestinationAttribute::ActiveConnections(1),
            DestinationAttribute::InactiveConnections(1),
            DestinationAttribute::PersistentConnections(1),
            DestinationAttribute::Stats64(Vec::new()),
        ]);
        attributes.retain(|attribute| {
            !matches!(
                attribute,
                DestinationAttribute::TunnelType(_)
                    | DestinationAttribute::TunnelPort(_)
                    | DestinationAttribute::TunnelFlags(_)
            )
        });
        attributes.remove(drop);
        let message = REQUESTS
            .encode(Command::NewDestination, vec![CommandAttribute::Destination(attributes)]);
        let error = decode_destination(&message, Family::V4).unwrap_err();
        let named = matches!(
            error,
            CodecError::Missing { attribute, .. } if attribute.starts_with("IPVS_DEST_ATTR_")
        );
        prop_assert!(named, "{}", error);
    }
}

fn bytes(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// The bytes `ipvsadm -A -t 10.96.0.1:443 -s rr` wants, written down by hand from the
/// header file, so that an error made alike in both directions shows.
#[test]
#[cfg(target_endian = "little")]
fn a_new_service_has_the_bytes_of_the_header_file() {
    let key = VirtualServerKey::Address {
        addr: Ipv4Addr::new(10, 96, 0, 1).into(),
        protocol: Protocol::Tcp,
        port: 443,
    };
    let server = VirtualServer::new(key, SchedulerName::new("rr").unwrap());
    let message = REQUESTS.new_service(&server);
    assert_eq!(message.kind, FAMILY_ID);
    let expected = bytes(&[
        &[1, 1, 0, 0],
        &[84, 0, 1, 0],
        &[6, 0, 1, 0, 2, 0, 0, 0],
        &[6, 0, 2, 0, 6, 0, 0, 0],
        &[20, 0, 3, 0, 10, 96, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[6, 0, 4, 0, 0x01, 0xbb, 0, 0],
        &[7, 0, 6, 0, b'r', b'r', 0, 0],
        &[12, 0, 7, 0, 0, 0, 0, 0, 0xfd, 0xff, 0xff, 0xff],
        &[8, 0, 8, 0, 0, 0, 0, 0],
        &[8, 0, 9, 0, 255, 255, 255, 255],
    ]);
    assert_eq!(message.payload, expected);
}

#[test]
#[cfg(target_endian = "little")]
fn a_new_destination_has_the_bytes_of_the_header_file() {
    let key = VirtualServerKey::FwMark { mark: NonZeroU32::MIN, family: Family::V6 };
    let server = RealServer::new(Ipv6Addr::LOCALHOST.into(), 8080, 3);
    let expected = bytes(&[
        &[5, 1, 0, 0],
        &[20, 0, 1, 0],
        &[6, 0, 1, 0, 10, 0, 0, 0],
        &[8, 0, 5, 0, 1, 0, 0, 0],
        &[72, 0, 2, 0],
        &[20, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        &[6, 0, 2, 0, 0x1f, 0x90, 0, 0],
        &[6, 0, 11, 0, 10, 0, 0, 0],
        &[8, 0, 3, 0, 0, 0, 0, 0],
        &[8, 0, 4, 0, 3, 0, 0, 0],
        &[8, 0, 5, 0, 0, 0, 0, 0],
        &[8, 0, 6, 0, 0, 0, 0, 0],
    ]);
    assert_eq!(REQUESTS.new_destination(&key, &server).payload, expected);
}

#[test]
fn unknown_attributes_are_skipped() {
    let key = VirtualServerKey::FwMark { mark: NonZeroU32::MIN, family: Family::V4 };
    let server = VirtualServer::new(key, SchedulerName::new("mh").unwrap());
    let unknown = || netlink_packet_core::DefaultNla::new(999, vec![1, 2, 3]);
    let mut attributes = service::full(&server);
    attributes.insert(0, ServiceAttribute::Other(unknown()));
    attributes.push(ServiceAttribute::Stats64(vec![StatsAttribute::Other(unknown())]));
    let reply = REQUESTS.encode(
        Command::NewService,
        vec![CommandAttribute::Other(unknown()), CommandAttribute::Service(attributes)],
    );
    assert_eq!(decode_service(&reply).unwrap().server, server);
}

#[test]
fn a_reply_to_something_else_is_refused() {
    let error = decode_service(&REQUESTS.get_info()).unwrap_err();
    let expected = CodecError::Unexpected { expected: Command::NewService, found: 15 };
    assert_eq!(error, expected);
}

#[test]
fn info_is_read() {
    let reply = REQUESTS.encode(
        Command::SetInfo,
        vec![CommandAttribute::Version(0x01_02_01), CommandAttribute::ConnectionTableSize(4096)],
    );
    let expected = Info { version: (1, 2, 1), connection_table_size: 4096 };
    assert_eq!(decode_info(&reply).unwrap(), expected);
}

#[test]
fn scheduler_names_are_checked() {
    assert_eq!(SchedulerName::new("wlc").unwrap().module(), "ip_vs_wlc");
    for name in ["", "sixteen-letters-", "a b", "a\0"] {
        SchedulerName::new(name).unwrap_err();
    }
}
