//! A directory of manifests as the source, in place of an API server.
//!
//! Files are read whole, and the set of all objects is compared with what was last
//! delivered. A file that does not parse keeps the objects of its last good version: a
//! typing mistake must not take Services away. Replace files by renaming; a file that
//! is truncated and written slowly may be seen half-written.

mod parse;

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::announce::Announcer;
use super::intake::{Closed, Intake, Kind, Listing, Nodes, Outlet, ServiceCidrs, Services, Slices};
use super::outage::Outage;
use super::stats::{Cause, ObjectKind, SourceStats};
use super::wire::Metadata;
use crate::model::{Event, Node, NodeName, ObjectName};

pub use parse::ParseError;
use parse::{Object, parse};

/// Quiet time after a change before the directory is read: editors and `cp` write in
/// several steps.
const SETTLE: Duration = Duration::from_millis(100);
/// However busy the directory, it is read this often.
const LONGEST_SETTLE: Duration = Duration::from_secs(2);
/// The directory is read this often even if nothing was reported: inotify is silent on
/// network file systems and loses events when its queue is full.
const POLL: Duration = Duration::from_secs(30);
/// As [`POLL`], where inotify cannot be had at all.
const POLL_ALONE: Duration = Duration::from_secs(2);

/// Why the directory cannot be used at start-up.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("{}: {error}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        error: io::Error,
    },
    #[error("{}:{error}", path.display())]
    Parse {
        path: PathBuf,
        #[source]
        error: ParseError,
    },
}

impl ManifestError {
    const fn cause(&self) -> Cause {
        match self {
            Self::Read { .. } => Cause::File,
            Self::Parse { .. } => Cause::Manifest,
        }
    }
}

/// One file as last read.
#[derive(Debug)]
struct Loaded {
    hash: u64,
    /// Of the last good version.
    objects: Vec<Object>,
    /// Whether the version as read is not the good one.
    broken: bool,
}

/// A directory that was read without an error once.
#[derive(Debug)]
pub struct Manifests {
    directory: PathBuf,
    node: NodeName,
    stats: Arc<SourceStats>,
    files: BTreeMap<PathBuf, Loaded>,
    outage: Outage,
}

impl Manifests {
    /// Reads the directory. Here every error counts: whoever starts the proxy is there
    /// to see it.
    pub fn open(
        directory: &Path,
        node: NodeName,
        stats: Arc<SourceStats>,
    ) -> Result<Self, ManifestError> {
        let mut manifests = Self {
            directory: directory.to_owned(),
            node,
            stats,
            files: BTreeMap::new(),
            outage: Outage::default(),
        };
        match manifests.read().errors.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(manifests),
        }
    }

    /// Delivers the objects, then every change, until the receiver is dropped.
    pub async fn run(mut self, events: mpsc::Sender<Event>) {
        let (changed, mut changes) = watch::channel(());
        let watcher = self.watcher(changed);
        let mut deliver = Delivery::new(events, &self.stats);
        if self.deliver(&mut deliver).await.is_err() {
            return;
        }
        // What changed between opening the directory and watching it.
        let mut pending = true;
        while !deliver.services.is_closed() {
            if !pending && watcher.is_none() {
                sleep(POLL_ALONE).await;
            } else if !pending && timeout(POLL, changes.changed()).await.is_ok() {
                settle(&mut changes).await;
            }
            pending = false;
            let (manifests, dirty) = match tokio::task::spawn_blocking(move || {
                let dirty = self.refresh();
                (self, dirty)
            })
            .await
            {
                Ok(read) => read,
                // Only when the runtime shuts down.
                Err(_) => return,
            };
            self = manifests;
            if dirty && self.deliver(&mut deliver).await.is_err() {
                return;
            }
        }
    }

    fn watcher(&self, changed: watch::Sender<()>) -> Option<RecommendedWatcher> {
        let made = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading a file is an event too, and would make us read for ever.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                changed.send_replace(());
            }
        })
        .and_then(|mut watcher| {
            watcher.watch(&self.directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match made {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                warn!(
                    directory = %self.directory.display(),
                    "cannot be watched ({error}), reading it every {POLL_ALONE:?} instead"
                );
                None
            }
        }
    }

    /// Reads again; whether any object may have changed. Errors are logged.
    fn refresh(&mut self) -> bool {
        let read = self.read();
        let now = Instant::now();
        for error in &read.errors {
            for kind in [ObjectKind::Service, ObjectKind::EndpointSlice] {
                self.stats.kind(kind).count_failure(error.cause());
            }
            let message = error.to_string();
            if let Some(line) = self.outage.failed(now, error.cause(), &message) {
                warn!("{line}; the last good version stays");
            }
        }
        let broken = self.files.values().any(|file| file.broken);
        if read.errors.is_empty()
            && !broken
            && let Some(lasted) = self.outage.well(now)
        {
            info!(directory = %self.directory.display(), "well again after {lasted:.1?}");
        }
        read.changed
    }

    fn read(&mut self) -> Read {
        let mut read = Read::default();
        let paths = match self.paths() {
            Ok(paths) => paths,
            Err(error) => {
                read.fail(&self.directory, error);
                return read;
            }
        };
        let before = self.files.len();
        self.files.retain(|path, _| paths.contains(path));
        read.changed = self.files.len() != before;
        for path in paths {
            match fs::read_to_string(&path) {
                Ok(text) => self.load(path, &text, &mut read),
                // Gone since the directory was listed: the next round sees to it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => read.fail(&path, error),
            }
        }
        read
    }

    /// Hidden files are editors' and, in a mounted ConfigMap, the versions behind the
    /// links.
    fn paths(&self) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let wanted = path
                .extension()
                .is_some_and(|kind| kind == "yaml" || kind == "yml" || kind == "json");
            let hidden =
                path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            if wanted && !hidden && !path.is_dir() {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    fn load(&mut self, path: PathBuf, text: &str, read: &mut Read) {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let hash = hasher.finish();
        let before = self.files.get(&path);
        if before.is_some_and(|file| file.hash == hash) {
            return;
        }
        match parse(&path, text) {
            Ok(objects) => {
                read.changed = true;
                let broken = false;
                self.files.insert(path, Loaded { hash, objects, broken });
            }
            Err(error) => {
                if let Some(file) = self.files.get_mut(&path) {
                    file.hash = hash;
                    file.broken = true;
                }
                read.errors.push(ManifestError::Parse { path, error });
            }
        }
    }

    async fn deliver(&self, deliver: &mut Delivery) -> Result<(), Closed> {
        let services = collect(&mut deliver.services, self.of(Object::service));
        deliver.services.listed(services).await?;
        let slices = collect(&mut deliver.slices, self.of(Object::slice));
        deliver.slices.listed(slices).await?;
        let service_cidrs = collect(&mut deliver.service_cidrs, self.of(Object::service_cidr));
        deliver.service_cidrs.listed(service_cidrs).await?;
        let mut own = self.of(Object::node);
        own.retain(|(_, metadata, _)| metadata.name.as_deref() == Some(&*self.node.0));
        if !own.is_empty() {
            let nodes = collect(&mut deliver.nodes, own);
            return deliver.nodes.listed(nodes).await;
        }
        // Nobody has to describe the node to use manifests: it exists, since we run.
        let plain = Node {
            name: self.node.clone(),
            zone: None,
            addresses: Vec::new(),
            pod_cidrs: Vec::new(),
            deleting: false,
            scaling_down: false,
        };
        let event = Event::Node(Some(plain));
        deliver.events.send(event).await.map_err(|_| Closed)
    }

    /// All objects of one kind, in the order of their files.
    fn of<'a, T>(
        &'a self,
        pick: fn(&'a Object) -> Option<(&'a Metadata, &'a T)>,
    ) -> Vec<Found<'a, T>> {
        let mut found = Vec::new();
        for (path, file) in &self.files {
            for object in &file.objects {
                if let Some((metadata, object)) = pick(object) {
                    found.push((path.as_path(), metadata, object));
                }
            }
        }
        found
    }
}

type Found<'a, T> = (&'a Path, &'a Metadata, &'a T);

/// Waits until nothing has changed for a moment.
async fn settle(changes: &mut watch::Receiver<()>) {
    let quiet =
        async { while timeout(SETTLE, changes.changed()).await.is_ok_and(|seen| seen.is_ok()) {} };
    if timeout(LONGEST_SETTLE, quiet).await.is_err() {
        sleep(SETTLE).await;
    }
}

/// What one reading of the directory brought.
#[derive(Debug, Default)]
struct Read {
    changed: bool,
    errors: Vec<ManifestError>,
}

impl Read {
    fn fail(&mut self, path: &Path, error: io::Error) {
        self.errors.push(ManifestError::Read { path: path.to_owned(), error });
    }
}

/// Where the objects of each kind go.
#[derive(Debug)]
struct Delivery {
    services: Intake<Services>,
    slices: Intake<Slices>,
    nodes: Intake<Nodes>,
    service_cidrs: Intake<ServiceCidrs>,
    events: mpsc::Sender<Event>,
}

impl Delivery {
    fn new(events: mpsc::Sender<Event>, stats: &Arc<SourceStats>) -> Self {
        // There is no API to publish announcements.
        let announcer = Announcer::default();
        let outlet = Outlet { events: events.clone(), stats: Arc::clone(stats), announcer };
        Self {
            services: Intake::new(outlet.clone()),
            slices: Intake::new(outlet.clone()),
            nodes: Intake::new(outlet.clone()),
            service_cidrs: Intake::new(outlet),
            events,
        }
    }
}

/// All objects of one kind, converted. Of two with one name the first file's counts.
fn collect<K: Kind>(
    intake: &mut Intake<K>,
    objects: Vec<Found<'_, K::Object>>,
) -> Listing<K::Model> {
    let mut listing = Listing::default();
    let mut seen: HashMap<ObjectName, &Path> = HashMap::new();
    for (path, metadata, object) in objects {
        let name = ObjectName::new(
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
        );
        if let Some(first) = seen.get(&name) {
            let kind = K::KIND.label();
            let first = first.display();
            warn!(%kind, object = %name, "in {} ignored: it is in {first} already", path.display());
            continue;
        }
        intake.list(&name, Ok(object), &mut listing);
        seen.insert(name, path);
    }
    intake.stats().connected();
    listing
}

#[cfg(test)]
mod tests;
