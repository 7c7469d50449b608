//! What the kernel holds, as our objects: a constant number of dumps, however many
//! Services there are. On a thread and sockets of its own, so that no change waits for it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::BufReader;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::codec::{
    self, RealServerStatus, Requests, VirtualServerKey, decode_destination, decode_service,
};
use super::objects::{Forward, Key, Value, server_key};
use super::ruleset::{Element, ElementKey, Set, read_elements};
use super::{IpvsPlane, PlaneError, proc};
use crate::dataplane::{Give, Pieces, Reader, WorkDone};
use crate::kernel::links::Links;
use crate::kernel::netlink::{Message, Netlink};
use crate::model::{Family, HostPort};
use crate::policy::FrontendKey;

/// The kernel interfaces that are read back.
pub struct ReadSeams<N> {
    /// Generic netlink.
    pub generic: N,
    /// Netfilter netlink.
    pub netfilter: N,
    pub links: Box<dyn Links>,
    /// `/proc/thread-self/net/ip_vs`, or a file like it.
    pub table: PathBuf,
    pub table_reads: u64,
}

impl<N> std::fmt::Debug for ReadSeams<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadSeams").field("table", &self.table).finish_non_exhaustive()
    }
}

/// Shared with the thread that reads.
pub(super) struct SharedSeams<N> {
    seams: Arc<Mutex<ReadSeams<N>>>,
    work: Arc<Mutex<WorkDone>>,
}

impl<N: Netlink + 'static> SharedSeams<N> {
    pub fn new(seams: ReadSeams<N>) -> Self {
        Self { seams: Arc::new(Mutex::new(seams)), work: Arc::default() }
    }

    /// Until the end of the last readback.
    pub fn work(&self) -> WorkDone {
        *self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the module is there.
    pub fn has_table(&self) -> bool {
        self.seams.lock().unwrap_or_else(PoisonError::into_inner).table.exists()
    }

    pub fn reader(&self, scope: Scope) -> Reader<Key> {
        let (seams, work) = (Arc::clone(&self.seams), Arc::clone(&self.work));
        Box::new(move |give| {
            // Whoever panicked in here has left no half of anything behind: all is read.
            let mut seams = seams.lock().unwrap_or_else(PoisonError::into_inner);
            let result = seams.read(&scope, give);
            *work.lock().unwrap_or_else(PoisonError::into_inner) = seams.work();
            result
        })
    }
}

/// What is ours to read.
pub(super) struct Scope {
    /// Of which there are tables of ours.
    pub families: Vec<Family>,
    /// The dummy link.
    pub link: u32,
    pub requests: Requests,
}

/// Marks of ownership, which are elements of our sets.
#[derive(Default)]
struct Marks {
    servers: HashSet<FrontendKey>,
    addresses: HashSet<IpAddr>,
}

impl Marks {
    fn note(&mut self, element: &Element) {
        match (element.set, element.key) {
            (Set::Owned, ElementKey::Port { address, protocol, port }) => {
                let port = NonZeroU16::new(port);
                self.servers.extend(port.map(|port| FrontendKey { address, protocol, port }));
            }
            (Set::Vips, ElementKey::Address(address)) => {
                self.addresses.insert(address);
            }
            _ => {}
        }
    }
}

impl<N: Netlink> ReadSeams<N> {
    fn work(&self) -> WorkDone {
        let parts = [self.generic.counters(), self.netfilter.counters(), self.links.counters()];
        WorkDone {
            requests: parts.iter().map(|p| p.requests).sum(),
            dumps: parts.iter().map(|p| p.dumps).sum::<u64>() + self.table_reads,
            sends: parts.iter().map(|p| p.sends).sum(),
        }
    }

    fn read(&mut self, scope: &Scope, give: Give<'_, Key>) -> Result<(), PlaneError> {
        let mut pieces = Pieces::new(give);
        let mut marks = Marks::default();
        read_elements(&mut self.netfilter, &scope.families, &mut |element| {
            marks.note(&element);
            if let Some((key, value)) = object(element) {
                pieces.put(true, key, value);
            }
        })
        .map_err(|error| PlaneError::new("nf_tables", error))?;
        let addresses =
            self.links.addresses().map_err(|error| PlaneError::new("addresses", error))?;
        for address in addresses.into_iter().filter(|address| address.link == scope.link) {
            let ours = marks.addresses.contains(&address.address);
            pieces.put(ours, Key::Address(address.address), Value::Present);
        }
        self.read_servers(scope, &marks, &mut pieces)?;
        pieces.end();
        Ok(())
    }

    fn read_servers(
        &mut self,
        scope: &Scope,
        marks: &Marks,
        pieces: &mut Pieces<'_, Key>,
    ) -> Result<(), PlaneError> {
        let mut without_table_entry = self.read_virtual_servers(scope, marks, pieces)?;
        let open = File::open(&self.table).map_err(|error| {
            PlaneError::new("IPVS", format!("cannot open {}: {error}", self.table.display()))
        })?;
        self.table_reads += 1;
        proc::read(BufReader::new(open), &mut |entry| {
            // Port 0 means all ports: it cannot be a Service's.
            let Some(port) = NonZeroU16::new(entry.port) else { return };
            let key = FrontendKey { address: entry.address, protocol: entry.protocol, port };
            // Others were made between the two reads.
            if without_table_entry.remove(&key) {
                let ours = marks.servers.contains(&key);
                for real in entry.real_servers {
                    let forward = Forward { weight: real.weight, masquerading: real.masquerading };
                    let value = Value::RealServer(forward);
                    pieces.put(ours, Key::RealServer(key, real.address), value);
                }
            }
        })
        .map_err(|error| PlaneError::new("IPVS", format!("{}: {error}", self.table.display())))?;
        // The table counts its way through the virtual servers of all network namespaces
        // (`ip_vs_info_seq_next`), but starts each piece at a count of this one's
        // (`ip_vs_info_array`): it leaves out as many of ours as others have.
        for key in without_table_entry {
            let ours = marks.servers.contains(&key);
            for status in dump_destinations(&mut self.generic, scope.requests, &key)? {
                let server = status.server;
                let masquerading = server.forward == codec::Forward::Masquerade;
                let forward = Forward { weight: server.weight, masquerading };
                let at = HostPort::new(server.key.addr, server.key.port);
                pieces.put(ours, Key::RealServer(key, at), Value::RealServer(forward));
            }
        }
        Ok(())
    }

    fn read_virtual_servers(
        &mut self,
        scope: &Scope,
        marks: &Marks,
        pieces: &mut Pieces<'_, Key>,
    ) -> Result<HashSet<FrontendKey>, PlaneError> {
        let mut found = HashSet::new();
        let mut malformed = None;
        self.generic
            .dump_each(&scope.requests.dump_services(), &mut |payload| {
                let part = Message { kind: 0, flags: 0, payload: payload.to_vec() };
                match decode_service(&part) {
                    Ok(status) => {
                        let Some(key) = frontend_key(&status.server.key) else { return };
                        let config = Value::VirtualServer(Arc::new(status.server.into()));
                        let ours = marks.servers.contains(&key);
                        pieces.put(ours, Key::VirtualServer(key), config);
                        found.insert(key);
                    }
                    Err(error) => malformed = Some(error),
                }
            })
            .map_err(|error| PlaneError::new("IPVS", error))?;
        match malformed {
            None => Ok(found),
            Some(error) => Err(PlaneError::new("IPVS", error)),
        }
    }
}

impl<N: Netlink + 'static> IpvsPlane<N> {
    /// Of these real servers, those without active and inactive connections. One dump
    /// for each virtual server concerned; what is drained is few.
    pub(super) fn without_connections(&mut self, retired: &[Key]) -> Result<Vec<Key>, PlaneError> {
        let mut by_server: BTreeMap<FrontendKey, BTreeSet<HostPort>> = BTreeMap::new();
        for key in retired {
            if let Key::RealServer(frontend, at) = key {
                by_server.entry(*frontend).or_default().insert(*at);
            }
        }
        let requests = self.requests()?;
        let mut unused = Vec::new();
        for (frontend, wanted) in by_server {
            for status in dump_destinations(&mut self.generic, requests, &frontend)? {
                let at = HostPort::new(status.server.key.addr, status.server.key.port);
                let idle = status.connections.active == 0 && status.connections.inactive == 0;
                if idle && wanted.contains(&at) {
                    unused.push(Key::RealServer(frontend, at));
                }
            }
        }
        Ok(unused)
    }
}

pub(super) fn dump_destinations<N: Netlink>(
    generic: &mut N,
    requests: Requests,
    frontend: &FrontendKey,
) -> Result<Vec<RealServerStatus>, PlaneError> {
    let request = requests.dump_destinations(&server_key(frontend));
    let parts = generic.dump(&request).map_err(|error| PlaneError::new("IPVS", error))?;
    parts
        .iter()
        .map(|part| decode_destination(part, frontend.family()))
        .collect::<Result<_, _>>()
        .map_err(|error| PlaneError::new("IPVS", error))
}

/// `None` for a firewall mark's, and for one that takes all ports.
pub(super) fn frontend_key(server: &VirtualServerKey) -> Option<FrontendKey> {
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
            Some((Key::Redirect(element.set, from), Value::Redirect(Box::new(to))))
        }
        _ => Some((Key::Element(element), Value::Present)),
    }
}
