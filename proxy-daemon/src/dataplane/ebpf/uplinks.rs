//! Where XDP is, and where it may send frames.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proxy_ebpf::layout::Device;

use super::XdpMode;
use crate::kernel::links::{self, Frames, XdpAttached};

/// Whether packets of other machines come in by the device: hardware, and what has one of the
/// node's addresses (the node may be a container, and its uplink a veth end).
///
/// Nothing is gained at the devices of pods: a pod leaves checksums to the hardware, and
/// such packets are tc's.
pub(super) fn is_uplink(device: &links::Device, own: &[IpAddr], node: &[IpAddr]) -> bool {
    device.frames == Some(Frames::Ethernet)
        && device.enslaved.is_none()
        && (device.kind.is_none() || own.iter().any(|address| node.contains(address)))
}

/// Whether a program attached like that serves who asked for this mode.
pub(super) const fn serves(attached: Option<XdpAttached>, mode: XdpMode) -> bool {
    matches!(
        (mode, attached),
        (XdpMode::Auto, Some(_))
            | (XdpMode::Native, Some(XdpAttached::Native))
            | (XdpMode::Generic, Some(XdpAttached::Generic))
    )
}

/// What the map says of a device at XDP. `takers`: those that take frames received elsewhere,
/// where the kernel tells.
pub(super) fn flags(device: &links::Device, takers: Option<&BTreeSet<u32>>) -> u32 {
    let native = device.xdp == Some(XdpAttached::Native);
    // A driver that has XDP takes frames, most of them as long as a program is there; a veth end
    // under conditions of its own.
    let takes = match takers {
        Some(takers) => takers.contains(&device.index),
        None => native && device.kind.is_none(),
    };
    // What a veth end is sent back it leaves lying until something else comes, unless there is a
    // program at its other end (`veth_xdp_flush`); redirected to itself it goes at once.
    let sends_back = native && device.kind.as_deref() != Some("veth");
    let flag = |is: bool, flag| if is { flag } else { 0 };
    flag(sends_back, Device::XDP_TX)
        | flag(takes, Device::XDP_TAKES)
        | flag(device.xdp == Some(XdpAttached::Generic), Device::XDP_GENERIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::links::Enslaved;

    fn device(kind: Option<&str>, xdp: Option<XdpAttached>) -> links::Device {
        links::Device {
            index: 3,
            name: "eth0".into(),
            kind: kind.map(str::to_owned),
            frames: Some(Frames::Ethernet),
            enslaved: None,
            mac: None,
            xdp,
        }
    }

    #[test]
    fn uplinks_are_hardware_or_have_the_nodes_address() {
        let node: IpAddr = "192.0.2.2".parse().unwrap();
        let pods: IpAddr = "10.244.0.1".parse().unwrap();
        let hardware = device(None, None);
        assert!(is_uplink(&hardware, &[], &[]));
        let port = links::Device { enslaved: Some(Enslaved::Bridge), ..hardware.clone() };
        assert!(!is_uplink(&port, &[node], &[node]));
        let modem = links::Device { frames: Some(Frames::Bare), ..hardware };
        assert!(!is_uplink(&modem, &[node], &[node]));
        let veth = device(Some("veth"), None);
        assert!(is_uplink(&veth, &[pods, node], &[node]));
        assert!(!is_uplink(&veth, &[pods], &[node]));
    }

    #[test]
    fn nothing_is_sent_where_it_may_be_lost() {
        use XdpAttached::{Generic, Native};
        let both = Device::XDP_TX | Device::XDP_TAKES;
        let (taker, none) = ([3].into(), BTreeSet::new());
        for (kind, xdp, takers, expected) in [
            (None, Some(Native), Some(&taker), both),
            (None, Some(Native), Some(&none), Device::XDP_TX),
            (None, Some(Native), None, both),
            (None, None, None, 0),
            (None, None, Some(&taker), Device::XDP_TAKES),
            (Some("veth"), Some(Native), Some(&taker), Device::XDP_TAKES),
            (Some("veth"), Some(Native), Some(&none), 0),
            (Some("veth"), Some(Native), None, 0),
            (Some("bond"), Some(Native), Some(&none), Device::XDP_TX),
            (Some("vlan"), Some(Generic), Some(&none), Device::XDP_GENERIC),
        ] {
            assert_eq!(flags(&device(kind, xdp), takers), expected, "{kind:?} {xdp:?} {takers:?}");
        }
    }

    #[test]
    fn a_link_of_the_daemon_before_serves_when_its_mode_does() {
        use XdpAttached::{Generic, Native};
        assert!(serves(Some(Generic), XdpMode::Auto) && serves(Some(Native), XdpMode::Auto));
        assert!(serves(Some(Native), XdpMode::Native) && serves(Some(Generic), XdpMode::Generic));
        assert!(!serves(Some(Generic), XdpMode::Native) && !serves(Some(Native), XdpMode::Generic));
        assert!(!serves(None, XdpMode::Auto));
    }
}
