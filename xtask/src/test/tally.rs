//! Counting tests from what libtest prints.

use std::collections::BTreeMap;
use std::fmt;

use crate::guest::Kernel;

/// What a test counts as in the summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Unit,
    Property,
    Namespace,
    Guest(Kernel),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unit => f.write_str("unit"),
            Self::Property => f.write_str("property"),
            Self::Namespace => f.write_str("namespace"),
            Self::Guest(kernel) => write!(f, "VM {kernel}"),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
}

/// The outcome of one test binary.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    all: Count,
    /// Those of them that are property tests by their module's name.
    property: Count,
    ignored: usize,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.all.passed, self.all.failed)?;
        if self.ignored > 0 {
            write!(f, ", {} IGNORED", self.ignored)?;
        }
        Ok(())
    }
}

impl Tally {
    /// A binary that ended without a result: one failure, whatever ran before.
    pub fn crashed() -> Self {
        Self { all: Count { passed: 0, failed: 1 }, ..Self::default() }
    }

    /// Tests that failed.
    pub fn failed(&self) -> usize {
        self.all.failed
    }

    /// One of those that failed has passed since.
    pub fn passes_after_all(&mut self, name: &str) {
        let count = |of: &mut Count| {
            of.failed = of.failed.saturating_sub(1);
            of.passed += 1;
        };
        count(&mut self.all);
        if is_property(name) {
            count(&mut self.property);
        }
    }

    /// Reads libtest's output; `names` are the tests that were to run. `None` when there is
    /// no result line, or it accounts for fewer tests than there are.
    ///
    /// The result line is what counts: the lines of single tests may have a child's output
    /// in their midst.
    pub fn read(text: &str, names: &[String]) -> Option<Self> {
        let mut tally = Self::default();
        let line = text.lines().rfind(|line| line.starts_with("test result: "))?;
        tally.add_result(line);
        if tally.all.passed + tally.all.failed < names.len() {
            return None;
        }
        let failures = failures(text);
        let property: Vec<_> = names.iter().filter(|name| is_property(name)).collect();
        tally.property.failed =
            property.iter().filter(|name| failures.contains(&name.as_str())).count();
        tally.property.passed = property.len() - tally.property.failed;
        Some(tally)
    }

    /// Adds up the result lines of several binaries.
    pub fn sum_of_results(text: &str) -> Self {
        let mut tally = Self::default();
        for line in text.lines().filter(|line| line.starts_with("test result: ")) {
            tally.add_result(line);
        }
        tally
    }

    /// `test result: ok. 9 passed; 0 failed; 0 ignored; 0 measured; ...`
    fn add_result(&mut self, line: &str) {
        let words: Vec<_> = line.split([' ', ';']).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<usize>() else { continue };
            match pair[1] {
                "passed" => self.all.passed += number,
                "failed" => self.all.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// A test is a property test when a part of its path says so.
fn is_property(name: &str) -> bool {
    name.split("::").any(|part| {
        part.split('_').any(|word| matches!(word, "prop" | "props" | "property" | "properties"))
    })
}

/// The names under libtest's last `failures:` heading.
pub fn failures(text: &str) -> Vec<&str> {
    let Some((_, list)) = text.rsplit_once("\nfailures:\n") else { return Vec::new() };
    list.lines().map_while(|line| line.strip_prefix("    ")).collect()
}

/// All outcomes, by kind.
#[derive(Debug, Default)]
pub struct Report {
    counts: BTreeMap<Kind, Count>,
    ignored: usize,
    unsteady: Vec<String>,
}

impl Report {
    /// A test that failed beside others and passed alone.
    pub fn unsteady(&mut self, name: String) {
        self.unsteady.push(name);
    }

    /// Adds a binary's outcome. A kind that was added and stays without a test fails the run.
    pub fn add(&mut self, kind: Kind, all_property: bool, tally: Tally) {
        self.ignored += tally.ignored;
        let property = if all_property { tally.all } else { tally.property };
        if property != Count::default() && kind == Kind::Unit {
            self.count(Kind::Property, property);
            let rest = Count {
                passed: tally.all.passed - property.passed,
                failed: tally.all.failed - property.failed,
            };
            if rest != Count::default() {
                self.count(kind, rest);
            }
        } else {
            self.count(kind, tally.all);
        }
    }

    /// Adds what may well be empty.
    pub fn add_optional(&mut self, kind: Kind, tally: Tally) {
        if tally.all != Count::default() {
            self.add(kind, false, tally);
        }
    }

    fn count(&mut self, kind: Kind, count: Count) {
        let sum = self.counts.entry(kind).or_default();
        sum.passed += count.passed;
        sum.failed += count.failed;
    }

    /// Prints the summary, whose last line is `N passed, N failed`, and says whether all is
    /// well.
    pub fn print(&self) -> bool {
        let mut sum = Count::default();
        for (kind, count) in &self.counts {
            println!(
                "{:<10} {:>5} passed, {} failed",
                kind.to_string(),
                count.passed,
                count.failed
            );
            sum.passed += count.passed;
            sum.failed += count.failed;
        }
        if self.ignored > 0 {
            println!("{:<10} {:>5} (marked #[ignore])", "IGNORED", self.ignored);
        }
        for name in &self.unsteady {
            println!("UNSTEADY   failed beside others, passed alone: {name}");
        }
        let empty: Vec<_> =
            self.counts.iter().filter(|(_, count)| **count == Count::default()).collect();
        for (kind, _) in &empty {
            println!("no {kind} test ran: that is a failure of the run");
        }
        if self.counts.is_empty() {
            println!("no test ran: that is a failure of the run");
        }
        println!("{} passed, {} failed", sum.passed, sum.failed);
        sum.failed == 0 && empty.is_empty() && !self.counts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\nrunning 4 tests\ntest a::x ... ok\ntest state::prop::y ... FAILED\n\
        \nfailures:\n\n---- state::prop::y stdout ----\nboom\n\n\nfailures:\n    state::prop::y\n\
        \ntest result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 7 filtered out; \
        finished in 0.02s\n\n";

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn counts_and_kinds_from_libtest() {
        let tally = Tally::read(OUTPUT, &names(&["a::x", "state::prop::y", "plan::properties::z"]))
            .unwrap();
        assert_eq!(tally.all, Count { passed: 2, failed: 1 });
        assert_eq!(tally.property, Count { passed: 1, failed: 1 });
        assert_eq!(tally.to_string(), "2 passed, 1 failed, 1 IGNORED");
        let mut report = Report::default();
        report.add(Kind::Unit, false, tally);
        assert_eq!(report.counts[&Kind::Property], Count { passed: 1, failed: 1 });
        assert_eq!(report.counts[&Kind::Unit], Count { passed: 1, failed: 0 });
        assert!(!report.print());
    }

    #[test]
    fn what_passes_the_second_time_counts_as_passed() {
        let mut tally = Tally::read(OUTPUT, &names(&["a::x", "state::prop::y"])).unwrap();
        assert_eq!(failures(OUTPUT), ["state::prop::y"]);
        tally.passes_after_all("state::prop::y");
        assert_eq!(tally.property, Count { passed: 1, failed: 0 });
        assert_eq!(tally.all, Count { passed: 3, failed: 0 });
    }

    #[test]
    fn output_that_stops_short_is_no_result() {
        assert!(Tally::read("running 2 tests\ntest a ... ok\n", &names(&["a", "b"])).is_none());
        let short = "test result: ok. 1 passed; 0 failed; 0 ignored";
        assert!(Tally::read(short, &names(&["a", "b"])).is_none());
    }

    #[test]
    fn a_stage_without_tests_fails_the_run() {
        let mut report = Report::default();
        assert!(!report.print());
        let passed = Tally { all: Count { passed: 1, failed: 0 }, ..Tally::default() };
        report.add(Kind::Unit, false, passed);
        assert!(report.print());
        report.add(Kind::Guest(Kernel::V6_1), false, Tally::default());
        assert!(!report.print());
    }

    #[test]
    fn property_by_word_not_by_letters() {
        assert!(is_property("state::prop_tests::order"));
        assert!(is_property("properties::x"));
        assert!(!is_property("proposal::x"));
    }
}
