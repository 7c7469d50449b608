//! Operations to kernel requests: neighbours on one interface go out together.

use std::net::IpAddr;
use std::time::Instant;

use nix::libc;
use tracing::trace;

use super::codec::{RealServerKey, Requests};
use super::objects::{Key, Value, server_key};
use super::ruleset::{Element, ElementKey, Operation};
use super::{IpvsPlane, OpError};
use crate::kernel::links::AddressChange;
use crate::kernel::netlink::{Errno, Message, Netlink, NetlinkError};
use crate::model::HostPort;
use crate::plan::Op;

/// Which kernel interface an operation goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interface {
    NfTables,
    Ipvs,
    Links,
}

const fn interface(key: &Key) -> Interface {
    match key {
        Key::Element(_) | Key::Redirect(..) => Interface::NfTables,
        Key::VirtualServer(_) | Key::RealServer(..) => Interface::Ipvs,
        Key::Address(_) => Interface::Links,
    }
}

type Results = Vec<Result<(), OpError>>;

impl<N: Netlink + 'static> IpvsPlane<N> {
    pub(super) fn apply_all(&mut self, ops: &[Op<Key>]) -> Results {
        let mut results = Results::with_capacity(ops.len());
        for run in ops.chunk_by(|a, b| interface(a.key()) == interface(b.key())) {
            let interface = interface(run[0].key());
            let start = Instant::now();
            results.extend(match interface {
                Interface::NfTables => self.apply_elements(run),
                Interface::Ipvs => self.apply_servers(run),
                Interface::Links => self.apply_addresses(run),
            });
            trace!(?interface, ops = run.len(), took = ?start.elapsed(), "applied");
        }
        results
    }

    fn apply_elements(&mut self, ops: &[Op<Key>]) -> Results {
        let changes: Vec<(Operation, Element)> = ops.iter().filter_map(element_change).collect();
        match self.ruleset.apply(&changes) {
            Ok(results) => results
                .into_iter()
                .map(|result| {
                    result.map_err(|errno| match errno {
                        // A set or the table is gone: somebody flushed the ruleset, and
                        // it has to be made anew before anything can be added.
                        Errno(libc::ENOENT) => OpError::Unknown(format!("nf_tables: {errno}")),
                        // A map holds something else for this key.
                        Errno(libc::EBUSY | libc::EEXIST) => {
                            OpError::Unknown(format!("nf_tables: {errno}"))
                        }
                        errno => OpError::Refused(format!("nf_tables: {errno}")),
                    })
                })
                .collect(),
            Err(error) => all_unknown(ops, &error),
        }
    }

    fn apply_addresses(&mut self, ops: &[Op<Key>]) -> Results {
        let changes: Vec<AddressChange> = ops.iter().filter_map(address_change).collect();
        match self.links.change_addresses(self.link, &changes) {
            Ok(results) => results
                .into_iter()
                .map(|result| {
                    result.map_err(|errno| match errno {
                        // The link is gone.
                        Errno(libc::ENODEV) => OpError::Unknown(format!("address: {errno}")),
                        errno => OpError::Refused(format!("address: {errno}")),
                    })
                })
                .collect(),
            Err(error) => all_unknown(ops, &error),
        }
    }

    fn apply_servers(&mut self, ops: &[Op<Key>]) -> Results {
        let requests = match self.requests() {
            Ok(requests) => requests,
            Err(error) => return all_unknown(ops, &error),
        };
        match self.request_servers(requests, ops) {
            Ok(results) => {
                ops.iter().zip(results).map(|(op, result)| server_result(op, result)).collect()
            }
            Err(error) => all_unknown(ops, &error),
        }
    }

    /// What turns out to be there although it was to be made, or not to be there although
    /// it was to be changed, is made right with a second request.
    fn request_servers(
        &mut self,
        requests: Requests,
        ops: &[Op<Key>],
    ) -> Result<Vec<Result<(), Errno>>, NetlinkError> {
        let messages: Vec<Message> =
            ops.iter().filter_map(|op| server_request(requests, op)).collect();
        let mut results = self.generic.request_all(&messages)?;
        let (places, again): (Vec<usize>, Vec<Message>) = ops
            .iter()
            .zip(&results)
            .enumerate()
            .filter_map(|(place, (op, result))| {
                let other = corrected(op, (*result).err()?)?;
                Some((place, server_request(requests, &other)?))
            })
            .unzip();
        if !again.is_empty() {
            for (place, result) in places.into_iter().zip(self.generic.request_all(&again)?) {
                if let Some(first) = results.get_mut(place) {
                    *first = result;
                }
            }
        }
        Ok(results)
    }
}

/// The other way to the same end. `ip_vs_genl_set_cmd` says ESRCH for a service and ENOENT
/// for a destination that is not there.
fn corrected(op: &Op<Key>, errno: Errno) -> Option<Op<Key>> {
    match (op, errno) {
        (Op::Create(key, value), Errno(libc::EEXIST)) => {
            Some(Op::Update(key.clone(), value.clone()))
        }
        (Op::Update(key, value), Errno(libc::ESRCH | libc::ENOENT)) => {
            Some(Op::Create(key.clone(), value.clone()))
        }
        _ => None,
    }
}

fn all_unknown(ops: &[Op<Key>], error: &dyn std::fmt::Display) -> Results {
    ops.iter().map(|_| Err(OpError::Unknown(error.to_string()))).collect()
}

fn element_change(op: &Op<Key>) -> Option<(Operation, Element)> {
    match (op, op.key()) {
        (Op::Delete(_), Key::Element(element)) => Some((Operation::Delete, *element)),
        (_, Key::Element(element)) => Some((Operation::Add, *element)),
        (_, Key::Redirect(map, from)) => {
            let (operation, to) = match op {
                Op::Create(_, Value::Redirect(to)) => (Operation::Add, *to),
                Op::Update(_, Value::Redirect(to)) => (Operation::Replace, *to),
                // Found by its key alone.
                _ => (Operation::Delete, HostPort::new(from.address, 0)),
            };
            let (address, protocol, port) = (from.address, from.protocol, from.port.get());
            let key = ElementKey::Redirect { address, protocol, port, to };
            Some((operation, Element { set: *map, key }))
        }
        _ => None,
    }
}

fn address_change(op: &Op<Key>) -> Option<AddressChange> {
    let change = |address: &IpAddr| match op {
        Op::Delete(_) => AddressChange::Delete(*address),
        _ => AddressChange::Add(*address),
    };
    match op.key() {
        Key::Address(address) => Some(change(address)),
        _ => None,
    }
}

fn server_request(requests: Requests, op: &Op<Key>) -> Option<Message> {
    Some(match op {
        Op::Create(Key::VirtualServer(key), Value::VirtualServer(config)) => {
            requests.new_service(&config.server(key))
        }
        Op::Update(Key::VirtualServer(key), Value::VirtualServer(config)) => {
            requests.set_service(&config.server(key))
        }
        Op::Delete(Key::VirtualServer(key)) => requests.del_service(&server_key(key)),
        Op::Create(Key::RealServer(key, at), Value::RealServer(forward)) => {
            requests.new_destination(&server_key(key), &forward.real_server(*at))
        }
        Op::Update(Key::RealServer(key, at), Value::RealServer(forward))
        | Op::Retire(Key::RealServer(key, at), Value::RealServer(forward)) => {
            requests.set_destination(&server_key(key), &forward.real_server(*at))
        }
        Op::Delete(Key::RealServer(key, at)) => {
            let real = RealServerKey { addr: at.address, port: at.port };
            requests.del_destination(&server_key(key), &real)
        }
        _ => return None,
    })
}

fn server_result(op: &Op<Key>, result: Result<(), Errno>) -> Result<(), OpError> {
    let Err(errno) = result else { return Ok(()) };
    match (op, errno) {
        (Op::Delete(_), Errno(libc::ESRCH | libc::ENOENT)) => Ok(()),
        // Our picture of the kernel was wrong: of this object, or of what it is in.
        (_, Errno(libc::EEXIST | libc::ESRCH | libc::ENOENT)) => {
            Err(OpError::Unknown(format!("IPVS: {errno}")))
        }
        _ => Err(OpError::Refused(format!("IPVS: {errno}"))),
    }
}
