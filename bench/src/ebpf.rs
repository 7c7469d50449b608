//! What ebpf mode's programs cost, on the kernel of this very machine.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use proxy_ebpf::device::Hook;
use proxy_tests::ebpf::cost::{self, Connects};
use serde::{Deserialize, Serialize};

use crate::record::Summary;
use crate::{network, peer};

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Plan {
    /// Numbers of Services, each with 10 endpoints
    #[arg(long, value_delimiter = ',', default_value = "1,10000")]
    sizes: Vec<u32>,
    /// Blocks of 500 connects of each kind
    #[arg(long, default_value_t = 40)]
    blocks: usize,
    /// Samples of 200 packets at each hook
    #[arg(long, default_value_t = 2000)]
    packets: u32,
    /// Directory for `ebpf.json` and `ebpf.md`
    #[arg(long)]
    out: PathBuf,
}

const BLOCK: usize = 500;
const UPDATES: u32 = 20_000;

/// One whole run.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Run {
    kernel: String,
    cpus: usize,
    sizes: Vec<Size>,
}

/// With so many Services; every time as median, 99th percentile and the like.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Size {
    services: u32,
    /// Of `connect(2)`, in microseconds.
    connects: Vec<(String, Stats)>,
    /// Of the medians of blocks that were measured one after the other.
    ratios: Vec<(String, Stats)>,
    /// Nanoseconds a packet.
    packets: Vec<(String, Stats)>,
    /// Microseconds to write one Service.
    update: Stats,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Stats {
    samples: usize,
    min: f64,
    median: f64,
    p99: f64,
    max: f64,
}

impl Stats {
    fn of(samples: &[f64]) -> Self {
        let Summary { min, median, p99, max } = Summary::of(samples.iter().copied());
        Self { samples: samples.len(), min, median, p99, max }
    }
}

/// Runs everything and writes the results.
///
/// # Errors
/// Not root, or the kernel refuses the programs.
pub fn run(plan: &Plan) -> Result<()> {
    fs::create_dir_all(&plan.out).with_context(|| format!("cannot make {}", plan.out.display()))?;
    let cpus = std::thread::available_parallelism()?.get();
    network::in_turn()?;
    let mut run = Run { kernel: peer::kernel()?, cpus, ..Run::default() };
    for &services in &plan.sizes {
        let found = size(plan, services);
        run.sizes.push(found.with_context(|| format!("with {services} Services"))?);
    }
    let table = table(&run);
    print!("{table}");
    fs::write(plan.out.join("ebpf.json"), serde_json::to_string_pretty(&run)?)?;
    fs::write(plan.out.join("ebpf.md"), table)?;
    Ok(())
}

fn size(plan: &Plan, services: u32) -> Result<Size> {
    println!("{services} Services: connects");
    let connects = cost::connects(services, plan.blocks, BLOCK)?;
    println!("{services} Services: packets");
    let mut packets = Vec::new();
    for (name, hook) in [("XDP", Hook::Xdp), ("tc ingress", Hook::Ingress)] {
        let found = cost::packets(hook, services, plan.packets)?;
        packets.push((format!("{name}, sent on"), Stats::of(&found.forwarded)));
        packets.push((format!("{name}, sent on, each further one"), Stats::of(&found.further)));
        packets.push((format!("{name}, none of ours"), Stats::of(&found.foreign)));
    }
    println!("{services} Services: updates");
    let update = Stats::of(&cost::map_update(services, UPDATES)?);
    let Connects { without, direct, service } = &connects;
    let all = |blocks: &[Vec<f64>]| Stats::of(&blocks.concat());
    let ratio = |a: &[Vec<f64>], b: &[Vec<f64>]| {
        let median = |block: &Vec<f64>| Summary::of(block.iter().copied()).median;
        Stats::of(&a.iter().zip(b).map(|(a, b)| median(a) / median(b)).collect::<Vec<_>>())
    };
    Ok(Size {
        services,
        connects: vec![
            ("straight, seen by no program".to_owned(), all(without)),
            ("straight".to_owned(), all(direct)),
            ("through the Service".to_owned(), all(service)),
        ],
        ratios: vec![
            ("through the Service / straight".to_owned(), ratio(service, direct)),
            ("straight / seen by no program".to_owned(), ratio(direct, without)),
        ],
        packets,
        update,
    })
}

fn table(run: &Run) -> String {
    let mut text = format!(
        "Kernel {}, {} processors; {} endpoints a Service.\n\n\
         | | Services | median | p99 | min to max | samples |\n|---|---|---|---|---|---|\n",
        run.kernel,
        run.cpus,
        cost::ENDPOINTS
    );
    let mut row = |what: &str, services: u32, digits: usize, stats: &Stats| {
        let Stats { samples, min, median, p99, max } = stats;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {what} | {services} | {median:.digits$} | {p99:.digits$} | {min:.digits$} to \
             {max:.digits$} | {samples} |"
        );
    };
    for size in &run.sizes {
        for (what, stats) in &size.connects {
            row(&format!("TCP connect {what}, us"), size.services, 2, stats);
        }
        for (what, stats) in &size.ratios {
            row(&format!("{what}, medians of {BLOCK} in turn"), size.services, 3, stats);
        }
        for (what, stats) in &size.packets {
            row(&format!("packet at {what}, ns"), size.services, 0, stats);
        }
        row("one Service written into the maps, us", size.services, 1, &size.update);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_row_for_each_measurement() {
        let stats = |median| Stats { samples: 3, min: 1.0, median, p99: 9.0, max: 10.0 };
        let run = Run {
            kernel: "6.18".to_owned(),
            cpus: 2,
            sizes: vec![Size {
                services: 10_000,
                connects: vec![("straight".to_owned(), stats(7.4))],
                ratios: vec![("a / b".to_owned(), stats(1.01))],
                packets: vec![("XDP, sent on".to_owned(), stats(100.4))],
                update: stats(3.2),
            }],
        };
        let text = table(&run);
        for row in [
            "| TCP connect straight, us | 10000 | 7.40 | 9.00 | 1.00 to 10.00 | 3 |",
            "| a / b, medians of 500 in turn | 10000 | 1.010 | 9.000 | 1.000 to 10.000 | 3 |",
            "| packet at XDP, sent on, ns | 10000 | 100 | 9 | 1 to 10 | 3 |",
            "| one Service written into the maps, us | 10000 | 3.2 | 9.0 | 1.0 to 10.0 | 3 |",
        ] {
            assert!(text.contains(row), "{row}\n{text}");
        }
    }
}
