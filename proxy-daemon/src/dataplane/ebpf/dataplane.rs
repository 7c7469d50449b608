//! The eBPF data plane as the engine drives it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use proxy_ebpf::layout::config::client;
use proxy_ebpf::layout::{Config, Device, OptOut, Timeouts, names};
use proxy_ebpf::order::{Address, Be16};
use tracing::{debug, info, warn};

mod growth;

use self::growth::Growth;
use super::loader::Limit;
use super::opt_out;
use super::pins::Pins;
use super::plane::{Table, prefix};
use super::readback::{Found, Reading};
use super::spans::Spans;
use super::upgrade::Upgrade;
use super::uplinks;
use super::value::{Key, Lowering, Value};
use super::{Capacity, LoadError, Programs, SocketRelease, TableError, Tables, XdpMode};
use crate::dataplane::kubeproxy::Takeover;
use crate::dataplane::{
    Dataplane, Fill, FlowRelease, OpError, Pieces, PlaneError, Reader, Surroundings, WorkDone,
};
use crate::kernel::links::{self, Enslaved, Links};
use crate::kernel::netdev::NetDevices;
use crate::kernel::sysctl::Sysctls;
use crate::model::{LocalDetect, Node};
use crate::plan::Op;
use crate::policy::{Frontend, FrontendKey};

/// Ports of masqueraded packets. Beside those that sockets of the node get by themselves,
/// for the most part; one that a socket uses is never taken.
const PORTS: (u16, u16) = (50_000, 65_535);

/// Tells what counts as a pod.
pub type Detection = Box<dyn Fn(Option<&Node>) -> LocalDetect + Send>;

pub struct EbpfConfig {
    /// What the maps have.
    pub capacity: Capacity,
    /// What they may grow to.
    pub limit: Limit,
    /// From another version's maps.
    pub upgrade: Upgrade,
    pub masquerade_all: bool,
    /// What counts as a pod, given the Node.
    pub local_detection: Detection,
    /// Whose sockets are served.
    pub cgroup: PathBuf,
    /// Names, `*` at the end for any; none: every device with an address.
    pub devices: Vec<String>,
    /// Patterns of cgroups below `cgroup` whose sockets are left alone.
    pub opt_outs: Vec<String>,
    pub xdp: Option<XdpMode>,
    pub direct: DirectReturn,
    pub sysctl_root: PathBuf,
    /// Cookie of the node's network namespace, where it is known.
    pub namespace: Option<u64>,
    /// Connections may go through another proxy's translation.
    pub handing_over: Arc<AtomicBool>,
}

/// Packets between nodes inside others, so that replies need not come back the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectReturn {
    pub accepts: bool,
    pub sends: bool,
    /// UDP.
    pub port: u16,
}

impl fmt::Debug for EbpfConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EbpfConfig").field("cgroup", &self.cgroup).finish_non_exhaustive()
    }
}

pub struct EbpfPlane {
    table: Table<Programs>,
    pins: Pins,
    links: Box<dyn Links>,
    netdev: Box<dyn NetDevices>,
    sockets: SocketRelease,
    /// Where there may be something to take over from.
    takeover: Option<Takeover>,
    config: EbpfConfig,
    lowering: Lowering,
    detect: LocalDetect,
    node_addresses: Vec<IpAddr>,
    /// With our programs: index to what the map says.
    devices: BTreeMap<u32, Device>,
    /// Those of them with our program at XDP.
    uplinks: BTreeSet<u32>,
    /// Where addresses of Services are.
    spans: Spans,
    written: Option<Config>,
    /// Some cgroup opted out.
    opted_out: bool,
    attached: bool,
    /// That has been tried.
    begun: bool,
    /// The table's picture was made from the maps.
    adopted: bool,
    growth: Growth,
    complained: BTreeSet<String>,
}

impl fmt::Debug for EbpfPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EbpfPlane").field("devices", &self.devices).finish_non_exhaustive()
    }
}

fn load(error: &LoadError) -> PlaneError {
    PlaneError::new("eBPF programs", error)
}

fn table(error: &TableError) -> PlaneError {
    PlaneError::new("eBPF maps", error)
}

impl EbpfPlane {
    #[must_use]
    pub fn new(
        config: EbpfConfig,
        programs: Programs,
        pins: Pins,
        (links, netdev): (Box<dyn Links>, Box<dyn NetDevices>),
        sockets: SocketRelease,
        takeover: Option<Takeover>,
    ) -> Self {
        let detect = (config.local_detection)(None);
        Self {
            table: Table::new(programs, config.capacity).with_locals(config.direct.accepts),
            lowering: Lowering { masquerade_all: config.masquerade_all, own: BTreeSet::new() },
            pins,
            links,
            netdev,
            sockets,
            takeover,
            config,
            detect,
            node_addresses: Vec::new(),
            devices: BTreeMap::new(),
            uplinks: BTreeSet::new(),
            spans: Spans::default(),
            written: None,
            opted_out: false,
            attached: false,
            begun: false,
            adopted: false,
            growth: Growth::default(),
            complained: BTreeSet::new(),
        }
    }

    /// Packets are routed between devices, or nothing but sockets works.
    fn set_sysctls(&mut self) {
        let sysctls = Sysctls::at(&self.config.sysctl_root);
        for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            if let Err(error) = sysctls.set_to(name, "1") {
                self.complain(name, &error);
            }
        }
    }

    /// No socket of the node gets a port of masqueraded packets by itself: a reply to the one would
    /// be taken for the other's.
    fn reserve_ports(&mut self) {
        const NAME: &str = "net/ipv4/ip_local_reserved_ports";
        let sysctls = Sysctls::at(&self.config.sysctl_root);
        let result = sysctls.read(NAME).and_then(|reserved| match with_ports(&reserved) {
            Some(more) => sysctls.set_to(NAME, &more),
            None => Ok(false),
        });
        if let Err(error) = result {
            self.complain(NAME, &error);
        }
    }

    fn complain(&mut self, about: &str, error: &dyn fmt::Display) {
        if self.complained.insert(about.to_owned()) {
            warn!(%error, about, "going on without it");
        }
    }

    fn write_config(&mut self) -> Result<(), TableError> {
        let source = |v4: bool| {
            let of_family = |address: &&IpAddr| address.is_ipv4() == v4;
            self.node_addresses
                .iter()
                .find(of_family)
                .map(|a| Address::from(*a))
                .unwrap_or_default()
        };
        let feature = |is: bool, feature| if is { feature } else { 0 };
        let handing_over = self.config.handing_over.load(Ordering::Relaxed);
        let mut config = Config {
            features: Config::TCP_PEER_NAMES
                | feature(self.opted_out, Config::OPT_OUTS)
                | feature(handing_over, Config::OTHERS_CONNECTIONS)
                | feature(self.config.direct.accepts, Config::DIRECT_ACCEPT)
                | feature(self.config.direct.sends, Config::DIRECT_SEND),
            seed: 0,
            source4: source(true),
            source6: source(false),
            port_low: PORTS.0,
            port_high: PORTS.1,
            timeouts: Timeouts::default(),
            direct_port: Be16::from_host(self.config.direct.port),
            namespace: self.config.namespace.unwrap_or(0),
            ..Config::default()
        };
        self.spans.write(&mut config);
        if self.written != Some(config) {
            self.table.store().tables().set_config(config)?;
            self.written = Some(config);
        }
        Ok(())
    }

    /// Pods' cgroups come and go: with every readback, and with the node's addresses.
    fn write_opt_outs(&mut self) -> Result<(), TableError> {
        let ids = match opt_out::ids(&self.config.cgroup, &self.config.opt_outs) {
            Ok(ids) => ids,
            Err(error) => {
                self.complain("cgroups that opt out", &error);
                return Ok(());
            }
        };
        let wanted: BTreeSet<(u64, u32)> = ids.into_iter().map(|id| (id, OptOut::CGROUP)).collect();
        let tables = self.table.store().tables();
        let held: BTreeSet<(u64, u32)> =
            tables.opt_outs()?.into_iter().map(|who| (who.id, who.kind)).collect();
        let entry = |&(id, kind): &(u64, u32)| OptOut { id, kind, pad: 0 };
        for who in wanted.difference(&held).map(entry) {
            tables.set_opt_out(who)?;
        }
        for who in held.difference(&wanted).map(entry) {
            tables.remove_opt_out(&who)?;
        }
        self.opted_out = !wanted.is_empty();
        self.write_config()
    }

    /// What kind of client an address is: the node's own, and pods as local detection says.
    fn write_prefixes(&mut self) -> Result<(), TableError> {
        let mut wanted: BTreeMap<(Vec<u8>, u32), (Address, u32)> = BTreeMap::new();
        let mut add = |address: Address, length: u32, kind: u32| {
            let bytes = address.words().iter().flat_map(|word| word.to_wire()).collect();
            wanted.entry((bytes, length)).or_insert((address, 0)).1 |= kind;
        };
        if let LocalDetect::Cidrs(cidrs) = &self.detect {
            for cidr in cidrs {
                let (address, length) = prefix(cidr);
                add(address, length, client::CLUSTER);
            }
        }
        for own in &self.lowering.own {
            add((*own).into(), 128, client::NODE);
        }
        let tables = self.table.store().tables();
        let held = tables.prefixes()?;
        for ((_, length), (address, kind)) in &wanted {
            if !held.contains(&(*address, *length, *kind)) {
                tables.set_prefix(*address, *length, *kind)?;
            }
        }
        for (address, length, _) in held {
            let key: Vec<u8> = address.words().iter().flat_map(|word| word.to_wire()).collect();
            if !wanted.contains_key(&(key, length)) {
                tables.remove_prefix(address, length)?;
            }
        }
        Ok(())
    }

    /// Attaches to the devices that there are now.
    fn attach_devices(&mut self) -> Result<(), PlaneError> {
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
        for (index, (device, in_map)) in &wanted {
            let before = self.devices.get(index);
            if before == Some(in_map) {
                continue;
            }
            if before.is_some_and(|before| (before.flags ^ in_map.flags) & Device::PORT != 0) {
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
                continue;
            }
            self.devices.insert(*index, *in_map);
        }
        let gone: Vec<u32> =
            self.devices.keys().filter(|index| !wanted.contains_key(index)).copied().collect();
        for index in gone {
            self.devices.remove(&index);
            self.uplinks.remove(&index);
            match self.table.store().tables().remove_device(index) {
                Err(error) if !error.is_missing() => return Err(table(&error)),
                _ => {}
            }
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

    /// Beside tc's programs, which do what this one leaves.
    fn attach_xdp(&mut self, device: &links::Device, mode: XdpMode) -> Result<(), LoadError> {
        let index = device.index;
        if uplinks::serves(device.xdp, mode) && self.replace(names::XDP_INGRESS, index)? {
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
        let pods = match &self.detect {
            LocalDetect::Bridge(bridge) => *device.name == **bridge,
            LocalDetect::InterfacePrefix(prefix) => device.name.starts_with(&**prefix),
            LocalDetect::Unknown | LocalDetect::Cidrs(_) => false,
        };
        let flag = |is: bool, flag| if is { flag } else { 0 };
        let flags = flag(pods, Device::PODS) | flag(is_port(device), Device::PORT);
        let mac = device.mac.unwrap_or_default();
        Device { source4: first(true), source6: first(false), flags, mac, pad: [0; 2] }
    }

    /// Each program takes the place of the one of the daemon before this one, where there is one.
    fn attach_device(&mut self, device: &links::Device) -> Result<(), LoadError> {
        let (name, index) = (&*device.name, device.index);
        let port = is_port(device);
        let mut missing = Vec::new();
        // First what undoes translations, then what makes them.
        for program in [names::TC_EGRESS, names::TC_INGRESS] {
            let wanted = program == names::TC_EGRESS || !port;
            if wanted && !self.replace(program, index)? {
                missing.push(program);
            }
        }
        let replaced = missing.is_empty();
        let programs = self.table.store();
        let (hook, attachments) = programs.attach_tc_programs(name, &missing)?;
        for (program, attachment) in attachments {
            attachment.pin(&self.pins.link(program, index))?;
        }
        info!(device = name, ?hook, port, replaced, "attached");
        Ok(())
    }

    /// False when no daemon before this one has left such a program there.
    fn replace(&mut self, program: &str, index: u32) -> Result<bool, LoadError> {
        let Some(before) = self.pins.before(program, index)? else { return Ok(false) };
        if let Err(error) = self.table.store().replace(program, &before, index) {
            // The device may be another one with the same index; the pin goes with the others.
            debug!(%error, "attaching anew");
            return Ok(false);
        }
        self.pins.take_over(&before)?;
        Ok(true)
    }

    fn attach(&mut self) -> Result<(), PlaneError> {
        if self.attached {
            return self.attach_devices();
        }
        if std::mem::replace(&mut self.begun, true) {
            // An attempt that failed half-way: its links are those of a start before this one.
            self.pins.start_again();
            self.devices.clear();
            self.uplinks.clear();
        }
        // Twice: the second look is short, and so is what it misses.
        for _ in 0..2 {
            self.config.upgrade.carry().map_err(|e| load(&e))?;
        }
        self.attach_devices()?;
        self.attach_sockets().map_err(|error| load(&error))?;
        // What the daemon before this one attached has been in place until now.
        let ours = self.pins.start();
        self.pins.remove_links(|_, start| start != ours).map_err(|e| load(&e))?;
        self.pins.detach_others().map_err(|e| load(&e))?;
        self.config.upgrade.carry().map_err(|e| load(&e))?;
        self.attached = true;
        self.config.upgrade = Upgrade::default();
        if let Err(error) = self.pins.remove_others() {
            warn!(%error, "what another version left stays until the next start");
        }
        Ok(())
    }

    fn attach_sockets(&mut self) -> Result<(), LoadError> {
        let attachments = self.table.store().attach_sockets(&self.config.cgroup)?;
        for (attachment, name) in attachments.into_iter().zip(proxy_ebpf::layout::names::CGROUP) {
            attachment.pin(&self.pins.link(name, 0))?;
        }
        info!(cgroup = %self.config.cgroup.display(), "attached");
        Ok(())
    }

    fn note_address(&mut self, address: IpAddr) -> Result<(), TableError> {
        if self.spans.note(address) { self.write_config() } else { Ok(()) }
    }

    /// The first look through the maps, at once: nothing was written before it.
    fn adopt(&mut self) -> Result<Vec<(Key, Value)>, TableError> {
        let objects = self.table.adopt_all()?;
        self.adopted = true;
        Ok(objects)
    }
}

fn wants_device(patterns: &[String], device: &links::Device) -> bool {
    // Others have no header that could be looked at, or exchanged.
    if !device.ethernet {
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

/// The ports that are to be reserved, when those of masqueraded packets are not among them yet.
fn with_ports(reserved: &str) -> Option<String> {
    let (from, to) = PORTS;
    let ours = format!("{from}-{to}");
    let covers = |range: &str| {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        low.parse::<u16>().is_ok_and(|low| low <= from)
            && high.parse::<u16>().is_ok_and(|high| high >= to)
    };
    match reserved {
        "" => Some(ours),
        reserved if reserved.split(',').any(covers) => None,
        reserved => Some(format!("{reserved},{ours}")),
    }
}

fn is_port(device: &links::Device) -> bool {
    device.enslaved == Some(Enslaved::Bridge)
}

impl Dataplane for EbpfPlane {
    type Key = Key;

    fn lower(&mut self, key: &FrontendKey, frontend: &Frontend) -> Vec<(Key, Value)> {
        self.lowering.lower(key, frontend)
    }

    fn surroundings_changed(&mut self, now: Surroundings<'_>) -> bool {
        let detect = (self.config.local_detection)(now.node);
        let addresses = now.node.map_or_else(Vec::new, |node| node.addresses.clone());
        let other_ranges = self.spans.set_ranges(now.service_cidrs);
        let changed = other_ranges || detect != self.detect || addresses != self.node_addresses;
        self.detect = detect;
        self.node_addresses = addresses;
        changed
    }

    fn addresses_changed(&mut self, addresses: &[IpAddr]) {
        self.lowering.own = addresses.iter().copied().collect();
        if !self.attached {
            return;
        }
        let result = self
            .attach_devices()
            .and_then(|()| self.write_prefixes().map_err(|error| table(&error)))
            .and_then(|()| self.write_opt_outs().map_err(|error| table(&error)));
        if let Err(error) = result {
            // The next resync tries again.
            warn!(%error, "the node's addresses changed");
        }
    }

    fn prepare(&mut self) -> Result<(), PlaneError> {
        self.set_sysctls();
        self.reserve_ports();
        self.write_opt_outs().map_err(|error| table(&error))?;
        self.write_prefixes().map_err(|error| table(&error))?;
        if !self.attached && self.config.upgrade.waits() {
            info!("another version's programs go on until all Services are in the new tables");
            return Ok(());
        }
        self.attach()
    }

    fn reader(&mut self) -> Result<Reader<Key>, PlaneError> {
        if !self.adopted {
            let objects = self.adopt().map_err(|error| table(&error))?;
            return Ok(Box::new(move |give| {
                let mut pieces = Pieces::new(give);
                objects.into_iter().for_each(|(key, value)| pieces.put(true, key, value));
                pieces.end();
                Ok(())
            }));
        }
        let maps = Tables::open(&self.pins).map_err(|error| load(&error))?;
        Ok(Box::new(move |give| {
            let mut pieces = Pieces::new(give);
            Reading::new(&maps)
                .run(|Found { key, value, .. }| pieces.put(true, key, value))
                .map_err(|error| table(&error))?;
            pieces.end();
            Ok(())
        }))
    }

    fn found(&mut self, key: &Key, value: &Value) {
        let result = match key {
            Key::Address(address) => self.note_address(*address),
            Key::Frontend(_) => self.table.found(key, value),
        };
        if let Err(error) = result {
            // The next readback finds it again.
            warn!(%error, ?key, "what was found in the maps");
        }
    }

    fn apply(&mut self, ops: &[Op<Key>]) -> Vec<Result<(), OpError>> {
        let now = Instant::now();
        let results = ops
            .iter()
            .map(|op| {
                self.apply_one(op, now)?;
                match op {
                    Op::Create(Key::Address(address), _) => self
                        .note_address(*address)
                        .map_err(|error| OpError::Refused(error.to_string())),
                    _ => Ok(()),
                }
            })
            .collect();
        self.sockets.release(self.table.take_gone());
        results
    }

    fn unused(&mut self, retired: &[Key]) -> Result<Vec<Key>, PlaneError> {
        // Nothing is retired: connections live in the table of flows.
        Ok(retired.to_vec())
    }

    /// All Services are in the tables, if they were not from the start.
    fn superseded(&mut self, _foreign: &HashMap<Key, Value>) -> Vec<Key> {
        if !self.attached
            && let Err(error) = self.attach()
        {
            // The next resync tries again.
            warn!(%error, "another version's programs go on");
            return Vec::new();
        }
        if let Some(takeover) = &mut self.takeover
            && takeover.due().is_some()
        {
            takeover.remove();
        }
        Vec::new()
    }

    fn fill(&self) -> Vec<Fill> {
        self.fills()
    }

    fn take_releases(&mut self) -> Vec<FlowRelease> {
        self.sockets.take_done()
    }

    fn work(&self) -> WorkDone {
        let requests = self.table.writes();
        WorkDone { requests, dumps: 0, sends: requests }
    }
}

#[cfg(test)]
mod tests {
    use super::with_ports;

    #[test]
    fn ports_are_reserved_besides_those_that_are() {
        assert_eq!(with_ports("").as_deref(), Some("50000-65535"));
        assert_eq!(with_ports("8080,9000-9010").as_deref(), Some("8080,9000-9010,50000-65535"));
        assert_eq!(with_ports("8080,50000-65535"), None);
        assert_eq!(with_ports("40000-65535"), None);
    }
}
