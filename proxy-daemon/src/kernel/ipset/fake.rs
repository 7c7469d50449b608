//! Sets in memory. Clones share them, so that a test keeps one and hands on the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::libc;

use super::{BUSY, Errno, IpSets, Member, NetlinkError};

#[derive(Debug, Default)]
pub struct State {
    pub sets: BTreeMap<String, Vec<Member>>,
    /// How many times destroying this set is refused.
    pub busy: BTreeMap<String, u32>,
    /// Every set whose members were asked for.
    pub read: BTreeSet<String>,
}

#[derive(Debug, Clone, Default)]
pub struct FakeIpSets(Arc<Mutex<State>>);

impl FakeIpSets {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IpSets for FakeIpSets {
    fn names(&mut self) -> Result<Vec<String>, NetlinkError> {
        Ok(self.state().sets.keys().cloned().collect())
    }

    fn members(&mut self, set: &str) -> Result<Vec<Member>, NetlinkError> {
        let mut state = self.state();
        state.read.insert(set.to_owned());
        let gone = NetlinkError::Refused { operation: "dump", errno: Errno(libc::ENOENT) };
        state.sets.get(set).cloned().ok_or(gone)
    }

    fn destroy(&mut self, sets: &[&str]) -> Result<Vec<Result<(), Errno>>, NetlinkError> {
        let mut state = self.state();
        let mut destroy = |set: &&str| {
            if let Some(left) = state.busy.get_mut(*set).filter(|left| **left > 0) {
                *left -= 1;
                return Err(BUSY);
            }
            state.sets.remove(*set);
            Ok(())
        };
        Ok(sets.iter().map(&mut destroy).collect())
    }
}
