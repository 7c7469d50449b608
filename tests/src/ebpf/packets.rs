//! The programs against the library they are made of: the same frames, in the same order,
//! through the kernel's test run and through the library on the host. What each returns,
//! every byte of what it made, and the tables afterwards have to be the same.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context as _, Result, ensure};
use proxy_daemon::dataplane::ebpf::Programs;
use proxy_ebpf::device::{Arrival, Hook};
use proxy_ebpf::direct;
use proxy_ebpf::fake::Fake;
use proxy_ebpf::fake::frames::{DIRECT_PORT, Frame, check, icmp_error};
use proxy_ebpf::fake::program::{self, Fate, Way};
use proxy_ebpf::layout::config::client;
use proxy_ebpf::layout::{
    Backend, BackendId, Config, Device, Flow, Frontend, FrontendId, FrontendKey, LocalKey, Prefix,
    RangeData, ServiceId, SlotRange, Timeouts, Traffic, Tuple,
};
use proxy_ebpf::order::{Address, Be16};
use proxy_ebpf::parse::{self, ETHERNET, Headers, SCTP, TCP, UDP};
use proxy_ebpf::unmatched::address_key;
use proxy_ebpf::verdict::Reason;

use super::{in_netns, load, older_than, run};

pub(super) const DEVICE: &str = "front0";
pub(super) const MTU: u16 = 1500;
pub(super) const OWN: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(super) const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// One family's addresses. Everything is beyond the gateway but what the node has itself.
#[derive(Clone, Copy)]
pub(super) struct Names {
    pub node: &'static str,
    pub gateway: &'static str,
    pub service: &'static str,
    pub clients: &'static str,
    pub pod: &'static str,
    pub backends: &'static str,
    /// Of a prefix, from the front of the 128 bits.
    pub bits: u32,
}

pub(super) const FAMILIES: [Names; 2] = [
    Names {
        node: "192.0.2.2",
        gateway: "192.0.2.1",
        service: "10.96.0.",
        clients: "203.0.113.",
        pod: "10.244.0.9",
        backends: "10.244.1.",
        bits: 96,
    },
    Names {
        node: "2001:db8::2",
        gateway: "2001:db8::1",
        service: "fd00:96::",
        clients: "2001:db8:7::",
        pod: "fd00:244::9",
        backends: "fd00:244:1::",
        bits: 0,
    },
];

pub(super) fn ip(text: &str) -> Result<Address> {
    Ok(text.parse::<std::net::IpAddr>().with_context(|| text.to_owned())?.into())
}

/// The same tables on both sides.
struct Pair {
    fake: Fake,
    programs: Programs,
    ifindex: u32,
}

impl Pair {
    fn new() -> Result<Self> {
        let ifindex = link()?;
        let mut pair = Self { fake: Fake::default(), programs: load()?, ifindex };
        pair.fill()?;
        Ok(pair)
    }

    fn fill(&mut self) -> Result<()> {
        let mut config = Config {
            seed: 0x5eed,
            source4: ip(FAMILIES[0].node)?,
            source6: ip(FAMILIES[1].node)?,
            port_low: 50_000,
            port_high: 50_255,
            prefixes: 2,
            dropping: 2,
            timeouts: Timeouts::default(),
            ..Config::default()
        };
        config.service_prefixes[0] = Prefix::new(ip("10.96.0.0")?, 96 + 16);
        config.service_prefixes[1] = Prefix::new(ip("fd00:96::")?, 64);
        config.direct_port = Be16::from_host(DIRECT_PORT);
        self.configure(config)?;
        let device = Device { flags: Device::XDP_TX, mac: OWN, ..Device::default() };
        self.programs.tables().set_device(self.ifindex, device)?;
        for (family, names) in FAMILIES.into_iter().enumerate() {
            self.client(ip(names.node)?, client::NODE)?;
            self.client(ip(names.pod)?, client::CLUSTER)?;
            self.services(u32::try_from(family)?, names)?;
        }
        Ok(())
    }

    fn configure(&mut self, config: Config) -> Result<()> {
        self.fake.config = config;
        Ok(self.programs.tables().set_config(config)?)
    }

    /// Packets inside others are sent, taken, both or neither.
    fn direct(&mut self, features: u32) -> Result<()> {
        let kept = self.fake.config.features & !(Config::DIRECT_ACCEPT | Config::DIRECT_SEND);
        self.configure(Config { features: kept | features, ..self.fake.config })
    }

    fn client(&mut self, address: Address, kind: u32) -> Result<()> {
        self.fake.clients.insert(address, kind);
        Ok(self.programs.tables().set_prefix(address, 128, kind)?)
    }

    /// Four backends, and a Service of each kind; each on its own last byte.
    fn services(&mut self, family: u32, names: Names) -> Result<()> {
        let base = family * 4;
        let service = ServiceId::new(u64::from(family) + 1);
        for i in 0..4 {
            let local = if i == 0 { Backend::LOCAL } else { 0 };
            let backend = Backend {
                address: ip(&format!("{}{}", names.backends, i + 1))?,
                port: Be16::from_host(if i == 3 { 80 } else { 8080 }),
                flags: Backend::IN_USE | local,
                service,
            };
            self.fake.backends.push(backend);
            self.fake.slots.push(BackendId(base + i));
            self.programs.tables().set_backend(BackendId(base + i), backend)?;
            self.programs.tables().set_slots(base + i, &[BackendId(base + i)])?;
            for service in [service, LocalKey::ANY].into_iter().filter(|_| i == 0) {
                let key = LocalKey { service, address: backend.address };
                self.fake.locals.insert(key, BackendId(base));
                self.programs.tables().set_local(&key, BackendId(base))?;
            }
        }
        let all = SlotRange { base, len: 4 };
        let remote = Frontend::MASQUERADE_REMOTE;
        for (last, range, flags) in [
            (1, all, Frontend::MASQUERADE_OUTSIDE),
            (2, all, remote),
            (3, SlotRange { base, len: 1 }, Frontend::OUTSIDE_LOCAL_SET),
            (4, SlotRange::default(), 0),
            (5, SlotRange::default(), Frontend::OUTSIDE_DROPS),
            (6, all, remote | Frontend::SOURCE_RANGES),
            (7, all, Frontend::MASQUERADE_ALL),
        ] {
            let address = ip(&format!("{}{last}", names.service))?;
            for protocol in [TCP, UDP, SCTP] {
                let id = FrontendId(family * 8 + last);
                let value =
                    Frontend { node: range, outside: range, id, service, affinity: 0, flags };
                self.frontend(FrontendKey::new(address, Be16::from_host(80), protocol), value)?;
            }
            self.frontend(address_key(address), Frontend::default())?;
        }
        for protocol in [TCP, UDP, SCTP] {
            let (id, node) = (FrontendId(family * 8), ip(names.node)?);
            let value =
                Frontend { node: all, outside: all, id, service, affinity: 0, flags: remote };
            self.frontend(FrontendKey::new(node, Be16::from_host(80), protocol), value)?;
        }
        let allowed = ip(&format!("{}1", names.clients))?;
        self.fake.source_ranges.insert((service, allowed), 1);
        let range = RangeData { service, address: allowed };
        Ok(self.programs.tables().set_source_range(range, 128)?)
    }

    fn frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<()> {
        self.fake.frontends.insert(key, value);
        Ok(self.programs.tables().set_frontend(key, value)?)
    }

    /// Both, and what they agree on.
    fn run(&mut self, hook: Hook, frame: &[u8]) -> Result<(Fate, Vec<u8>)> {
        let [a, b, c, d, e, f] = GATEWAY;
        let [g, h, i, j, k, l] = OWN;
        let way = Way {
            ethernet: [a, b, c, d, e, f, g, h, i, j, k, l],
            mtu: MTU,
            tells_mtu: !older_than(5, 12)?,
            own: [ip(FAMILIES[0].node)?, ip(FAMILIES[1].node)?],
        };
        let bytes = u64::try_from(frame.len())?;
        let traffic = Traffic { packets: 1, bytes };
        let device = Device::XDP_TX;
        let arrival = Arrival { hook, device, wrapped: false, now: 1, random: 0, traffic };
        let mut host = frame.to_vec();
        let fate = program::run(&self.fake, &arrival, &way, &mut host);
        let (returned, kernel) = self.programs.test_run(hook, self.ifindex, frame)?;
        let expected = match (hook, fate) {
            (Hook::Xdp, Fate::Next) => 2,
            (Hook::Xdp, Fate::Redirect) => 3,
            (Hook::Xdp, Fate::Drop) => 1,
            (_, Fate::Next) => u32::MAX,
            (_, Fate::Redirect) => 7,
            (_, Fate::Drop) => 2,
        };
        ensure!(
            returned == expected,
            "{hook:?} returned {returned}, on the host {fate:?}: {frame:02x?}"
        );
        // A packet that is dropped may be half changed.
        ensure!(
            fate == Fate::Drop || kernel == host,
            "{hook:?} {fate:?}: {frame:02x?}\nkernel {kernel:02x?}\nhost   {host:02x?}"
        );
        if check(frame).is_ok() && fate != Fate::Drop {
            check(&host).map_err(anyhow::Error::msg).with_context(|| format!("{host:02x?}"))?;
        }
        Ok((fate, host))
    }

    /// Flows (times aside), counters and drops.
    fn compare(&mut self) -> Result<()> {
        let timeless = |flow: Flow| Flow { seen: 0, ..flow };
        let kernel: HashMap<Tuple, Flow> =
            self.programs.tables().flows()?.into_iter().map(|(k, v)| (k, timeless(v))).collect();
        let host: HashMap<Tuple, Flow> =
            self.fake.flows.borrow().iter().map(|(k, v)| (*k, timeless(*v))).collect();
        for (key, flow) in &host {
            ensure!(kernel.get(key) == Some(flow), "{key:?}: {:?}, not {flow:?}", kernel.get(key));
        }
        ensure!(kernel.len() == host.len(), "{} flows, not {}", kernel.len(), host.len());
        for (id, expected) in &*self.fake.frontend_counters.borrow() {
            let counted = self.programs.tables().frontend_counters(*id)?;
            ensure!(counted == *expected, "{id:?}: {counted:?}, not {expected:?}");
        }
        for (id, expected) in &*self.fake.backend_counters.borrow() {
            let counted = self.programs.tables().backend_counters(*id)?;
            ensure!(counted == *expected, "{id:?}: {counted:?}, not {expected:?}");
        }
        for reason in Reason::ALL {
            let expected =
                self.fake.drops.borrow().iter().filter(|other| **other == reason).count();
            let counted = self.programs.tables().drops(reason)?;
            ensure!(counted == u64::try_from(expected)?, "{reason:?}: {counted}, not {expected}");
        }
        Ok(())
    }
}

/// A link with a gateway behind it that is the way to everywhere.
pub(super) fn link() -> Result<u32> {
    let hex = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let (own, gateway) = (hex(OWN), hex(GATEWAY));
    run("ip", &["link", "add", DEVICE, "address", &own, "type", "veth", "peer", "name", "rear0"])?;
    run("ip", &["link", "set", "rear0", "up"])?;
    run("ip", &["link", "set", DEVICE, "mtu", &MTU.to_string(), "up"])?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
    for names in FAMILIES {
        let (length, family) = if names.bits == 0 { (64, "-6") } else { (24, "-4") };
        let address = format!("{}/{length}", names.node);
        let mut add = vec!["address", "add", &address, "dev", DEVICE];
        if names.bits == 0 {
            add.push("nodad");
        }
        run("ip", &add)?;
        run("ip", &["neigh", "add", names.gateway, "lladdr", &gateway, "dev", DEVICE])?;
        run("ip", &[family, "route", "add", "default", "via", names.gateway, "dev", DEVICE])?;
    }
    Ok(nix::net::if_::if_nametoindex(DEVICE)?)
}

/// xorshift64: the same at every run, so that a failure is found again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or_default()
    }

    fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// From one of few clients to one of the Services, or near one.
    fn request(&mut self) -> Result<Frame> {
        let names = self.pick(&FAMILIES);
        let source = match self.below(6) {
            0 => names.pod.to_owned(),
            1 => names.node.to_owned(),
            n => format!("{}{n}", names.clients),
        };
        let destination = match self.below(9) {
            0 => names.node.to_owned(),
            n => format!("{}{n}", names.service),
        };
        let port = if self.one_in(12) { 81 } else { 80 };
        let tuple = Tuple {
            source: ip(&source)?,
            destination: ip(&destination)?,
            source_port: Be16::from_host(4000 + u16::try_from(self.below(20))?),
            destination_port: Be16::from_host(port),
            protocol: self.pick(&[TCP, TCP, UDP, UDP, SCTP]),
            pad: [0; 3],
        };
        Ok(self.dress(tuple))
    }

    fn dress(&mut self, tuple: Tuple) -> Frame {
        let length = if self.one_in(10) { 1490 } else { self.below(200) };
        let v4 = tuple.source.to_v4().is_some();
        let payload: Vec<u8> = (0..length).map(|_| self.next().to_le_bytes()[0]).collect();
        Frame {
            tcp_flags: self.pick(&[2, 16, 16, 24, 17, 1, 4, 18]),
            ttl: if self.one_in(10) { 1 } else { 64 },
            options: if self.one_in(4) { u8::try_from(self.below(3)).unwrap_or(0) } else { 0 },
            dont_fragment: !v4 || !self.one_in(3),
            id: u32::try_from(self.below(1000)).unwrap_or(0),
            unchecked: v4 && self.one_in(8),
            ..Frame::new(tuple, &payload)
        }
    }

    /// As another node sends it, to a backend of this one or to one near it; and what is inside.
    fn inside(&mut self, frame: &Frame) -> Result<Vec<u8>> {
        let names = self.pick(&FAMILIES);
        let to = format!("{}{}", names.backends, if self.one_in(6) { 2 } else { 1 });
        let mut frame = Frame { options: 0, ..frame.clone() };
        if frame.is_v4() != (names.bits != 0) {
            return Ok(frame.bytes());
        }
        // Another node's node port, whose address is this node's gateway.
        if self.one_in(3) {
            frame.tuple.destination = ip(names.gateway)?;
        }
        let source = self.pick(&[names.node, names.pod, names.gateway, names.gateway]);
        let outer = Tuple {
            source: ip(source)?,
            destination: ip(&to)?,
            source_port: direct::source_port(u32::try_from(self.next() >> 32)?),
            protocol: UDP,
            ..Tuple::default()
        };
        let mut bytes = frame.bytes();
        let mut headers = Headers::default();
        if parse::ethernet(&bytes.as_slice(), &mut headers).is_err() {
            return Ok(bytes);
        }
        let room = vec![0; direct::overhead(headers.version)];
        bytes.splice(ETHERNET..ETHERNET, room);
        let port = Be16::from_host(DIRECT_PORT);
        direct::wrap(&mut bytes, &outer, port, headers.version, headers.length)
            .context("no room")?;
        Ok(bytes)
    }

    /// A few bytes to other values, small ones preferred (they mean something); one frame
    /// in four also loses its end. Link and network header stay: the kernel runs nothing
    /// shorter.
    fn damage(&mut self, frame: &mut Vec<u8>) {
        for _ in 0..=self.below(3) {
            let place = 12 + self.below(frame.len() - 12);
            let value = self.next().to_le_bytes()[7];
            frame[place] = if self.one_in(2) { value % 64 } else { value };
        }
        if self.one_in(4) {
            let least = 14 + 40;
            frame.truncate(least + self.below(frame.len().saturating_sub(least).max(1)));
        }
    }
}

/// Thousands of frames: requests, the replies that fit them, ICMP errors about either,
/// fragments, and all of these damaged.
///
/// # Errors
/// The frame on which the two differ, or the entry.
pub fn packets() -> Result<()> {
    const ROUNDS: u64 = 6000;
    in_netns(|| {
        let mut pair = Pair::new()?;
        let mut random = Random(0x5eed);
        // Translated requests, which can be replied to.
        let mut seen: Vec<Frame> = Vec::new();
        // Requests that went on inside others, as they came.
        let mut sent: Vec<Frame> = Vec::new();
        let mut fates: BTreeMap<String, u32> = BTreeMap::new();
        for round in 0..ROUNDS {
            // Before kernel 5.14 a run at XDP cannot be told its device.
            let hooks = [Hook::Ingress, Hook::Ingress, Hook::Egress, Hook::Xdp];
            let hook = random.pick(if older_than(5, 14)? { &hooks[..3] } else { &hooks });
            if round % 500 == 0 {
                let (accept, send) = (Config::DIRECT_ACCEPT, Config::DIRECT_SEND);
                pair.direct(random.pick(&[0, accept, accept | send, accept | send]))?;
            }
            for mut frame in next(&mut random, &seen, &sent)? {
                if random.one_in(20) {
                    // Another machine's, or everybody's.
                    frame.1[0] = random.pick(&[0, 3]);
                }
                let damaged = random.one_in(8);
                let before = frame.1.clone();
                if damaged {
                    random.damage(&mut frame.1);
                }
                let (fate, bytes) =
                    pair.run(hook, &frame.1).with_context(|| format!("round {round}"))?;
                let what = match (is_wrapped(&frame.1), is_wrapped(&bytes)) {
                    _ if fate == Fate::Drop => "lost",
                    (false, true) => "wrapped",
                    (true, false) => "unwrapped",
                    _ if bytes == frame.1 => "same",
                    _ => "changed",
                };
                *fates.entry(format!("{} {hook:?} {fate:?} {what}", frame.0)).or_default() += 1;
                if frame.0 == "request" && !damaged && bytes != before && fate != Fate::Drop {
                    match what {
                        "wrapped" => remember(&mut sent, &before),
                        _ => remember(&mut seen, &bytes),
                    }
                }
            }
        }
        pair.compare()?;
        for (what, count) in &fates {
            println!("{count:6} {what}");
        }
        for needed in [
            "request Ingress Next changed",
            "request Ingress Redirect changed",
            "request Ingress Drop",
            "request Xdp Redirect changed",
            "reply Ingress Redirect changed",
            "reply Egress Next changed",
            "reply Xdp Redirect changed",
            "error Ingress Redirect changed",
            "error Egress Next changed",
            "fragment Ingress Redirect changed",
            // Inside other packets, and out of them.
            "request Ingress Redirect wrapped",
            "request Xdp Redirect wrapped",
            "fragment Ingress Redirect wrapped",
            "error Ingress Redirect wrapped",
            "inside Ingress Next unwrapped",
            "inside Ingress Redirect unwrapped",
            "inside Ingress Drop",
            "inside Ingress Next same",
            "inside Xdp Next same",
        ] {
            let count: u32 =
                fates.iter().filter(|(what, _)| what.starts_with(needed)).map(|(_, n)| n).sum();
            ensure!(count >= 10, "only {count} of \"{needed}\"");
        }
        Ok(())
    })
}

/// A frame, or the fragments of one, and of what kind.
fn next(
    random: &mut Random,
    seen: &[Frame],
    sent: &[Frame],
) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let frame = random.request()?;
    let known =
        if seen.is_empty() { frame.clone() } else { seen[random.below(seen.len())].clone() };
    Ok(match random.below(9) {
        0 | 1 => {
            let reply = random.dress(known.tuple.inverse());
            vec![("reply", reply.bytes())]
        }
        2 | 3 => {
            // About a request as the backend's side knows it, or about a reply.
            let about = match random.below(4) {
                0 | 1 => known,
                // What the other node sent to the client.
                2 if !sent.is_empty() => {
                    let request = &sent[random.below(sent.len())];
                    request.with(request.tuple.inverse())
                }
                _ => frame.with(frame.tuple.inverse()),
            };
            let about = Frame { options: 0, ..about };
            let v4 = about.is_v4();
            let kind = if v4 { [3, 4] } else { [2, 0] };
            let router = ip(if v4 { "198.18.0.1" } else { "2001:db8:9::1" })?;
            let quoted = if v4 { 28 } else { 48 } + random.below(60);
            vec![("error", icmp_error(router, &about, kind, quoted))]
        }
        4 => {
            let whole = Frame {
                dont_fragment: !frame.is_v4(),
                payload: vec![7; 100 + random.below(100)],
                ttl: 64,
                ..frame
            };
            let (cut, length) = (48, whole.transport_length());
            let part = |from, length| Frame { part: Some((from, length)), ..whole.clone() };
            let parts = [part(0, cut), part(cut, length - cut)];
            let mut made = Vec::new();
            for part in parts {
                made.push(("fragment", part.bytes()));
                made.push(("inside", random.inside(&part)?));
            }
            made
        }
        5 => vec![("inside", random.inside(&frame)?)],
        _ => vec![("request", frame.bytes())],
    })
}

fn is_wrapped(frame: &Vec<u8>) -> bool {
    let mut headers = Headers::default();
    parse::ethernet(&frame.as_slice(), &mut headers).is_ok()
        && direct::is_wrapped(frame, &headers, Be16::from_host(DIRECT_PORT))
}

fn remember(seen: &mut Vec<Frame>, bytes: &Vec<u8>) {
    let mut headers = Headers::default();
    let ours = parse::ethernet(&bytes.as_slice(), &mut headers).is_ok()
        && headers.kind == parse::Kind::Whole;
    if ours {
        seen.push(Frame::new(headers.tuple, b"payload"));
    }
}
