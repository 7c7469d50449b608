//! `cargo xtask test`: every test of the project, on this machine and in guests.

mod binaries;
mod guests;
mod tally;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::guest::Kernel;
use crate::{ebpf, kubectl, place, setup, shell};
use binaries::{Binaries, Suite, TestBinary};
use guests::Guests;
use tally::{Report, Tally};

/// A test binary that hangs is ended after this long. The whole of the host's tests take
/// well under a minute each.
const HOST_TIMEOUT: Duration = Duration::from_secs(600);

/// Test binaries of the host that wait most of the time: for what is not to be answered, and for
/// what ends by itself.
const WAITING: [&str; 2] = ["host_conformance", "host_ebpf"];

/// Run every test: unit, property, namespace, and in guests on each kernel
///
/// Installs what is missing (as `cargo xtask setup` does), builds the eBPF programs, runs the
/// workspace's tests here, then the guest tests on each kernel of the matrix.
///
/// Kinds: *property* tests have `prop` in their module or file name; *namespace* tests are the
/// integration tests called `host*`, which make network namespaces and load eBPF programs on
/// this machine (root); *VM* tests are in tests/tests/guest; all others are *unit* tests.
///
/// Tests run beside each other, and guests of several kernels share this machine's processors,
/// which emulate theirs: a test that fails beside others is run once more alone, and named as
/// UNSTEADY in the summary when it passes then.
///
/// The last line is `N passed, N failed`. The exit code is not 0 when a test failed, or when a
/// stage found no test at all.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask test                                   everything
  cargo xtask test --only unit                       no root, no guests
  cargo xtask test --only vm --kernel 6.12 --filter ipvs

Plain `cargo test --workspace` runs the same unit, property and namespace tests; the eBPF ones
among them want PROXY_EBPF_OBJECT, which `cargo xtask build --ebpf-only` prints.")]
pub struct Args {
    /// Only tests whose name contains this, on every kernel
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Only this guest kernel, with nothing left to another [default: all, at once; the longest
    /// tests then on one each]
    #[arg(long, value_enum)]
    kernel: Option<Kernel>,
    /// Only this part: unit includes property tests, host is the namespace tests
    #[arg(long, value_enum)]
    only: Option<Part>,
}

/// A part of the tests that can be asked for alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Unit,
    Host,
    Vm,
}

impl Args {
    fn wants(&self, part: Part) -> bool {
        self.only.is_none_or(|only| only == part)
    }

    fn kernels(&self) -> Vec<Kernel> {
        self.kernel.map_or_else(|| Kernel::ALL.to_vec(), |kernel| vec![kernel])
    }
}

/// Runs the command.
///
/// # Errors
/// When something needed cannot be installed or built. Failing tests are the exit code.
pub fn run(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let mut report = Report::default();
    let root_needed = args.wants(Part::Host) || args.wants(Part::Vm);
    stage("setup", || prepare(args, root_needed))?;
    let object = if root_needed { Some(stage("build eBPF", ebpf::build)?) } else { None };
    let binaries = stage("build tests", || Binaries::build(args.wants(Part::Vm)))?;
    let programs = binaries.programs()?;
    let mut env: Vec<(String, OsString)> =
        vec![("PROXY_BIN_DIR".to_owned(), programs.path().as_os_str().to_owned())];
    if let Some(object) = object {
        env.push((ebpf::OBJECT_ENV.to_owned(), object.into_os_string()));
    }
    if args.wants(Part::Unit) {
        env.push((kubectl::ENV.to_owned(), kubectl::ensure()?.into_os_string()));
    }

    let filter = args.filter.as_deref();
    for (part, suite, name) in
        [(Part::Unit, Suite::Unit, "unit"), (Part::Host, Suite::Host, "namespace")]
    {
        if !args.wants(part) {
            continue;
        }
        stage(&format!("{name} tests"), || {
            for binary in binaries.of(suite) {
                on_host(binary, filter, &env, &mut report)?;
            }
            Ok(())
        })?;
    }
    if args.wants(Part::Unit) {
        stage("documentation tests", || doc_tests(filter, &mut report))?;
    }
    if args.wants(Part::Vm) {
        let kernels = args.kernels();
        let guests = Guests {
            binaries: &binaries,
            run_dir: programs.path(),
            filter,
            env: &env,
            several: kernels.len() > 1,
        };
        let names: Vec<String> = kernels.iter().map(ToString::to_string).collect();
        stage(&format!("VM tests on {}", names.join(" and ")), || {
            guests.run(&kernels, &mut report)
        })?;
    }
    println!("\ntook {:.0} s", start.elapsed().as_secs_f64());
    Ok(if report.print() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Says what goes on and how long it took.
fn stage<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("== {name}");
    let start = Instant::now();
    let result = work().with_context(|| format!("stage `{name}`"));
    println!("== {name}: {:.1} s", start.elapsed().as_secs_f64());
    result
}

fn prepare(args: &Args, root_needed: bool) -> Result<()> {
    if !root_needed {
        return setup::unit_packages();
    }
    setup::packages()?;
    if args.wants(Part::Vm) {
        for kernel in args.kernels() {
            kernel.ensure()?;
        }
    }
    Ok(())
}

/// One test binary on this machine, as `cargo test` would start it.
fn on_host(
    binary: &TestBinary,
    filter: Option<&str>,
    env: &[(String, OsString)],
    report: &mut Report,
) -> Result<()> {
    let names = binary.names(filter)?;
    if names.is_empty() {
        return Ok(());
    }
    let mut arguments: Vec<OsString> = filter.map(OsString::from).into_iter().collect();
    if WAITING.iter().any(|name| binary.label.ends_with(name)) {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        arguments.push(format!("--test-threads={}", 2 * processors).into());
    }
    let first = start_on_host(binary, &names, &arguments, env)?;
    let mut tally = first.tally;
    if names.len() > 1 && !first.failures.is_empty() {
        println!("once more, alone: {}", first.failures.join(", "));
        let mut arguments: Vec<OsString> = vec!["--test-threads=1".into(), "--exact".into()];
        arguments.extend(first.failures.iter().map(OsString::from));
        let again = start_on_host(binary, &first.failures, &arguments, env)?;
        if again.tally.failed() == again.failures.len() {
            for name in first.failures.iter().filter(|name| !again.failures.contains(name)) {
                tally.passes_after_all(name);
                report.unsteady(format!("{} {name}", binary.label));
            }
        }
    }
    let kind = if binary.suite == Suite::Host { tally::Kind::Namespace } else { tally::Kind::Unit };
    report.add(kind, binary.is_property, tally);
    Ok(())
}

/// What came of one start of a test binary.
struct HostRun {
    tally: Tally,
    /// Names, unless the binary ended without a result.
    failures: Vec<String>,
}

fn start_on_host(
    binary: &TestBinary,
    names: &[String],
    arguments: &[OsString],
    env: &[(String, OsString)],
) -> Result<HostRun> {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", &HOST_TIMEOUT.as_secs().to_string()]).arg(&binary.path);
    command.args(arguments).current_dir(&binary.package_dir).stdin(Stdio::null());
    command.env("CARGO_MANIFEST_DIR", &binary.package_dir);
    command.envs(env.iter().map(|(key, value)| (key, value)));
    let label = format!("{} ({} tests)", binary.label, names.len());
    let start = Instant::now();
    let out = shell::progress(&label, || command.output().context("cannot start a test binary"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let tally = Tally::read(&text, names);
    let ok = out.status.success() && tally.as_ref().is_some_and(|tally| tally.failed() == 0);
    if !ok {
        print!("{text}{}", String::from_utf8_lossy(&out.stderr));
        println!("{} failed: {}", binary.label, why(out.status.code()));
    }
    let failures = match &tally {
        Some(_) => tally::failures(&text).into_iter().map(ToOwned::to_owned).collect(),
        None => Vec::new(),
    };
    let tally = tally.unwrap_or_else(Tally::crashed);
    println!("{}: {tally} in {:.1} s", binary.label, start.elapsed().as_secs_f64());
    Ok(HostRun { tally, failures })
}

fn why(code: Option<i32>) -> String {
    match code {
        Some(124 | 137) => format!("did not end within {} s", HOST_TIMEOUT.as_secs()),
        Some(code) => format!("exit code {code}"),
        None => "ended by a signal".to_owned(),
    }
}

fn doc_tests(filter: Option<&str>, report: &mut Report) -> Result<()> {
    let mut cargo = shell::cargo();
    cargo.current_dir(place::repo()).args(["test", "--quiet", "--workspace", "--doc"]);
    if let Some(filter) = filter {
        cargo.args(["--", filter]);
    }
    let out = shell::progress("documentation tests", || {
        cargo.output().context("cannot start cargo test --doc")
    })?;
    let text = String::from_utf8_lossy(&out.stdout);
    let mut tally = Tally::sum_of_results(&text);
    if !out.status.success() {
        print!("{text}{}", String::from_utf8_lossy(&out.stderr));
        if tally.failed() == 0 {
            tally = Tally::crashed();
        }
    }
    println!("documentation: {tally}");
    report.add_optional(tally::Kind::Unit, tally);
    Ok(())
}

/// A second name for a built file, which keeps its content while another build replaces it.
/// Guests of several kernels may ask for the same one at once.
fn link(file: &Path, dir: &Path) -> Result<PathBuf> {
    let name = file.file_name().context("a built file has a name")?;
    let linked = dir.join(name);
    let result = match std::fs::hard_link(file, &linked) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            // Never onto a name that is in use: it may be the very file.
            let part = tempfile::NamedTempFile::new_in(dir)?.into_temp_path();
            std::fs::copy(file, &part).and_then(|_| std::fs::rename(&part, &linked))
        }
        _ => Ok(()),
    };
    result.with_context(|| format!("cannot link {} to {}", file.display(), dir.display()))?;
    Ok(linked)
}
