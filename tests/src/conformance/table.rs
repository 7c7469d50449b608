//! The table of cases and variants, and notes beside it. Written to standard error itself:
//! the test harness holds back what tests print, and a passing table is worth seeing.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::Variant;

struct Row {
    name: String,
    outcomes: BTreeMap<Variant, (bool, Duration)>,
}

/// All variants of one process, by the mode and the number of the case.
static ROWS: Mutex<BTreeMap<(&str, u16), Row>> = Mutex::new(BTreeMap::new());

pub(super) fn note(text: &str) {
    // Nothing can be done about a closed stream.
    let _ = writeln!(std::io::stderr(), "{text}");
}

pub(super) fn record(
    (mode, variant): (&'static str, Variant),
    number: u16,
    name: &str,
    passed: bool,
    took: Duration,
) {
    let mut rows = ROWS.lock().unwrap_or_else(PoisonError::into_inner);
    let row = rows
        .entry((mode, number))
        .or_insert_with(|| Row { name: name.to_owned(), outcomes: BTreeMap::new() });
    row.outcomes.insert(variant, (passed, took));
}

pub(super) fn print(mode: &str, took: Duration) {
    let rows = ROWS.lock().unwrap_or_else(PoisonError::into_inner);
    let rows: Vec<&Row> =
        rows.iter().filter(|((of, _), _)| *of == mode).map(|(_, row)| row).collect();
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let heading = format!("case, {mode} mode");
    let mut text = format!("\n{heading:width$}");
    for variant in Variant::ALL {
        text += &format!("  {:>12}", variant.name());
    }
    text.push('\n');
    let mut passed = BTreeMap::new();
    for row in rows {
        text += &format!("{:width$}", row.name);
        for variant in Variant::ALL {
            let cell = match row.outcomes.get(&variant) {
                None => "-".to_owned(),
                Some((good, took)) => {
                    let count: &mut (usize, usize) = passed.entry(variant).or_default();
                    count.0 += usize::from(*good);
                    count.1 += 1;
                    let word = if *good { "pass" } else { "FAIL" };
                    format!("{word} {:5.1} s", took.as_secs_f64())
                }
            };
            text += &format!("  {cell:>12}");
        }
        text.push('\n');
    }
    text += &format!("{:width$}", "passed");
    for variant in Variant::ALL {
        let cell = passed.get(&variant).map_or("-".to_owned(), |(n, of)| format!("{n}/{of}"));
        text += &format!("  {cell:>12}");
    }
    note(&format!("{text}\n{:.0} s in this variant", took.as_secs_f64()));
}
