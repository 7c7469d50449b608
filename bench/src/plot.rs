//! The results as plots: both axes logarithmic, one line a peer.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use plotters::prelude::*;

use crate::record::{Paths, Peers, Run, Size, Summary};

type Samples = Box<dyn Fn(&Size) -> Vec<f64>>;

/// A line: its name, its colour, and the samples of each size.
struct Line {
    name: &'static str,
    colour: RGBColor,
    samples: Samples,
}

impl Line {
    fn new(
        name: &'static str,
        colour: RGBColor,
        samples: impl Fn(&Size) -> Vec<f64> + 'static,
    ) -> Self {
        Self { name, colour, samples: Box::new(samples) }
    }
}

const IPTABLES: RGBColor = RGBColor(200, 80, 40);
const OURS: RGBColor = RGBColor(30, 100, 180);
const DIRECT: RGBColor = RGBColor(120, 120, 120);

/// Changes of an endpoint.
fn updates() -> [Line; 2] {
    [
        Line::new("iptables", IPTABLES, |size| {
            size.update.iptables.iter().map(|cost| cost.ms).collect()
        }),
        Line::new("this daemon", OURS, |size| {
            size.update.ours.iter().map(|cost| cost.ms).collect()
        }),
    ]
}

/// What went by the ways to a pod; without one it is the same for both peers.
fn paths(of: fn(&Size) -> &Peers<Paths>) -> [Line; 3] {
    [
        Line::new("iptables, last Service", IPTABLES, move |size| of(size).iptables.last.clone()),
        Line::new("this daemon, last Service", OURS, move |size| of(size).ours.last.clone()),
        Line::new("straight to the pod", DIRECT, move |size| {
            let Peers { iptables, ours } = of(size);
            [&iptables.direct[..], &ours.direct].concat()
        }),
    ]
}

/// Writes `update.svg`, `connect.svg` and `rate.svg` into `dir`.
///
/// # Errors
/// When there is nothing to plot, or a file cannot be written.
pub fn draw(run: &Run, dir: &Path) -> Result<()> {
    let name = run.mode.name();
    let update = format!("One endpoint change: time until it takes effect ({name})");
    chart(run, &dir.join("update.svg"), (&update, "ms (median, min to worst)"), &updates())?;
    let connect = format!("TCP connect through a ClusterIP ({name})");
    chart(
        run,
        &dir.join("connect.svg"),
        (&connect, "us (median, min to p99)"),
        &paths(|size| &size.connect),
    )?;
    let rate = format!("Short TCP connections through a ClusterIP ({name})");
    chart(
        run,
        &dir.join("rate.svg"),
        (&rate, "connections/s (median, min to p99)"),
        &paths(|size| &size.rate),
    )
}

/// Of one size: Services, least, median, p99.
type Point = (f64, f64, f64, f64);

fn points(run: &Run, line: &Line) -> Vec<Point> {
    run.sizes
        .iter()
        .map(|size| {
            let of = Summary::of((line.samples)(size));
            (f64::from(u32::try_from(size.services).unwrap_or(u32::MAX)), of.min, of.median, of.p99)
        })
        // A logarithm needs more than nothing.
        .filter(|(services, min, ..)| *services > 0.0 && *min > 0.0)
        .collect()
}

fn chart(run: &Run, file: &Path, (title, unit): (&str, &str), lines: &[Line]) -> Result<()> {
    let all: Vec<Point> = lines.iter().flat_map(|line| points(run, line)).collect();
    let bound = |pick: fn(&Point) -> f64, better: fn(f64, f64) -> f64| {
        all.iter().map(pick).reduce(better).context("nothing was measured")
    };
    let x = bound(|p| p.0, f64::min)? / 1.5..bound(|p| p.0, f64::max)? * 1.5;
    let y = bound(|p| p.1, f64::min)? / 1.5..bound(|p| p.3, f64::max)? * 1.5;
    let area = SVGBackend::new(file, (760, 480)).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("{}: {error}", file.display());
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 24))
        .margin(12)
        .x_label_area_size(50)
        .y_label_area_size(70)
        .build_cartesian_2d(x.log_scale(), y.log_scale())
        .map_err(|e| failed(&e))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .x_desc(format!("Services ({} endpoints each)", run.endpoints))
        .y_desc(unit)
        .y_label_formatter(&|value| format!("{value}"))
        .draw()
        .map_err(|e| failed(&e))?;
    for line in lines {
        let (colour, points) = (line.colour, points(run, line));
        let medians = points.iter().map(|p| (p.0, p.2));
        chart
            .draw_series(LineSeries::new(medians.clone(), colour.stroke_width(2)))
            .map_err(|e| failed(&e))?
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        let dots = medians.map(|at| Circle::new(at, 4, colour.filled()));
        chart.draw_series(dots).map_err(|e| failed(&e))?;
        let spread = points.iter().map(|p| PathElement::new([(p.0, p.1), (p.0, p.3)], colour));
        chart.draw_series(spread).map_err(|e| failed(&e))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(DIRECT)
        .label_font(("sans-serif", 16))
        .draw()
        .map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}
