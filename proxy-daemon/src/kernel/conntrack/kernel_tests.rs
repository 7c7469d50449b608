//! Against the running kernel, each test in a network namespace that its thread owns.
//! They need root.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use super::*;
use crate::kernel::namespace::in_new_namespace;
use crate::kernel::netlink::{Socket, Subsystem};

/// `IPCTNL_MSG_CT_NEW` with `NLM_F_CREATE | NLM_F_EXCL`.
const NEW: u16 = 0x100;
const CREATE_EXCLUSIVE: u16 = 0x600;
const TCP: u8 = 6;
const UDP: u8 = 17;

fn in_namespace(test: impl FnOnce(Socket) + Send + 'static) {
    in_new_namespace(move || {
        test(Socket::open(Subsystem::Netfilter).expect("a netfilter socket"));
    });
}

fn host(family: Family, number: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(0x0a00_0000 + number).into(),
        Family::V6 => Ipv6Addr::from((0xfd00_u128 << 112) + u128::from(number)).into(),
    }
}

/// The `number`-th client of a frontend, whose replies come from `endpoint`.
fn flow(family: Family, number: u32, endpoint: u32) -> Flow {
    let client = SocketAddr::new(host(family, 0x0001_0000 + number), 40_000);
    Flow {
        original: Tuple { source: client, destination: SocketAddr::new(host(family, 1), 53) },
        reply: Tuple { source: SocketAddr::new(host(family, endpoint), 5353), destination: client },
    }
}

fn create(socket: &mut Socket, flows: &[Flow], protocol: u8) {
    let create = |flow| Message {
        kind: NEW,
        flags: CREATE_EXCLUSIVE,
        payload: codec::encode(flow, protocol),
    };
    let requests: Vec<Message> = flows.iter().map(create).collect();
    let results = socket.request_all(&requests).expect("a conntrack table");
    assert!(results.iter().all(Result::is_ok), "{:?}", results.iter().find(|r| r.is_err()));
}

/// Every UDP entry of both families, by way of the code under test.
fn listed(conntrack: &mut NetlinkConntrack<Socket>) -> BTreeSet<Flow> {
    let mut flows = BTreeSet::new();
    for family in Family::ALL {
        let listed = conntrack.delete_udp(family, &mut |flow| {
            flows.insert(*flow);
            false
        });
        assert_eq!(listed.expect("a dump"), 0);
    }
    flows
}

#[test]
fn stale_entries_go_and_all_others_stay() {
    in_namespace(|mut socket| {
        for family in Family::ALL {
            let flows: Vec<Flow> = (0..60).map(|n| flow(family, n, 2 + n % 3)).collect();
            create(&mut socket, &flows, UDP);
            create(&mut socket, &flows, TCP);
        }
        let mut conntrack = NetlinkConntrack::new(socket);
        assert_eq!(listed(&mut conntrack).len(), 120);
        let gone = SocketAddr::new(host(Family::V6, 3), 5353);
        let before = conntrack.counters();
        let mut asked = 0;
        let deleted = conntrack
            .delete_udp(Family::V6, &mut |flow| {
                asked += 1;
                flow.reply.source == gone
            })
            .expect("a dump");
        assert_eq!((deleted, asked), (20, 60));
        assert_eq!(conntrack.counters().dumps - before.dumps, 1);
        let left = listed(&mut conntrack);
        assert_eq!(left.len(), 100);
        assert!(left.iter().all(|flow| flow.reply.source != gone));
        assert_eq!(entries_of(&mut conntrack, TCP), 120, "those of other protocols");
    });
}

/// Counted without any filter.
fn entries_of(conntrack: &mut NetlinkConntrack<Socket>, protocol: u8) -> usize {
    let mut count = 0;
    for family in Family::ALL {
        let udp = protocol == UDP;
        conntrack
            .netlink
            .dump_each(&codec::dump(family, None), &mut |part| {
                count +=
                    usize::from(decode(part, Protocol::Udp).expect("an entry").is_some() == udp);
            })
            .expect("a dump");
    }
    count
}

#[test]
fn the_kernel_leaves_out_what_was_not_asked_for() {
    in_namespace(|mut socket| {
        let flows: Vec<Flow> = (0..10).map(|n| flow(Family::V4, n, 2)).collect();
        create(&mut socket, &flows, UDP);
        create(&mut socket, &flows, TCP);
        let mut parts = 0;
        socket
            .dump_each(&codec::dump(Family::V4, Some(Protocol::Udp)), &mut |_| parts += 1)
            .expect("a dump");
        assert_eq!(parts, 10, "kernels from 5.8 on filter by protocol");
    });
}

#[test]
fn an_entry_that_took_the_place_of_another_is_not_deleted_for_it() {
    in_namespace(|mut socket| {
        let first = flow(Family::V4, 1, 2);
        create(&mut socket, &[first], UDP);
        let mut part = Vec::new();
        socket
            .dump_each(&codec::dump(Family::V4, Some(Protocol::Udp)), &mut |bytes| {
                part = bytes.to_vec()
            })
            .expect("a dump");
        let delete = decode(&part, Protocol::Udp).expect("an entry").expect("UDP").delete();
        assert_eq!(socket.request_all(std::slice::from_ref(&delete)).expect("an answer"), [Ok(())]);
        // The id is made of the entry's place in memory, which another takes first.
        let (other, second) = (flow(Family::V4, 2, 3), flow(Family::V4, 1, 3));
        create(&mut socket, &[other, second], UDP);
        let again = socket.request_all(&[delete]).expect("an answer");
        assert_eq!(again, [Err(Errno(libc::ENOENT))]);
        assert_eq!(listed(&mut NetlinkConntrack::new(socket)), BTreeSet::from([other, second]));
    });
}

/// `PROXY_FLOWS=250000` measures a large table; the default keeps a test run short.
#[test]
fn a_large_table_is_read_in_parts() {
    let count = std::env::var("PROXY_FLOWS").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    in_namespace(move |mut socket| {
        let flows: Vec<Flow> = (0..count).map(|n| flow(Family::V4, n, 2 + n % 100)).collect();
        create(&mut socket, &flows, UDP);
        let mut conntrack = NetlinkConntrack::new(socket);
        let gone = SocketAddr::new(host(Family::V4, 7), 5353);
        let start = Instant::now();
        let deleted = conntrack
            .delete_udp(Family::V4, &mut |flow| flow.reply.source == gone)
            .expect("a dump");
        println!("{count} entries: {deleted} deleted in {:?}", start.elapsed());
        assert_eq!(deleted, usize::try_from(count / 100).expect("small"));
    });
}
