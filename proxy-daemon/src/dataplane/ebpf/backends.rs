//! Backends by the Service that has them.
//!
//! One map of all of them, with the address in the key and again in the value, would be the
//! largest thing that the daemon has.

use std::collections::HashMap;
use std::net::IpAddr;

use proxy_ebpf::layout::ServiceId;

/// What knows its address and port.
pub trait Placed {
    fn place(&self) -> (IpAddr, u16);
}

/// Each Service's in the order of address and port, in no more room than they need.
#[derive(Debug)]
pub struct Backends<B>(HashMap<ServiceId, Vec<B>>);

impl<B> Default for Backends<B> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

/// Service, address, port.
pub type Place = (ServiceId, IpAddr, u16);

/// Where a backend is, or is to be put.
#[derive(Debug)]
pub struct Entry<'a, B> {
    of_service: &'a mut Vec<B>,
    at: Result<usize, usize>,
}

impl<'a, B> Entry<'a, B> {
    pub fn or_insert(self, new: B) -> &'a mut B {
        let Self { of_service, at } = self;
        let at = at.unwrap_or_else(|at| {
            if of_service.len() == of_service.capacity() {
                of_service.reserve_exact(1 + of_service.len() / 8);
            }
            of_service.insert(at, new);
            at
        });
        &mut of_service[at]
    }
}

fn find<B: Placed>(of_service: &[B], address: IpAddr, port: u16) -> Result<usize, usize> {
    of_service.binary_search_by_key(&(address, port), B::place)
}

impl<B: Placed> Backends<B> {
    pub fn get(&self, &(service, address, port): &Place) -> Option<&B> {
        let of_service = self.0.get(&service)?;
        of_service.get(find(of_service, address, port).ok()?)
    }

    pub fn get_mut(&mut self, &(service, address, port): &Place) -> Option<&mut B> {
        let of_service = self.0.get_mut(&service)?;
        let at = find(of_service, address, port).ok()?;
        of_service.get_mut(at)
    }

    /// What is inserted has this address and port.
    pub fn entry(&mut self, (service, address, port): Place) -> Entry<'_, B> {
        let of_service = self.0.entry(service).or_default();
        let at = find(of_service, address, port);
        Entry { of_service, at }
    }

    pub fn remove(&mut self, &(service, address, port): &Place) {
        let Some(of_service) = self.0.get_mut(&service) else { return };
        if let Ok(at) = find(of_service, address, port) {
            of_service.remove(at);
        }
        if of_service.is_empty() {
            self.0.remove(&service);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Placed for (IpAddr, u16) {
        fn place(&self) -> (IpAddr, u16) {
            *self
        }
    }

    #[test]
    fn each_is_found_under_its_service_until_it_is_removed() {
        let services = [1, 2].map(ServiceId::new);
        let address = IpAddr::from([10, 0, 0, 1]);
        let mut backends = Backends::default();
        for (service, port) in [(0, 80), (0, 70), (0, 90), (0, 80), (1, 80)] {
            let place = (services[service], address, port);
            backends.entry(place).or_insert((address, port));
        }
        let found = |backends: &Backends<(IpAddr, u16)>, service: usize| -> Vec<u16> {
            let is_there = |port: &u16| {
                backends.get(&(services[service], address, *port)) == Some(&(address, *port))
            };
            [60, 70, 80, 90].into_iter().filter(is_there).collect()
        };
        assert_eq!((found(&backends, 0), found(&backends, 1)), (vec![70, 80, 90], vec![80]));
        assert_eq!(backends.0[&services[0]].len(), 3);
        for port in [70, 60, 90] {
            backends.remove(&(services[0], address, port));
        }
        assert_eq!((found(&backends, 0), found(&backends, 1)), (vec![80], vec![80]));
        assert!(backends.get_mut(&(services[0], address, 80)).is_some());
        backends.remove(&(services[0], address, 80));
        assert!(backends.get_mut(&(services[0], address, 80)).is_none());
        assert_eq!(backends.0.len(), 1);
    }
}
