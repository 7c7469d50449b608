//! Embeds the eBPF object, when there is one.
//!
//! `cargo xtask build` makes the object first and passes its path in
//! `PROXY_EBPF_OBJECT`. A plain `cargo check` or `cargo build` needs no eBPF tool chain:
//! it embeds nothing, and the daemon then wants the path at run time, or says so.

use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=PROXY_EBPF_OBJECT");
    let out = env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR for build scripts")?;
    let embedded = PathBuf::from(out).join("proxy-ebpf.o");
    let bytes = match env::var_os("PROXY_EBPF_OBJECT").filter(|path| !path.is_empty()) {
        None => Vec::new(),
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            fs::read(&path).map_err(|e| format!("PROXY_EBPF_OBJECT: {}: {e}", path.display()))?
        }
    };
    fs::write(&embedded, bytes).map_err(|e| format!("{}: {e}", embedded.display()))
}
