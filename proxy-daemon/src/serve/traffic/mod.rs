//! The traffic of Service ports and endpoints, on the metrics page.
//!
//! The engine says which frontend is whose ([`Traffic::serves`]), which costs it a push. A
//! scrape reads the kernel, on its own thread, and no more than once a second however many
//! scrape.

mod accounts;
mod tally;

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use tracing::warn;

use crate::dataplane::traffic::{Abilities, Counters, Current, TrafficSource};
use crate::policy::FrontendKey;
use accounts::Series;
use tally::{Served, Tally};

pub use tally::{Limits, ServicePort};

/// Scrapes that come closer together share one reading.
const SHORTEST: Duration = Duration::from_secs(1);

/// Nor is the kernel read for more than a tenth of the time, however long that takes (all
/// endpoints of a very large cluster).
const REST: u32 = 10;

/// Changes that wait for a scrape; more are taken in by the engine's thread, unless a scrape
/// is at it.
const WAITING: usize = 4096;

/// Stands in every label of the sum of what has no series; no object can be named so.
const OTHERS: &str = "_other";

/// Clones share the content.
#[derive(Clone)]
pub struct Traffic(Arc<Shared>);

struct Shared {
    /// Never held for long.
    changes: Mutex<Vec<Served>>,
    /// Held while the kernel is read: not for the engine to wait for.
    reading: Mutex<Reading>,
    enabled: bool,
}

struct Reading {
    tally: Tally,
    source: Option<Box<dyn TrafficSource>>,
    last: Option<Instant>,
    took: Duration,
    failures: u64,
    /// That it fails was said.
    failing: bool,
}

impl fmt::Debug for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traffic").field("enabled", &self.0.enabled).finish_non_exhaustive()
    }
}

impl Traffic {
    pub fn new(limits: Limits) -> Self {
        Self(Arc::new(Shared {
            changes: Mutex::default(),
            reading: Mutex::new(Reading {
                tally: Tally::new(limits),
                source: None,
                last: None,
                took: Duration::ZERO,
                failures: 0,
                failing: false,
            }),
            enabled: limits != Limits { service_ports: 0, endpoints: 0 },
        }))
    }

    /// From now on scrapes read this.
    pub fn read_from(&self, source: Box<dyn TrafficSource>) {
        self.reading().source = Some(source);
    }

    /// A frontend serves this port now, or none any more. Never waits for a reading.
    pub fn serves(&self, frontend: FrontendKey, port: Option<ServicePort>) {
        if !self.0.enabled {
            return;
        }
        let mut changes = self.0.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.push(Served { frontend, port });
        if changes.len() >= WAITING
            && let Ok(mut reading) = self.0.reading.try_lock()
        {
            reading.tally.serve(changes.drain(..));
        }
    }

    fn reading(&self) -> MutexGuard<'_, Reading> {
        // What a panic left half done is made good by the next reading.
        self.0.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel as it was at most a second ago.
    fn refreshed(&self, now: Instant) -> MutexGuard<'_, Reading> {
        let mut reading = self.reading();
        let rest = SHORTEST.max(reading.took * REST);
        let recent = |last: Instant| now.saturating_duration_since(last) < rest;
        if self.0.enabled && !reading.last.is_some_and(recent) {
            let changes =
                std::mem::take(&mut *self.0.changes.lock().unwrap_or_else(PoisonError::into_inner));
            reading.refresh(changes, now);
        }
        reading
    }
}

impl Reading {
    /// New names before the kernel is read, so that it is known whose everything is; names
    /// that end after it, so that what is still there counts for the last time.
    fn refresh(&mut self, changes: Vec<Served>, now: Instant) {
        let Some(source) = &mut self.source else {
            self.tally.serve(changes);
            return;
        };
        let (ended, begun): (Vec<_>, Vec<_>) =
            last_of_each(changes).into_iter().partition(|served| served.port.is_none());
        self.tally.serve(begun);
        let started = Instant::now();
        let endpoints = self.tally.limits().endpoints > 0;
        match self.tally.read(|sink| source.read(endpoints, sink)) {
            Ok(()) => self.failing = false,
            Err(error) => {
                self.failures += 1;
                if !std::mem::replace(&mut self.failing, true) {
                    warn!(%error, "the kernel's counters cannot be read; metrics of traffic stay behind");
                }
            }
        }
        self.took = started.elapsed();
        self.tally.serve(ended);
        self.last = Some(now);
    }

    fn abilities(&self) -> Abilities {
        self.source.as_ref().map(|source| source.abilities()).unwrap_or_default()
    }
}

/// In the order of their last change.
fn last_of_each(changes: Vec<Served>) -> Vec<Served> {
    let mut known = std::collections::HashSet::new();
    let mut last: Vec<Served> =
        changes.into_iter().rev().filter(|served| known.insert(served.frontend)).collect();
    last.reverse();
    last
}

type Encoded = Result<(), fmt::Error>;

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Encoded {
        if !self.0.enabled {
            return Ok(());
        }
        let reading = self.refreshed(Instant::now());
        if reading.source.is_none() {
            return Ok(());
        }
        let encoder = &mut encoder;
        let (tally, abilities) = (&reading.tally, reading.abilities());
        let services = tally.services();
        let lines: Vec<Line<'_>> = services
            .series()
            .map(|(port, series)| Line::of(port, None, series))
            .chain([Line::others(false, services.others())])
            .collect();
        encode_lines(encoder, &SERVICE, &lines, abilities)?;
        if tally.limits().endpoints > 0 {
            let endpoints = tally.endpoints();
            let lines: Vec<Line<'_>> = endpoints
                .series()
                .map(|((port, at), series)| Line::of(port, Some(at.to_string()), series))
                .chain([Line::others(true, endpoints.others())])
                .collect();
            // What is refused has no endpoint.
            encode_lines(encoder, &ENDPOINT, &lines, Abilities { refused: false, ..abilities })?;
        }
        drops(encoder, tally)?;
        ports(encoder, tally)?;
        let gauge = ConstGauge::new(reading.took.as_secs_f64());
        let help = "How long the last reading of the kernel's counters took";
        let kind = MetricType::Gauge;
        gauge.encode(encoder.encode_descriptor("traffic_reading_seconds", help, None, kind)?)?;
        let help = "Readings of the kernel's counters that failed";
        let name = "traffic_reading_failures";
        ConstCounter::new(reading.failures).encode(encoder.encode_descriptor(
            name,
            help,
            None,
            MetricType::Counter,
        )?)
    }
}

/// Names and help of one kind of series.
struct Names {
    connections: [&'static str; 2],
    refused: [&'static str; 2],
    packets: [&'static str; 2],
    bytes: [&'static str; 2],
    current: [&'static str; 2],
}

const SERVICE: Names = Names {
    connections: [
        "service_connections",
        "Connections and flows of a Service port that got an endpoint; in ebpf mode also the \
         datagrams of sockets that are not connected",
    ],
    refused: ["service_refused", "Connects and packets of a Service port refused or dropped"],
    packets: [
        "service_packets",
        "Packets of a Service port, in from clients or out to them; in ebpf mode those \
         translated at devices, not those of sockets that were sent to an endpoint as they \
         connected",
    ],
    bytes: ["service_bytes", "Bytes of these packets, as IPVS or the device counts them"],
    current: ["service_current_connections", "Connections of a Service port that IPVS has now"],
};

const ENDPOINT: Names = Names {
    connections: ["endpoint_connections", "As service_connections_total, by endpoint"],
    refused: ["", ""],
    packets: ["endpoint_packets", "As service_packets_total, by endpoint"],
    bytes: ["endpoint_bytes", "As service_bytes_total, by endpoint"],
    current: ["endpoint_current_connections", "As service_current_connections, by endpoint"],
};

/// One series with its labels.
struct Line<'a> {
    labels: Vec<(&'static str, Cow<'a, str>)>,
    totals: Counters,
    current: Current,
}

impl<'a> Line<'a> {
    fn of(port: &'a ServicePort, endpoint: Option<String>, series: &Series) -> Self {
        let name = match port.number {
            Some(number) if port.name.port.is_empty() => Cow::Owned(number.to_string()),
            _ => Cow::Borrowed(&*port.name.port),
        };
        let mut labels = vec![
            ("namespace", Cow::Borrowed(&*port.name.service.namespace)),
            ("service", Cow::Borrowed(&*port.name.service.name)),
            ("port", name),
            ("protocol", Cow::Owned(port.protocol.to_string())),
        ];
        labels.extend(endpoint.map(|at| ("endpoint", Cow::Owned(at))));
        Self { labels, totals: series.totals, current: series.current }
    }

    fn others(endpoint: bool, series: &Series) -> Self {
        let names = ["namespace", "service", "port", "protocol", "endpoint"];
        let count = if endpoint { names.len() } else { names.len() - 1 };
        let labels = names.into_iter().take(count).map(|name| (name, Cow::Borrowed(OTHERS)));
        Self { labels: labels.collect(), totals: series.totals, current: series.current }
    }
}

fn encode_lines(
    encoder: &mut DescriptorEncoder<'_>,
    names: &Names,
    lines: &[Line<'_>],
    abilities: Abilities,
) -> Encoded {
    counters(encoder, names.connections, lines, None, |line| [("", line.totals.connections)])?;
    if abilities.refused {
        counters(encoder, names.refused, lines, None, |line| [("", line.totals.refused)])?;
    }
    counters(encoder, names.packets, lines, Some("direction"), |Line { totals, .. }| {
        [("in", totals.requests.packets), ("out", totals.replies.packets)]
    })?;
    counters(encoder, names.bytes, lines, Some("direction"), |Line { totals, .. }| {
        [("in", totals.requests.bytes), ("out", totals.replies.bytes)]
    })?;
    if abilities.current {
        let [name, help] = names.current;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for line in lines {
            let Current { active, inactive } = line.current;
            for (state, value) in [("active", active), ("inactive", inactive)] {
                let labels = (line.labels.as_slice(), [("state", state)]);
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}

/// One metric; `label` tells the values of a line apart.
fn counters<'a, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    [name, help]: [&str; 2],
    lines: &[Line<'a>],
    label: Option<&'static str>,
    values: impl Fn(&Line<'a>) -> [(&'static str, u64); N],
) -> Encoded {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for line in lines {
        for (which, value) in values(line) {
            let more: &[(&str, &str)] = match label {
                Some(label) => &[(label, which)],
                None => &[],
            };
            let labels = (line.labels.as_slice(), more);
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn drops(encoder: &mut DescriptorEncoder<'_>, tally: &Tally) -> Encoded {
    let all = tally.drops();
    if all.is_empty() {
        return Ok(());
    }
    let help = "Connects and packets to addresses of Services refused or dropped, of the whole \
                node, by reason; in ipvs mode those that begin a connection";
    let mut family = encoder.encode_descriptor("drops", help, None, MetricType::Counter)?;
    for (reason, count) in all {
        ConstCounter::new(count).encode(family.encode_family(&[("reason", reason)])?)?;
    }
    Ok(())
}

fn ports(encoder: &mut DescriptorEncoder<'_>, tally: &Tally) -> Encoded {
    let help = "Service ports with series of their own, and those that share the series _other";
    let mut family = encoder.encode_descriptor("service_ports", help, None, MetricType::Gauge)?;
    let own = tally.services().len();
    for (exported, count) in [("own", own), ("other", tally.ports().saturating_sub(own))] {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        ConstGauge::new(count).encode(family.encode_family(&[("series", exported)])?)?;
    }
    Ok(())
}
