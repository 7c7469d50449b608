//! Whose counters are whose: readings of kernel objects to series of Service ports and
//! endpoints. Pure.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU16;
use std::sync::Arc;

use super::accounts::Accounts;
use crate::dataplane::traffic::{EndpointKey, Sample, Sink};
use crate::model::{HostPort, Protocol};
use crate::policy::{FrontendKey, PortName};

/// How many series there may be; 0: nothing of the kind is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub service_ports: usize,
    pub endpoints: usize,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePort {
    pub name: PortName,
    /// What a port without a name is called by.
    pub number: Option<NonZeroU16>,
    pub protocol: Protocol,
}

/// An endpoint of a Service port.
pub type Endpoint = (Arc<ServicePort>, HostPort);

/// A frontend serves this port now, or none any more.
#[derive(Debug, Clone)]
pub struct Served {
    pub frontend: FrontendKey,
    pub port: Option<ServicePort>,
}

#[derive(Debug)]
pub struct Tally {
    limits: Limits,
    names: HashMap<FrontendKey, Arc<ServicePort>>,
    /// With the number of their frontends.
    ports: HashMap<Arc<ServicePort>, usize>,
    services: Accounts<FrontendKey, Arc<ServicePort>>,
    endpoints: Accounts<EndpointKey, Endpoint>,
    /// Objects in the last reading.
    endpoint_objects: usize,
    /// By reason and place: what was last read, and the sum.
    drops: BTreeMap<(&'static str, u8), (u64, u64)>,
}

impl Tally {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            names: HashMap::new(),
            ports: HashMap::new(),
            services: Accounts::new(limits.service_ports),
            endpoints: Accounts::new(limits.endpoints),
            // At first it is not known whether there is room for all of them.
            endpoint_objects: usize::MAX,
            drops: BTreeMap::new(),
        }
    }

    /// What changed about frontends, in order.
    pub fn serve(&mut self, changes: impl IntoIterator<Item = Served>) {
        for Served { frontend, port } in changes {
            let before = match &port {
                Some(port) if self.names.get(&frontend).is_some_and(|held| **held == *port) => {
                    continue;
                }
                Some(port) => {
                    let port = self.intern(port);
                    *self.ports.entry(Arc::clone(&port)).or_default() += 1;
                    self.names.insert(frontend, port)
                }
                None => self.names.remove(&frontend),
            };
            if let Some(before) = before {
                self.leave(&before);
            }
        }
    }

    fn intern(&self, port: &ServicePort) -> Arc<ServicePort> {
        let held = self.ports.get_key_value(port).map(|(held, _)| Arc::clone(held));
        held.unwrap_or_else(|| Arc::new(port.clone()))
    }

    /// One frontend of the port less; with the last, the port and its series are gone.
    fn leave(&mut self, port: &Arc<ServicePort>) {
        let Some(frontends) = self.ports.get_mut(port) else { return };
        *frontends -= 1;
        if *frontends == 0 {
            self.ports.remove(port);
            self.services.forget(port);
        }
    }

    /// One reading: `read` tells everything to the sink, and whether that was all.
    pub fn read<E>(&mut self, read: impl FnOnce(&mut dyn Sink) -> Result<(), E>) -> Result<(), E> {
        self.services.begin(self.ports.len());
        self.endpoints.begin(self.endpoint_objects);
        self.endpoint_objects = 0;
        let result = read(self);
        // Half a reading does not say what is gone.
        if result.is_ok() {
            self.services.end();
            self.endpoints.end_with_groups();
        }
        result
    }

    pub const fn limits(&self) -> Limits {
        self.limits
    }

    pub const fn services(&self) -> &Accounts<FrontendKey, Arc<ServicePort>> {
        &self.services
    }

    pub const fn endpoints(&self) -> &Accounts<EndpointKey, Endpoint> {
        &self.endpoints
    }

    /// By reason.
    pub fn drops(&self) -> BTreeMap<&'static str, u64> {
        let mut drops = BTreeMap::new();
        for ((reason, _), (_, sum)) in &self.drops {
            *drops.entry(*reason).or_default() += *sum;
        }
        drops
    }

    /// Service ports that have frontends.
    pub fn ports(&self) -> usize {
        self.ports.len()
    }
}

impl Sink for Tally {
    /// A frontend that no Service is known to have is somebody else's, or so new that the next
    /// reading knows it, with all that it has counted.
    fn frontend(&mut self, key: FrontendKey, sample: Sample) {
        if let Some(port) = self.names.get(&key) {
            self.services.add(key, port, sample);
        }
    }

    fn endpoint(&mut self, key: EndpointKey, of: FrontendKey, sample: Sample) {
        if let Some(port) = self.names.get(&of) {
            self.endpoint_objects += 1;
            self.endpoints.add(key, &(Arc::clone(port), key.at), sample);
        }
    }

    fn dropped(&mut self, place: u8, reason: &'static str, count: u64) {
        let (last, sum) = self.drops.entry((reason, place)).or_default();
        *sum += count.checked_sub(*last).unwrap_or(count);
        *last = count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::traffic::Counters;
    use crate::model::ObjectName;

    const LIMITS: Limits = Limits { service_ports: 2, endpoints: 2 };

    fn key(address: [u8; 4], port: u16) -> FrontendKey {
        let port = NonZeroU16::new(port).unwrap();
        FrontendKey { address: address.into(), protocol: Protocol::Tcp, port }
    }

    fn port(service: &str) -> ServicePort {
        ServicePort {
            name: PortName { service: ObjectName::new("shop", service), port: "http".into() },
            number: NonZeroU16::new(80),
            protocol: Protocol::Tcp,
        }
    }

    fn serves(frontend: FrontendKey, service: &str) -> Served {
        Served { frontend, port: Some(port(service)) }
    }

    fn count(connections: u64) -> Sample {
        Sample { counters: Counters { connections, ..Counters::default() }, ..Sample::default() }
    }

    fn read(tally: &mut Tally, told: &[(FrontendKey, u64)]) {
        let result: Result<(), ()> = tally.read(|sink| {
            told.iter().for_each(|(key, connections)| sink.frontend(*key, count(*connections)));
            Ok(())
        });
        assert_eq!(result, Ok(()));
    }

    fn connections(tally: &Tally) -> Vec<(String, u64)> {
        let one = |port: &ServicePort| port.name.service.name.to_string();
        tally.services().series().map(|(p, s)| (one(p), s.totals.connections)).collect()
    }

    #[test]
    fn frontends_of_a_port_are_one_series_and_strangers_none() {
        let (vip, node_port, stranger) =
            (key([10, 96, 0, 1], 80), key([192, 0, 2, 1], 30_080), key([10, 9, 9, 9], 80));
        let mut tally = Tally::new(LIMITS);
        tally.serve([serves(vip, "web"), serves(node_port, "web")]);
        read(&mut tally, &[(vip, 3), (node_port, 4), (stranger, 99)]);
        assert_eq!(connections(&tally), [("web".to_owned(), 7)]);
        tally.serve([Served { frontend: node_port, port: None }]);
        read(&mut tally, &[(vip, 5), (node_port, 4)]);
        assert_eq!(connections(&tally), [("web".to_owned(), 9)], "it keeps what it had");
        tally.serve([Served { frontend: vip, port: None }]);
        assert_eq!(connections(&tally), []);
        assert_eq!(tally.ports(), 0);
    }

    #[test]
    fn a_frontend_that_changes_hands_counts_for_its_new_holder_from_then_on() {
        let vip = key([10, 96, 0, 1], 80);
        let mut tally = Tally::new(LIMITS);
        tally.serve([serves(vip, "younger"), serves(key([10, 96, 0, 2], 80), "older")]);
        read(&mut tally, &[(vip, 3)]);
        tally.serve([serves(vip, "older"), serves(key([10, 96, 0, 3], 80), "younger")]);
        read(&mut tally, &[(vip, 10), (key([10, 96, 0, 3], 80), 0)]);
        let expected = [("older".to_owned(), 7), ("younger".to_owned(), 0)];
        assert_eq!(connections(&tally), expected, "the younger one begins anew");
    }

    #[test]
    fn a_reading_that_broke_off_forgets_nothing() {
        let vip = key([10, 96, 0, 1], 80);
        let mut tally = Tally::new(LIMITS);
        tally.serve([serves(vip, "web")]);
        read(&mut tally, &[(vip, 3)]);
        assert_eq!(tally.read(|_| Err("gone")), Err("gone"));
        read(&mut tally, &[(vip, 4)]);
        assert_eq!(connections(&tally), [("web".to_owned(), 4)]);
    }

    #[test]
    fn endpoints_are_of_their_service_port_and_go_with_the_kernels() {
        let (vip, other) = (key([10, 96, 0, 1], 80), key([10, 96, 0, 2], 80));
        let mut tally = Tally::new(LIMITS);
        tally.serve([serves(vip, "web"), serves(other, "api")]);
        let at: HostPort = "10.244.0.7:8080".parse().unwrap();
        let tell = |tally: &mut Tally, told: &[(u64, FrontendKey, u64)]| {
            let result: Result<(), ()> = tally.read(|sink| {
                for (owner, of, connections) in told {
                    sink.endpoint(EndpointKey { owner: *owner, at }, *of, count(*connections));
                }
                Ok(())
            });
            assert_eq!(result, Ok(()));
        };
        let held = |tally: &Tally| -> Vec<(String, u64)> {
            let series = tally.endpoints().series();
            series.map(|((p, _), s)| (p.name.to_string(), s.totals.connections)).collect()
        };
        tell(&mut tally, &[(1, vip, 4), (2, vip, 1), (3, other, 2)]);
        assert_eq!(
            held(&tally),
            [("shop/api:http".to_owned(), 2), ("shop/web:http".to_owned(), 5)]
        );
        tell(&mut tally, &[(3, other, 2)]);
        assert_eq!(held(&tally), [("shop/api:http".to_owned(), 2)]);
    }

    #[test]
    fn drops_are_sums_whatever_happens_to_the_kernels_counter() {
        let mut tally = Tally::new(LIMITS);
        for (place, told, sum) in [(4, 5, 5), (6, 1, 6), (4, 7, 8), (4, 1, 9), (6, 1, 9)] {
            tally.dropped(place, "no_endpoint", told);
            assert_eq!(tally.drops(), BTreeMap::from([("no_endpoint", sum)]));
        }
    }
}
