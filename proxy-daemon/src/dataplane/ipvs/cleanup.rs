//! Taking down: what we made, and what kube-proxy made, as its own `--cleanup` would.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::objects::Key;
use super::{Dataplane as _, IpvsPlane, LINK, PlaneError};
use crate::dataplane::kubeproxy::{Forwarding, LeftoverError, Leftovers, Takeover};
use crate::kernel::netlink::Netlink;
use crate::plan::{Op, deletions};

fn leftovers_error(error: LeftoverError) -> PlaneError {
    PlaneError::new("what kube-proxy left", error)
}

impl<N: Netlink + 'static> IpvsPlane<N> {
    /// Removes everything that carries our mark and everything that kube-proxy left, and
    /// nothing else. While kube-proxy runs, what is its stays, and in ipvs mode that is
    /// also what we have made: it has taken it over. What was done, in words for the user.
    ///
    /// # Errors
    /// When the kernel cannot be read or refuses.
    pub fn cleanup(&mut self, forwarding: Forwarding) -> Result<Vec<String>, PlaneError> {
        let mut done = Vec::new();
        let takeover = self.takeover.take();
        let rival = takeover.as_ref().and_then(Takeover::rival);
        let mut leftovers = takeover.and_then(Takeover::into_leftovers);
        if let (Some(reason), Some(leftovers)) = (&rival, &mut leftovers) {
            done.push(format!("what kube-proxy made stays: {reason}"));
            if leftovers.has_sets().map_err(leftovers_error)? {
                done.push(
                    "virtual servers and addresses stay: kube-proxy runs in ipvs mode".into(),
                );
                self.delete_tables(&mut done)?;
                return Ok(done);
            }
        }
        let link = self.find_link()?;
        self.ruleset.find().map_err(|error| PlaneError::new("nf_tables", error))?;
        let mut ours = BTreeSet::new();
        let mut foreign = HashMap::new();
        // Without the module there are none of its objects, and none is loaded to see that.
        if self.reading.has_table() {
            self.reader()?(&mut |piece| {
                ours.extend(piece.ours.into_iter().map(|(key, _)| key));
                foreign.extend(piece.foreign);
            })?;
        }
        ours.retain(|key| !self.excluded(key));
        let count = self.delete(ours)?;
        done.push(format!("removed {count} kernel objects of this daemon"));
        if let (None, Some(leftovers)) = (&rival, &mut leftovers) {
            let theirs = self.left_by_kube_proxy(&foreign, leftovers)?;
            let count = self.delete(theirs)?;
            done.push(format!("removed {count} virtual servers and addresses of kube-proxy"));
            remove_leftovers(leftovers, forwarding, &mut done)?;
        }
        self.delete_tables(&mut done)?;
        if link {
            self.delete_link(&mut done)?;
        }
        Ok(done)
    }

    /// Whether the dummy link is there; it is not made.
    fn find_link(&mut self) -> Result<bool, PlaneError> {
        let devices = self.links.devices().map_err(|error| PlaneError::new("links", error))?;
        if devices.iter().any(|device| device.name == LINK) {
            self.open_link()?;
            return Ok(true);
        }
        Ok(false)
    }

    fn delete(&mut self, keys: impl IntoIterator<Item = Key>) -> Result<usize, PlaneError> {
        // Real servers go with their virtual server.
        let keys = keys.into_iter().filter(|key| !matches!(key, Key::RealServer(..)));
        let ops: Vec<Op<Key>> = deletions(keys);
        let results = self.apply(&ops);
        for (op, result) in ops.iter().zip(&results) {
            if let Err(error) = result {
                return Err(PlaneError::new("cleanup", format!("{:?}: {error}", op.key())));
            }
        }
        Ok(ops.len())
    }

    fn excluded(&self, key: &Key) -> bool {
        let within =
            |address: IpAddr| self.config.exclude_cidrs.iter().any(|cidr| cidr.contains(address));
        match key {
            Key::VirtualServer(frontend) | Key::RealServer(frontend, _) => within(frontend.address),
            Key::Address(address) => within(*address),
            Key::Element(_) | Key::Redirect(..) => false,
        }
    }

    fn delete_tables(&mut self, done: &mut Vec<String>) -> Result<(), PlaneError> {
        let tables =
            self.ruleset.delete_table().map_err(|error| PlaneError::new("nf_tables", error))?;
        done.extend(tables.iter().map(|family| format!("removed nf_tables table for {family}")));
        Ok(())
    }

    fn delete_link(&mut self, done: &mut Vec<String>) -> Result<(), PlaneError> {
        let addresses =
            self.links.addresses().map_err(|error| PlaneError::new("addresses", error))?;
        if addresses.iter().any(|address| address.link == self.link) {
            done.push(format!("{LINK} stays: it has addresses that are not ours"));
        } else {
            self.links.delete_dummy(LINK).map_err(|error| PlaneError::new("link", error))?;
            done.push(format!("removed link {LINK}"));
        }
        Ok(())
    }
}

fn remove_leftovers(
    leftovers: &mut Leftovers,
    forwarding: Forwarding,
    done: &mut Vec<String>,
) -> Result<(), PlaneError> {
    done.extend(leftovers.remove(forwarding).map_err(leftovers_error)?.in_words());
    Ok(())
}
