//! Programs at their hooks, and in the place of those of a daemon before this one.

use std::fs::File;
use std::path::Path;

use aya::Ebpf;
use aya::programs::cgroup_sock::CgroupSockLink;
use aya::programs::cgroup_sock_addr::CgroupSockAddrLink;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::{self, XdpLink};
use aya::programs::{
    CgroupAttachMode, CgroupSock, CgroupSockAddr, LinkOrder, ProgramError, SchedClassifier,
    TcAttachType, Xdp,
};
use nix::errno::Errno;
use proxy_ebpf::layout::names;

use super::super::LoadError;
use super::super::pins::{filter, filter_of};
use super::{Programs, program};
use crate::kernel::links::Frames;

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
    CgroupSock(CgroupSockLink),
    Tc(TcHook, SchedClassifierLink),
    Xdp(XdpLink),
}

impl Attachment {
    /// Leaves the program attached when this process ends, until `path` is removed (by
    /// [`Pins`](super::super::pins::Pins), since a clsact filter has nothing to pin).
    ///
    /// # Errors
    /// The path is not in a BPF file system, or taken.
    pub fn pin(self, path: &Path) -> Result<(), LoadError> {
        let failed = |e: &(dyn std::error::Error + 'static)| {
            LoadError::from_aya(format!("pin {}", path.display()), e)
        };
        let link = match self.link {
            AnyLink::Cgroup(link) => FdLink::try_from(link),
            AnyLink::CgroupSock(link) => FdLink::try_from(link),
            AnyLink::Tc(TcHook::Tcx, link) => FdLink::try_from(link),
            AnyLink::Tc(TcHook::Clsact, link) => return keep_filter(link, path),
            AnyLink::Xdp(link) => FdLink::try_from(link),
        };
        let link = link.map_err(|e| failed(&e))?;
        link.pin(path).map(drop).map_err(|e| failed(&e))
    }
}

/// What is pinned at `path`, of [`Pins::before`](super::super::pins::Pins::before).
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
pub(in super::super) fn detach_filter(program: &str, priority: u16, handle: u32, ifindex: u32) {
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

impl Programs {
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
            if name == names::SOCK_RELEASE {
                let program: &mut CgroupSock = program(&mut self.ebpf, name)?;
                let id = program.attach(&directory, CgroupAttachMode::Single).map_err(refused)?;
                let link = program.take_link(id).map_err(refused)?;
                return Ok(Attachment { link: AnyLink::CgroupSock(link) });
            }
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
        self.attach_tc_programs(interface, Frames::Ethernet, if both { &all } else { &all[..1] })
    }

    /// As [`Self::attach_tc`], these programs, of those for such packets.
    ///
    /// # Errors
    /// As there, or those programs are not loaded.
    pub fn attach_tc_programs(
        &mut self,
        interface: &str,
        frames: Frames,
        programs: &[&'static str],
    ) -> Result<(TcHook, Vec<Named>), LoadError> {
        let hook = tc_hook(interface)?;
        if hook == TcHook::Clsact {
            add_clsact(interface)?;
        }
        let attach = |&name: &&'static str| {
            Ok((name, self.attach_tc_at(interface, frames, hook, direction(name))?))
        };
        let attached: Result<Vec<Named>, LoadError> = programs.iter().map(attach).collect();
        Ok((hook, attached?))
    }

    fn attach_tc_at(
        &mut self,
        interface: &str,
        frames: Frames,
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
        let program: &mut SchedClassifier = program(self.of(frames)?, name)?;
        let id = program.attach_with_options(interface, direction, options).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        Ok(Attachment { link: AnyLink::Tc(hook, link) })
    }

    /// Puts `program`, one for devices, in the place of the one that a daemon before this one
    /// has attached: every packet meets one of them, and none both.
    ///
    /// # Errors
    /// What is pinned at `path` is attached no more, or the kernel refuses.
    pub fn replace(
        &mut self,
        name: &str,
        frames: Frames,
        path: &Path,
        ifindex: u32,
    ) -> Result<(), LoadError> {
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
        let program: &mut SchedClassifier = program(self.of(frames)?, name)?;
        let id = program.attach_to_link(link).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        match filter {
            // Dropping it would detach it.
            Some(_) => std::mem::forget(link),
            None => drop(link),
        }
        Ok(())
    }

    /// Tc's programs for such packets.
    fn of(&mut self, frames: Frames) -> Result<&mut Ebpf, LoadError> {
        match frames {
            Frames::Ethernet => Ok(&mut self.ebpf),
            Frames::Bare => self.bare.as_mut().ok_or_else(|| LoadError::Other {
                operation: "attach to a device without link headers".to_owned(),
                reason: "the programs for such devices are not loaded".to_owned(),
            }),
        }
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
}

fn at(program: &str, place: impl std::fmt::Display) -> String {
    format!("attach program {program} to {place}")
}

/// A kernel without tcx does not know the attach type, and says `EINVAL` to a query.
pub(super) fn tc_hook(interface: &str) -> Result<TcHook, LoadError> {
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
