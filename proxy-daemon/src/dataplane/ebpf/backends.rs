//! Backends by the Service that has them.
//!
//! One map of all of them, with the address in the key and again in the value, would be the
//! largest thing that the daemon has.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_ebpf::layout::ServiceId;

use super::members::Member;

/// What is known (`B`) of each Service's backends: by family, since with any address an entry
/// would have room for the longest.
#[derive(Debug)]
pub struct Backends<B> {
    v4: OfFamily<Ipv4Addr, B>,
    v6: OfFamily<Ipv6Addr, B>,
}

impl<B> Default for Backends<B> {
    fn default() -> Self {
        Self { v4: OfFamily(HashMap::new()), v6: OfFamily(HashMap::new()) }
    }
}

/// Service, address, port.
pub type Place<A = IpAddr> = (ServiceId, A, u16);

impl<B> Backends<B> {
    pub fn get(&self, &(service, address, port): &Place) -> Option<(Member, &B)> {
        match address {
            IpAddr::V4(address) => self.v4.get((service, address, port)),
            IpAddr::V6(address) => self.v6.get((service, address, port)),
        }
    }

    pub fn get_mut(&mut self, &(service, address, port): &Place) -> Option<(Member, &mut B)> {
        match address {
            IpAddr::V4(address) => self.v4.get_mut((service, address, port)),
            IpAddr::V6(address) => self.v6.get_mut((service, address, port)),
        }
    }

    /// The backend is this one now; `new` is known of it when there was none at its place.
    pub fn put(&mut self, service: ServiceId, member: Member, new: impl FnOnce() -> B) -> &mut B {
        match member.address {
            IpAddr::V4(address) => self.v4.put(service, member.at(address), new),
            IpAddr::V6(address) => self.v6.put(service, member.at(address), new),
        }
    }

    pub fn remove(&mut self, &(service, address, port): &Place) {
        match address {
            IpAddr::V4(address) => self.v4.remove((service, address, port)),
            IpAddr::V6(address) => self.v6.remove((service, address, port)),
        }
    }
}

/// Each Service's in the order of address and port, in no more room than they need.
#[derive(Debug)]
struct OfFamily<A, B>(HashMap<ServiceId, Vec<(Member<A>, B)>>);

impl<A: Copy + Ord + Into<IpAddr>, B> OfFamily<A, B> {
    fn find(list: &[(Member<A>, B)], address: A, port: u16) -> Result<usize, usize> {
        list.binary_search_by_key(&(address, port), |(member, _)| (member.address, member.port))
    }

    fn get(&self, (service, address, port): Place<A>) -> Option<(Member, &B)> {
        let list = self.0.get(&service)?;
        let (member, known) = &list[Self::find(list, address, port).ok()?];
        Some((member.at(address.into()), known))
    }

    fn get_mut(&mut self, (service, address, port): Place<A>) -> Option<(Member, &mut B)> {
        let list = self.0.get_mut(&service)?;
        let at = Self::find(list, address, port).ok()?;
        let (member, known) = &mut list[at];
        Some((member.at(address.into()), known))
    }

    fn put(&mut self, service: ServiceId, member: Member<A>, new: impl FnOnce() -> B) -> &mut B {
        let list = self.0.entry(service).or_default();
        let at = Self::find(list, member.address, member.port).unwrap_or_else(|at| {
            if list.len() == list.capacity() {
                list.reserve_exact(1 + list.len() / 8);
            }
            list.insert(at, (member, new()));
            at
        });
        let (held, known) = &mut list[at];
        *held = member;
        known
    }

    fn remove(&mut self, (service, address, port): Place<A>) {
        let Some(list) = self.0.get_mut(&service) else { return };
        if let Ok(at) = Self::find(list, address, port) {
            list.remove(at);
        }
        if list.is_empty() {
            self.0.remove(&service);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(address: IpAddr, port: u16) -> Member {
        Member { address, port, local: false, host: false }
    }

    #[test]
    fn each_is_found_under_its_service_until_it_is_removed() {
        let services = [1, 2].map(ServiceId::new);
        let address = IpAddr::from([10, 0, 0, 1]);
        let mut backends = Backends::default();
        for (service, port) in [(0, 80), (0, 70), (0, 90), (0, 80), (1, 80)] {
            backends.put(services[service], member(address, port), || port);
        }
        let found = |backends: &Backends<u16>, service: usize| -> Vec<u16> {
            let is_there = |port: &u16| {
                let place = (services[service], address, *port);
                backends.get(&place) == Some((member(address, *port), port))
            };
            [60, 70, 80, 90].into_iter().filter(is_there).collect()
        };
        assert_eq!((found(&backends, 0), found(&backends, 1)), (vec![70, 80, 90], vec![80]));
        for port in [70, 60, 90] {
            backends.remove(&(services[0], address, port));
        }
        assert_eq!((found(&backends, 0), found(&backends, 1)), (vec![80], vec![80]));
        assert!(backends.get_mut(&(services[0], address, 80)).is_some());
        backends.remove(&(services[0], address, 80));
        assert!(backends.get_mut(&(services[0], address, 80)).is_none());
        assert_eq!(backends.v4.0.len(), 1);
    }

    #[test]
    fn what_is_known_stays_when_the_backend_changes() {
        let service = ServiceId::new(1);
        let mut backends = Backends::default();
        let here = member([10, 0, 0, 1].into(), 80);
        *backends.put(service, here, || 1) += 1;
        let local = Member { local: true, ..here };
        *backends.put(service, local, || 10) += 1;
        assert_eq!(backends.get(&(service, here.address, 80)), Some((local, &3)));
    }

    #[test]
    fn each_family_is_found_by_itself() {
        let service = ServiceId::new(1);
        let mut backends = Backends::default();
        let all = [("10.0.0.1", 4), ("fd00::1", 6)]
            .map(|(address, known)| (member(address.parse().unwrap(), 80), known));
        for (member, known) in all {
            let place = (service, member.address, 80);
            assert_eq!(backends.get(&place), None);
            backends.put(service, member, || known);
            assert_eq!(backends.get(&place), Some((member, &known)));
            assert_eq!(backends.get_mut(&place), Some((member, &mut { known })));
        }
        for (member, _) in all {
            backends.remove(&(service, member.address, 80));
        }
        assert!(backends.v4.0.is_empty() && backends.v6.0.is_empty());
    }
}
