//! What IPVS has counted, and the connections that it has.
//!
//! One dump has the counters of all virtual servers; the table in `/proc` has the connections
//! of all real servers. Counters of real servers are dumped one virtual server at a time, so
//! only for those that have counted something since.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::BufReader;
use std::num::NonZeroU16;
use std::path::PathBuf;

use super::codec::{Requests, Stats, decode_service};
use super::proc;
use super::readback::{dump_destinations, frontend_key};
use super::ruleset::read_refusals;
use crate::dataplane::PlaneError;
use crate::dataplane::traffic::{
    Abilities, Amount, Counters, Current, EndpointKey, Sample, Sink, TrafficSource,
};
use crate::kernel::netlink::generic::resolve_family;
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
    /// Of virtual servers that have counted anything: as they were when their real servers
    /// were dumped, and what these had.
    dumped: HashMap<FrontendKey, (Counters, HashMap<HostPort, Counters>)>,
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

impl<N: Netlink> IpvsTraffic<N> {
    pub fn new(generic: N, netfilter: N, table: PathBuf) -> Self {
        Self { generic, netfilter, table, requests: None, dumped: HashMap::new() }
    }

    fn requests(&mut self) -> Result<Requests, PlaneError> {
        if let Some(requests) = self.requests {
            return Ok(requests);
        }
        let family = resolve_family(&mut self.generic, "IPVS", "ip_vs")
            .map_err(|error| PlaneError::new("IPVS", error))?;
        Ok(*self.requests.insert(Requests::new(family)))
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
    ) -> Result<(), PlaneError> {
        self.dumped.retain(|key, _| servers.contains_key(key));
        for (key, now) in servers.iter().filter(|(_, counters)| !counters.is_zero()) {
            if self.dumped.get(key).is_some_and(|(before, _)| before == now) {
                continue;
            }
            let mut real = HashMap::new();
            for status in dump_destinations(&mut self.generic, requests, key)? {
                let at = HostPort::new(status.server.key.addr, status.server.key.port);
                real.insert(at, counters(&status.stats));
            }
            self.dumped.insert(*key, (*now, real));
        }
        Ok(())
    }

    /// The connections of each virtual server, and its real servers told to the sink.
    fn read_table(
        &mut self,
        requests: Requests,
        servers: &HashMap<FrontendKey, Counters>,
        endpoints: bool,
        sink: &mut dyn Sink,
    ) -> Result<HashMap<FrontendKey, Current>, PlaneError> {
        let mut without_table_entry: HashSet<FrontendKey> = servers.keys().copied().collect();
        let open = File::open(&self.table).map_err(|error| {
            PlaneError::new("IPVS", format!("cannot open {}: {error}", self.table.display()))
        })?;
        let mut all: HashMap<FrontendKey, Current> = HashMap::new();
        proc::read(BufReader::new(open), &mut |entry| {
            let Some(port) = NonZeroU16::new(entry.port) else { return };
            let key = FrontendKey { address: entry.address, protocol: entry.protocol, port };
            without_table_entry.remove(&key);
            let dumped = self.dumped.get(&key);
            let mut sum = Current::default();
            for real in &entry.real_servers {
                let current = Current { active: real.active, inactive: real.inactive };
                sum += current;
                if endpoints {
                    let counters = dumped.and_then(|(_, all)| all.get(&real.address)).copied();
                    let counters = counters.unwrap_or_default();
                    let of = EndpointKey { owner: number_of(&key), at: real.address };
                    sink.endpoint(of, key, Sample { incarnation: 0, counters, current });
                }
            }
            if sum != Current::default() {
                all.insert(key, sum);
            }
        })
        .map_err(|error| PlaneError::new("IPVS", format!("{}: {error}", self.table.display())))?;
        // The table leaves out as many as other network namespaces have (see the readback).
        for key in without_table_entry {
            let mut sum = Current::default();
            for status in dump_destinations(&mut self.generic, requests, &key)? {
                let connections = status.connections;
                let current = Current {
                    active: connections.active.into(),
                    inactive: connections.inactive.into(),
                };
                sum += current;
                if endpoints {
                    let at = HostPort::new(status.server.key.addr, status.server.key.port);
                    let counters = counters(&status.stats);
                    let of = EndpointKey { owner: number_of(&key), at };
                    sink.endpoint(of, key, Sample { incarnation: 0, counters, current });
                }
            }
            all.insert(key, sum);
        }
        Ok(all)
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
        if endpoints {
            self.dump_real_servers(requests, &servers)?;
        }
        let mut current = self.read_table(requests, &servers, endpoints, sink)?;
        for (key, counters) in servers {
            let current = current.remove(&key).unwrap_or_default();
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
