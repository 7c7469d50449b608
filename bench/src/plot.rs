//! The results as plots: one line a peer, with the spread of its samples.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::record::{Cost, Paths, Peers, Run, Size, Summary};

const IPTABLES: RGBColor = RGBColor(200, 80, 40);
const OURS: RGBColor = RGBColor(30, 100, 180);
const FRAME: RGBColor = RGBColor(120, 120, 120);

/// One picture.
struct Figure {
    file: &'static str,
    title: &'static str,
    unit: &'static str,
    scale: Scale,
    lines: Vec<Line>,
}

/// Of the samples. Sizes are logarithmic always.
enum Scale {
    Logarithmic,
    FromZero,
}

/// What a line shows, at one size.
type Samples = Box<dyn Fn(&Size) -> Vec<f64>>;

/// A line: its name, its colour, and the samples of each size.
struct Line {
    name: &'static str,
    colour: RGBColor,
    dashed: bool,
    samples: Samples,
}

impl Line {
    fn new(
        name: &'static str,
        colour: RGBColor,
        samples: impl Fn(&Size) -> Vec<f64> + 'static,
    ) -> Self {
        Self { name, colour, dashed: false, samples: Box::new(samples) }
    }

    fn dashed(self) -> Self {
        Self { dashed: true, ..self }
    }
}

/// Changes of an endpoint.
fn updates() -> Vec<Line> {
    let ms = |costs: &[Cost]| costs.iter().map(|cost| cost.ms).collect();
    vec![
        Line::new("iptables", IPTABLES, move |size| ms(&size.update.iptables)),
        Line::new("this daemon", OURS, move |size| ms(&size.update.ours)),
    ]
}

/// What went by the ways to a pod. What a node has for Services may slow down the straight way too.
fn paths(of: fn(&Size) -> &Peers<Paths>) -> Vec<Line> {
    vec![
        Line::new("iptables: last Service", IPTABLES, move |size| of(size).iptables.last.clone()),
        Line::new("the same: straight to the pod", IPTABLES, move |size| {
            of(size).iptables.direct.clone()
        })
        .dashed(),
        Line::new("this daemon: last Service", OURS, move |size| of(size).ours.last.clone()),
        Line::new("the same: straight to the pod", OURS, move |size| of(size).ours.direct.clone())
            .dashed(),
    ]
}

/// Writes `update.svg`, `connect.svg` and `rate.svg` into `dir`.
///
/// # Errors
/// When there is nothing to plot, or a file cannot be written.
pub fn draw(run: &Run, dir: &Path) -> Result<()> {
    let figures = [
        Figure {
            file: "update.svg",
            title: "One endpoint change: time until it takes effect",
            unit: "ms (median, least to worst)",
            scale: Scale::Logarithmic,
            lines: updates(),
        },
        Figure {
            file: "connect.svg",
            title: "TCP connect through a ClusterIP",
            unit: "us (median, least to p99)",
            scale: Scale::FromZero,
            lines: paths(|size| &size.connect),
        },
        Figure {
            file: "rate.svg",
            title: "Short TCP connections through a ClusterIP",
            unit: "connections/s (median, least to most)",
            scale: Scale::FromZero,
            lines: paths(|size| &size.rate),
        },
    ];
    figures.iter().try_for_each(|figure| figure.draw(run, dir))
}

/// Of one size: Services, least, median, p99.
type Point = (f64, f64, f64, f64);

impl Line {
    /// Aside from the sizes by `nth` of `of`, so that no spread hides another.
    fn points(&self, run: &Run, nth: usize, of: usize) -> Vec<Point> {
        let steps = f64::from(u32::try_from(2 * nth).unwrap_or(0))
            - f64::from(u32::try_from(of).unwrap_or(0))
            + 1.0;
        let aside = 1.04_f64.powf(steps);
        let point = |size: &Size| {
            let of = Summary::of((self.samples)(size));
            let services = f64::from(u32::try_from(size.services).unwrap_or(u32::MAX));
            (services * aside, of.min, of.median, of.p99)
        };
        // A logarithm needs more than nothing.
        let any = |(services, min, ..): &Point| *services > 0.0 && *min > 0.0;
        run.sizes.iter().map(point).filter(any).collect()
    }
}

impl Figure {
    fn draw(&self, run: &Run, dir: &Path) -> Result<()> {
        let of = self.lines.len();
        let points: Vec<Vec<Point>> =
            self.lines.iter().enumerate().map(|(nth, line)| line.points(run, nth, of)).collect();
        let bound = |pick: fn(&Point) -> f64, better: fn(f64, f64) -> f64| {
            let all = points.iter().flatten().map(pick);
            all.reduce(better).with_context(|| format!("{}: nothing was measured", self.title))
        };
        let (least, most) = (bound(|p| p.1, f64::min)?, bound(|p| p.3, f64::max)?);
        let x = bound(|p| p.0, f64::min)? / 1.5..bound(|p| p.0, f64::max)? * 1.5;
        let file = dir.join(self.file);
        let drawn = match self.scale {
            Scale::Logarithmic => {
                self.chart(run, &file, x, (least / 1.5..most * 3.0).log_scale(), &points)
            }
            // Room for the names above.
            Scale::FromZero => self.chart(run, &file, x, 0.0..most * 1.5, &points),
        };
        drawn.map_err(|error| anyhow!("{}: {error}", file.display()))
    }

    fn chart<Y>(
        &self,
        run: &Run,
        file: &Path,
        x: std::ops::Range<f64>,
        y: Y,
        points: &[Vec<Point>],
    ) -> Result<(), Box<dyn std::error::Error + '_>>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let area = SVGBackend::new(file, (760, 480)).into_drawing_area();
        area.fill(&WHITE).map_err(text)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(format!("{} ({})", self.title, run.mode.name()), ("sans-serif", 24))
            .margin(12)
            .x_label_area_size(50)
            .y_label_area_size(70)
            .build_cartesian_2d(x.log_scale(), y)
            .map_err(text)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 15))
            .axis_desc_style(("sans-serif", 16))
            .x_desc(format!("Services ({} endpoints each)", run.endpoints))
            .x_label_formatter(&|value| thousands(*value))
            .y_desc(self.unit)
            .y_label_formatter(&|value| thousands(*value))
            .draw()
            .map_err(text)?;
        for (line, points) in self.lines.iter().zip(points) {
            let style = line.colour.stroke_width(2);
            let medians = points.iter().map(|p| (p.0, p.2));
            let drawn = if line.dashed {
                chart.draw_series(DashedLineSeries::new(medians.clone(), 6, 4, style))
            } else {
                chart.draw_series(LineSeries::new(medians.clone(), style))
            };
            let dashed = line.dashed;
            drawn.map_err(text)?.label(line.name).legend(move |(x, y)| {
                let end = if dashed { x + 8 } else { x + 18 };
                PathElement::new([(x, y), (end, y)], style)
            });
            let colour = line.colour;
            let dots = medians.map(|at| Circle::new(at, 4, colour.filled()));
            chart.draw_series(dots).map_err(text)?;
            let spread = points.iter().map(|p| PathElement::new([(p.0, p.1), (p.0, p.3)], colour));
            chart.draw_series(spread).map_err(text)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(FRAME)
            .label_font(("sans-serif", 16))
            .draw()
            .map_err(text)?;
        Ok(area.present().map_err(text)?)
    }
}

/// The error of a drawing borrows from what is drawn.
fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// `12,000`, and `0.5` below one.
fn thousands(value: f64) -> String {
    let whole = format!("{value:.0}");
    if value < 1.0 && value > 0.0 {
        return format!("{value}");
    }
    let mut text = String::new();
    for (nth, digit) in whole.chars().enumerate() {
        if nth > 0 && (whole.len() - nth).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::thousands;

    #[test]
    fn numbers_are_grouped() {
        for (value, text) in
            [(0.0, "0"), (0.5, "0.5"), (1.0, "1"), (999.6, "1,000"), (1_234_567.0, "1,234,567")]
        {
            assert_eq!(thousands(value), text);
        }
    }
}
