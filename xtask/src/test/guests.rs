//! The tests that run in guests.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use super::binaries::{Binaries, Suite, TestBinary};
use super::link;
use super::tally::{self, Report, Tally};
use crate::guest::{Kernel, Spec};

/// All guest tests on one kernel, under emulation, on a busy machine.
const GUEST_TIMEOUT: Duration = Duration::from_secs(2700);

/// The guest tests, on one kernel or on several at once. Guests that run beside each other get one
/// processor each: emulated processors that wait for each other cost this machine nearly twice the
/// time. A kernel that is tested alone has two.
pub struct Guests<'a> {
    pub binaries: &'a Binaries,
    pub run_dir: &'a Path,
    pub filter: Option<&'a str>,
    pub env: &'a [(String, OsString)],
    pub several: bool,
}

/// Of one test binary on one kernel.
struct Outcome<'a> {
    binary: &'a TestBinary,
    tally: Tally,
    /// Names, unless the binary or the guest ended without a result.
    failures: Vec<String>,
}

impl Guests<'_> {
    /// # Errors
    /// When a kernel or a binary cannot be had.
    pub fn run(&self, kernels: &[Kernel], report: &mut Report) -> Result<()> {
        let outcomes = std::thread::scope(|scope| {
            let run = |kernel: Kernel| scope.spawn(move || self.on(kernel));
            let threads: Vec<_> = kernels.iter().map(|kernel| (*kernel, run(*kernel))).collect();
            let join = |(kernel, thread): (Kernel, std::thread::ScopedJoinHandle<'_, _>)| {
                let outcomes: Result<Vec<Outcome<'_>>> =
                    thread.join().unwrap_or_else(|_| bail!("the thread of a guest panicked"));
                outcomes.map(|outcomes| (kernel, outcomes))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        for (kernel, outcomes) in outcomes {
            for mut outcome in outcomes {
                if self.several {
                    self.once_more(&mut outcome, kernel, report)?;
                }
                report.add(tally::Kind::Guest(kernel), false, outcome.tally);
            }
        }
        Ok(())
    }

    /// What failed beside another guest, alone. What passes now is told in the summary.
    fn once_more(&self, of: &mut Outcome<'_>, kernel: Kernel, report: &mut Report) -> Result<()> {
        if of.failures.is_empty() {
            return Ok(());
        }
        println!("once more on {kernel}, alone: {}", of.failures.join(", "));
        let mut arguments = vec!["--exact".into()];
        arguments.extend(of.failures.iter().map(OsString::from));
        let again = self.start(of.binary, kernel, arguments, &of.failures)?;
        if again.failures.is_empty() && again.tally.failed() > 0 {
            return Ok(());
        }
        for name in of.failures.iter().filter(|name| !again.failures.contains(name)) {
            of.tally.passes_after_all(name);
            report.unsteady(format!("{kernel} {name}"));
        }
        Ok(())
    }

    fn on(&self, kernel: Kernel) -> Result<Vec<Outcome<'_>>> {
        self.binaries.of(Suite::Guest).map(|binary| self.one(binary, kernel)).collect()
    }

    fn one<'b>(&self, binary: &'b TestBinary, kernel: Kernel) -> Result<Outcome<'b>> {
        let whole = self.several && self.filter.is_none();
        let left_out = if whole { left_out(kernel) } else { &[] };
        let mut names = binary.names(self.filter)?;
        names.retain(|name| !left_out.iter().any(|part| name.contains(part)));
        if names.is_empty() {
            return Ok(Outcome { binary, tally: Tally::default(), failures: Vec::new() });
        }
        let mut arguments: Vec<OsString> = Vec::new();
        for part in left_out {
            println!("not on {kernel} in this run, but with --kernel {kernel}: {part}");
            arguments.extend(["--skip".into(), (*part).into()]);
        }
        arguments.extend(self.filter.map(OsString::from));
        self.start(binary, kernel, arguments, &names)
    }

    /// A guest that fails to come up or panics counts as a failed test and the other kernels
    /// still have their turn.
    fn start<'b>(
        &self,
        binary: &'b TestBinary,
        kernel: Kernel,
        arguments: Vec<OsString>,
        names: &[String],
    ) -> Result<Outcome<'b>> {
        let linked = link(&binary.path, self.run_dir)?;
        let mut command: Vec<OsString> =
            vec![linked.into_os_string(), "--test-threads=1".into(), "--include-ignored".into()];
        command.extend(arguments);
        let mut env = self.env.to_vec();
        let package_dir = binary.package_dir.clone().into_os_string();
        env.push(("CARGO_MANIFEST_DIR".to_owned(), package_dir));
        let spec = Spec {
            timeout: GUEST_TIMEOUT,
            memory: 3072,
            cpus: if self.several { 1 } else { 2 },
            cwd: binary.package_dir.clone(),
            env,
            label: if self.several { kernel.to_string() } else { String::new() },
            ..Spec::new(kernel, command)?
        };
        let crashed = || Outcome { binary, tally: Tally::crashed(), failures: Vec::new() };
        let outcome = match spec.run() {
            Ok(outcome) => outcome,
            Err(error) => {
                println!("VM tests on {kernel}: {error:#}");
                return Ok(crashed());
            }
        };
        let text = String::from_utf8_lossy(&outcome.stdout);
        let tally = Tally::read(&text, names).unwrap_or_else(Tally::crashed);
        if outcome.code != 0 && tally.failed() == 0 {
            return Ok(crashed());
        }
        let failures = tally::failures(&text).into_iter().map(ToOwned::to_owned).collect();
        Ok(Outcome { binary, tally, failures })
    }
}

/// Long tests that are not run everywhere when several kernels are tested: the suite's dual-stack
/// variant has the cases of the IPv4 one, and in ebpf mode an emulated processor goes through the
/// verifier for half a minute at each start of a daemon. Every test of ebpf mode itself is run on
/// one of the guests' kernels, besides the machine's: on 6.1, where programs are attached by
/// clsact, those of packets at devices and sockets; on 6.12 those of XDP and of the daemon at
/// length. `--kernel` and `--filter` leave nothing out.
const fn left_out(kernel: Kernel) -> &'static [&'static str] {
    match kernel {
        Kernel::V5_10 => &[],
        Kernel::V6_1 => &[
            "conformance_1_ipv4",
            "conformance_2_ipv6",
            "conformance_4_ebpf",
            "conformance_5_ebpf",
            "conformance_6_ebpf",
            "conformance_7_ebpf",
            "conformance_8_ebpf",
            "ebpf::counters",
            "ebpf::follows_changes",
            "ebpf::many_connections",
            "ebpf::taken_off",
            "ebpf::xdp_",
            "scale::an_endpoint_update",
        ],
        Kernel::V6_12 => &[
            "conformance_1_ipv4",
            "conformance_3_dual",
            "conformance_4_ebpf",
            "conformance_5_ebpf",
            "conformance_7_ebpf",
            "conformance_8_ebpf",
            "ebpf::bare_",
            "ebpf::batches",
            "ebpf::carries_over",
            "ebpf::connect",
            "ebpf::daemon",
            "ebpf::path_mtu",
            "ebpf::refus",
            "ebpf::tagged",
        ],
    }
}
