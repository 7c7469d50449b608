//! The eBPF data plane as the engine drives it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ipnetwork::IpNetwork;
use proxy_ebpf::layout::config::client;
use proxy_ebpf::layout::{Config, Device, OptOut, Timeouts};
use proxy_ebpf::order::{Address, Be16};
use tracing::{info, warn};

mod devices;
mod growth;

use self::growth::Growth;
use super::loader::Limit;
use super::opt_out;
use super::pins::Pins;
use super::plane::{Table, prefix};
use super::readback::{FEW, Found, Reading};
use super::spans::Spans;
use super::upgrade::Upgrade;
use super::value::{Key, Lowering, Value};
use super::{
    Capacity, LoadError, Programs, Remembered, SocketRelease, TableError, Tables, XdpMode,
};
use crate::dataplane::kubeproxy::Takeover;
use crate::dataplane::{
    Dataplane, Fill, FlowRelease, OpError, Pieces, PlaneError, Reader, Surroundings, WorkDone,
};
use crate::kernel::links::{LinkAddress, Links};
use crate::kernel::netdev::NetDevices;
use crate::kernel::sysctl::Sysctls;
use crate::model::{LocalDetect, Node, Selection};
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
    pub selection: Selection,
    pub timeouts: Timeouts,
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
    /// How full the programs' own tables are.
    pub remembered: Arc<Remembered>,
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
    /// Programs that somebody took off, since somebody asked.
    put_back: u64,
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
        Self {
            table: Table::new(programs, config.capacity).with_locals(config.direct.accepts),
            lowering: Lowering {
                masquerade_all: config.masquerade_all,
                selection: config.selection,
                near: Vec::new(),
                own: BTreeSet::new(),
                detect: (config.local_detection)(None),
            },
            pins,
            links,
            netdev,
            sockets,
            takeover,
            config,
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
            put_back: 0,
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
            timeouts: self.config.timeouts,
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

    /// The kind of clients that a longer prefix must not hide.
    fn kind_around(&self, range: &IpNetwork) -> u32 {
        let LocalDetect::Cidrs(cidrs) = &self.lowering.detect else { return 0 };
        let is_around =
            |cidr: &IpNetwork| cidr.prefix() <= range.prefix() && cidr.contains(range.network());
        if cidrs.iter().any(is_around) { client::CLUSTER } else { 0 }
    }

    /// What kind of client an address is: the node's own, and pods as local detection says.
    fn write_prefixes(&mut self) -> Result<(), TableError> {
        let mut wanted: BTreeMap<(Vec<u8>, u32), (Address, u32)> = BTreeMap::new();
        let mut add = |address: Address, length: u32, kind: u32| {
            let bytes = address.words().iter().flat_map(|word| word.to_wire()).collect();
            wanted.entry((bytes, length)).or_insert((address, 0)).1 |= kind;
        };
        if let LocalDetect::Cidrs(cidrs) = &self.lowering.detect {
            for cidr in cidrs {
                let (address, length) = prefix(cidr);
                add(address, length, client::CLUSTER);
            }
        }
        for own in &self.lowering.own {
            add((*own).into(), 128, client::NODE);
        }
        for range in self.spans.more() {
            let (address, length) = prefix(range);
            add(address, length, client::SERVICE | self.kind_around(range));
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

    /// A client's endpoint is not remembered beyond its Service's affinity.
    fn forget_affinity(&mut self) {
        let services = self.table.take_forgotten();
        if services.is_empty() {
            return;
        }
        if let Err(error) = self.table.store().tables().forget_affinity(&services) {
            warn!(%error, "clients may go to the endpoints that they had before");
        }
    }

    /// The first look through the maps, at once: nothing was written before it.
    fn adopt(&mut self) -> Result<Vec<(Key, Value)>, TableError> {
        let objects = self.table.adopt_all()?;
        self.adopted = true;
        Ok(objects)
    }
}

/// What has other machines: a whole address is alone on its link.
fn near(held: &[LinkAddress]) -> Vec<IpNetwork> {
    let with_others =
        held.iter().filter(|held| **held != LinkAddress::alone(held.link, held.address));
    let mut near: Vec<IpNetwork> =
        with_others.filter_map(|held| IpNetwork::new(held.address, held.prefix).ok()).collect();
    near.sort_unstable();
    near.dedup();
    near
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

impl Dataplane for EbpfPlane {
    type Key = Key;

    fn lower(&mut self, key: &FrontendKey, frontend: &Frontend) -> Vec<(Key, Value)> {
        self.lowering.lower(key, frontend)
    }

    fn surroundings_changed(&mut self, now: Surroundings<'_>) -> bool {
        let detect = (self.config.local_detection)(now.node);
        let addresses = now.node.map_or_else(Vec::new, |node| node.addresses.clone());
        let other_ranges = self.spans.set_ranges(now.service_cidrs);
        let changed =
            other_ranges || detect != self.lowering.detect || addresses != self.node_addresses;
        self.lowering.detect = detect;
        self.node_addresses = addresses;
        changed
    }

    fn addresses_changed(&mut self, addresses: &[IpAddr]) {
        self.lowering.own = addresses.iter().copied().collect();
        match self.links.addresses() {
            Ok(held) => self.lowering.near = near(&held),
            Err(error) => warn!(%error, "which networks are at the node's links"),
        }
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
        let attached = self.attached;
        self.attach()?;
        if attached { self.put_back() } else { Ok(()) }
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
                .remembering(FEW)
                .run(|Found { key, value, .. }| pieces.put(true, key, value))
                .map_err(|error| table(&error))?;
            pieces.end();
            Ok(())
        }))
    }

    fn found(&mut self, key: &Key, value: &Value) {
        let result = match key {
            Key::Address(address) | Key::External(address) => self.note_address(*address),
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
                    Op::Create(Key::Address(address) | Key::External(address), _) => self
                        .note_address(*address)
                        .map_err(|error| OpError::Refused(error.to_string())),
                    _ => Ok(()),
                }
            })
            .collect();
        self.sockets.release(self.table.take_gone());
        self.forget_affinity();
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

    fn take_put_back(&mut self) -> u64 {
        std::mem::take(&mut self.put_back)
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
