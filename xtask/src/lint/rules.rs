//! The rules: which room may know which, which library lives where.

use super::scan::What;

/// The rooms of the daemon from the top down; those of one line may know each other.
/// `proxy-daemon/src/lib.rs` documents the same order.
/// `config` lies below `serve`, which publishes the configuration, and above `sync`: from
/// there down nothing knows of flags.
const ROOMS: [&[&str]; 11] = [
    &["app"],
    &["serve"],
    &["config"],
    &["sync"],
    &["dataplane"],
    &["kernel"],
    &["plan"],
    &["policy"],
    &["state"],
    &["watch"],
    &["model"],
];

/// Libraries that are confined, and the modules they are confined to.
const LIBRARIES: [(&str, &[&str]); 5] = [
    ("kube", &["watch"]),
    ("k8s_openapi", &["watch"]),
    ("aya", &["dataplane::ebpf"]),
    ("netlink_", &["kernel", "dataplane::ipvs"]),
    ("tokio", &["watch", "sync", "serve", "app"]),
];

/// Where `unsafe` may stand in the daemon.
const UNSAFE: &[&str] = &["kernel", "dataplane::ebpf"];

/// For `--help`; a test keeps it in step with the tables.
pub const EXPLAINED: &str = "Rules:
  imports point down only:  app > serve > config > sync > dataplane > kernel > plan
                            > policy > state > watch > model
  kube, k8s_openapi         only in watch
  aya                       only in dataplane::ebpf
  netlink_*                 only in kernel, dataplane::ipvs
  tokio                     only in watch, sync, serve, app
  unsafe                    only in kernel, dataplane::ebpf";

/// What is wrong with `what` standing in module `from`, if anything is.
pub fn check(from: &[String], what: &What) -> Option<String> {
    let here = from.join("::");
    match what {
        What::Room(to) => arrow(from.first()?, to),
        What::Library(library) => {
            let (_, allowed) = LIBRARIES.iter().find(|(name, _)| is_library(name, library))?;
            (!within(from, allowed)).then(|| {
                format!(
                    "{here} -> {library}: the library `{library}` belongs into {} only",
                    allowed.join(", ")
                )
            })
        }
        What::Unsafe => (!within(from, UNSAFE))
            .then(|| format!("{here}: `unsafe` may stand in {} only", UNSAFE.join(", "))),
    }
}

fn arrow(from: &str, to: &str) -> Option<String> {
    let Some(to_rank) = rank(to) else {
        return None; // an item of the crate's root, not a room
    };
    let Some(from_rank) = rank(from) else {
        return Some(format!(
            "{from} -> {to}: `{from}` has no place in the order of rooms (xtask/src/lint/rules.rs)"
        ));
    };
    (to_rank < from_rank).then(|| {
        format!("{from} -> {to}: points up; imports go down only: {}", order().join(" > "))
    })
}

fn order() -> Vec<String> {
    ROOMS.iter().map(|line| line.join("|")).collect()
}

fn rank(room: &str) -> Option<usize> {
    ROOMS.iter().position(|line| line.contains(&room))
}

/// A name that ends in an underscore stands for all that begin so.
fn is_library(rule: &str, library: &str) -> bool {
    library == rule || (rule.ends_with('_') && library.starts_with(rule))
}

fn within(module: &[String], allowed: &[&str]) -> bool {
    allowed.iter().any(|path| {
        let path: Vec<_> = path.split("::").collect();
        module.len() >= path.len() && module.iter().zip(&path).all(|(a, b)| a == b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lint::scan::scan;

    /// `line: message` for every broken rule of a file that is `module`.
    fn findings(module: &str, source: &str) -> Vec<String> {
        let module = module.split("::").map(str::to_owned).collect();
        let scanned = scan(source, module).unwrap();
        scanned
            .uses
            .iter()
            .filter_map(|used| Some(format!("{}: {}", used.line, check(&used.from, &used.what)?)))
            .collect()
    }

    #[track_caller]
    fn good(module: &str, source: &str) {
        assert_eq!(findings(module, source), Vec::<String>::new());
    }

    /// One finding on `line` that begins with `arrow`.
    #[track_caller]
    fn bad(module: &str, source: &str, line: usize, arrow: &str) {
        let found = findings(module, source);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with(&format!("{line}: {arrow}: ")), "{found:?}");
    }

    #[test]
    fn down_and_sideways_is_allowed() {
        good("plan::diff", "use crate::model::Key;\nuse super::ops::Op;\nuse self::x::Y;");
        good("app", "use crate::{config::Config, model, sync::engine};");
        good("serve", "use crate::config::X;");
        good("plan", "pub(crate) fn f() -> crate::model::Key { crate::model::key() }");
        good("plan", "// use crate::kernel::X;\nconst S: &str = \"crate::kernel\";");
    }

    #[test]
    fn up_is_found_however_it_is_written() {
        bad("plan::diff", "\nuse crate::kernel::X;", 2, "plan -> kernel");
        bad("config", "use crate::app::X;", 1, "config -> app");
        bad("model", "use crate::{model::Key,\n    state::S};", 2, "model -> state");
        bad("model", "use crate::{self as me, watch};", 1, "model -> watch");
        bad("plan::diff", "use super::super::sync::E;", 1, "plan -> sync");
        bad("plan", "use super::{model::K, serve::S};", 1, "plan -> serve");
        bad("model", "fn f() { crate::plan::diff() }", 1, "model -> plan");
        bad("model", "fn f(x: Vec<crate::plan::Op>) {}", 1, "model -> plan");
        bad("model", "fn f() { println!(\"{}\", crate::plan::N) }", 1, "model -> plan");
        bad("model", "mod inner { use super::super::plan::Op; }", 1, "model -> plan");
        bad("model", "pub use crate::plan as p;", 1, "model -> plan");
        bad("model", "use proxy_daemon::plan::Op;", 1, "model -> plan");
        bad("model", "use r#crate_is_fine::x; use crate::r#plan::Op;", 1, "model -> plan");
    }

    #[test]
    fn tests_inside_files_may_look_up() {
        good("model", "#[cfg(test)]\nmod tests { use crate::plan::Op; use tokio::test; }");
        good("model", "#[cfg(test)] use crate::{plan::Op, kernel}; fn f() {}");
        good("model", "#[cfg(all(test, unix))] #[allow(dead_code)] fn f() { crate::plan::x() }");
        bad("model", "#[cfg(test)] fn t() {}\nuse crate::plan::Op;", 2, "model -> plan");
        bad("model", "#[cfg(not(test))] use crate::plan::Op;", 1, "model -> plan");
        bad("model", "#[cfg(any(test, x))] use crate::plan::Op;", 1, "model -> plan");
        bad("model", "#[test]\nfn t() { crate::plan::x() }", 2, "model -> plan");
    }

    #[test]
    fn libraries_stay_in_their_rooms() {
        good("watch::kube", "use kube::Client; use k8s_openapi::api; use tokio::time;");
        good("dataplane::ebpf::loader", "use aya::Ebpf;");
        good("dataplane::ipvs", "use netlink_packet_core::X;");
        good("watch::manifests", "use super::kube::Y; use crate::watch::kube::Z;");
        good("policy", "use serde::Deserialize; let aya = 1; struct S { tokio: u8 }");
        bad("app", "use kube::Client;", 1, "app -> kube");
        bad("dataplane::ipvs", "use aya::Ebpf;", 1, "dataplane::ipvs -> aya");
        bad("dataplane::ebpf", "use netlink_sys::S;", 1, "dataplane::ebpf -> netlink_sys");
        bad("plan", "async fn f() { tokio::time::sleep(D).await }", 1, "plan -> tokio");
        bad("plan", "use ::tokio::time;", 1, "plan -> tokio");
        bad("plan", "use tokio as t;", 1, "plan -> tokio");
        bad("plan", "#[tokio::main] async fn f() {}", 1, "plan -> tokio");
        bad("plan", "extern crate tokio;", 1, "plan -> tokio");
    }

    #[test]
    fn unsafe_stays_at_the_kernel() {
        good("kernel::netns", "fn f() { unsafe { x() } }");
        good("dataplane::ebpf::pod", "unsafe impl Pod for X {}");
        bad("dataplane::ipvs", "\n\nfn f() { unsafe { x() } }", 3, "dataplane::ipvs");
    }

    #[test]
    fn a_room_without_a_rank_is_named() {
        bad("stray", "use crate::model::X;", 1, "stray -> model");
    }

    #[test]
    fn the_help_says_what_the_tables_say() {
        let flat = EXPLAINED.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(flat.contains(&order().join(" > ")));
        for (library, rooms) in LIBRARIES {
            assert!(flat.contains(library), "{library}");
            assert!(flat.contains(&format!("only in {}", rooms.join(", "))), "{library}");
        }
    }
}
