//! The backends of this node by Service port and address, as packets inside others name them.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use proxy_ebpf::layout::{BackendId, LocalKey, ServiceId};

/// What `LOCALS` is to hold.
#[derive(Debug, Default)]
pub struct Locals {
    /// Somebody looks there.
    kept: bool,
    /// Endpoints of one address may have several ports: any of them will do.
    ids: HashMap<(ServiceId, IpAddr), BTreeSet<BackendId>>,
    /// Service ports that have a backend there.
    addresses: HashMap<IpAddr, usize>,
}

/// An entry's new value, or none any more.
pub type Change = (LocalKey, Option<BackendId>);

impl Locals {
    pub fn new(kept: bool) -> Self {
        Self { kept, ..Self::default() }
    }

    /// A backend is one of this node, or is none any more: what that changes.
    pub fn note(
        &mut self,
        service: ServiceId,
        address: IpAddr,
        id: BackendId,
        local: bool,
    ) -> Vec<Change> {
        if !self.kept || !local && !self.ids.contains_key(&(service, address)) {
            return Vec::new();
        }
        let key = |service| LocalKey { service, address: address.into() };
        let ids = self.ids.entry((service, address)).or_default();
        let before = ids.first().copied();
        if local {
            ids.insert(id);
        } else {
            ids.remove(&id);
        }
        let after = ids.first().copied();
        let mut changes = Vec::new();
        if before != after {
            changes.push((key(service), after));
        }
        if after.is_none() {
            self.ids.remove(&(service, address));
        }
        if before.is_some() != after.is_some() {
            let services = self.addresses.entry(address).or_default();
            let first = *services == 0;
            *services = if after.is_some() { *services + 1 } else { services.saturating_sub(1) };
            if *services == 0 {
                self.addresses.remove(&address);
                changes.push((key(LocalKey::ANY), None));
            } else if first {
                changes.push((key(LocalKey::ANY), Some(BackendId::default())));
            }
        }
        changes
    }

    /// What a map with these entries lacks, and what it has besides.
    pub fn differences(&self, found: &[(LocalKey, BackendId)]) -> Vec<Change> {
        let mut wanted: HashMap<LocalKey, BackendId> = HashMap::new();
        for ((service, address), ids) in &self.ids {
            if let Some(id) = ids.first() {
                wanted.insert(LocalKey { service: *service, address: (*address).into() }, *id);
            }
            let any = LocalKey { service: LocalKey::ANY, address: (*address).into() };
            wanted.entry(any).or_default();
        }
        let mut changes: Vec<Change> = Vec::new();
        for (key, id) in found {
            match wanted.remove(key) {
                Some(right) if right == *id => {}
                other => changes.push((*key, other)),
            }
        }
        changes.extend(wanted.into_iter().map(|(key, id)| (key, Some(id))));
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ServiceId = ServiceId::new(1);
    const B: ServiceId = ServiceId::new(2);

    fn key(service: ServiceId, address: IpAddr) -> LocalKey {
        LocalKey { service, address: address.into() }
    }

    #[test]
    fn an_address_is_known_for_as_long_as_one_service_has_a_backend_there() {
        let mut locals = Locals::new(true);
        let here = IpAddr::from([10, 244, 0, 5]);
        let any = (key(LocalKey::ANY, here), Some(BackendId(0)));
        let of = |service, id: Option<u32>| (key(service, here), id.map(BackendId));
        assert_eq!(locals.note(A, here, BackendId(7), true), [of(A, Some(7)), any]);
        assert_eq!(locals.note(A, here, BackendId(7), true), [], "once more");
        assert_eq!(locals.note(B, here, BackendId(9), true), [of(B, Some(9))]);
        // Another port of the same Service.
        assert_eq!(locals.note(A, here, BackendId(8), true), []);
        assert_eq!(locals.note(A, here, BackendId(7), false), [of(A, Some(8))]);
        assert_eq!(locals.note(A, here, BackendId(8), false), [of(A, None)]);
        assert_eq!(locals.note(A, here, BackendId(8), false), [], "gone already");
        assert_eq!(locals.note(B, here, BackendId(9), false), [of(B, None), (any.0, None)]);
        assert_eq!(locals.differences(&[]), []);
    }

    #[test]
    fn a_map_is_made_to_hold_what_there_is() {
        let (here, there) = (IpAddr::from([10, 244, 0, 5]), IpAddr::from([10, 244, 0, 6]));
        let mut locals = Locals::new(true);
        locals.note(A, here, BackendId(7), true);
        let right = [(key(LocalKey::ANY, here), BackendId(0)), (key(A, here), BackendId(7))];
        assert_eq!(locals.differences(&right), []);
        let stale = [right[0], (key(A, here), BackendId(3)), (key(B, there), BackendId(1))];
        let mended = [(key(A, here), Some(BackendId(7))), (key(B, there), None)];
        assert_eq!(locals.differences(&stale), mended);
        assert_eq!(locals.differences(&right[..1]), [(right[1].0, Some(BackendId(7)))]);
        // Nobody looks there any more.
        let mut off = Locals::new(false);
        assert_eq!(off.note(A, here, BackendId(7), true), []);
        assert_eq!(off.differences(&right).len(), 2);
    }
}
