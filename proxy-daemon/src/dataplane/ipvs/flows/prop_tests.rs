//! Random histories of virtual servers: what is stale follows from what they had and
//! have, whatever way they got there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::*;
use crate::dataplane::ipvs::codec::{Netmask, SchedulerName, ServiceFlags};
use crate::dataplane::ipvs::objects::{Forward, ServerConfig, Value};
use crate::kernel::conntrack::Tuple;
use crate::plan::{Ledger, Standing, diff};

/// Virtual servers of one protocol, by number, with their real servers.
type Servers = BTreeMap<u8, BTreeSet<u8>>;

const FRONTENDS: u8 = 4;
const ENDPOINTS: u8 = 4;

fn servers() -> impl Strategy<Value = Servers> {
    btree_map(0..FRONTENDS, btree_set(0..ENDPOINTS, 0..4), 0..4)
}

fn frontend(number: u8, protocol: Protocol) -> FrontendKey {
    let port = NonZeroU16::new(53).unwrap();
    FrontendKey { address: [10, 96, 0, number].into(), protocol, port }
}

fn endpoint(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 244, 0, number], 5353))
}

/// An entry of a client of `number` whose replies come from `from`.
fn flow(number: u8, from: SocketAddr) -> Flow {
    let client = SocketAddr::from(([10, 244, 9, 9], 40_000));
    let destination = SocketAddr::from(([10, 96, 0, number], 53));
    Flow {
        original: Tuple { source: client, destination },
        reply: Tuple { source: from, destination: client },
    }
}

fn objects(servers: &Servers, protocol: Protocol) -> Vec<(FrontendKey, Vec<(Key, Value)>)> {
    let config = ServerConfig {
        scheduler: SchedulerName::new("rr").unwrap(),
        flags: ServiceFlags::default(),
        timeout: 0,
        netmask: Netmask::host(Family::V4),
    };
    let lowered = |(number, endpoints): (&u8, &BTreeSet<u8>)| {
        let key = frontend(*number, protocol);
        let real = |number: &u8| {
            let value = Value::RealServer(Forward { weight: 1, masquerading: true });
            (Key::RealServer(key, endpoint(*number).into()), value)
        };
        let server = (Key::VirtualServer(key), Value::VirtualServer(config.clone().into()));
        (key, std::iter::once(server).chain(endpoints.iter().map(real)).collect())
    };
    servers.iter().map(lowered).collect()
}

/// The operations that the engine would give from one state to the next.
fn ops(before: &Servers, after: &Servers, protocol: Protocol) -> Vec<Op<Key>> {
    let mut ledger = Ledger::default();
    let mut touched: BTreeSet<Key> = BTreeSet::new();
    for (key, value) in objects(before, protocol).into_iter().flat_map(|(_, objects)| objects) {
        ledger.hold(&key, value);
        touched.insert(key);
    }
    for (key, objects) in objects(after, protocol) {
        ledger.replace(key, objects, &mut touched);
    }
    diff(&touched, &ledger, |_| Standing::Gone)
}

fn take_in(stale: &mut StaleFlows, ops: &[Op<Key>]) {
    stale.applied(ops, &vec![Ok(()); ops.len()]);
}

/// After these states, without a deletion of stale entries in between.
fn after(history: &[Servers]) -> StaleFlows {
    let mut stale = StaleFlows::default();
    for pair in history.windows(2) {
        take_in(&mut stale, &ops(&pair[0], &pair[1], Protocol::Udp));
    }
    stale
}

proptest! {
    #[test]
    fn an_entry_is_stale_when_its_endpoint_went_or_its_server_came(
        history in vec(servers(), 2..5),
    ) {
        let stale = after(&history);
        let last = history.last().unwrap();
        let nobody = SocketAddr::from(([192, 0, 2, 1], 53));
        for number in 0..FRONTENDS {
            let had = |servers: &Servers, at| {
                servers.get(&number).is_some_and(|held| held.contains(&at))
            };
            let came = last.contains_key(&number)
                && history.iter().any(|servers| !servers.contains_key(&number));
            for at in 0..ENDPOINTS {
                let went = history.iter().any(|servers| had(servers, at));
                let expected = !had(last, at) && (went || came);
                prop_assert_eq!(stale.is_stale(&flow(number, endpoint(at))), expected);
            }
            // Entries that lead to no endpoint of ours, as from before the Service.
            prop_assert_eq!(stale.is_stale(&flow(number, nobody)), came);
        }
    }

    #[test]
    fn no_change_means_no_look_at_the_table(same in servers(), history in vec(servers(), 2..4)) {
        prop_assert!(after(&[same.clone(), same]).families().is_empty());
        let mut stale = StaleFlows::default();
        for pair in history.windows(2) {
            for protocol in [Protocol::Tcp, Protocol::Sctp] {
                take_in(&mut stale, &ops(&pair[0], &pair[1], protocol));
            }
        }
        prop_assert!(stale.families().is_empty());
        for number in 0..FRONTENDS {
            prop_assert!(!stale.is_stale(&flow(number, endpoint(0))));
        }
    }

    #[test]
    fn a_redirected_frontend_shares_the_fate_of_its_target(history in vec(servers(), 2..5)) {
        let mut stale = StaleFlows::default();
        // Frontend 9 has no server of its own.
        let udp = |number| frontend(number, Protocol::Udp);
        let (key, value) = redirect(udp(9), 1);
        stale.found(&key, &value);
        for pair in history.windows(2) {
            take_in(&mut stale, &ops(&pair[0], &pair[1], Protocol::Udp));
        }
        for at in (0..ENDPOINTS).map(endpoint) {
            prop_assert_eq!(stale.is_stale(&flow(9, at)), stale.is_stale(&flow(1, at)));
            prop_assert!(!stale.is_stale(&flow(8, at)));
        }
    }
}

fn redirect(from: FrontendKey, to: u8) -> (Key, Value) {
    let to = SocketAddr::from(([10, 96, 0, to], 53));
    (Key::Redirect(Set::Shared, from), Value::Redirect(Box::new(to.into())))
}

fn web(endpoints: &[u8]) -> Servers {
    Servers::from([(1, endpoints.iter().copied().collect())])
}

#[test]
fn refused_operations_change_nothing_and_lost_answers_count_as_done() {
    let ops = ops(&web(&[1, 2]), &web(&[1]), Protocol::Udp);
    assert_eq!(ops.len(), 1);
    let mut stale = StaleFlows::default();
    stale.applied(&ops, &[Err(OpError::Refused("EPERM".into()))]);
    assert!(stale.families().is_empty());
    stale.applied(&ops, &[Err(OpError::Unknown("ETIMEDOUT".into()))]);
    assert!(stale.is_stale(&flow(1, endpoint(2))) && !stale.is_stale(&flow(1, endpoint(1))));
}

#[test]
fn flows_go_on_where_their_frontend_led_until_the_endpoint_is_removed_there() {
    let own = frontend(9, Protocol::Udp);
    let (key, to_1) = redirect(own, 1);
    let (_, to_2) = redirect(own, 2);
    let mut stale = StaleFlows::default();
    // The target is as new as the redirect: flows to other endpoints did not go there.
    take_in(&mut stale, &ops(&Servers::new(), &web(&[1, 2]), Protocol::Udp));
    take_in(&mut stale, &[Op::Create(key.clone(), to_1)]);
    assert!(!stale.is_stale(&flow(9, endpoint(3))) && stale.is_stale(&flow(1, endpoint(3))));
    stale.clear();
    take_in(&mut stale, &[Op::Update(key.clone(), to_2), Op::Delete(key)]);
    assert!(stale.families().is_empty() && !stale.is_stale(&flow(9, endpoint(1))));
    take_in(&mut stale, &ops(&web(&[1, 2]), &web(&[2]), Protocol::Udp));
    assert!(stale.is_stale(&flow(9, endpoint(1))), "where it led is remembered");
    assert!(!stale.is_stale(&flow(9, endpoint(2))) && stale.redirects.is_empty());
    stale.clear();
    // With the frontend all its flows end, wherever they went.
    take_in(&mut stale, &[Op::Delete(Key::VirtualServer(own))]);
    assert!(stale.is_stale(&flow(9, endpoint(2))) && !stale.is_stale(&flow(1, endpoint(2))));
    assert_eq!(stale.families(), BTreeSet::from([Family::V4]));
    stale.clear();
    assert!(!stale.is_stale(&flow(9, endpoint(2))) && stale.former.is_empty());
    let (key, value) = redirect(frontend(9, Protocol::Tcp), 1);
    take_in(&mut stale, &[Op::Create(key.clone(), value), Op::Delete(key)]);
    assert!(stale.families().is_empty() && stale.redirects.is_empty());
}
