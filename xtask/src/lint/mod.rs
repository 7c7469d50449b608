//! `cargo xtask lint`: formatting, clippy, and the daemon's import arrows.

mod rules;
mod scan;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::{place, setup, shell};

/// Check formatting, clippy's findings, and the arrows of import inside the daemon
///
/// The daemon's modules import downwards only, libraries stay in the rooms they belong to,
/// and `unsafe` stands only where the kernel is spoken to: rustc checks none of that. Code
/// under `#[cfg(test)]` may import what it likes.
#[derive(Debug, clap::Args)]
#[command(after_help = rules::EXPLAINED)]
pub struct Args {
    /// Only the import arrows, which takes no time
    #[arg(long)]
    arrows: bool,
}

/// Runs all checks, also after one has failed.
///
/// # Errors
/// When a check cannot be started. Findings are the exit code.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut clean = arrows()?;
    if !args.arrows {
        setup::lint_components()?;
        clean &= cargo("formatting", &["fmt", "--all", "--check"])?;
        let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
        clean &= cargo("clippy", &clippy)?;
    }
    println!("lint: {}", if clean { "clean" } else { "findings above" });
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn cargo(name: &str, arguments: &[&str]) -> Result<bool> {
    println!("== {name}");
    let start = Instant::now();
    let mut command = shell::cargo();
    let clean = shell::visibly(command.args(arguments).current_dir(place::repo()))?;
    println!("== {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(clean)
}

fn arrows() -> Result<bool> {
    println!("== import arrows");
    let repo = place::repo();
    let source = repo.join("proxy-daemon/src");
    let mut findings = Vec::new();
    let mut files = 0;
    for (root, module) in [("lib.rs", ""), ("main.rs", "app")] {
        let module = if module.is_empty() { Vec::new() } else { vec![module.to_owned()] };
        for file in scan::crate_files(&source.join(root), module)? {
            files += 1;
            findings.extend(file.uses.iter().filter_map(|used| {
                let path = file.path.strip_prefix(&repo).unwrap_or(&file.path);
                let broken = rules::check(&used.from, &used.what)?;
                Some(format!("{}:{}: {broken}", path.display(), used.line))
            }));
        }
    }
    for finding in &findings {
        println!("{finding}");
    }
    println!("== import arrows: {files} files, {} findings", findings.len());
    Ok(findings.is_empty())
}
