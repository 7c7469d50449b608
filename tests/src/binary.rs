//! Finding the programs that tests start.

use std::path::PathBuf;

/// The built program called `name`, the daemon's or one of this crate's.
///
/// `cargo xtask test` links what it built into a directory and names it in
/// `PROXY_BIN_DIR`; under a plain `cargo test` programs lie above the test binary, which
/// cargo puts into `deps`, and the daemon must have been built before.
///
/// # Panics
/// When there is no such program: the message says how to build it.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let dir = std::env::var_os("PROXY_BIN_DIR").map_or_else(beside_tests, PathBuf::from);
    let file = dir.join(name);
    assert!(
        file.is_file(),
        "{} is not built: `cargo build --bin {name}`, or use `cargo xtask test`",
        file.display(),
    );
    file
}

fn beside_tests() -> PathBuf {
    let mut dir = std::env::current_exe().unwrap_or_default();
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    dir
}
