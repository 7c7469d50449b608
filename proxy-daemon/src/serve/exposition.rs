//! The two text formats of a metrics page.
//!
//! The registry writes OpenMetrics 1.0. kube-proxy's page, and every scraper that does
//! not ask for OpenMetrics, uses the older Prometheus text format (0.0.4); the two differ
//! in the names on `# TYPE` lines of counters, in how `le` values are written, and in the
//! end marker.

use std::fmt::{self, Write as _};

use prometheus_client::registry::Registry;

pub const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";
pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Content type and body for a request's `Accept` header.
pub fn render(
    registry: &Registry,
    accept: Option<&str>,
) -> Result<(&'static str, String), fmt::Error> {
    let mut text = String::with_capacity(64 * 1024);
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    if accept.is_some_and(prefers_open_metrics) {
        Ok((OPEN_METRICS, text))
    } else {
        Ok((CLASSIC, classic(&text)?))
    }
}

/// Whether OpenMetrics is accepted at least as gladly as plain text (RFC 9110, 12.5.1).
fn prefers_open_metrics(accept: &str) -> bool {
    let mut open_metrics: f32 = 0.0;
    let mut plain: f32 = 0.0;
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let quality = parts
            .find_map(|part| part.strip_prefix("q="))
            .map_or(1.0, |value| value.parse().unwrap_or(0.0));
        match media {
            "application/openmetrics-text" => open_metrics = open_metrics.max(quality),
            "text/plain" => plain = plain.max(quality),
            _ => {}
        }
    }
    open_metrics > 0.0 && open_metrics >= plain
}

/// OpenMetrics text, as the registry writes it, in the older format.
fn classic(open_metrics: &str) -> Result<String, fmt::Error> {
    let mut out = String::with_capacity(open_metrics.len());
    // `# HELP` comes before the `# TYPE` that tells whether the name gets `_total`.
    let mut help: Option<(&str, &str)> = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            // Kinds that the older format does not have are gauges there.
            let kind = match kind {
                "counter" | "gauge" | "histogram" | "summary" => kind,
                "unknown" => "untyped",
                _ => "gauge",
            };
            if let Some((_, text)) = help.take().filter(|(helped, _)| *helped == name) {
                writeln!(out, "# HELP {name}{suffix} {text}")?;
            }
            writeln!(out, "# TYPE {name}{suffix} {kind}")?;
        } else if !line.starts_with('#') {
            writeln!(out, "{}", plain_le(line))?;
        }
    }
    Ok(out)
}

/// `le="1.0"` as `le="1"`: label values are text, and a query for kube-proxy's buckets
/// asks for them as Go writes them.
fn plain_le(line: &str) -> String {
    const LE: &str = "le=\"";
    let Some(start) = line.find(LE).map(|at| at + LE.len()) else {
        return line.to_owned();
    };
    let (head, tail) = line.split_at(start);
    match tail.split_once('"') {
        Some((value, rest)) => {
            let value = value.strip_suffix(".0").unwrap_or(value);
            format!("{head}{value}\"{rest}")
        }
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::histogram::Histogram;

    use super::*;

    fn registry() -> Registry {
        let mut registry = Registry::default();
        let counter: Counter = Counter::default();
        counter.inc();
        registry.register("changes", "Changes", counter);
        let histogram = Histogram::new([0.5, 1.0]);
        histogram.observe(0.75);
        registry.register("wait_seconds", "Wait", histogram);
        registry
    }

    #[test]
    fn the_older_format_unless_open_metrics_is_preferred() {
        let (kind, body) = render(&registry(), None).unwrap();
        assert_eq!(kind, CLASSIC);
        assert_eq!(
            body,
            "# HELP changes_total Changes.\n# TYPE changes_total counter\nchanges_total 1\n\
             # HELP wait_seconds Wait.\n# TYPE wait_seconds histogram\n\
             wait_seconds_sum 0.75\nwait_seconds_count 1\n\
             wait_seconds_bucket{le=\"0.5\"} 0\nwait_seconds_bucket{le=\"1\"} 1\n\
             wait_seconds_bucket{le=\"+Inf\"} 1\n"
        );
        let prometheus =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4";
        let (kind, body) = render(&registry(), Some(prometheus)).unwrap();
        assert_eq!(kind, OPEN_METRICS);
        assert!(body.contains("# TYPE changes counter\n") && body.ends_with("# EOF\n"), "{body}");
    }

    #[test]
    fn accept() {
        assert!(prefers_open_metrics("application/openmetrics-text"));
        assert!(prefers_open_metrics("text/plain;q=0.3, application/openmetrics-text; q=0.3"));
        for accept in [
            "*/*",
            "",
            "text/plain",
            "application/openmetrics-text;q=0.1,text/plain",
            "application/openmetrics-text;q=0",
        ] {
            assert!(!prefers_open_metrics(accept), "{accept:?}");
        }
    }
}
