//! What the kernel holds, as our objects: a constant number of dumps, however many
//! Services there are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::net::SocketAddr;
use std::num::NonZeroU16;

use super::codec::{self, RealServerStatus, VirtualServerKey, decode_destination, decode_service};
use super::objects::{Forward, Key, ServerConfig, Value, server_key};
use super::ruleset::{Element, ElementKey, Set};
use super::{IpvsPlane, PlaneError, Readback, proc};
use crate::kernel::netlink::Netlink;
use crate::policy::FrontendKey;

impl<N: Netlink> IpvsPlane<N> {
    pub(super) fn read_kernel(&mut self) -> Result<Readback<Key>, PlaneError> {
        let mut readback = Readback::default();
        let elements =
            self.ruleset.elements().map_err(|error| PlaneError::new("nf_tables", error))?;
        let addresses =
            self.links.addresses().map_err(|error| PlaneError::new("addresses", error))?;
        for address in addresses.into_iter().filter(|a| a.link == self.link) {
            let ours = elements.contains(&Element::vip(address.address));
            let side = if ours { &mut readback.ours } else { &mut readback.foreign };
            side.insert(Key::Address(address.address), Value::Present);
        }
        self.read_servers(&elements, &mut readback)?;
        readback.ours.extend(elements.into_iter().filter_map(object));
        Ok(readback)
    }

    fn read_servers(
        &mut self,
        elements: &BTreeSet<Element>,
        readback: &mut Readback<Key>,
    ) -> Result<(), PlaneError> {
        let owned = |key: &FrontendKey| {
            let port = key.port.get();
            elements.contains(&Element::port(Set::Owned, key.address, key.protocol, port))
        };
        let mut configs = self.dump_services()?;
        self.reads += 1;
        let table = fs::read_to_string(&self.table).map_err(|error| {
            PlaneError::new("IPVS", format!("cannot read {}: {error}", self.table.display()))
        })?;
        let entries = proc::parse(&table).map_err(|error| PlaneError::new("IPVS", error))?;
        let mut found = |key: FrontendKey, config, real_servers: Vec<(SocketAddr, Forward)>| {
            let side = if owned(&key) { &mut readback.ours } else { &mut readback.foreign };
            side.insert(Key::VirtualServer(key), Value::VirtualServer(config));
            side.extend(real_servers.into_iter().map(|(address, forward)| {
                (Key::RealServer(key, address), Value::RealServer(forward))
            }));
        };
        for entry in entries {
            // Port 0 means all ports: it cannot be a Service's.
            let Some(port) = NonZeroU16::new(entry.port) else { continue };
            let key = FrontendKey { address: entry.address, protocol: entry.protocol, port };
            // Made between the two reads, by somebody else.
            let Some(config) = configs.remove(&server_key(&key)) else { continue };
            let forward = |real: &proc::TableRealServer| Forward {
                weight: real.weight,
                masquerading: real.masquerading,
            };
            let real_servers = entry.real_servers.iter().map(|real| (real.address, forward(real)));
            found(key, config, real_servers.collect());
        }
        // The table counts its way through the virtual servers of all network namespaces
        // (`ip_vs_info_seq_next`), but starts each piece at a count of this one's
        // (`ip_vs_info_array`): it leaves out as many of ours as others have.
        for (server, config) in configs {
            let Some(key) = frontend_key(&server) else { continue };
            found(key, config, self.dump_real_servers(&key)?);
        }
        Ok(())
    }

    fn dump_services(&mut self) -> Result<HashMap<VirtualServerKey, ServerConfig>, PlaneError> {
        let requests = self.requests()?;
        let parts = self
            .generic
            .dump(&requests.dump_services())
            .map_err(|error| PlaneError::new("IPVS", error))?;
        parts
            .iter()
            .map(|part| {
                decode_service(part)
                    .map(|status| (status.server.key, status.server.into()))
                    .map_err(|error| PlaneError::new("IPVS", error))
            })
            .collect()
    }

    /// Of these real servers, those without active and inactive connections. One dump
    /// for each virtual server concerned; what is drained is few.
    pub(super) fn without_connections(&mut self, retired: &[Key]) -> Result<Vec<Key>, PlaneError> {
        let mut by_server: BTreeMap<FrontendKey, BTreeSet<SocketAddr>> = BTreeMap::new();
        for key in retired {
            if let Key::RealServer(frontend, at) = key {
                by_server.entry(*frontend).or_default().insert(*at);
            }
        }
        let mut unused = Vec::new();
        for (frontend, wanted) in by_server {
            for status in self.dump_destinations(&frontend)? {
                let at = SocketAddr::new(status.server.key.addr, status.server.key.port);
                let idle = status.connections.active == 0 && status.connections.inactive == 0;
                if idle && wanted.contains(&at) {
                    unused.push(Key::RealServer(frontend, at));
                }
            }
        }
        Ok(unused)
    }

    fn dump_real_servers(
        &mut self,
        frontend: &FrontendKey,
    ) -> Result<Vec<(SocketAddr, Forward)>, PlaneError> {
        let statuses = self.dump_destinations(frontend)?;
        let real_server = |status: RealServerStatus| {
            let server = status.server;
            let masquerading = server.forward == codec::Forward::Masquerade;
            let forward = Forward { weight: server.weight, masquerading };
            (SocketAddr::new(server.key.addr, server.key.port), forward)
        };
        Ok(statuses.into_iter().map(real_server).collect())
    }

    fn dump_destinations(
        &mut self,
        frontend: &FrontendKey,
    ) -> Result<Vec<RealServerStatus>, PlaneError> {
        let request = self.requests()?.dump_destinations(&server_key(frontend));
        let parts = self.generic.dump(&request).map_err(|error| PlaneError::new("IPVS", error))?;
        parts
            .iter()
            .map(|part| decode_destination(part, frontend.family()))
            .collect::<Result<_, _>>()
            .map_err(|error| PlaneError::new("IPVS", error))
    }
}

/// `None` for a firewall mark's, and for one that takes all ports.
fn frontend_key(server: &VirtualServerKey) -> Option<FrontendKey> {
    match *server {
        VirtualServerKey::Address { addr, protocol, port } => {
            NonZeroU16::new(port).map(|port| FrontendKey { address: addr, protocol, port })
        }
        VirtualServerKey::FwMark { .. } => None,
    }
}

/// What an element of our sets and maps is among the objects.
fn object(element: Element) -> Option<(Key, Value)> {
    match element.key {
        ElementKey::Redirect { address, protocol, port, to } => {
            let from = FrontendKey { address, protocol, port: NonZeroU16::new(port)? };
            Some((Key::Redirect(element.set, from), Value::Redirect(to)))
        }
        _ => Some((Key::Element(element), Value::Present)),
    }
}
