//! The socket against the running kernel, each test in a network namespace that its
//! thread owns and that goes when the thread does. They need root.

use nix::libc;

use super::generic::{FamilyError, resolve_family};
use super::{Errno, Message, Netlink, NetlinkError, Socket, Subsystem};
use crate::kernel::namespace::in_new_namespace;

const NEW_ADDRESS: u16 = 20;
const GET_ADDRESS: u16 = 22;
const CREATE_EXCLUSIVE: u16 = 0x600;

/// `RTM_NEWADDR` of 10.x.y.z/32 on the loopback device, the only one in a new namespace.
fn address(number: u32) -> Message {
    let mut payload = vec![2, 32, 0, 0];
    payload.extend_from_slice(&1u32.to_ne_bytes());
    payload.extend_from_slice(&8u16.to_ne_bytes());
    payload.extend_from_slice(&2u16.to_ne_bytes());
    payload.extend_from_slice(&(0x0a00_0000 + number).to_be_bytes());
    Message { kind: NEW_ADDRESS, flags: CREATE_EXCLUSIVE, payload }
}

fn address_dump() -> Message {
    Message { kind: GET_ADDRESS, flags: 0, payload: vec![2, 0, 0, 0, 0, 0, 0, 0] }
}

#[test]
fn requests_are_pipelined_and_answered_in_order() {
    in_new_namespace(|| {
        let mut socket = Socket::open(Subsystem::Route).unwrap();
        let mut requests: Vec<Message> = (1..=2000).map(address).collect();
        requests.insert(1500, address(7));
        let results = socket.request_all(&requests).unwrap();
        let refused: Vec<_> = results
            .iter()
            .enumerate()
            .filter_map(|(index, result)| result.err().map(|errno| (index, errno)))
            .collect();
        assert_eq!(refused, [(1500, Errno(libc::EEXIST))]);
        let counters = socket.counters();
        assert_eq!(counters.requests, 2001);
        assert!(counters.sends <= 3, "{counters:?}");
        assert_eq!(socket.dump(&address_dump()).unwrap().len(), 2000);
    });
}

#[test]
fn lost_replies_are_told_and_the_socket_recovers() {
    in_new_namespace(|| {
        let mut socket = Socket::open(Subsystem::Route).unwrap();
        socket.shrink_receive_buffer();
        let requests: Vec<Message> = (1..=1000).map(address).collect();
        let error = socket.request_all(&requests).unwrap_err();
        assert!(matches!(error, NetlinkError::Lost { operation: "request", lost: 1.. }), "{error}");
        // All were carried out; their acknowledgements are what was lost.
        assert_eq!(socket.request_all(&[address(1)]).unwrap(), [Err(Errno(libc::EEXIST))]);
        assert_eq!(socket.dump(&address_dump()).unwrap().len(), 1000);
        // It has learnt to send fewer at a time: after some tries they fit.
        let mut tries = 0;
        while socket.request_all(&requests).is_err() {
            tries += 1;
            assert!(tries < 12, "never fits");
        }
    });
}

#[test]
fn a_refused_dump_keeps_its_errno() {
    in_new_namespace(|| {
        let mut socket = Socket::open(Subsystem::Netfilter).unwrap();
        // Subsystem 200 does not exist.
        let request = Message { kind: 200 << 8, flags: 0, payload: vec![0; 4] };
        let error = socket.dump(&request).unwrap_err();
        assert!(matches!(error, NetlinkError::Refused { errno: Errno(libc::EINVAL), .. }));
    });
}

#[test]
fn families_are_resolved_or_their_module_is_named() {
    in_new_namespace(|| {
        let mut socket = Socket::open(Subsystem::Generic).unwrap();
        assert_eq!(resolve_family(&mut socket, "nlctrl", "-").unwrap(), 0x10);
        let error = resolve_family(&mut socket, "NO_SUCH_FAMILY", "no_such").unwrap_err();
        assert!(matches!(error, FamilyError::Missing(ref missing) if missing.module == "no_such"));
    });
}

/// nf_tables messages: `nfgenmsg` (family inet, version 0, resource id) + attributes.
fn nft(kind: u16, flags: u16, attributes: &[(u16, &[u8])]) -> Message {
    let mut payload = vec![1, 0, 0, 0];
    for (kind, value) in attributes {
        let length = u16::try_from(4 + value.len()).unwrap();
        payload.extend_from_slice(&length.to_ne_bytes());
        payload.extend_from_slice(&kind.to_ne_bytes());
        payload.extend_from_slice(value);
        payload.resize(payload.len().next_multiple_of(4), 0);
    }
    Message { kind, flags, payload }
}

fn batch(messages: Vec<Message>) -> Vec<Message> {
    let mark = |kind| Message { kind, flags: 0, payload: vec![0, 0, 0, 10] };
    [vec![mark(0x10)], messages, vec![mark(0x11)]].concat()
}

const NEW_TABLE: u16 = 10 << 8;
const GET_TABLE: u16 = (10 << 8) | 1;
const DELETE_TABLE: u16 = (10 << 8) | 2;
const CREATE: u16 = 0x400;

#[test]
fn a_transaction_is_whole_or_names_what_was_refused() {
    in_new_namespace(|| {
        let mut socket = Socket::open(Subsystem::Netfilter).unwrap();
        let name: (u16, &[u8]) = (1, b"one\0");
        let missing: (u16, &[u8]) = (1, b"missing\0");
        assert_eq!(socket.transaction(&batch(Vec::new())).unwrap(), Ok(()));
        let good = batch(vec![nft(NEW_TABLE, CREATE, &[name])]);
        assert_eq!(socket.transaction(&good).unwrap(), Ok(()));
        let bad = batch(vec![
            nft(NEW_TABLE, CREATE, &[(1, b"two\0")]),
            nft(DELETE_TABLE, 0, &[missing]),
            nft(DELETE_TABLE, 0, &[missing]),
            nft(NEW_TABLE, CREATE, &[(1, b"three\0")]),
        ]);
        assert_eq!(socket.transaction(&bad).unwrap(), Err((2, Errno(libc::ENOENT))));
        let tables = socket.dump(&nft(GET_TABLE, 0, &[])).unwrap();
        assert_eq!(tables.len(), 1, "nothing of a refused transaction stays");
        assert_eq!(socket.counters().sends, 4);
    });
}

#[test]
fn a_large_transaction_fits() {
    in_new_namespace(|| {
        let mut socket = Socket::open(Subsystem::Netfilter).unwrap();
        let names: Vec<String> = (0..20_000).map(|number| format!("table-{number}\0")).collect();
        let tables: Vec<Message> =
            names.iter().map(|name| nft(NEW_TABLE, CREATE, &[(1, name.as_bytes())])).collect();
        assert_eq!(socket.transaction(&batch(tables[..500].to_vec())).unwrap(), Ok(()));
        // 36 bytes each, far beyond the default send buffer; all but the last refused.
        let absent = nft(DELETE_TABLE, 0, &[(1, b"a-table-that-is-absent\0")]);
        let refused = batch(vec![absent; 20_000]);
        assert_eq!(socket.transaction(&refused).unwrap(), Err((1, Errno(libc::ENOENT))));
        assert_eq!(socket.dump(&nft(GET_TABLE, 0, &[])).unwrap().len(), 500);
    });
}
