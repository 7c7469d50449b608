//! What IPVS has counted, and the connections that it has.
//!
//! One dump has the counters of all virtual servers. Real servers, which have the connections, are
//! dumped one virtual server at a time, so only for those that have counted something since or had
//! connections then: what a reading costs follows the Services that are used, not those that exist.
//! When every endpoint is to be told, the table in `/proc` has all of them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::BufReader;
use std::num::NonZeroU16;
use std::path::PathBuf;

use super::codec::{RealServerStatus, Requests, Stats, decode_service};
use super::find_family;
use super::proc;
use super::readback::{dump_destinations, frontend_key};
use super::ruleset::read_refusals;
use crate::dataplane::PlaneError;
use crate::dataplane::traffic::{
    Abilities, Amount, Counters, Current, EndpointKey, Sample, Sink, TrafficSource,
};
use crate::kernel::netlink::{Message, Netlink};
use crate::model::{Family, HostPort};
use crate::policy::FrontendKey;

/// On sockets of its own.
pub struct IpvsTraffic<N> {
    generic: N,
    /// For the rules that refuse.
    netfilter: N,
    /// `/proc/thread-self/net/ip_vs`, or a file like it.
    table: PathBuf,
    requests: Option<Requests>,
    /// Of virtual servers that have counted anything.
    dumped: HashMap<FrontendKey, Dumped>,
}

/// A virtual server as it was when its real servers were dumped, and what these had.
#[derive(Debug, Clone)]
struct Dumped {
    counters: Counters,
    /// Of all its real servers.
    current: Current,
    /// Kept only when endpoints are told of.
    real_servers: HashMap<HostPort, Counters>,
}

impl Dumped {
    /// Connections end without a packet, too: those that were there have to be looked at again.
    fn is_still(&self, counters: &Counters) -> bool {
        self.counters == *counters && self.current == Current::default()
    }
}

impl<N> std::fmt::Debug for IpvsTraffic<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IpvsTraffic").field("table", &self.table).finish_non_exhaustive()
    }
}

const fn counters(stats: &Stats) -> Counters {
    Counters {
        connections: stats.connections,
        refused: 0,
        requests: Amount { packets: stats.in_packets, bytes: stats.in_bytes },
        replies: Amount { packets: stats.out_packets, bytes: stats.out_bytes },
    }
}

fn current(status: &RealServerStatus) -> Current {
    let connections = status.connections;
    Current { active: connections.active.into(), inactive: connections.inactive.into() }
}

impl<N: Netlink> IpvsTraffic<N> {
    pub fn new(generic: N, netfilter: N, table: PathBuf) -> Self {
        Self { generic, netfilter, table, requests: None, dumped: HashMap::new() }
    }

    fn requests(&mut self) -> Result<Requests, PlaneError> {
        find_family(&mut self.generic, &mut self.requests)
    }

    /// By virtual server. A dump that has to be restarted tells of some twice.
    fn virtual_servers(
        &mut self,
        requests: Requests,
    ) -> Result<HashMap<FrontendKey, Counters>, PlaneError> {
        let mut all = HashMap::new();
        let mut malformed = None;
        self.generic
            .dump_each(&requests.dump_services(), &mut |payload| {
                let part = Message { kind: 0, flags: 0, payload: payload.to_vec() };
                match decode_service(&part) {
                    Ok(status) => {
                        let key = frontend_key(&status.server.key);
                        all.extend(key.map(|key| (key, counters(&status.stats))));
                    }
                    Err(error) => malformed = Some(error),
                }
            })
            .map_err(|error| PlaneError::new("IPVS", error))?;
        match malformed {
            None => Ok(all),
            Some(error) => Err(PlaneError::new("IPVS", error)),
        }
    }

    /// Brings `dumped` up to date.
    fn dump_real_servers(
        &mut self,
        requests: Requests,
        servers: &HashMap<FrontendKey, Counters>,
        endpoints: bool,
    ) -> Result<(), PlaneError> {
        self.dumped.retain(|key, _| servers.contains_key(key));
        for (key, now) in servers.iter().filter(|(_, counters)| !counters.is_zero()) {
            if self.dumped.get(key).is_some_and(|before| before.is_still(now)) {
                continue;
            }
            let mut dumped = Dumped {
                counters: *now,
                current: Current::default(),
                real_servers: HashMap::new(),
            };
            for status in dump_destinations(&mut self.generic, requests, key)? {
                dumped.current += current(&status);
                if endpoints {
                    let at = HostPort::new(status.server.key.addr, status.server.key.port);
                    dumped.real_servers.insert(at, counters(&status.stats));
                }
            }
            self.dumped.insert(*key, dumped);
        }
        Ok(())
    }

    /// Tells the sink of all real servers.
    fn read_table(
        &mut self,
        requests: Requests,
        servers: &HashMap<FrontendKey, Counters>,
        sink: &mut dyn Sink,
    ) -> Result<(), PlaneError> {
        let mut without_table_entry: HashSet<FrontendKey> = servers.keys().copied().collect();
        let open = File::open(&self.table).map_err(|error| {
            PlaneError::new("IPVS", format!("cannot open {}: {error}", self.table.display()))
        })?;
        proc::read(BufReader::new(open), &mut |entry| {
            let Some(port) = NonZeroU16::new(entry.port) else { return };
            let key = FrontendKey { address: entry.address, protocol: entry.protocol, port };
            without_table_entry.remove(&key);
            let dumped = self.dumped.get(&key);
            for real in &entry.real_servers {
                let current = Current { active: real.active, inactive: real.inactive };
                let counters = dumped.and_then(|dumped| dumped.real_servers.get(&real.address));
                let counters = counters.copied().unwrap_or_default();
                let of = EndpointKey { owner: number_of(&key), at: real.address };
                sink.endpoint(of, key, Sample { incarnation: 0, counters, current });
            }
        })
        .map_err(|error| PlaneError::new("IPVS", format!("{}: {error}", self.table.display())))?;
        // The table leaves out as many as other network namespaces have (see the readback).
        for key in without_table_entry {
            for status in dump_destinations(&mut self.generic, requests, &key)? {
                let at = HostPort::new(status.server.key.addr, status.server.key.port);
                let of = EndpointKey { owner: number_of(&key), at };
                let (counters, current) = (counters(&status.stats), current(&status));
                sink.endpoint(of, key, Sample { incarnation: 0, counters, current });
            }
        }
        Ok(())
    }
}

fn number_of(key: &FrontendKey) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

impl<N: Netlink> TrafficSource for IpvsTraffic<N> {
    fn abilities(&self) -> Abilities {
        Abilities { refused: false, current: true }
    }

    fn read(&mut self, endpoints: bool, sink: &mut dyn Sink) -> Result<(), PlaneError> {
        let requests = self.requests()?;
        let servers = self.virtual_servers(requests)?;
        self.dump_real_servers(requests, &servers, endpoints)?;
        if endpoints {
            self.read_table(requests, &servers, sink)?;
        }
        for (key, counters) in servers {
            let current = self.dumped.get(&key).map(|dumped| dumped.current).unwrap_or_default();
            sink.frontend(key, Sample { incarnation: 0, counters, current });
        }
        for (place, family) in (0..).zip(Family::ALL) {
            let refusals = read_refusals(&mut self.netfilter, family)
                .map_err(|error| PlaneError::new("nf_tables", error))?;
            refusals.into_iter().for_each(|(reason, count)| sink.dropped(place, reason, count));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::codec::tests::{destination_reply, service_reply};
    use super::super::codec::{
        ConnectionCounts, RealServer, SchedulerName, VirtualServer, VirtualServerKey,
    };
    use super::super::tests::kernel;
    use super::*;
    use crate::kernel::netlink::{FakeNetlink, fake::Exchange};
    use crate::model::Protocol;

    /// Connections begun at the one server that is used, and those that are left.
    type Used = Arc<Mutex<(u64, u32)>>;

    const SERVERS: u8 = 100;
    /// `IPVS_CMD_GET_SERVICE` and `IPVS_CMD_GET_DEST`.
    const GET_SERVICE: u8 = 4;
    const GET_DESTINATION: u8 = 8;

    fn server(number: u8) -> VirtualServer {
        let key = VirtualServerKey::Address {
            addr: [10, 96, 0, number].into(),
            protocol: Protocol::Tcp,
            port: 80,
        };
        VirtualServer::new(key, SchedulerName::new("rr").unwrap())
    }

    fn with(used: &Used) -> FakeNetlink {
        let (mut family, used) = (kernel(), Arc::clone(used));
        FakeNetlink::new(move |request| {
            let (connections, active) = *used.lock().unwrap();
            match request.payload.first() {
                Some(&GET_SERVICE) => Ok((0..SERVERS)
                    .map(|number| {
                        let connections = if number == 7 { connections } else { 0 };
                        service_reply(&server(number), &Stats { connections, ..Stats::default() })
                    })
                    .collect()),
                Some(&GET_DESTINATION) => Ok(vec![destination_reply(&RealServerStatus {
                    server: RealServer::new([10, 1, 0, 1].into(), 8080, 1),
                    connections: ConnectionCounts { active, ..ConnectionCounts::default() },
                    stats: Stats { connections, ..Stats::default() },
                })]),
                _ => family.get(request).unwrap().map(|reply| vec![reply]),
            }
        })
    }

    #[derive(Default)]
    struct Told {
        frontends: usize,
        connections: u64,
        active: u64,
    }

    impl Sink for Told {
        fn frontend(&mut self, _: FrontendKey, sample: Sample) {
            self.frontends += 1;
            self.connections += sample.counters.connections;
            self.active += sample.current.active;
        }

        fn endpoint(&mut self, _: EndpointKey, _: FrontendKey, _: Sample) {
            panic!("nobody asked for endpoints");
        }

        fn dropped(&mut self, _: u8, _: &'static str, _: u64) {}
    }

    #[test]
    fn a_reading_costs_one_dump_and_one_more_for_each_server_that_is_used() {
        let used = Used::default();
        let generic = with(&used);
        let table = PathBuf::from("/nonexistent");
        let mut source = IpvsTraffic::new(generic.clone(), FakeNetlink::default(), table);
        let mut read = |connections, active| {
            *used.lock().unwrap() = (connections, active);
            let mut told = Told::default();
            source.read(false, &mut told).unwrap();
            assert_eq!(told.frontends, usize::from(SERVERS));
            assert_eq!((told.connections, told.active), (connections, active.into()));
            let dumps = generic.take_exchanges().into_iter();
            dumps.filter(|exchange| matches!(exchange, Exchange::Dump(_))).count()
        };
        assert_eq!(read(0, 0), 1, "nobody is used");
        assert_eq!(read(5, 2), 2);
        assert_eq!(read(5, 1), 2, "connections end without being counted");
        assert_eq!(read(5, 0), 2);
        assert_eq!(read(5, 0), 1, "nothing is going on");
        assert_eq!(read(6, 1), 2);
    }
}
