//! Connection tracking (ctnetlink): the UDP entries that bind a client to an endpoint.

mod codec;
mod fake;
#[cfg(test)]
mod kernel_tests;

use std::net::SocketAddr;

use nix::libc;

use super::modules::MissingModule;
use super::netlink::{Counters, Errno, Message, Netlink, NetlinkError};
use crate::model::{Family, Protocol};

use codec::decode;
pub use fake::FakeConntrack;

/// One direction of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// What an entry says of a flow: the client's packets as they arrived, and the
/// replies it expects, whose source is the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow {
    pub original: Tuple,
    pub reply: Tuple,
}

impl Flow {
    #[must_use]
    pub const fn family(&self) -> Family {
        Family::of(self.original.destination.ip())
    }

    /// Its packets go elsewhere than its client sends them.
    #[must_use]
    pub fn is_translated(&self) -> bool {
        self.reply.source != self.original.destination
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Missing(#[from] MissingModule),
    #[error("conntrack: {failed} of {of} entries could not be deleted: {errno}")]
    Refused { failed: usize, of: usize, errno: Errno },
}

/// The seam; [`FakeConntrack`] is the other implementation.
pub trait Conntrack: Send {
    /// Deletes the UDP entries of `family` for which `stale` says so, and returns how
    /// many: one dump, read part by part, of which only these are kept. An entry may be
    /// asked about more than once, and one that ends by itself meanwhile is no error.
    ///
    /// # Errors
    /// When the table cannot be read, or the kernel refuses a deletion.
    fn delete_udp(
        &mut self,
        family: Family,
        stale: &mut dyn FnMut(&Flow) -> bool,
    ) -> Result<usize, ConntrackError>;

    /// Hands over every TCP entry of `family`, some perhaps more than once.
    ///
    /// # Errors
    /// When the table cannot be read.
    fn tcp(&mut self, family: Family, each: &mut dyn FnMut(Flow)) -> Result<(), ConntrackError>;

    fn counters(&self) -> Counters;
}

/// The real one, on a socket of [`super::netlink::Subsystem::Netfilter`].
#[derive(Debug)]
pub struct NetlinkConntrack<N> {
    netlink: N,
    /// Off once the kernel has refused it: then more comes back, and is left out here.
    filter: bool,
}

impl<N: Netlink> NetlinkConntrack<N> {
    pub const fn new(netlink: N) -> Self {
        Self { netlink, filter: true }
    }

    fn dump(
        &mut self,
        family: Family,
        protocol: Protocol,
        part: &mut dyn FnMut(&[u8]),
    ) -> Result<(), ConntrackError> {
        let request = codec::dump(family, self.filter.then_some(protocol));
        let refused = match self.netlink.dump_each(&request, part) {
            Ok(()) => return Ok(()),
            Err(NetlinkError::Refused {
                errno: errno @ Errno(libc::EINVAL | libc::EOPNOTSUPP),
                ..
            }) => errno,
            Err(error) => return Err(error.into()),
        };
        if self.filter {
            self.filter = false;
            return self.dump(family, protocol, part);
        }
        // `nfnetlink_rcv_msg` (net/netfilter/nfnetlink.c) says EINVAL when nobody serves
        // the subsystem and no module could be loaded for it. To be asked again: the
        // module may come, and take the filter.
        self.filter = true;
        if refused == Errno(libc::EINVAL) {
            let module = MissingModule::new("nf_conntrack_netlink", "conntrack over netlink");
            return Err(module.into());
        }
        Err(NetlinkError::Refused { operation: "conntrack dump", errno: refused }.into())
    }

    fn delete(&mut self, requests: &[Message]) -> Result<usize, ConntrackError> {
        let mut deleted = 0;
        let mut failed = 0;
        let mut last = None;
        for result in self.netlink.request_all(requests)? {
            match result {
                Ok(()) => deleted += 1,
                Err(Errno(libc::ENOENT)) => {}
                Err(errno) => {
                    failed += 1;
                    last = Some(errno);
                }
            }
        }
        match last {
            Some(errno) => Err(ConntrackError::Refused { failed, of: requests.len(), errno }),
            None => Ok(deleted),
        }
    }
}

impl<N: Netlink> Conntrack for NetlinkConntrack<N> {
    fn delete_udp(
        &mut self,
        family: Family,
        stale: &mut dyn FnMut(&Flow) -> bool,
    ) -> Result<usize, ConntrackError> {
        let mut requests = Vec::new();
        let mut unreadable = 0_u64;
        self.dump(family, Protocol::Udp, &mut |part| match decode(part, Protocol::Udp) {
            Ok(Some(entry)) if stale(&entry.flow) => requests.push(entry.delete()),
            Ok(_) => {}
            Err(_) => unreadable += 1,
        })?;
        if unreadable > 0 {
            tracing::warn!(unreadable, "conntrack entries that cannot be read are left alone");
        }
        self.delete(&requests)
    }

    fn tcp(&mut self, family: Family, each: &mut dyn FnMut(Flow)) -> Result<(), ConntrackError> {
        self.dump(family, Protocol::Tcp, &mut |part| {
            // One that cannot be read is nobody's that is waited for.
            if let Ok(Some(entry)) = decode(part, Protocol::Tcp) {
                each(entry.flow);
            }
        })
    }

    fn counters(&self) -> Counters {
        self.netlink.counters()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::FakeNetlink;

    fn entry(flow: &Flow) -> Message {
        Message { kind: 0x100, flags: 0, payload: codec::encode(flow, 17) }
    }

    fn flow(endpoint: u8) -> Flow {
        let client = SocketAddr::from(([10, 244, 0, 9], 40_000));
        Flow {
            original: Tuple {
                source: client,
                destination: SocketAddr::from(([10, 96, 0, 10], 53)),
            },
            reply: Tuple {
                source: SocketAddr::from(([10, 244, 0, endpoint], 5353)),
                destination: client,
            },
        }
    }

    #[test]
    fn stale_entries_are_deleted_in_one_dump_and_one_send() {
        let entries: Vec<Message> = (1..=9).map(|n| entry(&flow(n))).collect();
        let fake = FakeNetlink::scripted([Ok(entries)]);
        let mut conntrack = NetlinkConntrack::new(fake.clone());
        let gone: Vec<SocketAddr> = [3, 7].map(|n| flow(n).reply.source).to_vec();
        let deleted = conntrack
            .delete_udp(Family::V4, &mut |flow| gone.contains(&flow.reply.source))
            .unwrap();
        assert_eq!(deleted, 2);
        let counters = Counters { requests: 2, dumps: 1, sends: 2 };
        assert_eq!(conntrack.counters(), counters);
        let kinds: Vec<u16> = fake.messages().iter().map(|message| message.kind).collect();
        assert_eq!(kinds, [0x101, 0x102, 0x102]);
    }

    #[test]
    fn nothing_stale_sends_nothing_and_what_is_gone_is_no_error() {
        let fake = FakeNetlink::scripted([Ok(vec![entry(&flow(1))])]);
        let mut conntrack = NetlinkConntrack::new(fake.clone());
        assert_eq!(conntrack.delete_udp(Family::V4, &mut |_| false).unwrap(), 0);
        assert_eq!(fake.messages().len(), 1);

        let answers = [Ok(vec![entry(&flow(1))]), Err(Errno(libc::ENOENT))];
        let mut conntrack = NetlinkConntrack::new(FakeNetlink::scripted(answers));
        assert_eq!(conntrack.delete_udp(Family::V4, &mut |_| true).unwrap(), 0);
    }

    #[test]
    fn a_refused_filter_is_left_out_and_a_missing_module_is_named() {
        let einval = || Err(Errno(libc::EINVAL));
        let fake = FakeNetlink::scripted([einval(), Ok(vec![entry(&flow(1))])]);
        let mut conntrack = NetlinkConntrack::new(fake.clone());
        assert_eq!(conntrack.delete_udp(Family::V4, &mut |_| true).unwrap(), 1);
        let lengths: Vec<usize> = fake.messages().iter().map(|m| m.payload.len()).collect();
        assert!(lengths[1] < lengths[0], "the second dump has no filter: {lengths:?}");

        let fake = FakeNetlink::scripted([einval(), einval()]);
        let error = NetlinkConntrack::new(fake).delete_udp(Family::V4, &mut |_| true).unwrap_err();
        assert!(error.to_string().contains("modprobe nf_conntrack_netlink"), "{error}");
    }

    #[test]
    fn a_refused_deletion_is_an_error_that_says_how_many() {
        let answers =
            [Ok(vec![entry(&flow(1)), entry(&flow(2))]), Ok(vec![]), Err(Errno(libc::EPERM))];
        let mut conntrack = NetlinkConntrack::new(FakeNetlink::scripted(answers));
        let error = conntrack.delete_udp(Family::V4, &mut |_| true).unwrap_err();
        assert!(
            matches!(
                error,
                ConntrackError::Refused { failed: 1, of: 2, errno: Errno(libc::EPERM) }
            ),
            "{error}"
        );
    }
}
