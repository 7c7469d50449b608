//! Which devices have our programs, and what the map says of each.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nix::errno::Errno;
use proxy_ebpf::layout::{Device, names};
use proxy_ebpf::order::Address;
use tracing::{debug, info, warn};

use super::super::{LoadError, XdpMode, object, uplinks};
use super::{EbpfPlane, load, table};
use crate::dataplane::PlaneError;
use crate::kernel::links::{self, Enslaved, Frames};
use crate::model::LocalDetect;

impl EbpfPlane {
    /// Attaches to the devices that there are now.
    pub(super) fn attach_devices(&mut self) -> Result<(), PlaneError> {
        let addresses = self.links.addresses().map_err(|e| PlaneError::new("addresses", e))?;
        let devices = self.links.devices().map_err(|e| PlaneError::new("network devices", e))?;
        let mut wanted: BTreeMap<u32, (links::Device, Device)> = BTreeMap::new();
        let mut at_xdp = BTreeSet::new();
        for device in devices {
            let own = addresses.iter().filter(|a| a.link == device.index).map(|a| a.address);
            let own: Vec<IpAddr> = own.filter(|address| !address.is_loopback()).collect();
            if wants_device(&self.config.devices, &device) {
                let mut in_map = self.device(&device, &own);
                if uplinks::is_uplink(&device, &own, &self.node_addresses) {
                    at_xdp.insert(device.index);
                }
                let before = self.devices.get(&device.index);
                in_map.flags |= before.map_or(0, |before| before.flags & Device::XDP);
                wanted.insert(device.index, (device, in_map));
            }
        }
        let first = self.devices.is_empty();
        for (index, (device, in_map)) in &wanted {
            let before = self.devices.get(index);
            if before == Some(in_map) {
                continue;
            }
            let other = Device::PORT | Device::BARE;
            if before.is_some_and(|before| (before.flags ^ in_map.flags) & other != 0) {
                // It became a port, or is none any more: other programs.
                self.pins.remove_links(|place, _| place == *index).map_err(|e| load(&e))?;
                self.devices.remove(index);
                self.uplinks.remove(index);
            }
            // Before the programs, which would take a port for a device of its own.
            let tables = self.table.store().tables();
            tables.set_device(*index, *in_map).map_err(|e| table(&e))?;
            if !self.devices.contains_key(index)
                && let Err(error) = self.attach_device(device)
            {
                // A device may go at any time; the others must not wait for it.
                self.complain(&format!("programs at device {}", device.name), &error);
                self.forget_device(*index)?;
                continue;
            }
            self.devices.insert(*index, *in_map);
        }
        if first {
            self.forget_unknown_devices()?;
        }
        let gone: Vec<u32> =
            self.devices.keys().filter(|index| !wanted.contains_key(index)).copied().collect();
        for index in gone {
            self.devices.remove(&index);
            self.uplinks.remove(&index);
            self.forget_device(index)?;
            self.pins.remove_links(|place, _| place == index).map_err(|e| load(&e))?;
        }
        let Some(mode) = self.config.xdp else { return Ok(()) };
        for (device, _) in wanted.values().filter(|(device, _)| at_xdp.contains(&device.index)) {
            let known = self.devices.contains_key(&device.index);
            if known && !self.uplinks.contains(&device.index) {
                match self.attach_xdp(device, mode) {
                    Ok(()) => _ = self.uplinks.insert(device.index),
                    Err(error) => self.complain(&format!("XDP at {}", device.name), &error),
                }
            }
        }
        self.write_xdp()
    }

    /// Those that went while no daemon ran.
    fn forget_unknown_devices(&mut self) -> Result<(), PlaneError> {
        let known = self.table.store().tables().devices().map_err(|e| table(&e))?;
        for (index, _) in known {
            if !self.devices.contains_key(&index) {
                self.forget_device(index)?;
            }
        }
        Ok(())
    }

    fn forget_device(&mut self, index: u32) -> Result<(), PlaneError> {
        match self.table.store().tables().remove_device(index) {
            Err(error) if !error.is_missing() => Err(table(&error)),
            _ => Ok(()),
        }
    }

    /// Attaches again what somebody took off. Putting a program in its own place tells: it changes
    /// nothing where it is, and is refused where it is not.
    pub(super) fn put_back(&mut self) -> Result<(), PlaneError> {
        let devices = self.links.devices().map_err(|e| PlaneError::new("network devices", e))?;
        for device in &devices {
            if !self.devices.contains_key(&device.index) {
                continue;
            }
            match self.put_back_at(device) {
                Ok(missing) if missing.is_empty() => {}
                Ok(missing) => {
                    self.put_back += missing.len() as u64;
                    warn!(device = %device.name, ?missing, "programs were taken off: attached again");
                }
                // A device may go at any time.
                Err(error) => {
                    self.complain(&format!("programs taken off device {}", device.name), &error);
                }
            }
        }
        Ok(())
    }

    fn put_back_at(&mut self, device: &links::Device) -> Result<Vec<&'static str>, LoadError> {
        let (name, index) = (&*device.name, device.index);
        let frames = device.frames.unwrap_or(Frames::Ethernet);
        let mut missing = Vec::new();
        for program in [names::TC_EGRESS, names::TC_INGRESS] {
            let wanted = program == names::TC_EGRESS || !is_port(device);
            if wanted && !self.is_attached(program, frames, index)? {
                missing.push(program);
            }
        }
        if !missing.is_empty() {
            let (_, attachments) = self.table.store().attach_tc_programs(name, frames, &missing)?;
            for (program, attachment) in attachments {
                attachment.pin(&self.pins.link(program, index))?;
            }
        }
        if let Some(mode) = self.config.xdp
            && self.uplinks.contains(&index)
            && !self.is_attached(names::XDP_INGRESS, Frames::Ethernet, index)?
        {
            let own = self.pins.link(names::XDP_INGRESS, index);
            self.table.store().attach_xdp(name, mode)?.pin(&own)?;
            missing.push(names::XDP_INGRESS);
        }
        Ok(missing)
    }

    fn is_attached(&mut self, program: &str, frames: Frames, at: u32) -> Result<bool, LoadError> {
        /// Of a link that is detached; of a filter that is not there; of one without its qdisc.
        const MISSING: [Errno; 3] = [Errno::ENOLINK, Errno::ENOENT, Errno::EINVAL];
        let Some(path) = self.pins.current(program, at)? else { return Ok(false) };
        match self.table.store().replace(program, frames, &path, at) {
            Err(error)
                if error.errno().is_some_and(|e| MISSING.iter().any(|m| *m as i32 == e.0)) =>
            {
                self.pins.unpin(&path)?;
                Ok(false)
            }
            result => result.map(|()| true),
        }
    }

    /// Beside tc's programs, which do what this one leaves.
    fn attach_xdp(&mut self, device: &links::Device, mode: XdpMode) -> Result<(), LoadError> {
        let index = device.index;
        if uplinks::serves(device.xdp, mode)
            && self.replace(names::XDP_INGRESS, Frames::Ethernet, index)?
        {
            info!(device = %device.name, "program at XDP replaced");
            return Ok(());
        }
        // A device has room for one program.
        while let Some(before) = self.pins.before(names::XDP_INGRESS, index)? {
            std::fs::remove_file(&before)
                .map_err(|source| LoadError::Read { path: before, source })?;
        }
        let own = self.pins.link(names::XDP_INGRESS, index);
        self.table.store().attach_xdp(&device.name, mode)?.pin(&own)?;
        info!(device = %device.name, ?mode, "attached at XDP");
        Ok(())
    }

    /// Where XDP may send frames: that depends on what the kernel made of the mode, and on what
    /// drivers can do just now.
    fn write_xdp(&mut self) -> Result<(), PlaneError> {
        let takers = self.netdev.takers().unwrap_or_else(|error| {
            self.complain("which devices take frames from XDP", &error);
            Some(BTreeSet::new())
        });
        let devices = self.links.devices().map_err(|e| PlaneError::new("network devices", e))?;
        for device in devices {
            let Some(in_map) = self.devices.get_mut(&device.index) else { continue };
            let flags = in_map.flags & !Device::XDP | uplinks::flags(&device, takers.as_ref());
            if flags != in_map.flags {
                in_map.flags = flags;
                let tables = self.table.store().tables();
                tables.set_device(device.index, *in_map).map_err(|e| table(&e))?;
                info!(device = %device.name, flags = flags & Device::XDP, "what XDP may do");
            }
        }
        Ok(())
    }

    fn device(&self, device: &links::Device, addresses: &[IpAddr]) -> Device {
        let first = |v4: bool| {
            let usable = |address: &&IpAddr| {
                address.is_ipv4() == v4
                    && !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
            };
            addresses.iter().find(usable).map(|a| Address::from(*a)).unwrap_or_default()
        };
        let pods = match &self.lowering.detect {
            LocalDetect::Bridge(bridge) => *device.name == **bridge,
            LocalDetect::InterfacePrefix(prefix) => device.name.starts_with(&**prefix),
            LocalDetect::Unknown | LocalDetect::Cidrs(_) => false,
        };
        let flag = |is: bool, flag| if is { flag } else { 0 };
        let bare = device.frames == Some(Frames::Bare);
        let is_uplink = uplinks::is_uplink(device, addresses, &self.node_addresses)
            || addresses.iter().any(|address| self.node_addresses.contains(address));
        let flags = flag(pods, Device::PODS)
            | flag(is_port(device), Device::PORT)
            | flag(is_uplink, Device::UPLINK)
            | flag(bare, Device::BARE);
        let mac = device.mac.unwrap_or_default();
        Device { source4: first(true), source6: first(false), flags, mac, pad: [0; 2] }
    }

    /// Each program takes the place of the one of the daemon before this one, where there is one.
    fn attach_device(&mut self, device: &links::Device) -> Result<(), LoadError> {
        let (name, index) = (&*device.name, device.index);
        let port = is_port(device);
        let frames = device.frames.unwrap_or(Frames::Ethernet);
        if frames == Frames::Bare {
            self.table.store().load_bare(&object()?, &self.pins)?;
        }
        let mut missing = Vec::new();
        // First what undoes translations, then what makes them.
        for program in [names::TC_EGRESS, names::TC_INGRESS] {
            let wanted = program == names::TC_EGRESS || !port;
            if wanted && !self.replace(program, frames, index)? {
                missing.push(program);
            }
        }
        let replaced = missing.is_empty();
        let programs = self.table.store();
        let (hook, attachments) = programs.attach_tc_programs(name, frames, &missing)?;
        for (program, attachment) in attachments {
            attachment.pin(&self.pins.link(program, index))?;
        }
        info!(device = name, ?hook, ?frames, port, replaced, "attached");
        Ok(())
    }

    /// False when no daemon before this one has left such a program there.
    fn replace(&mut self, program: &str, frames: Frames, index: u32) -> Result<bool, LoadError> {
        let Some(before) = self.pins.before(program, index)? else { return Ok(false) };
        if let Err(error) = self.table.store().replace(program, frames, &before, index) {
            // The device may be another one with the same index; the pin goes with the others.
            debug!(%error, "attaching anew");
            return Ok(false);
        }
        self.pins.take_over(&before)?;
        Ok(true)
    }
}

fn wants_device(patterns: &[String], device: &links::Device) -> bool {
    // Others have a header that is not understood here.
    if device.frames.is_none() {
        return false;
    }
    if patterns.is_empty() {
        // No packet goes by a dummy.
        return device.kind.as_deref() != Some("dummy") && device.enslaved != Some(Enslaved::Other);
    }
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(start) => device.name.starts_with(start),
        None => device.name == *pattern,
    })
}

fn is_port(device: &links::Device) -> bool {
    device.enslaved == Some(Enslaved::Bridge)
}
