//! What the source of objects counts, shown at each scrape.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::watch::convert::Part;
use crate::watch::stats::KindStats;
use crate::watch::{Cause, ObjectKind, SourceStats};

type Count = fn(&KindStats) -> u64;

/// Empty until the source starts; clones share the content.
#[derive(Debug, Clone, Default)]
pub(super) struct SourceCollector(Arc<OnceLock<Arc<SourceStats>>>);

impl SourceCollector {
    /// The first source stays; a process has one.
    pub(super) fn set(&self, stats: Arc<SourceStats>) {
        let _ = self.0.set(stats);
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindAndCause {
    kind: &'static str,
    cause: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindAndPart {
    kind: &'static str,
    part: &'static str,
}

impl Collector for SourceCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(stats) = self.0.get() else {
            return Ok(());
        };
        let encoder = &mut encoder;
        gauges(encoder, stats, "source_connected", "1 while the source answers", |kind| {
            let connected = kind.connected_since().is_some();
            (connected || !kind.is_absent()).then_some(if connected { 1.0 } else { 0.0 })
        })?;
        gauges(
            encoder,
            stats,
            "source_last_contact_timestamp_seconds",
            "When the source last answered anything, bookmarks included",
            |kind| kind.last_contact().map(epoch_seconds),
        )?;
        let counts: [(&str, &str, Count); 4] = [
            ("source_lists", "Whole lists received", KindStats::lists),
            ("source_watches", "Watches begun; all but the first reconnect", KindStats::watches),
            ("source_applied", "Added or changed objects received", KindStats::applied),
            ("source_gone", "Deletions received", KindStats::gone),
        ];
        for (name, help, value) in counts {
            let labels =
                ObjectKind::ALL.map(|kind| (Kind { kind: kind.label() }, value(stats.kind(kind))));
            counters(encoder, name, help, labels)?;
        }
        let errors = ObjectKind::ALL.into_iter().flat_map(|kind| {
            let of = stats.kind(kind);
            Cause::ALL.map(|cause| {
                let labels = KindAndCause { kind: kind.label(), cause: cause.label() };
                (labels, of.failures(cause))
            })
        });
        counters(encoder, "source_errors", "Times the source had to try again", errors)?;
        let parts = ObjectKind::ALL.into_iter().flat_map(|kind| {
            let of = stats.kind(kind);
            Part::ALL.map(|part| {
                let labels = KindAndPart { kind: kind.label(), part: part.label() };
                (labels, of.complaints(part))
            })
        });
        counters(
            encoder,
            "rejected_parts",
            "Parts of objects that could not be used while the rest could",
            parts,
        )
    }
}

fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, u64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    stats: &SourceStats,
    name: &str,
    help: &str,
    value: impl Fn(&KindStats) -> Option<f64>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for kind in ObjectKind::ALL {
        if let Some(value) = value(stats.kind(kind)) {
            let labels = Kind { kind: kind.label() };
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn epoch_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
