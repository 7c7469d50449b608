//! The results as a Markdown table.

use std::fmt::Write as _;

use crate::record::{Cost, Mode, Paths, Peers, Run, Size, Summary};

fn size_with_sent(run: &Run) -> impl Iterator<Item = &Size> {
    run.sizes.iter().filter(|size| !size.sent.is_empty())
}

fn updates(run: &Run, text: &mut String) {
    let name = run.mode.name();
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(
        text,
        "| one endpoint change | Services | iptables median (min to worst) | {name} median (min to \
         worst) | iptables / {name} | rounds |\n|---|---|---|---|---|---|"
    );
    let time: fn(&Cost) -> f64 = |cost| cost.ms;
    let cpu: fn(&Cost) -> f64 = |cost| cost.cpu_ms;
    for (what, column) in [("until it takes effect, ms", time), ("CPU time, ms", cpu)] {
        for size in &run.sizes {
            let a = Summary::of(size.update.iptables.iter().map(column));
            let b = Summary::of(size.update.ours.iter().map(column));
            let _ = writeln!(
                text,
                "| {what} | {} | {:.1} ({:.1} to {:.1}) | {:.1} ({:.1} to {:.1}) | {} | {} |",
                size.services,
                a.median,
                a.min,
                a.max,
                b.median,
                b.min,
                b.max,
                ratio(a.median, b.median),
                size.update.ours.len(),
            );
        }
    }
    for size in size_with_sent(run) {
        let requests = Summary::of(size.sent.iter().map(|sent| sent.requests));
        let _ = writeln!(
            text,
            "| {} | {} | | {:.0} ({:.0} to {:.0}) | | {} |",
            match run.mode {
                Mode::Ipvs => "netlink requests",
                Mode::Ebpf => "changes of maps",
            },
            size.services,
            requests.median,
            requests.min,
            requests.max,
            size.sent.len(),
        );
    }
}

/// A row for each way: its name, how often ours was measured, and what both peers took.
fn rows(of: &Peers<Paths>) -> [(&'static str, usize, Summary, Summary); 3] {
    let (a, b) = (&of.iptables, &of.ours);
    [
        ("Service at the end", &a.last, &b.last),
        ("Service at 62 % of the list", &a.middle, &b.middle),
        ("straight to the pod", &a.direct, &b.direct),
    ]
    .map(|(what, a, b)| {
        (what, b.len(), Summary::of(a.iter().copied()), Summary::of(b.iter().copied()))
    })
}

fn rates(run: &Run, text: &mut String) {
    let name = run.mode.name();
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(
        text,
        "\n| short connections a second | Services | iptables median (min to max) | {name} median \
         (min to max) | {name} / iptables | blocks |\n|---|---|---|---|---|---|"
    );
    for size in run.sizes.iter().filter(|size| !size.rate.ours.last.is_empty()) {
        for (what, count, a, b) in rows(&size.rate) {
            let _ = writeln!(
                text,
                "| {what} | {} | {:.0} ({:.0} to {:.0}) | {:.0} ({:.0} to {:.0}) | {} | {count} |",
                size.services,
                a.median,
                a.min,
                a.max,
                b.median,
                b.min,
                b.max,
                ratio(b.median, a.median),
            );
        }
    }
}

/// Tables of everything measured.
#[must_use]
pub fn table(run: &Run) -> String {
    let name = run.mode.name();
    let processors = match run.mode {
        Mode::Ipvs => "virtual processors under emulation",
        Mode::Ebpf => "processors",
    };
    let mut text = format!(
        "Kernel {}, {} {processors}, {}; {} endpoints a Service; {:.0} s in all.\n\n",
        run.kernel, run.cpus, run.iptables, run.endpoints, run.seconds
    );
    updates(run, &mut text);
    let _ = writeln!(
        text,
        "\n| TCP connect, us | Services | iptables median / p99 / worst | {name} median / p99 / \
         worst | iptables / {name}, medians | connects |\n|---|---|---|---|---|---|"
    );
    for size in &run.sizes {
        for (what, count, a, b) in rows(&size.connect) {
            let _ = writeln!(
                text,
                "| {what} | {} | {:.1} / {:.1} / {:.1} | {:.1} / {:.1} / {:.1} | {} | {count} |",
                size.services,
                a.median,
                a.p99,
                a.max,
                b.median,
                b.p99,
                b.max,
                ratio(a.median, b.median),
            );
        }
    }
    rates(run, &mut text);
    let _ = writeln!(
        text,
        "\n| programming everything from nothing | Services | iptables | {name} |\n|---|---|---|---|"
    );
    for size in &run.sizes {
        let (a, b) = (size.load.iptables, size.load.ours);
        let _ = writeln!(
            text,
            "| time (CPU), s | {} | {:.2} ({:.2}) | {:.2} ({:.2}) |",
            size.services,
            a.ms / 1e3,
            a.cpu_ms / 1e3,
            b.ms / 1e3,
            b.cpu_ms / 1e3,
        );
    }
    text
}

fn ratio(a: f64, b: f64) -> String {
    if b > 0.0 { format!("{:.2}", a / b) } else { "-".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_medians_and_their_ratio() {
        let cost = |ms| Cost { ms, cpu_ms: ms / 2.0 };
        let rates = |most| Paths { last: vec![most - 200.0, most], ..Paths::default() };
        let connects = |us| Paths { last: vec![us; 200], ..Paths::default() };
        let run = Run {
            sizes: vec![Size {
                services: 10,
                update: Peers {
                    iptables: vec![cost(30.0), cost(20.0), cost(40.0)],
                    ours: vec![cost(5.0), cost(6.0), cost(4.0)],
                },
                connect: Peers { iptables: connects(300.0), ours: connects(200.0) },
                rate: Peers { iptables: rates(5_000.0), ours: rates(9_000.0) },
                ..Size::default()
            }],
            ..Run::default()
        };
        let text = table(&run);
        let effect = "| 10 | 30.0 (20.0 to 40.0) | 5.0 (4.0 to 6.0) | 6.00 | 3 |";
        assert!(text.contains(effect), "{text}");
        assert!(
            text.contains("| 300.0 / 300.0 / 300.0 | 200.0 / 200.0 / 200.0 | 1.50 | 200 |"),
            "{text}"
        );
        let rate = "| 10 | 4900 (4800 to 5000) | 8900 (8800 to 9000) | 1.82 | 2 |";
        assert!(text.contains(rate), "{text}");
    }
}
