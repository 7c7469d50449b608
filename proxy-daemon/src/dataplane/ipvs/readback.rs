//! What the kernel holds, as our objects: a constant number of dumps, however many
//! Services there are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::net::SocketAddr;
use std::num::NonZeroU16;

use super::codec::{VirtualServerKey, decode_destination, decode_service};
use super::objects::{Forward, Key, ServerConfig, Value, server_key};
use super::ruleset::{Element, Set};
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
        readback
            .ours
            .extend(elements.into_iter().map(|element| (Key::Element(element), Value::Present)));
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
        for entry in entries {
            // Port 0 means all ports: it cannot be a Service's.
            let Some(port) = NonZeroU16::new(entry.port) else { continue };
            let key = FrontendKey { address: entry.address, protocol: entry.protocol, port };
            // Made between the two reads, by somebody else.
            let Some(config) = configs.remove(&server_key(&key)) else { continue };
            let side = if owned(&key) { &mut readback.ours } else { &mut readback.foreign };
            side.insert(Key::VirtualServer(key), Value::VirtualServer(config));
            side.extend(entry.real_servers.into_iter().map(|real| {
                let forward = Forward { weight: real.weight, masquerading: real.masquerading };
                (Key::RealServer(key, real.address), Value::RealServer(forward))
            }));
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
        let requests = self.requests()?;
        let mut by_server: BTreeMap<FrontendKey, BTreeSet<SocketAddr>> = BTreeMap::new();
        for key in retired {
            if let Key::RealServer(frontend, at) = key {
                by_server.entry(*frontend).or_default().insert(*at);
            }
        }
        let mut unused = Vec::new();
        for (frontend, wanted) in by_server {
            let parts = self
                .generic
                .dump(&requests.dump_destinations(&server_key(&frontend)))
                .map_err(|error| PlaneError::new("IPVS", error))?;
            for part in &parts {
                let status = decode_destination(part, frontend.family())
                    .map_err(|error| PlaneError::new("IPVS", error))?;
                let at = SocketAddr::new(status.server.key.addr, status.server.key.port);
                let idle = status.connections.active == 0 && status.connections.inactive == 0;
                if idle && wanted.contains(&at) {
                    unused.push(Key::RealServer(frontend, at));
                }
            }
        }
        Ok(unused)
    }
}
