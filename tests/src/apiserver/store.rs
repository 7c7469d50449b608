//! What the server holds: every object, one version counter for all of them, and for
//! each resource the history of changes that watches and older lists read.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::alloc::Allocator;
use super::defaults::{self, StatusOf};
use super::managed::{self, Writer};
use super::object::Object;
use super::resource::Resource;
use super::status::Status;

/// The version a fresh server is at. Above 1, so that version 1 is "too old", as it is
/// on any server that has run for a moment.
const FIRST_VERSION: u64 = 1000;

/// Objects and their history. Shared by the HTTP side and by the test that owns the
/// server; every method is atomic.
#[derive(Debug)]
pub struct Store {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
    settings: Settings,
}

/// How a store behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Service ranges, the default family's first.
    pub service_ranges: Vec<IpNetwork>,
    /// Whether objects carry `metadata.managedFields`.
    pub managed_fields: bool,
    /// Changes kept for each resource; older versions answer 410.
    pub history: usize,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) version: u64,
    pub(super) tables: Vec<Table>,
    allocator: Allocator,
    uids: u64,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) objects: BTreeMap<Arc<str>, Arc<Object>>,
    pub(super) changes: VecDeque<Change>,
    /// Newest version whose change is not kept.
    pub(super) compacted: u64,
}

/// One change of one object.
#[derive(Debug, Clone)]
pub struct Change {
    /// Version the change made.
    pub version: u64,
    pub(super) key: Arc<str>,
    /// The object before; `None` when it was made.
    pub before: Option<Arc<Object>>,
    /// The object after; `None` when it was deleted.
    pub after: Option<Arc<Object>>,
}

/// Who writes, and what they may write.
#[derive(Debug, Clone, Copy)]
pub struct Write<'a> {
    /// Field manager.
    pub manager: &'a str,
    /// Whose `.status` is.
    pub status: StatusOf,
    /// `Some("status")` writes `.status` and nothing else.
    pub subresource: Option<&'a str>,
}

impl Write<'static> {
    /// The in-process API of tests.
    pub const TEST: Self = Self { manager: "test", status: StatusOf::Client, subresource: None };
}

impl Store {
    /// An empty store.
    pub fn new(settings: Settings) -> Self {
        let table = || Table { compacted: FIRST_VERSION, ..Table::default() };
        let inner = Inner {
            version: FIRST_VERSION,
            tables: Resource::ALL.iter().map(|_| table()).collect(),
            allocator: Allocator::new(settings.service_ranges.clone()),
            uids: 0,
        };
        Self { inner: Mutex::new(inner), changed: watch::Sender::new(FIRST_VERSION), settings }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic of a test thread inside a write leaves at worst that write half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The newest version.
    pub fn version(&self) -> u64 {
        self.lock().version
    }

    /// Told of every new version.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The object of that name, complete with `kind` and `apiVersion`.
    pub fn get(&self, resource: Resource, namespace: &str, name: &str) -> Option<Value> {
        self.find(resource, namespace, name).map(|object| object.full_value(resource))
    }

    pub(super) fn find(&self, resource: Resource, ns: &str, name: &str) -> Option<Arc<Object>> {
        let inner = self.lock();
        inner.tables[resource as usize].objects.get(resource.key(ns, name).as_str()).cloned()
    }

    /// All objects of a resource, complete, in list order.
    pub fn all(&self, resource: Resource) -> Vec<Value> {
        let objects: Vec<_> =
            self.lock().tables[resource as usize].objects.values().cloned().collect();
        objects.iter().map(|object| object.full_value(resource)).collect()
    }

    /// How many objects of a resource there are.
    pub fn len(&self, resource: Resource) -> usize {
        self.lock().tables[resource as usize].objects.len()
    }

    /// Makes an object.
    pub fn create(
        &self,
        resource: Resource,
        mut object: Value,
        write: Write<'_>,
    ) -> Result<Arc<Object>, Status> {
        let mut inner = self.lock();
        let name = new_name(&mut object, &mut inner)?;
        let namespace = own_namespace(resource, &mut object);
        let key = resource.key(&namespace, &name);
        if inner.tables[resource as usize].objects.contains_key(key.as_str()) {
            return Err(Status::already_exists(resource, &name));
        }
        defaults::on_create(resource, &mut object, write.status);
        defaults::apply(resource, &mut object);
        self.record(resource, &mut object, None, write);
        if resource == Resource::Service {
            defaults::drop_foreign_fields(&mut object["spec"]);
            inner.allocator.assign(&key, &mut object["spec"])?;
        }
        let metadata = &mut object["metadata"];
        if metadata["uid"].is_null() {
            metadata["uid"] = json!(inner.uid());
        }
        if metadata["creationTimestamp"].is_null() {
            metadata["creationTimestamp"] = json!(now());
        }
        if resource.info().generation {
            metadata["generation"] = json!(1);
        }
        let stored = inner.store(resource, &key, object, self.settings.history);
        self.changed.send_replace(inner.version);
        Ok(stored)
    }

    /// Changes an object: `change` gets it complete and returns it as it shall be. A
    /// change of nothing makes no new version, as on a real server.
    pub fn update(
        &self,
        resource: Resource,
        (namespace, name): (&str, &str),
        write: Write<'_>,
        change: impl FnOnce(Value) -> Result<Value, Status>,
    ) -> Result<Arc<Object>, Status> {
        let mut inner = self.lock();
        let key = resource.key(namespace, name);
        let stored = inner.tables[resource as usize].objects.get(key.as_str()).cloned();
        let stored = stored.ok_or_else(|| Status::not_found(resource, name))?;
        let old = stored.value();
        let mut new = change(stored.full_value(resource))?;
        let wanted = new["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        if !wanted.is_empty() && wanted != stored.version.to_string() {
            return Err(Status::conflict(resource, name));
        }
        keep_server_fields(resource, &mut new, &old, write);
        defaults::apply(resource, &mut new);
        if resource == Resource::Service {
            defaults::drop_foreign_fields(&mut new["spec"]);
            defaults::carry_allocated(&mut new["spec"], &old["spec"]);
        }
        // What the allocator adds belongs to no writer.
        let mut recorded = new.clone();
        if resource == Resource::Service {
            inner.allocator.assign(&key, &mut new["spec"])?;
        }
        finish(resource, &mut new);
        if same_but_for_bookkeeping(&new, &old) {
            return Ok(stored);
        }
        self.record(resource, &mut recorded, Some(&old), write);
        new["metadata"]["managedFields"] = recorded["metadata"]["managedFields"].take();
        if resource.info().generation {
            let generation = old["metadata"]["generation"].as_u64().unwrap_or(0);
            new["metadata"]["generation"] = json!(generation + 1);
        }
        let stored = inner.store(resource, &key, new, self.settings.history);
        self.changed.send_replace(inner.version);
        Ok(stored)
    }

    /// Deletes an object and returns its last state.
    pub fn remove(
        &self,
        resource: Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Object>, Status> {
        let mut inner = self.lock();
        let key = resource.key(namespace, name);
        let table = &mut inner.tables[resource as usize];
        let removed = table.objects.remove_entry(key.as_str());
        let (key, before) = removed.ok_or_else(|| Status::not_found(resource, name))?;
        if resource == Resource::Service {
            inner.allocator.release(&key);
        }
        inner.version += 1;
        let version = inner.version;
        let change = Change { version, key, before: Some(before.clone()), after: None };
        inner.tables[resource as usize].push(change, self.settings.history);
        self.changed.send_replace(inner.version);
        Ok(before)
    }

    /// Stores many new objects in one go. `make` gets an object's version and a fresh
    /// uid, and returns its key, its spec where that claims addresses, and the object.
    pub(super) fn bulk(
        &self,
        resource: Resource,
        count: usize,
        mut make: impl FnMut(usize, u64, &str, &mut Allocator) -> (String, Object),
    ) {
        let mut inner = self.lock();
        for at in 0..count {
            inner.version += 1;
            let (version, uid) = (inner.version, inner.uid());
            let (key, object) = make(at, version, &uid, &mut inner.allocator);
            let (key, object): (Arc<str>, _) = (key.into(), Arc::new(object));
            let table = &mut inner.tables[resource as usize];
            let before = table.objects.insert(key.clone(), object.clone());
            let change = Change { version, key, before, after: Some(object) };
            table.push(change, self.settings.history);
        }
        self.changed.send_replace(inner.version);
    }

    /// Forgets all history: older versions and continue tokens answer 410 from now on.
    pub fn compact(&self) {
        let mut inner = self.lock();
        let version = inner.version;
        for table in &mut inner.tables {
            table.changes.clear();
            table.compacted = version;
        }
    }

    /// The changes of a resource after `version`, and the version they lead to.
    pub fn changes_since(
        &self,
        resource: Resource,
        version: u64,
    ) -> Result<(Vec<Change>, u64), Status> {
        let inner = self.lock();
        let table = &inner.tables[resource as usize];
        Ok((table.since(version)?.cloned().collect(), inner.version))
    }

    fn record(&self, resource: Resource, new: &mut Value, old: Option<&Value>, write: Write<'_>) {
        if self.settings.managed_fields {
            let time = now();
            let (manager, subresource) = (write.manager, write.subresource);
            managed::record(resource, new, old, Writer { manager, subresource, time: &time });
        }
    }
}

impl Inner {
    fn store(
        &mut self,
        resource: Resource,
        key: &str,
        mut value: Value,
        history: usize,
    ) -> Arc<Object> {
        self.version += 1;
        finish(resource, &mut value);
        value["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let object = Arc::new(Object::new(value, self.version));
        let table = &mut self.tables[resource as usize];
        let key: Arc<str> = key.into();
        let before = table.objects.insert(key.clone(), object.clone());
        let change = Change { version: self.version, key, before, after: Some(object.clone()) };
        table.push(change, history);
        object
    }

    /// A version 4 UUID in form; counted, so that runs repeat.
    fn uid(&mut self) -> String {
        self.uids += 1;
        let n = self.uids;
        format!("5e1f0000-0000-4000-8000-{n:012x}")
    }
}

impl Table {
    fn push(&mut self, change: Change, history: usize) {
        self.changes.push_back(change);
        while self.changes.len() > history {
            if let Some(dropped) = self.changes.pop_front() {
                self.compacted = dropped.version;
            }
        }
    }

    /// The changes after `version`, unless some of them are gone.
    pub(super) fn since(&self, version: u64) -> Result<impl Iterator<Item = &Change>, Status> {
        if version < self.compacted {
            return Err(Status::too_old(version, self.compacted));
        }
        let first = self.changes.partition_point(|change| change.version <= version);
        Ok(self.changes.range(first..))
    }
}

/// RFC 3339 in UTC, whole seconds, as object metadata has it.
pub(super) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn new_name(object: &mut Value, inner: &mut Inner) -> Result<String, Status> {
    let metadata = &mut object["metadata"];
    if let Some(name) = metadata["name"].as_str().filter(|name| !name.is_empty()) {
        return Ok(name.to_owned());
    }
    let Some(prefix) = metadata["generateName"].as_str().filter(|p| !p.is_empty()) else {
        return Err(Status::bad_request("name or generateName is required"));
    };
    let name = format!("{prefix}{:05x}", inner.version);
    metadata["name"] = json!(name);
    Ok(name)
}

fn own_namespace(resource: Resource, object: &mut Value) -> String {
    if !resource.info().namespaced {
        return String::new();
    }
    let metadata = &mut object["metadata"];
    if metadata["namespace"].as_str().is_none_or(str::is_empty) {
        metadata["namespace"] = json!("default");
    }
    metadata["namespace"].as_str().unwrap_or_default().to_owned()
}

/// What a client cannot change, or did not mean to.
fn keep_server_fields(resource: Resource, new: &mut Value, old: &Value, write: Write<'_>) {
    if write.subresource == Some("status") {
        let status = new["status"].take();
        let (kind, version) = (new["kind"].take(), new["apiVersion"].take());
        *new = old.clone();
        (new["kind"], new["apiVersion"], new["status"]) = (kind, version, status);
        return;
    }
    for field in ["name", "namespace", "uid", "creationTimestamp", "generation"] {
        new["metadata"][field] = old["metadata"][field].clone();
    }
    if new["metadata"]["managedFields"].is_null() {
        new["metadata"]["managedFields"] = old["metadata"]["managedFields"].clone();
    }
    let owned_by_server = resource.info().status && write.status == StatusOf::Server;
    if owned_by_server || new["status"].is_null() {
        new["status"] = old["status"].clone();
    }
}

/// Last touches before an object is stored: no nulls, but for the lists that an
/// EndpointSlice always shows.
fn finish(resource: Resource, value: &mut Value) {
    defaults::prune_null(value);
    if resource == Resource::EndpointSlice
        && let Some(map) = value.as_object_mut()
    {
        map.entry("endpoints").or_insert(Value::Null);
        map.entry("ports").or_insert(Value::Null);
    }
}

fn same_but_for_bookkeeping(new: &Value, old: &Value) -> bool {
    let strip = |value: &Value| {
        let mut value = value.clone();
        if let Some(map) = value.as_object_mut() {
            map.remove("kind");
            map.remove("apiVersion");
        }
        if let Some(metadata) = value["metadata"].as_object_mut() {
            metadata.remove("resourceVersion");
            metadata.remove("managedFields");
        }
        value
    };
    strip(new) == strip(old)
}
