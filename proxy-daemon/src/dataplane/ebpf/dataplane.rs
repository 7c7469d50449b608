//! The eBPF data plane as the engine drives it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Instant;

use proxy_ebpf::layout::config::client;
use proxy_ebpf::layout::{Config, Device, Timeouts};
use proxy_ebpf::order::Address;
use tracing::{info, warn};

use super::pins::Pins;
use super::plane::{Table, prefix};
use super::value::{Key, Lowering, Value};
use super::{Capacity, LoadError, Programs, TableError, XdpMode};
use crate::dataplane::{Dataplane, OpError, PlaneError, Readback, WorkDone};
use crate::kernel::links::Links;
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
    pub capacity: Capacity,
    pub masquerade_all: bool,
    /// What counts as a pod, given the Node.
    pub local_detection: Detection,
    /// Whose sockets are served.
    pub cgroup: PathBuf,
    /// Names, `*` at the end for any; none: every device with an address.
    pub devices: Vec<String>,
    pub xdp: Option<XdpMode>,
    pub sysctl_root: PathBuf,
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
    config: EbpfConfig,
    lowering: Lowering,
    detect: LocalDetect,
    node_addresses: Vec<IpAddr>,
    /// With our programs: index to what the map says.
    devices: BTreeMap<u32, Device>,
    /// ClusterIPs: the addresses least and greatest, for each family.
    service_span: BTreeMap<bool, (IpAddr, IpAddr)>,
    written: Option<Config>,
    attached: bool,
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
    pub fn new(config: EbpfConfig, programs: Programs, pins: Pins, links: Box<dyn Links>) -> Self {
        let detect = (config.local_detection)(None);
        Self {
            table: Table::new(programs, config.capacity),
            lowering: Lowering { masquerade_all: config.masquerade_all, own: BTreeSet::new() },
            pins,
            links,
            config,
            detect,
            node_addresses: Vec::new(),
            devices: BTreeMap::new(),
            service_span: BTreeMap::new(),
            written: None,
            attached: false,
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
        let mut config = Config {
            features: Config::TCP_PEER_NAMES,
            seed: 0,
            source4: source(true),
            source6: source(false),
            port_low: PORTS.0,
            port_high: PORTS.1,
            timeouts: Timeouts::default(),
            ..Config::default()
        };
        for (place, (least, greatest)) in self.service_span.values().enumerate() {
            config.service_prefixes[place] = common_prefix(*least, *greatest);
            config.prefixes += 1;
        }
        if self.written != Some(config) {
            self.table.store().tables().set_config(config)?;
            self.written = Some(config);
        }
        Ok(())
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
        let names: BTreeMap<u32, String> = nix::net::if_::if_nameindex()
            .map_err(|errno| PlaneError::new("network devices", errno))?
            .iter()
            .map(|device| (device.index(), device.name().to_string_lossy().into_owned()))
            .collect();
        let mut wanted: BTreeMap<u32, Device> = BTreeMap::new();
        for (index, name) in &names {
            let own = addresses.iter().filter(|a| a.link == *index).map(|a| a.address);
            let own: Vec<IpAddr> = own.filter(|address| !address.is_loopback()).collect();
            if self.wants_device(name, &own) {
                wanted.insert(*index, self.device(name, &own));
            }
        }
        for (index, device) in &wanted {
            if !self.devices.contains_key(index) {
                let name = &names[index];
                if let Err(error) = self.attach_device(*index, name) {
                    // A device may go at any time; the others must not wait for it.
                    self.complain(&format!("programs at device {name}"), &error);
                    continue;
                }
            }
            if self.devices.get(index) != Some(device) {
                let tables = self.table.store().tables();
                tables.set_device(*index, *device).map_err(|e| table(&e))?;
                self.devices.insert(*index, *device);
            }
        }
        let gone: Vec<u32> =
            self.devices.keys().filter(|index| !wanted.contains_key(index)).copied().collect();
        for index in gone {
            self.devices.remove(&index);
            match self.table.store().tables().remove_device(index) {
                Err(error) if !error.is_missing() => return Err(table(&error)),
                _ => {}
            }
            self.pins.remove_links(|place, _| place == index).map_err(|e| load(&e))?;
        }
        Ok(())
    }

    fn wants_device(&self, name: &str, addresses: &[IpAddr]) -> bool {
        if self.config.devices.is_empty() {
            // The dummy that another proxy leaves behind has addresses and no packets.
            return !addresses.is_empty() && name != "kube-ipvs0";
        }
        self.config.devices.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == pattern,
        })
    }

    fn device(&self, name: &str, addresses: &[IpAddr]) -> Device {
        let first = |v4: bool| {
            let usable = |address: &&IpAddr| {
                address.is_ipv4() == v4
                    && !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
            };
            addresses.iter().find(usable).map(|a| Address::from(*a)).unwrap_or_default()
        };
        let pods = match &self.detect {
            LocalDetect::Bridge(bridge) => name == &**bridge,
            LocalDetect::InterfacePrefix(prefix) => name.starts_with(&**prefix),
            LocalDetect::Unknown | LocalDetect::Cidrs(_) => false,
        };
        let flags = if pods { Device::PODS } else { 0 };
        Device { source4: first(true), source6: first(false), flags, pad: 0 }
    }

    fn attach_device(&mut self, index: u32, name: &str) -> Result<(), LoadError> {
        let programs = self.table.store();
        let (hook, attachments) = programs.attach_tc(name)?;
        for (attachment, program) in attachments.into_iter().zip(["tc_egress", "tc_ingress"]) {
            attachment.pin(&self.pins.link(program, index))?;
        }
        if let Some(mode) = self.config.xdp {
            let attachment = programs.attach_xdp(name, mode)?;
            attachment.pin(&self.pins.link("xdp_ingress", index))?;
        }
        info!(device = name, ?hook, xdp = ?self.config.xdp, "attached");
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

    fn note_cluster_ip(&mut self, address: IpAddr) -> Result<(), TableError> {
        let span = self.service_span.entry(address.is_ipv4()).or_insert((address, address));
        let wider = (span.0.min(address), span.1.max(address));
        if *span == wider && self.written.is_some_and(|config| config.prefixes > 0) {
            return Ok(());
        }
        *span = wider;
        self.write_config()
    }
}

/// The longest prefix with both in it.
fn common_prefix(least: IpAddr, greatest: IpAddr) -> proxy_ebpf::layout::Prefix {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let length = (bits(least) ^ bits(greatest)).leading_zeros();
    proxy_ebpf::layout::Prefix::new(least.into(), length)
}

impl Dataplane for EbpfPlane {
    type Key = Key;

    fn lower(&mut self, key: &FrontendKey, frontend: &Frontend) -> Vec<(Key, Value)> {
        self.lowering.lower(key, frontend)
    }

    fn node_changed(&mut self, node: Option<&Node>) -> bool {
        let detect = (self.config.local_detection)(node);
        let addresses = node.map_or_else(Vec::new, |node| node.addresses.clone());
        let changed = detect != self.detect || addresses != self.node_addresses;
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
            .and_then(|()| self.write_prefixes().map_err(|error| table(&error)));
        if let Err(error) = result {
            // The next resync tries again.
            warn!(%error, "the node's addresses changed");
        }
    }

    fn prepare(&mut self) -> Result<(), PlaneError> {
        self.set_sysctls();
        self.write_config().map_err(|error| table(&error))?;
        self.write_prefixes().map_err(|error| table(&error))?;
        self.attach_devices()?;
        if !self.attached {
            self.attach_sockets().map_err(|error| load(&error))?;
            // What the daemon before this one attached has been in place until now.
            let ours = std::process::id();
            self.pins.remove_links(|_, process| process != ours).map_err(|e| load(&e))?;
            self.attached = true;
        }
        Ok(())
    }

    fn readback(&mut self) -> Result<Readback<Key>, PlaneError> {
        let readback = self.table.readback(self.config.capacity)?;
        for key in readback.ours.keys() {
            if let Key::Address(address) = key {
                self.note_cluster_ip(*address).map_err(|error| table(&error))?;
            }
        }
        Ok(readback)
    }

    fn apply(&mut self, ops: &[Op<Key>]) -> Vec<Result<(), OpError>> {
        let now = Instant::now();
        ops.iter()
            .map(|op| {
                self.table.apply(op, now)?;
                match op {
                    Op::Create(Key::Address(address), _) => self
                        .note_cluster_ip(*address)
                        .map_err(|error| OpError::Refused(error.to_string())),
                    _ => Ok(()),
                }
            })
            .collect()
    }

    fn unused(&mut self, retired: &[Key]) -> Result<Vec<Key>, PlaneError> {
        // Nothing is retired: connections live in the table of flows.
        Ok(retired.to_vec())
    }

    fn work(&self) -> WorkDone {
        let requests = self.table.writes();
        WorkDone { requests, dumps: 0, sends: requests }
    }
}
