//! Object bytes to programs at their hooks.

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

use super::pins::{Pins, filter, filter_of};
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
    /// Allocated as used.
    pub prefixes: u32,
    pub source_ranges: u32,
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
            prefixes: 1 << 12,
            source_ranges: 1 << 14,
        }
    }
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
    /// What the maps have: those that were there already keep their size.
    ///
    /// # Errors
    /// They are not pinned.
    pub fn as_made(self, pins: &Pins) -> Result<Self, LoadError> {
        Ok(Self {
            frontends: pins.size(names::FRONTENDS)? / ENTRIES_PER_FRONTEND,
            slots: pins.size(names::SLOTS)?,
            backends: pins.size(names::BACKENDS)?,
            ..self
        })
    }
}

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
}

impl Programs {
    /// # Errors
    /// The object does not fit this daemon or this kernel, or a capability is missing.
    pub fn load(object: &[u8], capacity: Capacity) -> Result<Self, LoadError> {
        Self::load_with(object, capacity, None)
    }

    /// With maps that stay: those that are pinned already are taken over as they are.
    ///
    /// # Errors
    /// As [`Self::load`], or the maps cannot be pinned.
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
        let frontends_counted = counted::<FrontendCounters>(capacity.frontends)?;
        let backends_counted = counted::<BackendCounters>(capacity.backends)?;
        let mut loader = EbpfLoader::new();
        if let Some(pins) = pins {
            for name in names::PINNED {
                loader.map_pin_path(name, pins.map(name));
            }
        }
        let mut ebpf = loader
            .map_max_entries(names::FRONTENDS, capacity.frontends * ENTRIES_PER_FRONTEND)
            .map_max_entries(names::FRONTEND_COUNTERS, frontends_counted)
            .map_max_entries(names::SLOTS, capacity.slots)
            .map_max_entries(names::BACKENDS, capacity.backends)
            .map_max_entries(names::BACKEND_COUNTERS, backends_counted)
            .map_max_entries(names::FLOWS, capacity.flows)
            .map_max_entries(names::AFFINITY, capacity.affinities)
            .map_max_entries(names::FRAGMENTS, capacity.fragments)
            .map_max_entries(names::SOCKETS, capacity.sockets)
            .map_max_entries(names::PREFIXES, capacity.prefixes)
            .map_max_entries(names::SOURCE_RANGES, capacity.source_ranges)
            .override_global(names::CAN_SET_RETVAL, &can_set_retval, true)
            .load(object)
            .map_err(|e| LoadError::from_aya("create the eBPF maps", &e))?;
        for name in names::CGROUP {
            load::<CgroupSockAddr>(&mut ebpf, name, CgroupSockAddr::load)?;
        }
        for name in [names::TC_INGRESS, names::TC_EGRESS] {
            load::<SchedClassifier>(&mut ebpf, name, SchedClassifier::load)?;
        }
        load::<Xdp>(&mut ebpf, names::XDP_INGRESS, Xdp::load)?;
        let tables = Tables::take(&mut ebpf)?;
        Ok(Self { ebpf, tables })
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

/// Some that lack are told apart by nothing but the verifier, which then rejects programs that it
/// takes otherwise.
fn check_capabilities() -> Result<(), LoadError> {
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
