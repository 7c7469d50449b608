//! The thread that tells the engine the node's addresses, now and whenever they change.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use tracing::warn;

use crate::kernel::links::{AddressMonitor, Links, NetlinkLinks};
use crate::kernel::netlink::{Socket, Subsystem};
use crate::sync::Input;

/// A lost notice is made up for after this time.
const POLL: Duration = Duration::from_secs(60);

/// Starts the thread. Addresses of `own_link` are ours and not the node's.
pub fn watch(own_link: u32, inputs: SyncSender<Input>) -> Result<(), String> {
    let cannot = |error: &dyn std::fmt::Display| format!("cannot watch addresses: {error}");
    // Before the first dump, so that no change falls in between.
    let monitor = AddressMonitor::open(own_link).map_err(|error| cannot(&error))?;
    let socket = Socket::open(Subsystem::Route).map_err(|error| cannot(&error))?;
    std::thread::Builder::new()
        .name("addresses".into())
        .spawn(move || run(NetlinkLinks::new(socket), monitor, own_link, &inputs))
        .map(|_| ())
        .map_err(|error| cannot(&error))
}

fn run(
    mut links: NetlinkLinks<Socket>,
    mut monitor: AddressMonitor,
    own_link: u32,
    inputs: &SyncSender<Input>,
) {
    let mut last: Option<BTreeSet<IpAddr>> = None;
    loop {
        match links.addresses() {
            Ok(all) => {
                let addresses: BTreeSet<IpAddr> =
                    all.into_iter().filter(|a| a.link != own_link).map(|a| a.address).collect();
                if last.as_ref() != Some(&addresses) {
                    let list = addresses.iter().copied().collect();
                    if inputs.send(Input::Addresses(list)).is_err() {
                        return;
                    }
                    last = Some(addresses);
                }
            }
            Err(error) => warn!(%error, "cannot list the node's addresses; trying again"),
        }
        let wait = if last.is_some() { POLL } else { Duration::from_secs(1) };
        if let Err(error) = monitor.wait(wait) {
            warn!(%error, "cannot wait for address changes; polling");
            std::thread::sleep(POLL);
        }
    }
}
