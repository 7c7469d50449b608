//! Object bytes to programs at their hooks.

use std::fs::File;
use std::path::Path;

use aya::programs::cgroup_sock_addr::CgroupSockAddrLink;
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::{self, XdpLink};
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, LinkOrder, Program, ProgramError, ProgramType,
    SchedClassifier, TcAttachType, TestRun as _, TestRunOptions, Xdp,
};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader};
use nix::errno::Errno;
use proxy_ebpf::layout::names;
use proxy_ebpf::service::Hook;

use super::{LoadError, Tables, check_layout};

/// Sizes of the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Allocated as used; its counters are allocated at once, per CPU.
    pub frontends: u32,
    /// 4 bytes each, allocated at once.
    pub slots: u32,
    /// Allocated at once, their counters per CPU.
    pub backends: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self { frontends: 1 << 14, slots: 1 << 18, backends: 1 << 16 }
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
    /// Never read: it detaches when dropped.
    _link: AnyLink,
}

#[derive(Debug)]
enum AnyLink {
    Cgroup { _link: CgroupSockAddrLink },
    Tc { _link: SchedClassifierLink },
    Xdp { _link: XdpLink },
}

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
        check_layout(object)?;
        let can_set_retval = u8::from(can_set_retval()?);
        let mut ebpf = EbpfLoader::new()
            .map_max_entries(names::FRONTENDS, capacity.frontends)
            .map_max_entries(names::FRONTEND_COUNTERS, capacity.frontends)
            .map_max_entries(names::SLOTS, capacity.slots)
            .map_max_entries(names::BACKENDS, capacity.backends)
            .map_max_entries(names::BACKEND_COUNTERS, capacity.backends)
            .override_global(names::CAN_SET_RETVAL, &can_set_retval, true)
            .load(object)
            .map_err(|e| LoadError::from_aya("create the eBPF maps", &e))?;
        load::<CgroupSockAddr>(&mut ebpf, names::CONNECT4, CgroupSockAddr::load)?;
        load::<CgroupSockAddr>(&mut ebpf, names::CONNECT6, CgroupSockAddr::load)?;
        load::<SchedClassifier>(&mut ebpf, names::TC_INGRESS, SchedClassifier::load)?;
        load::<Xdp>(&mut ebpf, names::XDP_INGRESS, Xdp::load)?;
        let tables = Tables::take(&mut ebpf)?;
        Ok(Self { ebpf, tables })
    }

    pub const fn tables(&mut self) -> &mut Tables {
        &mut self.tables
    }

    /// Takes effect for `connect(2)` of every process in this cgroup and below. Other
    /// programs there keep running.
    ///
    /// # Errors
    /// Not a cgroup v2 directory, or the kernel refuses.
    pub fn attach_connect(&mut self, cgroup: &Path) -> Result<[Attachment; 2], LoadError> {
        let directory = File::open(cgroup)
            .map_err(|source| LoadError::Read { path: cgroup.to_owned(), source })?;
        let mut attach = |name| {
            let refused = |e: ProgramError| LoadError::from_aya(at(name, cgroup.display()), &e);
            // A link (kernel 5.7) always shares the cgroup with others, and the kernel takes
            // no flag that says so; aya's name for no flag is `Single`.
            let program: &mut CgroupSockAddr = program(&mut self.ebpf, name)?;
            let id = program.attach(&directory, CgroupAttachMode::Single).map_err(refused)?;
            let link = program.take_link(id).map_err(refused)?;
            Ok(Attachment { _link: AnyLink::Cgroup { _link: link } })
        };
        Ok([attach(names::CONNECT4)?, attach(names::CONNECT6)?])
    }

    /// For packets that come in by `interface` of the current network namespace.
    ///
    /// # Errors
    /// No such interface, or the kernel refuses.
    pub fn attach_tc(&mut self, interface: &str) -> Result<(TcHook, Attachment), LoadError> {
        let refused = |e: ProgramError| LoadError::from_aya(at(names::TC_INGRESS, interface), &e);
        let hook = tc_hook(interface)?;
        let options = match hook {
            TcHook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::default()),
            TcHook::Clsact => {
                add_clsact(interface)?;
                TcAttachOptions::Netlink(NlOptions::default())
            }
        };
        let program: &mut SchedClassifier = program(&mut self.ebpf, names::TC_INGRESS)?;
        let id = program
            .attach_with_options(interface, TcAttachType::Ingress, options)
            .map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        Ok((hook, Attachment { _link: AnyLink::Tc { _link: link } }))
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
        Ok(Attachment { _link: AnyLink::Xdp { _link: link } })
    }

    /// Runs the program of `hook` on one frame, with the tables as they are, attached to
    /// nothing (`BPF_PROG_TEST_RUN`): what it decides, and counts, is what it would for a
    /// packet from a device.
    ///
    /// # Errors
    /// The kernel refuses the frame: it takes none shorter than an Ethernet header.
    pub fn test_run(&mut self, hook: Hook, frame: &[u8]) -> Result<u32, LoadError> {
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::default() };
        let result = match hook {
            Hook::Tc => {
                program::<SchedClassifier>(&mut self.ebpf, names::TC_INGRESS)?.test_run(options)
            }
            Hook::Xdp => program::<Xdp>(&mut self.ebpf, names::XDP_INGRESS)?.test_run(options),
        };
        result
            .map(|result| result.return_value)
            .map_err(|e| LoadError::from_aya("run a program on a test packet", &e))
    }

    /// How many instructions the verifier went through for each program; `None` from
    /// kernels before 5.16, which do not say. Its limit is a million.
    ///
    /// # Errors
    /// The kernel refuses to tell.
    pub fn verified_instructions(&self) -> Result<Vec<(&'static str, Option<u32>)>, LoadError> {
        [names::CONNECT4, names::CONNECT6, names::TC_INGRESS, names::XDP_INGRESS]
            .into_iter()
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
