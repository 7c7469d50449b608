//! A conntrack table in memory, for tests of what stands above.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Conntrack, ConntrackError, Flow};
use crate::kernel::modules::MissingModule;
use crate::kernel::netlink::Counters;
use crate::model::Family;

#[derive(Debug, Default)]
pub struct Inner {
    /// UDP entries.
    pub flows: Vec<Flow>,
    /// TCP entries.
    pub tcp: Vec<Flow>,
    /// The kernel has no ctnetlink while this is set.
    pub missing: bool,
    pub requests: u64,
    pub dumps: u64,
}

/// Clones share the same table.
#[derive(Debug, Clone, Default)]
pub struct FakeConntrack(Arc<Mutex<Inner>>);

impl FakeConntrack {
    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Conntrack for FakeConntrack {
    fn delete_udp(
        &mut self,
        family: Family,
        stale: &mut dyn FnMut(&Flow) -> bool,
    ) -> Result<usize, ConntrackError> {
        let mut inner = self.inner();
        inner.dumps += 1;
        if inner.missing {
            return Err(MissingModule::new("nf_conntrack_netlink", "conntrack").into());
        }
        let before = inner.flows.len();
        inner.flows.retain(|flow| flow.family() != family || !stale(flow));
        let deleted = before - inner.flows.len();
        inner.requests += u64::try_from(deleted).unwrap_or(u64::MAX);
        Ok(deleted)
    }

    fn tcp(&mut self, family: Family, each: &mut dyn FnMut(Flow)) -> Result<(), ConntrackError> {
        let mut inner = self.inner();
        inner.dumps += 1;
        if inner.missing {
            return Err(MissingModule::new("nf_conntrack_netlink", "conntrack").into());
        }
        inner.tcp.iter().filter(|flow| flow.family() == family).for_each(|flow| each(*flow));
        Ok(())
    }

    fn counters(&self) -> Counters {
        let inner = self.inner();
        Counters { requests: inner.requests, dumps: inner.dumps, sends: inner.requests }
    }
}
