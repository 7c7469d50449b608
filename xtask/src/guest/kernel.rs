//! Guest kernels: Debian's packages, unpacked beside the system and never installed.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::apt::{Lists, Release};
use crate::{place, shell};

/// The kernels that tests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kernel {
    /// Debian 11's: the oldest that is supported. Not in the usual run: ask for it by name
    #[value(name = "5.10")]
    V5_10,
    /// Debian 12's own: no tcx, clsact only
    #[value(name = "6.1")]
    V6_1,
    /// Debian 12's backport: tcx, netkit
    #[value(name = "6.12")]
    V6_12,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

impl Kernel {
    /// Every kernel of the usual run, oldest first.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// The package names to choose from, as an apt regular expression: the unsigned image
    /// of the plain flavour, because the signed one only adds a signature for secure boot.
    fn pattern(self) -> &'static str {
        match self {
            Self::V5_10 => r"^linux-image-5\.10\.0-[0-9]+-amd64-unsigned$",
            Self::V6_1 => r"^linux-image-6\.1\.0-[0-9]+-amd64-unsigned$",
            Self::V6_12 => r"^linux-image-6\.12\.[0-9.+a-z-]*deb12[0-9.+a-z-]*-amd64-unsigned$",
        }
    }

    const fn release(self) -> Release {
        match self {
            Self::V5_10 => Release::Bullseye,
            Self::V6_1 | Self::V6_12 => Release::Bookworm,
        }
    }

    fn dir(self) -> Result<PathBuf> {
        Ok(place::cache()?.join("kernels").join(self.to_string()))
    }

    /// The unpacked tree, if it is there.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn find(self) -> Result<Option<Tree>> {
        let dir = self.dir()?;
        if dir.is_dir() { Tree::open(&dir).map(Some) } else { Ok(None) }
    }

    /// The unpacked tree, downloaded when it is not there.
    ///
    /// # Errors
    /// When the package cannot be found, fetched or unpacked.
    pub fn ensure(self) -> Result<Tree> {
        if let Some(tree) = self.find()? {
            return Ok(tree);
        }
        let cache = place::cache()?;
        let _lock = shell::lock(&cache.join("kernels.lock"))?;
        if let Some(tree) = self.find()? {
            return Ok(tree);
        }
        let release = self.release();
        let lists = Lists::update(release, &cache.join(release.directory()))?;
        let mut names = lists.search(self.pattern())?;
        names.retain(|name| !name.contains("-rt-") && !name.contains("-cloud-"));
        names.sort_by_key(|name| numbers(name));
        let Some(package) = names.pop() else {
            bail!("Debian's lists name no package for a {self} guest kernel");
        };
        self.unpack(&lists, &package, &cache)
    }

    fn unpack(self, lists: &Lists, package: &str, cache: &Path) -> Result<Tree> {
        // Unpacked aside and renamed into place: an interrupted run leaves no half tree.
        let kernels = cache.join("kernels");
        fs::create_dir_all(&kernels)?;
        let work = tempfile::Builder::new().prefix(".new-").tempdir_in(&kernels)?;
        lists.download(package, work.path())?;
        let deb = only(work.path(), |name| name.ends_with(".deb"))?;
        let root = work.path().join("root");
        shell::quietly(
            &format!("unpacking {package}"),
            Command::new("dpkg").arg("-x").arg(&deb).arg(&root),
        )?;
        let release = release(&root)?;
        shell::quietly(
            &format!("indexing the modules of {release}"),
            Command::new("depmod").arg("-b").arg(&root).arg(&release),
        )?;
        fs::rename(&root, self.dir()?).context("cannot move the kernel tree into place")?;
        Tree::open(&self.dir()?)
    }
}

/// The numbers in a name, so that 6.1.0-9 sorts before 6.1.0-10.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
}

fn only(dir: &Path, matches: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    entries
        .filter_map(Result::ok)
        .find(|entry| matches(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .with_context(|| format!("{} holds nothing of the expected name", dir.display()))
}

fn release(root: &Path) -> Result<String> {
    let image = only(&root.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(name.trim_start_matches("vmlinuz-").to_owned())
}

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Tree {
    root: PathBuf,
    /// As `uname -r` prints it in the guest.
    pub release: String,
}

impl Tree {
    fn open(root: &Path) -> Result<Self> {
        let tree = Self { root: root.to_owned(), release: release(root)? };
        let index = tree.module_dir().join("modules.dep");
        if !index.is_file() {
            bail!("{} is missing: remove {} and start again", index.display(), root.display());
        }
        Ok(tree)
    }

    /// The kernel image to boot.
    pub fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// What `/lib/modules` shall be in the guest.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules")
    }

    /// Where `modules.dep` and the modules of this release are.
    pub fn module_dir(&self) -> PathBuf {
        self.modules().join(&self.release)
    }

    /// The files of the named modules and of everything they need, in loading order.
    /// Names that are built into the kernel give no file.
    ///
    /// # Errors
    /// When a name is neither a module nor built in.
    pub fn loading_order(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let dir = self.module_dir();
        let read = |file: &str| {
            fs::read_to_string(dir.join(file))
                .with_context(|| format!("cannot read {}", dir.join(file).display()))
        };
        let order = loading_order(&read("modules.dep")?, &read("modules.builtin")?, names)
            .with_context(|| format!("kernel {}", self.release))?;
        Ok(order.iter().map(|file| dir.join(file)).collect())
    }
}

/// `modules.dep` has one line per module, `file: needed-first needed-second ...`, where
/// what is needed comes in reverse order of loading (depmod(8)).
fn loading_order(dep: &str, builtin: &str, names: &[&str]) -> Result<Vec<String>> {
    let lines: HashMap<&str, (&str, &str)> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (module_name(file), (file, needs)))
        .collect();
    let builtin: BTreeSet<&str> = builtin.lines().map(module_name).collect();
    let mut order: Vec<String> = Vec::new();
    for name in names {
        let Some((file, needs)) = lines.get(name) else {
            if builtin.contains(name) {
                continue;
            }
            bail!("has no module {name}");
        };
        for file in needs.split_whitespace().rev().chain([*file]) {
            if !order.iter().any(|have| have == file) {
                order.push(file.to_owned());
            }
        }
    }
    Ok(order)
}

fn module_name(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs.ko.xz\n\
        kernel/net/9p/9pnet.ko.xz:\nkernel/fs/netfs.ko.xz:\n\
        kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz\n";

    #[test]
    fn a_module_comes_after_all_it_needs_and_once() {
        let order = loading_order(DEP, "", &["9p", "9pnet_virtio"]).unwrap();
        let names: Vec<_> = order.iter().map(|file| module_name(file)).collect();
        assert_eq!(names, ["netfs", "9pnet", "9p", "9pnet_virtio"]);
    }

    #[test]
    fn built_in_needs_no_file_and_unknown_is_an_error() {
        assert!(loading_order(DEP, "kernel/virtio.ko\n", &["virtio"]).unwrap().is_empty());
        let error = loading_order(DEP, "", &["virtio"]).unwrap_err();
        assert_eq!(error.to_string(), "has no module virtio");
    }

    #[test]
    fn versions_sort_by_number() {
        assert!(numbers("linux-image-6.1.0-9-amd64") < numbers("linux-image-6.1.0-10-amd64"));
    }
}
