//! Links in memory, for tests of what stands above.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{AddressChange, Device, LinkAddress, Links, LinksError};
use crate::kernel::netlink::{Counters, Errno};

/// Index that the fake gives its dummy link.
const DUMMY: u32 = 100;

#[derive(Debug, Default)]
pub struct Inner {
    pub addresses: BTreeSet<LinkAddress>,
    pub devices: Vec<Device>,
    pub requests: u64,
    pub dumps: u64,
}

/// Clones share the same links.
#[derive(Debug, Clone, Default)]
pub struct FakeLinks(Arc<Mutex<Inner>>);

impl FakeLinks {
    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses on the dummy link.
    #[must_use]
    pub fn dummy_addresses(&self) -> BTreeSet<IpAddr> {
        let inner = self.inner();
        inner.addresses.iter().filter(|a| a.link == DUMMY).map(|a| a.address).collect()
    }
}

impl Links for FakeLinks {
    fn ensure_dummy(&mut self, _: &str) -> Result<u32, LinksError> {
        Ok(DUMMY)
    }

    fn index(&mut self, name: &str) -> Result<Option<u32>, LinksError> {
        let inner = self.inner();
        Ok(inner.devices.iter().find(|device| device.name == name).map(|device| device.index))
    }

    fn addresses(&mut self) -> Result<Vec<LinkAddress>, LinksError> {
        let mut inner = self.inner();
        inner.dumps += 1;
        Ok(inner.addresses.iter().copied().collect())
    }

    fn devices(&mut self) -> Result<Vec<Device>, LinksError> {
        let mut inner = self.inner();
        inner.dumps += 1;
        Ok(inner.devices.clone())
    }

    fn change_addresses(
        &mut self,
        link: u32,
        changes: &[AddressChange],
    ) -> Result<Vec<Result<(), Errno>>, LinksError> {
        let mut inner = self.inner();
        for change in changes {
            inner.requests += 1;
            match *change {
                AddressChange::Add(address) => {
                    inner.addresses.insert(LinkAddress::alone(link, address))
                }
                AddressChange::Delete(address) => {
                    inner.addresses.remove(&LinkAddress::alone(link, address))
                }
            };
        }
        Ok(vec![Ok(()); changes.len()])
    }

    fn delete_dummy(&mut self, _: &str) -> Result<(), LinksError> {
        self.inner().addresses.retain(|a| a.link != DUMMY);
        Ok(())
    }

    fn counters(&self) -> Counters {
        let inner = self.inner();
        Counters { requests: inner.requests, dumps: inner.dumps, sends: inner.requests }
    }
}
