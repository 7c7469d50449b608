//! Building every test binary with one cargo run, and sorting what comes out.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::link;
use crate::{place, shell};

/// Where a test binary runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// On this machine, without privileges.
    Unit,
    /// On this machine, as root, in namespaces of its own.
    Host,
    /// In guests.
    Guest,
}

/// A built test binary.
#[derive(Debug)]
pub struct TestBinary {
    /// The file.
    pub path: PathBuf,
    /// Package and target, for people.
    pub label: String,
    /// Where tests expect to be started, as cargo starts them.
    pub package_dir: PathBuf,
    /// Where it runs.
    pub suite: Suite,
    /// The file itself is named as one of property tests.
    pub is_property: bool,
}

impl TestBinary {
    /// The names of the tests in it that match and are to run: not those marked `#[ignore]`,
    /// which for a guest test only says that it is none for this machine.
    pub fn names(&self, filter: Option<&str>) -> Result<Vec<String>> {
        let list = |ignored: bool| -> Result<Vec<String>> {
            let mut command = Command::new(&self.path);
            command.args(["--list", "--format=terse"]).args(filter);
            command.current_dir(&self.package_dir);
            if ignored {
                command.arg("--ignored");
            }
            let text = shell::output(&mut command)?;
            Ok(text
                .lines()
                .filter_map(|line| line.strip_suffix(": test"))
                .map(Into::into)
                .collect())
        };
        let mut names = list(false)?;
        if self.suite != Suite::Guest {
            let ignored = list(true)?;
            names.retain(|name| !ignored.contains(name));
        }
        Ok(names)
    }
}

/// Everything built for a run.
#[derive(Debug)]
pub struct Binaries {
    tests: Vec<TestBinary>,
    programs: Vec<PathBuf>,
}

impl Binaries {
    /// Builds the workspace's tests, and the programs they start.
    ///
    /// # Errors
    /// When something does not compile; cargo has then said what.
    pub fn build(with_guest: bool) -> Result<Self> {
        let mut binaries = cargo_build(&["--tests", "--bin", "proxy-daemon"])?;
        if with_guest {
            // `test = false` keeps it out of a plain `cargo test`, and out of the selection
            // above even when it is named there.
            binaries.add(cargo_build(&["--test", "guest"])?);
            if binaries.of(Suite::Guest).next().is_none() {
                bail!("cargo built no guest tests");
            }
        }
        Ok(binaries)
    }

    fn add(&mut self, mut other: Self) {
        self.tests.append(&mut other.tests);
        self.programs.append(&mut other.programs);
    }

    /// Cargo's JSON messages: <https://doc.rust-lang.org/cargo/reference/external-tools.html>.
    fn read(messages: &str) -> Result<Self> {
        let mut binaries = Self { tests: Vec::new(), programs: Vec::new() };
        for line in messages.lines().filter(|line| line.starts_with('{')) {
            let message: Value = serde_json::from_str(line).context("cargo wrote odd JSON")?;
            let Some(path) = message["executable"].as_str() else { continue };
            let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
            if message["profile"]["test"].as_bool() == Some(true) {
                binaries.tests.push(test_binary(&message, path, kind));
            } else if kind == "bin" {
                binaries.programs.push(path.into());
            }
        }
        binaries.tests.sort_by(|a, b| a.label.cmp(&b.label));
        Ok(binaries)
    }

    /// The test binaries of one suite, in a fixed order.
    pub fn of(&self, suite: Suite) -> impl Iterator<Item = &TestBinary> {
        self.tests.iter().filter(move |test| test.suite == suite)
    }

    /// A directory with the programs that tests start, by their names; gone on drop.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn programs(&self) -> Result<tempfile::TempDir> {
        let dir = tempfile::Builder::new()
            .prefix("test-run-")
            .tempdir_in(place::target())
            .context("cannot make a directory for the tests' programs")?;
        for program in &self.programs {
            link(program, dir.path())?;
        }
        Ok(dir)
    }
}

/// Always the whole workspace: with fewer packages other features would be unified, and
/// dependencies compiled again.
fn cargo_build(targets: &[&str]) -> Result<Binaries> {
    let mut cargo = shell::cargo();
    cargo.args(["build", "--workspace"]).args(targets);
    cargo.arg("--message-format=json-render-diagnostics");
    cargo.current_dir(place::repo()).stderr(Stdio::inherit());
    let out = cargo.output().context("cannot start cargo")?;
    if !out.status.success() {
        bail!("the tests do not build");
    }
    Binaries::read(&String::from_utf8_lossy(&out.stdout))
}

fn test_binary(message: &Value, path: &str, kind: &str) -> TestBinary {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let name = text(&message["target"]["name"]);
    let manifest = PathBuf::from(text(&message["manifest_path"]));
    let package_dir = manifest.parent().map(Path::to_path_buf).unwrap_or_default();
    let package = package_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let suite = match (kind, name.as_str()) {
        ("test", "guest") => Suite::Guest,
        ("test", name) if name.starts_with("host") => Suite::Host,
        _ => Suite::Unit,
    };
    TestBinary {
        path: path.into(),
        label: format!("{package} {kind} {name}"),
        package_dir,
        suite,
        is_property: kind == "test" && name.contains("prop"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: &str, name: &str, test: bool) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","manifest_path":"/r/tests/Cargo.toml","target":
            {{"kind":["{kind}"],"name":"{name}"}},"profile":{{"test":{test}}},
            "executable":"/t/{name}"}}"#
        )
        .replace('\n', "")
    }

    #[test]
    fn artifacts_sort_into_suites() {
        let text = [
            message("lib", "proxy_tests", true),
            message("test", "host_ebpf", true),
            message("test", "guest", true),
            message("test", "prop_state", true),
            message("bin", "host-like", true),
            message("bin", "test-apiserver", false),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
            "not json".to_owned(),
        ]
        .join("\n");
        let binaries = Binaries::read(&text).unwrap();
        let labels = |suite| binaries.of(suite).map(|test| test.label.as_str()).collect::<Vec<_>>();
        assert_eq!(labels(Suite::Host), ["tests test host_ebpf"]);
        assert_eq!(labels(Suite::Guest), ["tests test guest"]);
        assert_eq!(
            labels(Suite::Unit),
            ["tests bin host-like", "tests lib proxy_tests", "tests test prop_state"]
        );
        assert_eq!(binaries.programs, [PathBuf::from("/t/test-apiserver")]);
        assert_eq!(binaries.tests.iter().filter(|test| test.is_property).count(), 1);
    }
}
