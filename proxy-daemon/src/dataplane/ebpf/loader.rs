//! Object bytes to programs at their hooks.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use aya::programs::{
    Program, ProgramError, ProgramType, SchedClassifier, TestRun as _, TestRunOptions,
    TestRunResult, Xdp,
};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader};
use nix::errno::Errno;
use proxy_ebpf::device::Hook;
use proxy_ebpf::layout::names;
use proxy_ebpf::parse::ETHERNET;
use tracing::info;

mod attach;
mod capacity;

pub(super) use self::attach::detach_filter;
pub use self::attach::{Attachment, TcHook, XdpMode};
pub use self::capacity::{Capacity, Limit};

use self::attach::tc_hook;
use self::capacity::GROWING;
use super::pins::{Pins, raw_pin};
use super::upgrade::MEMORY;
use super::{LoadError, Tables, capability, check_layout};

/// All programs, in the kernel and verified, with their maps.
#[derive(Debug)]
pub struct Programs {
    ebpf: Ebpf,
    /// Tc's programs for devices whose packets have no link header, when there is one.
    bare: Option<Ebpf>,
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
                        if there != *wanted && MEMORY.contains(&name) {
                            info!(
                                map = name,
                                entries = there,
                                wanted = *wanted,
                                "keeps its size until --cleanup or a reboot"
                            );
                        }
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
        load(&mut ebpf, |_| true)?;
        let tables = Tables::take(&mut ebpf)?;
        let sets_retval = can_set_retval != 0;
        Ok(Self { ebpf, bare: None, tables, made_maps, sets_retval, grown })
    }

    /// Loads tc's programs once more, with the same maps, for devices whose packets have no link
    /// header. Few nodes have one, and this takes memory and time, so it is done when asked for.
    ///
    /// # Errors
    /// As [`Self::load_pinned`], or `pins` are not those of these programs.
    pub fn load_bare(&mut self, object: &[u8], pins: &Pins) -> Result<(), LoadError> {
        if self.bare.is_some() {
            return Ok(());
        }
        let mut loader = EbpfLoader::new();
        for name in names::PINNED {
            let grown = self.grown.contains(&name);
            let path = if grown { pins.next(name) } else { pins.map(name) };
            if !path.exists() {
                let source = std::io::ErrorKind::NotFound.into();
                return Err(LoadError::Read { path, source });
            }
            loader.map_pin_path(name, path);
        }
        let all = u32::try_from(ETHERNET).unwrap_or_default();
        let mut bare = loader
            .override_global(names::MISSING_HEADER, &all, true)
            .load(object)
            .map_err(|e| LoadError::from_aya("open the eBPF maps", &e))?;
        load(&mut bare, |name| [names::TC_INGRESS, names::TC_EGRESS].contains(&name))?;
        self.bare = Some(bare);
        Ok(())
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
    /// kernels before 5.16, which do not say. Its limit is a million. Last are those of
    /// [`Self::load_bare`].
    ///
    /// # Errors
    /// The kernel refuses to tell.
    pub fn verified_instructions(&self) -> Result<Vec<(&'static str, Option<u32>)>, LoadError> {
        let tc = [names::TC_INGRESS, names::TC_EGRESS];
        let all = names::CGROUP.into_iter().chain(tc).chain([names::XDP_INGRESS]);
        let of_bare = self.bare.iter().flat_map(|bare| tc.map(|name| (bare, name)));
        all.map(|name| (&self.ebpf, name))
            .chain(of_bare)
            .map(|(ebpf, name)| {
                let program = ebpf.program(name).ok_or_else(|| no_program(name))?;
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

/// Has the kernel verify programs, all at once: that is most of what a start takes, and each of
/// tc's and XDP's is a CPU's work for a while.
fn load(ebpf: &mut Ebpf, wanted: impl Fn(&str) -> bool) -> Result<(), LoadError> {
    std::thread::scope(|scope| {
        let mut loading = Vec::new();
        for (name, program) in ebpf.programs_mut().filter(|(name, _)| wanted(name)) {
            let thread = std::thread::Builder::new().name(format!("load {name}"));
            let thread = thread.spawn_scoped(scope, move || load_one(name, program));
            loading.push(thread.map_err(|e| LoadError::from_aya("start a thread", &e))?);
        }
        loading.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

fn load_one(name: &str, program: &mut Program) -> Result<(), LoadError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
    .map_err(|e| LoadError::from_program_load(name, &e))
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
