//! Running other programs: errors that name the command and show its output, and a
//! progress line for whatever takes longer than a second.

use std::ffi::OsStr;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The first program called `name` on `PATH`, also looking where a plain user's `PATH`
/// does not lead.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    std::env::split_paths(&path)
        .chain(usual.iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// A command as one would type it, for messages.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// `cargo` as a user's shell would start it. What `cargo run` told this process about
/// itself is taken away: build scripts (ring's) watch these variables, and would be run
/// again, with everything that stands on them, at each change between
/// `cargo xtask test` and `cargo test`.
pub fn cargo() -> Command {
    let mut command = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command to its end and returns what it wrote to stdout.
///
/// # Errors
/// When it cannot be started or fails; the message carries the end of its stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let result = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    checked(command, &result)?;
    Ok(String::from_utf8_lossy(&result.stdout).into_owned())
}

/// Runs a command whose output nobody wants unless it fails, saying that it goes on.
///
/// # Errors
/// As [`output`].
pub fn quietly(what: &str, command: &mut Command) -> Result<()> {
    progress(what, || output(command).map(drop))
}

/// Runs a command that writes straight to the terminal.
///
/// # Errors
/// When it cannot be started; its own failure is in the value.
pub fn visibly(command: &mut Command) -> Result<bool> {
    let status = command.status().with_context(|| format!("cannot start `{}`", shown(command)))?;
    Ok(status.success())
}

fn checked(command: &Command, result: &Output) -> Result<()> {
    if result.status.success() {
        return Ok(());
    }
    let text = [&result.stdout[..], &result.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(15)..].join("\n  ");
    bail!("`{}` failed ({}):\n  {tail}", shown(command), result.status)
}

/// Does `work` and, once it has taken longer than a second, says what goes on and for
/// how long; a terminal gets a running clock, a log one line at the start and at the end.
///
/// # Errors
/// Those of `work`.
pub fn progress<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let (done, ended) = channel::<()>();
    let label = what.to_owned();
    let clock = thread::spawn(move || {
        let live = std::io::stderr().is_terminal();
        let mut wait = Duration::from_secs(1);
        let mut said = false;
        while ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
            let seconds = start.elapsed().as_secs();
            if live {
                eprint!("\r  {label} ... {seconds} s ");
                let _ = std::io::stderr().flush();
            } else {
                eprintln!("  {label} ... {seconds} s");
                wait = Duration::from_secs(15);
            }
            said = true;
        }
        if said {
            let start_of_line = if live { "\r" } else { "" };
            eprintln!("{start_of_line}  {label}: {:.1} s      ", start.elapsed().as_secs_f64());
        }
    });
    let result = work();
    drop(done);
    let _ = clock.join();
    result
}

/// The lock that keeps two runs from preparing the same thing at once; released on drop.
///
/// # Errors
/// When the lock file cannot be opened.
pub fn lock(file: &Path) -> Result<std::fs::File> {
    let lock = std::fs::File::create(file)
        .with_context(|| format!("cannot make the lock file {}", file.display()))?;
    if lock.try_lock().is_err() {
        eprintln!("  waiting for another run that holds {}", file.display());
        lock.lock().with_context(|| format!("cannot lock {}", file.display()))?;
    }
    Ok(lock)
}
