//! Cgroups whose sockets are left alone: their packets are translated at the devices.
//!
//! For what goes wrong when a socket is translated as it connects: proxies that want to see the
//! Service's address (Istio), clients in the kernel that connect again by the translated one.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Ids (the inodes are the same) of the cgroups below `root` whose path matches a pattern, and of
/// all below these: a program sees the id of the task's own cgroup, and of one level above.
///
/// # Errors
/// A directory cannot be read; one that goes meanwhile is none.
pub fn ids(root: &Path, patterns: &[String]) -> io::Result<BTreeSet<u64>> {
    let mut ids = BTreeSet::new();
    for pattern in patterns {
        let mut matching = vec![root.to_owned()];
        for part in pattern.split('/').filter(|part| !part.is_empty()) {
            let mut below = Vec::new();
            for directory in matching {
                below.extend(children(&directory)?.into_iter().filter(|child| {
                    child.file_name().is_some_and(|name| matches(part, &name.to_string_lossy()))
                }));
            }
            matching = below;
        }
        while let Some(directory) = matching.pop() {
            if let Ok(metadata) = fs::metadata(&directory) {
                ids.insert(metadata.ino());
            }
            matching.extend(children(&directory)?);
        }
    }
    Ok(ids)
}

fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    Ok(entries.flatten().filter(is_dir).map(|entry| entry.path()).collect())
}

/// `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut left) = name.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    left.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, name, expected) in [
            ("pod-2", "pod-2", true),
            ("pod-2", "pod-22", false),
            ("*", "anything", true),
            ("pod*", "pod", true),
            ("*.slice", "kubepods.slice", true),
            ("kube*-pod*.slice", "kubepods-besteffort-pod12.slice", true),
            ("kube*-pod*.slice", "kubepods-besteffort.slice", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn what_matches_and_all_below_it() {
        let root = tempfile::tempdir().unwrap();
        for path in ["kubepods/pod1/main", "kubepods/pod2", "kubepods/burstable/pod3", "system"] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        fs::write(root.path().join("kubepods/pod9"), "no directory").unwrap();
        let id = |path: &str| fs::metadata(root.path().join(path)).unwrap().ino();
        let of = |patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(|&one| one.to_owned()).collect();
            ids(root.path(), &patterns).unwrap()
        };
        assert_eq!(of(&[]), BTreeSet::new());
        assert_eq!(
            of(&["kubepods/pod*"]),
            ["kubepods/pod1", "kubepods/pod1/main", "kubepods/pod2"].map(id).into()
        );
        assert_eq!(of(&["/kubepods/*/pod3", "none/*"]), [id("kubepods/burstable/pod3")].into());
    }
}
