//! Every developer command of the project, one file per command.
//!
//! A command is a clap `Args` struct and a `run(&Args) -> Result<ExitCode>` in its own
//! module; it appears here as one line of [`Command`] and one of `main`.

#![allow(dead_code, reason = "setup and test, which use the rest, come next")]

mod apt;
mod guest;
mod place;
mod shell;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of the node dataplane daemon.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Vm(vm::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Vm(args) => vm::run(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
