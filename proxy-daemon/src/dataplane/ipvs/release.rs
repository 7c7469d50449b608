//! Deleting the conntrack entries that changes left stale.

use std::time::Instant;

use tracing::{debug, info, warn};

use super::{FlowRelease, IpvsPlane};
use crate::kernel::netlink::Netlink;

impl<N: Netlink + 'static> IpvsPlane<N> {
    /// Right after the changes, so that few packets meet an entry that leads nowhere. One
    /// dump for each family whose UDP servers changed, none otherwise. What fails is
    /// tried again with the next change: traffic to everything else needs none of this.
    pub(super) fn release_flows(&mut self) {
        let mut failure = None;
        for family in self.stale_flows.families() {
            let start = Instant::now();
            let stale = &self.stale_flows;
            let result = self.conntrack.delete_udp(family, &mut |flow| stale.is_stale(flow));
            let duration = start.elapsed();
            debug!(%family, ?result, ?duration, "stale UDP flows");
            let released = result.map_err(|error| failure = Some(error)).ok();
            self.releases.push(FlowRelease { family, duration, released });
        }
        match failure {
            None => {
                self.stale_flows.clear();
                if std::mem::take(&mut self.release_failing) {
                    info!("stale UDP flows can be released again");
                }
            }
            Some(error) if !self.release_failing => {
                self.release_failing = true;
                warn!(
                    %error,
                    "UDP flows to removed endpoints are not released: their clients wait until \
                     the conntrack entry ends; trying again with each change"
                );
            }
            Some(_) => {}
        }
    }
}
