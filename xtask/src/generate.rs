//! `cargo xtask generate`: files of `deploy/` that are made from the daemon's source.

use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::{place, shell};

/// Make the manual pages, the shell completions and the rendered Helm chart again
///
/// They are kept in deploy/, and tests of the daemon find them out of date. The chart is
/// rendered by helm, from PATH or from where the variable HELM says; without it the chart's
/// part is left as it is.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the tests that compare these files, told to write them instead.
///
/// # Errors
/// When cargo cannot be started. What fails is the exit code.
pub fn run(_: &Args) -> Result<ExitCode> {
    let helm = std::env::var_os("HELM").unwrap_or_else(|| "helm".into());
    let has_helm = Command::new(&helm).arg("version").output().is_ok_and(|o| o.status.success());
    if !has_helm {
        println!("{} is not there: the chart is not rendered", helm.display());
    }
    let mut cargo = shell::cargo();
    cargo.current_dir(place::repo()).env("PROXY_UPDATE", "1");
    cargo.args(["test", "--package", "proxy-daemon", "--lib", "--", "config::generated_tests"]);
    if has_helm {
        cargo.arg("config::chart_tests::what_is_rendered_is_of_this_chart");
    }
    Ok(if shell::visibly(&mut cargo)? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
