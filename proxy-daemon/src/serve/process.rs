//! `process_*`, read from `/proc/self` at each scrape: the names every Prometheus client
//! library gives them, which resource dashboards ask for.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Ticks per second of the times in `/proc` (`USER_HZ`): 100 on every architecture that
/// Linux gives Rust programs (asm-generic/param.h).
const USER_HZ: f64 = 100.0;

#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let process = Process::read();
        let mut counter = |name, help, value: Option<f64>| match value {
            Some(value) => {
                let metric = ConstCounter::new(value);
                metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
            }
            None => Ok(()),
        };
        counter(
            "process_cpu_seconds",
            "User and system CPU time of the daemon.",
            process.cpu_seconds,
        )?;
        for (name, help, value) in [
            (
                "process_resident_memory_bytes",
                "Resident memory of the daemon.",
                process.resident_bytes,
            ),
            ("process_virtual_memory_bytes", "Address space in use.", process.virtual_bytes),
            ("process_start_time_seconds", "Start of the daemon, since the epoch.", process.start),
            ("process_open_fds", "Open file descriptors.", process.open_fds),
            ("process_max_fds", "File descriptors that may be open.", process.max_fds),
        ] {
            if let Some(value) = value {
                let metric = ConstGauge::new(value);
                metric.encode(encoder.encode_descriptor(
                    name,
                    help,
                    None,
                    metric.metric_type(),
                )?)?;
            }
        }
        Ok(())
    }
}

/// What could be read; `/proc` may be hidden.
#[derive(Debug, Default)]
struct Process {
    cpu_seconds: Option<f64>,
    resident_bytes: Option<f64>,
    virtual_bytes: Option<f64>,
    start: Option<f64>,
    open_fds: Option<f64>,
    max_fds: Option<f64>,
}

impl Process {
    fn read() -> Self {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let system = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let open_fds = std::fs::read_dir("/proc/self/fd").ok().map(Iterator::count);
        Self {
            #[expect(clippy::cast_precision_loss, reason = "file descriptors stay below 2^52")]
            open_fds: open_fds.map(|count| count as f64),
            max_fds: std::fs::read_to_string("/proc/self/limits")
                .ok()
                .and_then(|limits| max_fds(&limits)),
            ..Self::parse(&stat, &status, &system)
        }
    }

    /// Fields by number as proc_pid_stat(5) counts them, from 3 after the command's `)`.
    fn parse(stat: &str, status: &str, system: &str) -> Self {
        let fields: Vec<&str> =
            stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
        let ticks = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let kibibytes = |key: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(key))?;
            value.trim().trim_end_matches("kB").trim().parse::<f64>().ok()
        };
        let boot = system
            .lines()
            .find_map(|line| line.strip_prefix("btime "))
            .and_then(|value| value.trim().parse::<f64>().ok());
        Self {
            cpu_seconds: ticks(14).zip(ticks(15)).map(|(user, system)| (user + system) / USER_HZ),
            resident_bytes: kibibytes("VmRSS:").map(|kib| kib * 1024.0),
            virtual_bytes: kibibytes("VmSize:").map(|kib| kib * 1024.0),
            start: boot.zip(ticks(22)).map(|(boot, since)| boot + since / USER_HZ),
            open_fds: None,
            max_fds: None,
        }
    }
}

/// The soft limit, as proc_pid_limits(5) writes it.
fn max_fds(limits: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_behind_a_command_with_spaces_and_parentheses() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 150 0 0 20 0 3 0 1000 9 9";
        let process = Process::parse(
            stat,
            "Name:\tx\nVmSize:\t    2048 kB\nVmRSS:\t    1024 kB\n",
            "cpu 1\nbtime 1700000000\n",
        );
        assert_eq!(process.cpu_seconds, Some(4.0));
        assert_eq!(process.start, Some(1_700_000_010.0));
        assert_eq!(process.resident_bytes, Some(1_048_576.0));
        assert_eq!(process.virtual_bytes, Some(2_097_152.0));
        let nothing = Process::parse("", "", "");
        assert_eq!((nothing.cpu_seconds, nothing.start), (None, None));
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files   1024   4096   files\n";
        assert_eq!((max_fds(limits), max_fds("")), (Some(1024.0), None));
    }
}
