//! What devices can do at XDP: generic netlink family `netdev`, from kernel 6.3 on.

use std::collections::BTreeSet;

use netlink_packet_core::NlasIterator;

use super::netlink::generic::{FamilyError, HEADER_LENGTH, resolve_family};
use super::netlink::{Message, Netlink};

/// `include/uapi/linux/netdev.h`.
const DEV_GET: u8 = 1;
const VERSION: u8 = 1;
const IFINDEX: u16 = 1;
const XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`: frames may be redirected to the device.
const NDO_XMIT: u64 = 4;

/// The seam.
pub trait NetDevices: Send {
    /// The devices of this network namespace that take frames which XDP received at another
    /// one. `None`: the kernel does not say.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn takers(&mut self) -> Result<Option<BTreeSet<u32>>, FamilyError>;
}

/// The real one, on a socket of [`super::netlink::Subsystem::Generic`].
#[derive(Debug)]
pub struct GenericNetdev<N> {
    netlink: N,
}

impl<N: Netlink> GenericNetdev<N> {
    pub const fn new(netlink: N) -> Self {
        Self { netlink }
    }
}

impl<N: Netlink> NetDevices for GenericNetdev<N> {
    fn takers(&mut self) -> Result<Option<BTreeSet<u32>>, FamilyError> {
        let family = match resolve_family(&mut self.netlink, "netdev", "net") {
            Ok(family) => family,
            Err(FamilyError::Missing(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let request = Message { kind: family, flags: 0, payload: vec![DEV_GET, VERSION, 0, 0] };
        let parts = self.netlink.dump(&request)?;
        let features = parts.iter().filter_map(|part| decode(&part.payload));
        Ok(Some(features.filter(|(_, it)| it & NDO_XMIT != 0).map(|(index, _)| index).collect()))
    }
}

/// A device's index and features.
fn decode(payload: &[u8]) -> Option<(u32, u64)> {
    let mut found = (None, None);
    for attribute in NlasIterator::new(payload.get(HEADER_LENGTH..)?).filter_map(Result::ok) {
        match attribute.kind() {
            IFINDEX => found.0 = attribute.value().try_into().ok().map(u32::from_ne_bytes),
            XDP_FEATURES => found.1 = attribute.value().try_into().ok().map(u64::from_ne_bytes),
            _ => {}
        }
    }
    Some((found.0?, found.1?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::{Errno, FakeNetlink};

    fn device(index: u32, features: u64) -> Message {
        let mut payload = vec![DEV_GET, VERSION, 0, 0, 8, 0, 1, 0];
        payload.extend(index.to_ne_bytes());
        payload.extend([12, 0, 3, 0]);
        payload.extend(features.to_ne_bytes());
        Message { kind: 0x22, flags: 0, payload }
    }

    #[test]
    fn who_takes_frames_is_read_from_the_features() {
        let family = Message { kind: 16, flags: 0, payload: vec![1, 2, 0, 0, 6, 0, 1, 0, 0x22, 0] };
        let fake = FakeNetlink::scripted([
            Ok(vec![family]),
            Ok(vec![device(3, 7), device(4, 3), device(5, 4)]),
        ]);
        let takers = GenericNetdev::new(fake.clone()).takers().unwrap();
        assert_eq!(takers, Some([3, 5].into()));
        assert_eq!(fake.messages()[1].kind, 0x22);
    }

    #[test]
    fn a_kernel_that_does_not_say_is_no_error() {
        let fake = FakeNetlink::scripted([Err(Errno(nix::libc::ENOENT))]);
        assert_eq!(GenericNetdev::new(fake).takers().unwrap(), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40),
        ) {
            let _ = decode(&bytes);
        }
    }
}
