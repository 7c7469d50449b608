//! Every developer command of the project, one file per command.
//!
//! A command is a clap `Args` struct and a `run(&Args) -> Result<ExitCode>` in its own
//! module; it appears here as one line of [`Command`] and one of `main`.

mod apt;
mod bench;
mod build;
mod deb;
mod demo;
mod ebpf;
mod generate;
mod guest;
mod image;
mod kubectl;
mod lint;
mod mode;
mod place;
mod setup;
mod shell;
mod test;
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
    Setup(setup::Args),
    Build(build::Args),
    Test(test::Args),
    Lint(lint::Args),
    Demo(demo::Args),
    Vm(vm::Args),
    Bench(bench::Args),
    Image(image::Args),
    Deb(deb::Args),
    Generate(generate::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Setup(args) => setup::run(&args),
        Command::Build(args) => build::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Lint(args) => lint::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Vm(args) => vm::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Deb(args) => deb::run(&args),
        Command::Generate(args) => generate::run(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
