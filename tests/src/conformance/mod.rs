//! The contract of a Service, as cases that run against real traffic.
//!
//! A case says what one line of the contract means: it makes Services of its own, on
//! addresses of its own, and looks from pods, nodes and outside at who answers. All cases
//! of a variant (IPv4, IPv6, both) share one cluster of two nodes; a case that fails does
//! not stop the others. They know nothing of the mode, except for the last chapter.
//!
//! Nothing waits for a fixed time: [`context::Context::settle`] waits until every daemon
//! has programmed all changes made so far, and every look repeats until it finds what it
//! wants or gives up.

mod addresses;
mod affinity;
mod clients;
mod connections;
mod context;
mod ebpf;
mod endpoints;
mod frontends;
mod health;
mod hosts;
mod ipvs;
mod look;
mod no_endpoints;
mod selection;
mod service;
mod source_ranges;
mod table;
mod xdp;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};

use crate::bed::{self, Bed};
use crate::binary::binary;
use crate::cluster::{Families, Sockets};
use crate::traffic::Protocol;

use context::Context;

/// Pods are `a0` to `a3` and `b0` to `b3`; the last of each node is a client that is never an
/// endpoint.
const PODS_PER_NODE: u8 = 4;
/// Where every pod serves, whatever the protocol.
const TARGET_PORT: u16 = 8080;
/// And once more, for Services with two ports; servers there are called `a0:8081`.
const SECOND_TARGET_PORT: u16 = 8081;

/// Which families the cluster has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    Ipv4,
    Ipv6,
    Dual,
}

impl Variant {
    const ALL: [Self; 3] = [Self::Ipv4, Self::Ipv6, Self::Dual];

    const fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
            Self::Dual => "dual",
        }
    }

    const fn families(self) -> Families {
        match self {
            Self::Ipv4 => Families::V4,
            Self::Ipv6 => Families::V6,
            Self::Dual => Families::Dual,
        }
    }
}

/// What to test, and with what.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The daemon's program.
    pub daemon: PathBuf,
    /// Each adds the chapter of its particulars.
    pub mode: &'static str,
    /// Programs at the nodes' cgroups see these; others' packets are translated at devices.
    pub sockets: Sockets,
    /// `--xdp`; links between machines are then like network cards and cables.
    pub xdp: Option<&'static str>,
    /// What the kernel can carry; a kernel without SCTP says so by leaving it out here.
    pub protocols: Vec<Protocol>,
    /// Only cases whose chapter and name contain this.
    pub filter: Option<String>,
}

impl Settings {
    /// Variants of one title share a table.
    const fn title(&self) -> &'static str {
        if self.xdp.is_some() { "ebpf (XDP)" } else { self.mode }
    }
}

/// One line of the contract.
struct Case {
    name: &'static str,
    run: fn(&mut Context<'_>) -> Result<()>,
}

const fn case(name: &'static str, run: fn(&mut Context<'_>) -> Result<()>) -> Case {
    Case { name, run }
}

fn chapters(mode: &str, xdp: bool) -> Vec<(&'static str, &'static [Case])> {
    let mut chapters: Vec<(&str, &[Case])> = vec![
        ("objects", selection::CASES),
        ("frontends", frontends::CASES),
        ("endpoints", endpoints::CASES),
        ("no endpoints", no_endpoints::CASES),
        ("addresses", addresses::CASES),
        ("affinity", affinity::CASES),
        ("source ranges", source_ranges::CASES),
        ("connections", connections::CASES),
        ("hosts", hosts::CASES),
        ("health", health::CASES),
    ];
    match mode {
        "ipvs" => chapters.push(("ipvs", ipvs::CASES)),
        "ebpf" => chapters.push(("ebpf", ebpf::CASES)),
        _ => {}
    }
    if xdp {
        chapters.push(("xdp", xdp::CASES));
    }
    chapters
}

/// Runs every case in one variant, and prints the table of all variants run so far.
///
/// # Errors
/// When the bed cannot be built, or cases failed: the message names them.
pub fn run(variant: Variant, settings: &Settings) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let begun = Instant::now();
    let mut bed = build(variant, settings, directory.path().to_owned())?;
    table::note(&format!(
        "{}: bed built in {:.1} s",
        variant.name(),
        begun.elapsed().as_secs_f64()
    ));
    let mut failed = Vec::new();
    let mut number = 0;
    for (chapter, cases) in chapters(settings.mode, settings.xdp.is_some()) {
        for case in cases {
            number += 1;
            let name = format!("{chapter}: {}", case.name);
            if settings.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
                continue;
            }
            let started = Instant::now();
            let result = run_one(case, number, &mut bed, &settings.protocols);
            let took = started.elapsed();
            table::record((settings.title(), variant), number, &name, result.is_ok(), took);
            let word = if result.is_ok() { "pass" } else { "FAIL" };
            let at = begun.elapsed().as_secs();
            table::note(&format!("[{at:3} s] {} {word} {name}", variant.name()));
            if let Err(error) = result {
                table::note(&format!("  {error:#}"));
                failed.push(name);
            }
        }
    }
    table::print(settings.title(), begun.elapsed());
    if failed.is_empty() {
        return Ok(());
    }
    table::note(&bed.log_tails(30));
    Err(anyhow!("{} of the cases fail: {}", failed.len(), failed.join("; ")))
}

fn build(variant: Variant, settings: &Settings, directory: PathBuf) -> Result<Bed> {
    let mut arguments = vec!["-v=4".to_owned()];
    arguments.extend(settings.xdp.map(|mode| format!("--xdp={mode}")));
    let mut bed = Bed::build(bed::Settings {
        daemon: settings.daemon.clone(),
        confined: Some(binary("confined")),
        mode: settings.mode,
        families: variant.families(),
        sockets: settings.sockets,
        nodes: 2,
        pods_per_node: PODS_PER_NODE,
        directory,
        arguments,
    })?;
    if settings.xdp.is_some() {
        bed.cluster().finish_frames()?;
    }
    let ports = |port| settings.protocols.iter().map(move |protocol| (*protocol, port));
    for node in 0..2 {
        for pod in 0..usize::from(PODS_PER_NODE) {
            let name = clients::pod_name(node, pod);
            bed.serve((node, pod), &name, &ports(TARGET_PORT).collect::<Vec<_>>())?;
            let second = format!("{name}:{SECOND_TARGET_PORT}");
            bed.serve((node, pod), &second, &ports(SECOND_TARGET_PORT).collect::<Vec<_>>())?;
        }
    }
    bed.start_daemons()?;
    Context::new(&mut bed, 0, &settings.protocols)
        .settle_within(context::RESTARTED)
        .with_context(|| format!("the first start\n{}", bed.log_tails(30)))?;
    Ok(bed)
}

/// A panic fails the case like an error; what the case made goes either way.
fn run_one(case: &Case, number: u16, bed: &mut Bed, protocols: &[Protocol]) -> Result<()> {
    let mut context = Context::new(bed, number, protocols);
    let result = catch_unwind(AssertUnwindSafe(|| (case.run)(&mut context)));
    let cleaned = context.clean_up();
    let result = result.unwrap_or_else(|_| Err(anyhow!("panicked; the message is above")));
    result.and(cleaned.context("cleaning up"))
}
