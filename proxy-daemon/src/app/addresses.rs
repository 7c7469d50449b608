//! The thread that tells the engine the node's addresses, now and whenever they change, and where
//! programs are attached to devices also whenever these change.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use tracing::warn;

use crate::dataplane::ipvs::LINK;
use crate::kernel::links::{AddressMonitor, Device, Links, LinksError, NetlinkLinks};
use crate::kernel::netlink::{Socket, Subsystem};
use crate::sync::Input;

/// A lost notice is made up for after this time.
const POLL: Duration = Duration::from_secs(60);

/// Starts the thread. Addresses of [`LINK`] are Services' and not the node's: in ipvs mode
/// we put them there, in ebpf mode a proxy before us may have.
pub fn watch(inputs: SyncSender<Input>, what: Watched) -> Result<(), String> {
    let cannot = |error: &dyn std::fmt::Display| format!("cannot watch addresses: {error}");
    // Before the first dump, so that no change falls in between.
    let monitor =
        if what.devices { AddressMonitor::open_for_devices() } else { AddressMonitor::open() };
    let monitor = monitor.map_err(|error| cannot(&error))?;
    let socket = Socket::open(Subsystem::Route).map_err(|error| cannot(&error))?;
    std::thread::Builder::new()
        .name("addresses".into())
        .spawn(move || run(NetlinkLinks::new(socket), monitor, &inputs, what))
        .map(|_| ())
        .map_err(|error| cannot(&error))
}

fn run(
    mut links: impl Links,
    mut monitor: AddressMonitor,
    inputs: &SyncSender<Input>,
    mut what: Watched,
) {
    let mut last: Option<(BTreeSet<IpAddr>, BTreeSet<Device>)> = None;
    loop {
        match list(&mut links, what.devices) {
            Ok(Listing { addresses, devices, services_link }) => {
                monitor.ignore(services_link);
                if !what.ipv6 && addresses.iter().any(IpAddr::is_ipv6) {
                    what.ipv6 = true;
                    warn!(
                        "the node has IPv6 since the daemon started: IPv6 Services are programmed \
                         when it is started again"
                    );
                }
                let now = (addresses, devices);
                if last.as_ref() != Some(&now) {
                    let list = now.0.iter().copied().collect();
                    if inputs.send(Input::Addresses(list)).is_err() {
                        return;
                    }
                    last = Some(now);
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

/// What is listed besides addresses, and what is known.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    /// A pod's device may have no address of its own.
    pub devices: bool,
    /// Services of this family are programmed: the kernel knew of it at the start.
    pub ipv6: bool,
}

struct Listing {
    /// Of the node itself.
    addresses: BTreeSet<IpAddr>,
    /// When they are asked for.
    devices: BTreeSet<Device>,
    /// The index of [`LINK`], when it is there.
    services_link: Option<u32>,
}

/// The link is looked for each time: whoever deletes it (kube-proxy does when it starts in
/// another mode) makes the next resync create another, with another index. Before the dump
/// and after it, so that one which is replaced meanwhile counts under both.
fn list(links: &mut impl Links, with_devices: bool) -> Result<Listing, LinksError> {
    let before = links.index(LINK)?;
    let all = links.addresses()?;
    let services_link = links.index(LINK)?;
    let of_services = [before, services_link];
    let own = all.into_iter().filter(|held| !of_services.contains(&Some(held.link)));
    let addresses = own.map(|held| held.address).collect();
    let devices = if with_devices { links.devices()? } else { Vec::new() };
    // That programs come and go there is no news.
    let devices = devices.into_iter().map(|device| Device { xdp: None, ..device }).collect();
    Ok(Listing { addresses, devices, services_link })
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::sync_channel;
    use std::time::Instant;

    use super::*;
    use crate::kernel::links::{AddressChange, LinkAddress};
    use crate::kernel::namespace::in_new_namespace;
    use crate::kernel::netlink::{Counters, Errno};

    /// Answers each look for the link by this, and counts how often addresses were listed.
    struct Listed<I>(I, Arc<AtomicUsize>);

    impl<I: FnMut() -> Option<u32> + Send> Links for Listed<I> {
        fn index(&mut self, name: &str) -> Result<Option<u32>, LinksError> {
            assert_eq!(name, "kube-ipvs0");
            Ok((self.0)())
        }

        fn addresses(&mut self) -> Result<Vec<LinkAddress>, LinksError> {
            self.1.fetch_add(1, Ordering::SeqCst);
            let held = |link, last| LinkAddress::alone(link, [10, 96, 0, last].into());
            Ok(vec![held(1, 1), held(7, 7), held(8, 8)])
        }

        fn ensure_dummy(&mut self, _: &str) -> Result<u32, LinksError> {
            panic!("only listed from")
        }

        fn devices(&mut self) -> Result<Vec<Device>, LinksError> {
            panic!("only listed from")
        }

        fn change_addresses(
            &mut self,
            _: u32,
            _: &[AddressChange],
        ) -> Result<Vec<Result<(), Errno>>, LinksError> {
            panic!("only listed from")
        }

        fn delete_dummy(&mut self, _: &str) -> Result<(), LinksError> {
            panic!("only listed from")
        }

        fn counters(&self) -> Counters {
            Counters::default()
        }
    }

    #[test]
    fn addresses_of_a_link_that_is_replaced_during_the_dump_are_services_under_both_indices() {
        let looked = |answers: [Option<u32>; 2]| {
            let mut each = answers.into_iter();
            let mut links = Listed(|| each.next().expect("looked twice"), Arc::default());
            let Listing { addresses, services_link, .. } = list(&mut links, false).unwrap();
            assert_eq!(services_link, answers[1]);
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(looked([Some(7), Some(8)]), "10.96.0.1");
        assert_eq!(looked([Some(7), None]), "10.96.0.1 10.96.0.8");
        assert_eq!(looked([None, Some(8)]), "10.96.0.1 10.96.0.7");
        assert_eq!(looked([None, None]), "10.96.0.1 10.96.0.7 10.96.0.8");
    }

    fn ip(arguments: &str) {
        let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    /// On the running kernel, in a network namespace of the test's own (needs root). The link
    /// is no dummy link here: not every kernel that builds the project has them.
    #[test]
    fn a_link_that_is_made_anew_brings_the_node_no_address() {
        in_new_namespace(|| {
            let make_link = || {
                ip("link add kube-ipvs0 type veth peer name other");
                for last in 1..=20 {
                    ip(&format!("addr add 10.96.0.{last}/32 dev kube-ipvs0"));
                }
            };
            make_link();
            let (inputs, received) = sync_channel(100);
            watch(inputs, Watched { devices: false, ipv6: true }).unwrap();
            let expect = |wanted: &[&str]| {
                let wanted: BTreeSet<IpAddr> = wanted.iter().map(|a| a.parse().unwrap()).collect();
                let input = received.recv_timeout(Duration::from_secs(20)).expect("addresses");
                let Input::Addresses(list) = input else { panic!("{input:?}") };
                assert_eq!(list.into_iter().collect::<BTreeSet<_>>(), wanted);
            };
            expect(&[]);
            for round in 1..=3 {
                ip("link del kube-ipvs0");
                make_link();
                // The next list that comes has this and nothing else that is new.
                ip(&format!("addr add 192.0.2.{round}/32 dev lo"));
                expect(&["192.0.2.1", "192.0.2.2", "192.0.2.3"][..round]);
            }
        });
    }

    /// There may be thousands, and we put them there.
    #[test]
    fn addresses_of_services_that_come_make_nobody_list_all() {
        in_new_namespace(|| {
            ip("link add kube-ipvs0 type veth peer name other");
            let lists = Arc::new(AtomicUsize::new(0));
            let index = || nix::net::if_::if_nametoindex("kube-ipvs0").ok();
            let links = Listed(index, Arc::clone(&lists));
            let monitor = AddressMonitor::open().unwrap();
            let (inputs, received) = sync_channel(100);
            let what = Watched { devices: false, ipv6: true };
            std::thread::spawn(move || run(links, monitor, &inputs, what));
            received.recv_timeout(Duration::from_secs(20)).expect("a list");
            for last in 1..=5 {
                ip(&format!("addr add 10.96.0.{last}/32 dev kube-ipvs0"));
                std::thread::sleep(Duration::from_millis(50));
            }
            ip("addr add 192.0.2.1/32 dev lo");
            let end = Instant::now() + Duration::from_secs(20);
            while lists.load(Ordering::SeqCst) < 2 && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(lists.load(Ordering::SeqCst), 2, "at first, and for the node's own");
        });
    }

    /// As a pod's is with some networks: addresses are behind it only.
    #[test]
    fn a_device_without_addresses_is_told_where_devices_count() {
        in_new_namespace(|| {
            let told = |devices| {
                let (inputs, received) = sync_channel(100);
                watch(inputs, Watched { devices, ipv6: true }).unwrap();
                assert!(received.recv_timeout(Duration::from_secs(20)).is_ok(), "at first");
                received
            };
            let (counts, counts_not) = (told(true), told(false));
            ip("link add pod type veth peer name other");
            assert!(counts.recv_timeout(Duration::from_secs(20)).is_ok(), "the device");
            while counts.recv_timeout(Duration::from_millis(300)).is_ok() {}
            ip("link del pod");
            assert!(counts.recv_timeout(Duration::from_secs(20)).is_ok(), "it went");
            assert!(counts_not.try_recv().is_err());
        });
    }
}
