//! EndpointSlices as they are kept. Of all objects these are the largest part: in them is every
//! endpoint of every Service.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::SystemTime;

use crate::model::{Endpoint, EndpointSlice, Family, ObjectName, Placement, SlicePort};

/// The same as the slice, in less room.
#[derive(Debug)]
pub(super) struct Filed {
    pub name: ObjectName,
    service: ObjectName,
    family: Family,
    ports: Box<[SlicePort]>,
    endpoints: Endpoints,
    triggered: Option<SystemTime>,
}

#[derive(Debug)]
enum Endpoints {
    V4(Box<[Endpoint4]>),
    /// With others among them.
    Any(Box<[Endpoint]>),
}

/// Half of what an endpoint of any family takes.
#[derive(Debug)]
struct Endpoint4 {
    address: Ipv4Addr,
    ready: bool,
    serving: bool,
    terminating: bool,
    placement: Arc<Placement>,
}

impl Endpoint4 {
    fn of(endpoint: &Endpoint) -> Option<Self> {
        let IpAddr::V4(address) = endpoint.address else { return None };
        let Endpoint { ready, serving, terminating, .. } = *endpoint;
        Some(Self { address, ready, serving, terminating, placement: endpoint.placement.clone() })
    }

    fn endpoint(&self) -> Endpoint {
        let Self { address, ready, serving, terminating, .. } = *self;
        let placement = self.placement.clone();
        Endpoint { address: address.into(), ready, serving, terminating, placement }
    }
}

impl From<EndpointSlice> for Filed {
    fn from(slice: EndpointSlice) -> Self {
        let EndpointSlice { name, service, family, ports, endpoints, triggered } = slice;
        let narrow: Option<Box<[_]>> = endpoints.iter().map(Endpoint4::of).collect();
        let endpoints =
            narrow.map_or_else(|| Endpoints::Any(endpoints.into_boxed_slice()), Endpoints::V4);
        Self { name, service, family, ports: ports.into_boxed_slice(), endpoints, triggered }
    }
}

impl Filed {
    pub fn slice(&self) -> EndpointSlice {
        EndpointSlice {
            name: self.name.clone(),
            service: self.service.clone(),
            family: self.family,
            ports: self.ports.to_vec(),
            endpoints: match &self.endpoints {
                Endpoints::V4(all) => all.iter().map(Endpoint4::endpoint).collect(),
                Endpoints::Any(all) => all.to_vec(),
            },
            triggered: self.triggered,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_of_ipv4_takes_sixteen_bytes() {
        assert_eq!(size_of::<Endpoint4>(), 16);
    }

    #[test]
    fn a_slice_comes_back_as_it_was() {
        let name = |text| ObjectName::new("ns", text);
        let endpoint = |address: &str| Endpoint {
            address: address.parse().unwrap(),
            ready: false,
            serving: true,
            terminating: true,
            placement: Placement::default().shared(),
        };
        for addresses in [&["10.0.0.1", "10.0.0.2"][..], &["10.0.0.1", "fd00::1"], &[]] {
            let slice = EndpointSlice {
                name: name("web-1"),
                service: name("web"),
                family: Family::V4,
                ports: vec![],
                endpoints: addresses.iter().map(|address| endpoint(address)).collect(),
                triggered: Some(SystemTime::UNIX_EPOCH),
            };
            assert_eq!(Filed::from(slice.clone()).slice(), slice);
        }
    }
}
