//! What was measured, as it is kept, and the few statistics drawn from it.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Something of each of the two that are compared.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Peers<T> {
    /// kube-proxy's rules, restored with `iptables-legacy-restore`.
    pub iptables: T,
    /// This daemon.
    #[serde(alias = "ipvs")]
    pub ours: T,
}

/// The mode that the daemon is measured in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// In a guest, whose kernel has IPVS.
    #[default]
    Ipvs,
    /// On the machine's own kernel.
    Ebpf,
}

impl Mode {
    /// As the daemon's flag has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ipvs => "ipvs",
            Self::Ebpf => "ebpf",
        }
    }
}

/// One whole run, all of it on one kernel.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Run {
    /// Of this daemon.
    #[serde(default)]
    pub mode: Mode,
    /// `uname -r`.
    pub kernel: String,
    /// Processors, virtual ones in a guest.
    pub cpus: usize,
    /// First line of `iptables-legacy-restore --version`.
    pub iptables: String,
    /// Endpoints of each generated Service.
    pub endpoints: usize,
    /// Duration of the run in seconds.
    pub seconds: f64,
    /// One entry a size, ascending.
    pub sizes: Vec<Size>,
}

/// Everything measured with so many Services.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Size {
    /// Generated Services; the two that are probed come on top.
    pub services: usize,
    /// From nothing to everything programmed.
    pub load: Peers<Cost>,
    /// One endpoint added to the probed Service: one sample a round.
    pub update: Peers<Vec<Cost>>,
    /// What the daemon asked of the kernel for each of these changes.
    #[serde(default)]
    pub sent: Vec<Sent>,
    /// TCP connects: microseconds of each.
    pub connect: Peers<Paths>,
    /// Short connections a second, one after the other: connect, a byte, close. A sample is a
    /// block.
    #[serde(default)]
    pub rate: Peers<Paths>,
}

/// Of the daemon's own counters, what a change added.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Sent {
    /// Netlink requests of every kind; in ebpf mode, changes of the maps.
    pub requests: f64,
    /// Dumps among them.
    pub dumps: f64,
}

/// Time until an effect, and the CPU time spent on it.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Milliseconds until the effect was seen.
    pub ms: f64,
    /// Milliseconds of user and system time.
    pub cpu_ms: f64,
}

/// Samples of each way to a pod.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Paths {
    /// To the pod itself, without a Service.
    pub direct: Vec<f64>,
    /// Through the Service with 62 of 100 others before it.
    pub middle: Vec<f64>,
    /// Through the Service that comes last.
    pub last: Vec<f64>,
}

/// Order statistics of samples.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Summary {
    pub min: f64,
    pub median: f64,
    /// The worst sample where there are fewer than 100.
    pub p99: f64,
    pub max: f64,
}

impl Summary {
    /// All zero when there are no samples.
    #[must_use]
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else {
            return Self::default();
        };
        let (low, high) = (sorted[last / 2], sorted[last - last / 2]);
        Self {
            min: sorted[0],
            median: f64::midpoint(low, high),
            // Nearest rank, rounded up: 198 of 200.
            p99: sorted[((last + 1) * 99).div_ceil(100) - 1],
            max: sorted[last],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_statistics() {
        let all = Summary::of((1..=200).map(f64::from));
        assert_eq!(all, Summary { min: 1.0, median: 100.5, p99: 198.0, max: 200.0 });
        let few = Summary::of([3.0, 1.0, 2.0]);
        assert_eq!(few, Summary { min: 1.0, median: 2.0, p99: 3.0, max: 3.0 });
        assert_eq!(Summary::of([]), Summary::default());
    }
}
