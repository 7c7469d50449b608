//! Object bytes to programs at their hooks.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use aya::programs::cgroup_sock_addr::CgroupSockAddrLink;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::{self, XdpLink};
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, LinkOrder, Program, ProgramError, ProgramType,
    SchedClassifier, TcAttachType, TestRun as _, TestRunOptions, TestRunResult, Xdp,
};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::util::nr_cpus;
use aya::{Ebpf, EbpfLoader};
use nix::errno::Errno;
use proxy_ebpf::device::Hook;
use proxy_ebpf::layout::{BackendCounters, FrontendCounters, names};

use super::pins::{Pins, filter, filter_of, raw_pin};
use super::plane::{Growing, Shortage};
use super::{LoadError, Tables, capability, check_layout};

/// Sizes of the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Addresses with a port. Allocated as used.
    pub frontends: u32,
    /// 4 bytes each, allocated at once.
    pub slots: u32,
    /// 24 bytes each, allocated at once.
    pub backends: u32,
    /// Entries of the tables that make room by themselves, allocated at once: two for each
    /// flow (about 190 bytes each), and one for each client with affinity, datagram in
    /// pieces, and socket with a peer.
    pub flows: u32,
    pub affinities: u32,
    pub fragments: u32,
    pub sockets: u32,
    /// Allocated as used: these are bounds.
    pub prefixes: u32,
    pub source_ranges: u32,
    pub devices: u32,
    pub opt_outs: u32,
    pub locals: u32,
    /// As many of each, the lowest, have counters at most: they cannot be exchanged while
    /// programs count.
    pub counted_frontends: u32,
    pub counted_backends: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            // 44,000 Services with 6 endpoints each, or 5,000 with 50, in 12 MiB.
            frontends: 1 << 16,
            slots: 1 << 19,
            backends: 5 << 16,
            flows: 1 << 17,
            affinities: 1 << 15,
            fragments: 1 << 12,
            sockets: 1 << 16,
            prefixes: 1 << 16,
            source_ranges: 1 << 20,
            devices: 1 << 14,
            opt_outs: 1 << 14,
            locals: 1 << 16,
            counted_frontends: Self::LIMIT.frontends,
            counted_backends: Self::LIMIT.backends,
        }
    }
}

/// Sizes of the maps that grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub frontends: u32,
    pub slots: u32,
    pub backends: u32,
}

/// In `FRONTENDS`: the frontend itself, and that its address is a Service's. Many share one
/// address, none has two.
const ENTRIES_PER_FRONTEND: u32 = 2;

/// For the counters of frontends, and for those of backends: every CPU has its own, allocated
/// at once, and machines have hundreds.
const COUNTERS_BYTES: usize = 16 << 20;

/// How many ids, the lowest, have counters. Low ones are taken first.
fn counted<T>(ids: u32) -> Result<u32, LoadError> {
    let cpus = nr_cpus().map_err(|(path, source)| LoadError::Read { path: path.into(), source })?;
    let room = COUNTERS_BYTES / (size_of::<T>() * cpus.max(1));
    Ok(u32::try_from(room).map_or(ids, |room| room.min(ids)))
}

impl Capacity {
    /// What maps grow to unless something else is said: 180 MiB, and what frontends take.
    pub const LIMIT: Limit = Limit { frontends: 1 << 20, slots: 1 << 24, backends: 1 << 22 };

    /// No smaller than the maps that are there: they keep their size, or grow.
    ///
    /// # Errors
    /// The kernel refuses to tell their size.
    pub fn at_least(self, pins: &Pins) -> Result<Self, LoadError> {
        let of = |name, asked: u32, each: u32| {
            Ok::<_, LoadError>(asked.max(pins.size(name)?.unwrap_or(0) / each))
        };
        Ok(Self {
            frontends: of(names::FRONTENDS, self.frontends, ENTRIES_PER_FRONTEND)?,
            slots: of(names::SLOTS, self.slots, 1)?,
            backends: of(names::BACKENDS, self.backends, 1)?,
            ..self
        })
    }

    /// With room for what is short: twice as much, as often as it takes. `None` when that is
    /// more than the limit.
    #[must_use]
    pub fn grown(self, shortage: Shortage, limit: Limit) -> Option<Self> {
        let more = |size: u32, limit: u32| {
            let wanted = size.checked_add(shortage.needed).filter(|wanted| *wanted <= limit)?;
            let mut grown = size.max(1);
            while grown < wanted {
                grown = grown.checked_mul(2)?;
            }
            // What was free is in pieces, or rests: all that is needed comes new.
            Some(grown.min(limit))
        };
        let mut grown = self;
        let (size, limit) = match shortage.map {
            Growing::Frontends => (&mut grown.frontends, limit.frontends),
            Growing::Slots => (&mut grown.slots, limit.slots),
            Growing::Backends => (&mut grown.backends, limit.backends),
        };
        *size = more(*size, limit)?;
        Some(grown)
    }

    /// The size of one that grows.
    #[must_use]
    pub const fn of(&self, map: Growing) -> u32 {
        match map {
            Growing::Frontends => self.frontends,
            Growing::Slots => self.slots,
            Growing::Backends => self.backends,
        }
    }

    /// Entries of the maps in the kernel.
    fn entries(&self) -> Result<[(&'static str, u32); 14], LoadError> {
        let counted_frontends = self.counted_frontends.max(self.frontends);
        let counted_backends = self.counted_backends.max(self.backends);
        Ok([
            (names::FRONTENDS, self.frontends.saturating_mul(ENTRIES_PER_FRONTEND)),
            (names::FRONTEND_COUNTERS, counted::<FrontendCounters>(counted_frontends)?),
            (names::SLOTS, self.slots),
            (names::BACKENDS, self.backends),
            (names::BACKEND_COUNTERS, counted::<BackendCounters>(counted_backends)?),
            (names::FLOWS, self.flows),
            (names::AFFINITY, self.affinities),
            (names::FRAGMENTS, self.fragments),
            (names::SOCKETS, self.sockets),
            (names::PREFIXES, self.prefixes),
            (names::SOURCE_RANGES, self.source_ranges),
            (names::DEVICES, self.devices),
            (names::OPT_OUTS, self.opt_outs),
            (names::LOCALS, self.locals),
        ])
    }
}

/// Maps that only the daemon writes, so that larger ones can take their place.
const GROWING: [&str; 8] = [
    names::FRONTENDS,
    names::SLOTS,
    names::BACKENDS,
    names::PREFIXES,
    names::SOURCE_RANGES,
    names::DEVICES,
    names::OPT_OUTS,
    names::LOCALS,
];

/// Which of the kernel's two ways a tc program is attached by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcHook {
    /// A link, ordered among others; kernel 6.6.
    Tcx,
    /// A filter at a clsact qdisc. The qdisc stays after detaching: others may use it.
    Clsact,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver where it can, else generic.
    Auto,
    Native,
    Generic,
}

/// A program at a hook; dropping it detaches. A clsact filter is found by interface
/// index, so drop it in the network namespace it was made in.
#[derive(Debug)]
#[must_use = "dropping it detaches the program"]
pub struct Attachment {
    link: AnyLink,
}

#[derive(Debug)]
enum AnyLink {
    Cgroup(CgroupSockAddrLink),
    Tc(TcHook, SchedClassifierLink),
    Xdp(XdpLink),
}

impl Attachment {
    /// Leaves the program attached when this process ends, until `path` is removed (by
    /// [`Pins`], since a clsact filter has nothing to pin).
    ///
    /// # Errors
    /// The path is not in a BPF file system, or taken.
    pub fn pin(self, path: &Path) -> Result<(), LoadError> {
        let failed = |e: &(dyn std::error::Error + 'static)| {
            LoadError::from_aya(format!("pin {}", path.display()), e)
        };
        let link = match self.link {
            AnyLink::Cgroup(link) => FdLink::try_from(link),
            AnyLink::Tc(TcHook::Tcx, link) => FdLink::try_from(link),
            AnyLink::Tc(TcHook::Clsact, link) => return keep_filter(link, path),
            AnyLink::Xdp(link) => FdLink::try_from(link),
        };
        let link = link.map_err(|e| failed(&e))?;
        link.pin(path).map(drop).map_err(|e| failed(&e))
    }
}

/// What is pinned at `path`, of [`Pins::before`].
fn pinned<L: TryFrom<FdLink>>(path: &Path) -> Result<L, LoadError> {
    let open = || format!("open the link {}", path.display());
    let link = PinnedLink::from_pin(path).map_err(|e| LoadError::from_aya(open(), &e))?;
    L::try_from(link.into())
        .map_err(|_| LoadError::Other { operation: open(), reason: "it is of another kind".into() })
}

fn keep_filter(link: SchedClassifierLink, path: &Path) -> Result<(), LoadError> {
    let failed = |e: ProgramError| LoadError::from_aya("ask for a clsact filter's handle", &e);
    let priority = link.priority().map_err(failed)?;
    let handle = link.handle().map_err(failed)?;
    let path = filter(path, priority, handle.into());
    std::fs::create_dir(&path).map_err(|source| LoadError::Read { path, source })?;
    // Dropping it would detach it.
    std::mem::forget(link);
    Ok(())
}

fn direction(program: &str) -> TcAttachType {
    match program {
        names::TC_EGRESS => TcAttachType::Egress,
        _ => TcAttachType::Ingress,
    }
}

/// Removes a clsact filter of a daemon that is no more. Gone with its device, or removed by
/// somebody else, is as good.
pub(super) fn detach_filter(program: &str, priority: u16, handle: u32, ifindex: u32) {
    drop(attached_filter(program, priority, handle, ifindex));
}

fn attached_filter(
    program: &str,
    priority: u16,
    handle: u32,
    ifindex: u32,
) -> Result<SchedClassifierLink, LoadError> {
    let gone = |source: std::io::Error| LoadError::Read { path: program.into(), source };
    let interface = nix::net::if_::if_indextoname(ifindex).map_err(|errno| gone(errno.into()))?;
    let interface = interface.to_string_lossy().into_owned();
    SchedClassifierLink::attached(&interface, direction(program), priority, handle.into(), None)
        .map_err(gone)
}

/// A program's name, and where it is attached.
pub type Named = (&'static str, Attachment);

/// All programs, in the kernel and verified, with their maps.
#[derive(Debug)]
pub struct Programs {
    ebpf: Ebpf,
    tables: Tables,
    made_maps: bool,
    sets_retval: bool,
    /// Maps of theirs that are larger copies of those that are pinned.
    grown: Vec<&'static str>,
}

impl Programs {
    /// # Errors
    /// The object does not fit this daemon or this kernel, or a capability is missing.
    pub fn load(object: &[u8], capacity: Capacity) -> Result<Self, LoadError> {
        Self::load_with(object, capacity, None)
    }

    /// With maps that stay: those that are pinned already are taken over as they are. Of those
    /// that are too small there is a larger copy, which is nobody else's until
    /// [`Self::settle`]; nothing may be written to the old one meanwhile.
    ///
    /// # Errors
    /// As [`Self::load`], or the maps cannot be pinned, or there is no memory for larger ones.
    pub fn load_pinned(object: &[u8], capacity: Capacity, pins: &Pins) -> Result<Self, LoadError> {
        Self::load_with(object, capacity, Some(pins))
    }

    fn load_with(
        object: &[u8],
        capacity: Capacity,
        pins: Option<&Pins>,
    ) -> Result<Self, LoadError> {
        check_layout(object)?;
        check_capabilities()?;
        let can_set_retval = u8::from(can_set_retval()?);
        let made_maps = pins.is_none_or(|pins| !pins.map(names::FRONTEND_COUNTERS).exists());
        let mut entries: BTreeMap<&'static str, u32> = capacity.entries()?.into_iter().collect();
        let mut grown = Vec::new();
        let mut loader = EbpfLoader::new();
        if let Some(pins) = pins {
            pins.clear_next()?;
            for name in names::PINNED {
                let there = pins.size(name)?;
                let too_small = there.zip(entries.get_mut(name)).is_some_and(|(there, wanted)| {
                    let grows = GROWING.contains(&name) && there < *wanted;
                    if !grows {
                        *wanted = there;
                    }
                    grows
                });
                if too_small {
                    grown.push(name);
                }
                let path = if too_small { pins.next(name) } else { pins.map(name) };
                loader.map_pin_path(name, path);
            }
        }
        for (name, entries) in entries {
            loader.map_max_entries(name, entries);
        }
        let mut ebpf = loader
            .override_global(names::CAN_SET_RETVAL, &can_set_retval, true)
            .load(object)
            .map_err(|e| LoadError::from_aya("create the eBPF maps", &e))?;
        if let Some(pins) = pins {
            for name in &grown {
                copy(name, &pins.map(name), &pins.next(name))?;
            }
        }
        for name in names::CGROUP {
            load::<CgroupSockAddr>(&mut ebpf, name, CgroupSockAddr::load)?;
        }
        for name in [names::TC_INGRESS, names::TC_EGRESS] {
            load::<SchedClassifier>(&mut ebpf, name, SchedClassifier::load)?;
        }
        load::<Xdp>(&mut ebpf, names::XDP_INGRESS, Xdp::load)?;
        let tables = Tables::take(&mut ebpf)?;
        let sets_retval = can_set_retval != 0;
        Ok(Self { ebpf, tables, made_maps, sets_retval, grown })
    }

    /// The larger copies take the place of the maps that they were made of. Both hold the same:
    /// whoever ends in between leaves whole maps, old or new ones.
    ///
    /// # Errors
    /// They cannot be renamed.
    pub fn settle(&mut self, pins: &Pins) -> Result<Vec<&'static str>, LoadError> {
        let grown = std::mem::take(&mut self.grown);
        grown.iter().try_for_each(|name| pins.take_next(name))?;
        Ok(grown)
    }

    /// Whether the maps were made for this process, and not taken over.
    #[must_use]
    pub const fn made_maps(&self) -> bool {
        self.made_maps
    }

    /// Whether a refused caller gets the right errno by itself.
    #[must_use]
    pub const fn sets_retval(&self) -> bool {
        self.sets_retval
    }

    /// How programs will be attached to devices, as asked at the loopback device.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn tc_hook() -> Result<TcHook, LoadError> {
        tc_hook("lo")
    }

    pub const fn tables(&mut self) -> &mut Tables {
        &mut self.tables
    }

    #[must_use]
    pub const fn tables_ref(&self) -> &Tables {
        &self.tables
    }

    /// Takes effect for the sockets of every process in this cgroup and below. Other
    /// programs there keep running.
    ///
    /// # Errors
    /// Not a cgroup v2 directory, or the kernel refuses.
    pub fn attach_sockets(&mut self, cgroup: &Path) -> Result<Vec<Attachment>, LoadError> {
        let directory = File::open(cgroup)
            .map_err(|source| LoadError::Read { path: cgroup.to_owned(), source })?;
        let mut attach = |name| {
            let refused = |e: ProgramError| LoadError::from_aya(at(name, cgroup.display()), &e);
            // A link (kernel 5.7) always shares the cgroup with others, and the kernel takes
            // no flag that says so; aya's name for no flag is `Single`.
            let program: &mut CgroupSockAddr = program(&mut self.ebpf, name)?;
            let id = program.attach(&directory, CgroupAttachMode::Single).map_err(refused)?;
            let link = program.take_link(id).map_err(refused)?;
            Ok(Attachment { link: AnyLink::Cgroup(link) })
        };
        names::CGROUP.into_iter().map(&mut attach).collect()
    }

    /// For packets that go out and, with `both`, come in by `interface` of the current network
    /// namespace; each with the program's name.
    ///
    /// # Errors
    /// No such interface, or the kernel refuses.
    pub fn attach_tc(
        &mut self,
        interface: &str,
        both: bool,
    ) -> Result<(TcHook, Vec<Named>), LoadError> {
        // First what undoes translations, then what makes them.
        let all = [names::TC_EGRESS, names::TC_INGRESS];
        self.attach_tc_programs(interface, if both { &all } else { &all[..1] })
    }

    /// As [`Self::attach_tc`], these programs.
    ///
    /// # Errors
    /// As there.
    pub fn attach_tc_programs(
        &mut self,
        interface: &str,
        programs: &[&'static str],
    ) -> Result<(TcHook, Vec<Named>), LoadError> {
        let hook = tc_hook(interface)?;
        if hook == TcHook::Clsact {
            add_clsact(interface)?;
        }
        let attach =
            |&name: &&'static str| Ok((name, self.attach_tc_at(interface, hook, direction(name))?));
        let attached: Result<Vec<Named>, LoadError> = programs.iter().map(attach).collect();
        Ok((hook, attached?))
    }

    fn attach_tc_at(
        &mut self,
        interface: &str,
        hook: TcHook,
        direction: TcAttachType,
    ) -> Result<Attachment, LoadError> {
        let name = match direction {
            TcAttachType::Egress => names::TC_EGRESS,
            _ => names::TC_INGRESS,
        };
        let refused = |e: ProgramError| LoadError::from_aya(at(name, interface), &e);
        let options = match hook {
            TcHook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::default()),
            TcHook::Clsact => TcAttachOptions::Netlink(NlOptions::default()),
        };
        let program: &mut SchedClassifier = program(&mut self.ebpf, name)?;
        let id = program.attach_with_options(interface, direction, options).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        Ok(Attachment { link: AnyLink::Tc(hook, link) })
    }

    /// Puts `program`, one for devices, in the place of the one that a daemon before this one
    /// has attached: every packet meets one of them, and none both.
    ///
    /// # Errors
    /// What is pinned at `path` is attached no more, or the kernel refuses.
    pub fn replace(&mut self, name: &str, path: &Path, ifindex: u32) -> Result<(), LoadError> {
        let refused = |e: ProgramError| LoadError::from_aya(at(name, path.display()), &e);
        if name == names::XDP_INGRESS {
            let link = pinned::<XdpLink>(path)?;
            let program: &mut Xdp = program(&mut self.ebpf, name)?;
            let id = program.attach_to_link(link).map_err(refused)?;
            // The pin holds it.
            return program.take_link(id).map(drop).map_err(refused);
        }
        let filter = filter_of(path);
        let link = match filter {
            Some((priority, handle)) => attached_filter(name, priority, handle, ifindex)?,
            None => pinned::<SchedClassifierLink>(path)?,
        };
        let program: &mut SchedClassifier = program(&mut self.ebpf, name)?;
        let id = program.attach_to_link(link).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        match filter {
            // Dropping it would detach it.
            Some(_) => std::mem::forget(link),
            None => drop(link),
        }
        Ok(())
    }

    /// For packets that come in by `interface` of the current network namespace.
    ///
    /// # Errors
    /// No such interface, the driver lacks the mode, or the kernel refuses.
    pub fn attach_xdp(&mut self, interface: &str, mode: XdpMode) -> Result<Attachment, LoadError> {
        let refused = |e: ProgramError| LoadError::from_aya(at(names::XDP_INGRESS, interface), &e);
        let mode = match mode {
            XdpMode::Auto => xdp::XdpMode::Default,
            XdpMode::Native => xdp::XdpMode::Driver,
            XdpMode::Generic => xdp::XdpMode::Skb,
        };
        let program: &mut Xdp = program(&mut self.ebpf, names::XDP_INGRESS)?;
        let id = program.attach(interface, mode).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        Ok(Attachment { link: AnyLink::Xdp(link) })
    }

    /// Runs the program of `hook` on one frame, as if it came by the device `ifindex` of the
    /// current network namespace, with the tables as they are, attached to nothing
    /// (`BPF_PROG_TEST_RUN`): what it returns, and what it made of the frame.
    ///
    /// # Errors
    /// The kernel refuses the frame: it takes none shorter than an Ethernet header.
    pub fn test_run(
        &mut self,
        hook: Hook,
        ifindex: u32,
        frame: &[u8],
    ) -> Result<(u32, Vec<u8>), LoadError> {
        // An answer is longer than the question by two headers at most.
        let mut output = vec![0; frame.len() + 64];
        let result = self.run_program(hook, ifindex, frame, 1, Some(&mut output))?;
        output.truncate(result.data_size_out as usize);
        Ok((result.return_value, output))
    }

    /// Runs it `repeat` times on the same frame, which stays as the time before left it: what it
    /// returns at last, and how long one run takes on average, as the kernel measures it.
    ///
    /// # Errors
    /// As [`Self::test_run`].
    pub fn time(
        &mut self,
        hook: Hook,
        ifindex: u32,
        frame: &[u8],
        repeat: u32,
    ) -> Result<(u32, Duration), LoadError> {
        let result = self.run_program(hook, ifindex, frame, repeat, None)?;
        Ok((result.return_value, result.duration))
    }

    fn run_program(
        &mut self,
        hook: Hook,
        ifindex: u32,
        frame: &[u8],
        repeat: u32,
        output: Option<&mut [u8]>,
    ) -> Result<TestRunResult, LoadError> {
        let context = context(hook, ifindex, frame.len());
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: output,
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::default()
        };
        let result = match hook {
            Hook::Ingress => {
                program::<SchedClassifier>(&mut self.ebpf, names::TC_INGRESS)?.test_run(options)
            }
            Hook::Egress => {
                program::<SchedClassifier>(&mut self.ebpf, names::TC_EGRESS)?.test_run(options)
            }
            Hook::Xdp => program::<Xdp>(&mut self.ebpf, names::XDP_INGRESS)?.test_run(options),
        };
        result.map_err(|e| LoadError::from_aya("test run a program", &e))
    }

    /// How many instructions the verifier went through for each program; `None` from
    /// kernels before 5.16, which do not say. Its limit is a million.
    ///
    /// # Errors
    /// The kernel refuses to tell.
    pub fn verified_instructions(&self) -> Result<Vec<(&'static str, Option<u32>)>, LoadError> {
        names::CGROUP
            .into_iter()
            .chain([names::TC_INGRESS, names::TC_EGRESS, names::XDP_INGRESS])
            .map(|name| {
                let program = self.ebpf.program(name).ok_or_else(|| no_program(name))?;
                let info = program
                    .info()
                    .map_err(|e| LoadError::from_aya(format!("ask about program {name}"), &e))?;
                Ok((name, info.verified_instruction_count()))
            })
            .collect()
    }
}

/// All entries of one pinned map into another one.
fn copy(name: &str, from: &Path, to: &Path) -> Result<(), LoadError> {
    let refused =
        |errno| LoadError::Kernel { operation: format!("copy map {name}"), errno, hint: "" };
    let (from, to) = (raw_pin(from)?, raw_pin(to)?);
    let mut result = Ok(());
    from.read(|keys, values| {
        if result.is_ok() {
            result = to.update(keys, values);
        }
    })
    .map_err(refused)?;
    result.map_err(refused)
}

/// As much of `__sk_buff` or `xdp_md` as says by which device the frame came
/// (`include/uapi/linux/bpf.h`).
fn context(hook: Hook, ifindex: u32, length: usize) -> Vec<u8> {
    let (size, place) = if hook == Hook::Xdp { (24, 12) } else { (44, 40) };
    let mut context = vec![0; size];
    if hook == Hook::Xdp {
        let end = u32::try_from(length).unwrap_or(u32::MAX);
        context[4..8].copy_from_slice(&end.to_ne_bytes());
    }
    context[place..place + 4].copy_from_slice(&ifindex.to_ne_bytes());
    context
}

fn at(program: &str, place: impl std::fmt::Display) -> String {
    format!("attach program {program} to {place}")
}

fn no_program(name: &str) -> LoadError {
    LoadError::Object(format!("it has no program {name}"))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, LoadError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or_else(|| no_program(name))?;
    program.try_into().map_err(|e| LoadError::Object(format!("program {name}: {e}")))
}

fn load<P>(
    ebpf: &mut Ebpf,
    name: &str,
    load: fn(&mut P) -> Result<(), ProgramError>,
) -> Result<(), LoadError>
where
    for<'a> &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    load(program(ebpf, name)?).map_err(|e| LoadError::from_program_load(name, &e))
}

/// Whether this process may load the programs. Some capabilities are missed by nobody but the
/// verifier, which then rejects programs that it takes otherwise.
///
/// # Errors
/// Names those that are missing.
pub fn check_capabilities() -> Result<(), LoadError> {
    let missing = capability::missing();
    if missing.is_empty() {
        return Ok(());
    }
    let errno = crate::kernel::netlink::Errno(Errno::EPERM as i32);
    Err(LoadError::Permission { operation: "load eBPF programs".into(), missing, errno })
}

/// Whether a program at connect can choose the errno that its caller sees: asked of the
/// kernel, since distributions carry it further back than its version 5.18.
fn can_set_retval() -> Result<bool, LoadError> {
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)
        .map_err(|e| LoadError::from_aya("probe the kernel for eBPF helpers", &e))
}

/// A kernel without tcx does not know the attach type, and says `EINVAL` to a query.
fn tc_hook(interface: &str) -> Result<TcHook, LoadError> {
    match SchedClassifier::query_tcx(interface, TcAttachType::Ingress) {
        Ok(_) => Ok(TcHook::Tcx),
        Err(e) => match LoadError::from_aya(format!("ask for tcx programs of {interface}"), &e) {
            e if e.errno().is_some_and(|errno| errno.0 == Errno::EINVAL as i32) => {
                Ok(TcHook::Clsact)
            }
            e => Err(e),
        },
    }
}

fn add_clsact(interface: &str) -> Result<(), LoadError> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => Ok(()),
        Err(e) => match LoadError::from_aya(format!("add a clsact qdisc to {interface}"), &e) {
            e if e.errno().is_some_and(|errno| errno.0 == Errno::EEXIST as i32) => Ok(()),
            e => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_double_as_often_as_it_takes_and_no_further_than_their_limit() {
        let capacity = Capacity { backends: 6, slots: 1, ..Capacity::default() };
        let limit = Limit { backends: 40, slots: 1 << 24, frontends: 65_536 };
        let grown = |map, needed| {
            let grown = capacity.grown(Shortage { map, needed }, limit)?;
            // No other map changes.
            let others = Growing::ALL.into_iter().filter(|other| *other != map);
            others.for_each(|other| assert_eq!(grown.of(other), capacity.of(other)));
            Some(grown.of(map))
        };
        assert_eq!(grown(Growing::Backends, 1), Some(12));
        assert_eq!(grown(Growing::Backends, 7), Some(24));
        assert_eq!(grown(Growing::Backends, 34), Some(40));
        assert_eq!(grown(Growing::Backends, 35), None);
        assert_eq!(grown(Growing::Backends, u32::MAX), None);
        assert_eq!(grown(Growing::Slots, 131_071), Some(131_072));
        assert_eq!(grown(Growing::Frontends, 1), None);
    }
}
