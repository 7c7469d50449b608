//! Lists: whole, in pages, and as of an older version.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::object::Object;
use super::resource::Resource;
use super::selector::Selector;
use super::status::Status;
use super::store::{Inner, Store};

/// Which version a list shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// The newest: also what "any" and "not older than" get here.
    Newest,
    /// Exactly this one.
    Exact(u64),
    /// What is left of an earlier list.
    Continue(Token),
}

/// What a continue token says. On the wire it is the JSON that a real server puts there,
/// in unpadded URL-safe base64; to a client it is opaque.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Version of the list; `None` in the token that comes with a 410, which continues
    /// at the newest version.
    version: Option<u64>,
    /// Keys from here on remain.
    start: String,
}

impl Token {
    /// Reads a token.
    pub fn parse(text: &str) -> Result<Self, Status> {
        let invalid = |why: &str| Status::bad_request(format!("continue key is not valid: {why}"));
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|e| invalid(&e.to_string()))?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| invalid(&e.to_string()))?;
        let start = value["start"].as_str().and_then(|start| start.strip_prefix('/'));
        match (value["v"] == "meta.k8s.io/v1", value["rv"].as_i64(), start) {
            (true, Some(version), Some(start)) => {
                Ok(Self { version: u64::try_from(version).ok(), start: start.to_owned() })
            }
            _ => Err(invalid("server does not recognize this encoded version")),
        }
    }

    fn encode(&self) -> String {
        let version = self.version.map_or(json!(-1), |v| json!(v));
        // The order of the keys is that of the recorded tokens.
        let start = json!(format!("/{}", self.start));
        URL_SAFE_NO_PAD
            .encode(format!(r#"{{"v":"meta.k8s.io/v1","rv":{version},"start":{start}}}"#))
    }
}

/// What is asked for.
#[derive(Debug)]
pub struct Query<'a> {
    /// Of which resource.
    pub resource: Resource,
    /// In which namespace; `None` for all.
    pub namespace: Option<&'a str>,
    /// Which objects.
    pub selector: &'a Selector,
    /// At most so many, 0 for all.
    pub limit: usize,
    /// As of when.
    pub at: At,
}

/// The answer.
#[derive(Debug)]
pub struct Page {
    /// Version of the list.
    pub version: u64,
    /// The objects.
    pub items: Vec<Arc<Object>>,
    /// Token for the rest.
    pub next: Option<String>,
    /// How many are left, unless a selector makes that unknown.
    pub remaining: Option<usize>,
}

impl Page {
    /// The `metadata` of the list.
    pub fn metadata(&self) -> Value {
        let mut metadata = json!({"resourceVersion": self.version.to_string()});
        if let Some(next) = &self.next {
            metadata["continue"] = json!(next);
        }
        if let Some(remaining) = self.remaining {
            metadata["remainingItemCount"] = json!(remaining);
        }
        metadata
    }
}

impl Store {
    /// Lists objects.
    pub fn list(&self, query: &Query<'_>) -> Result<Page, Status> {
        let inner = self.lock();
        let newest = inner.version;
        let (version, start) = match &query.at {
            At::Newest => (newest, ""),
            At::Exact(version) if *version > newest => {
                return Err(Status::too_large(*version, newest));
            }
            At::Exact(version) => (*version, ""),
            At::Continue(token) => (token.version.unwrap_or(newest), token.start.as_str()),
        };
        let found = objects_at(&inner, query, version, start).map_err(|expired| {
            let start = start.to_owned();
            match query.at {
                At::Continue(_) => {
                    Status::expired_continue(Token { version: None, start }.encode())
                }
                _ => expired,
            }
        })?;
        Ok(cut(query, version, found))
    }
}

type Found = Vec<(Arc<str>, Arc<Object>)>;

/// The objects in range as they were at `version`: the present ones, with every later
/// change undone.
fn objects_at(
    inner: &Inner,
    query: &Query<'_>,
    version: u64,
    start: &str,
) -> Result<Found, Status> {
    let table = &inner.tables[query.resource as usize];
    let prefix = query.namespace.map(|ns| format!("{ns}/")).unwrap_or_default();
    let from = if start > prefix.as_str() { start } else { prefix.as_str() };
    let in_range = |key: &str| key >= from && key.starts_with(&prefix);
    let present = table
        .objects
        .range::<str, _>((Bound::Included(from), Bound::Unbounded))
        .take_while(|(key, _)| key.starts_with(&prefix))
        .map(|(key, object)| (key.clone(), object.clone()));
    if version >= inner.version {
        return Ok(present.collect());
    }
    let later = table.since(version).map_err(|_| Status::list_too_old())?;
    let mut undone: HashMap<&Arc<str>, &Option<Arc<Object>>> = HashMap::new();
    for change in later.filter(|change| in_range(&change.key)) {
        undone.entry(&change.key).or_insert(&change.before);
    }
    let mut objects: BTreeMap<_, _> = present.collect();
    for (key, before) in undone {
        match before {
            Some(object) => drop(objects.insert(key.clone(), object.clone())),
            None => drop(objects.remove(key)),
        }
    }
    Ok(objects.into_iter().collect())
}

/// Selects, and cuts a page off.
fn cut(query: &Query<'_>, version: u64, found: Found) -> Page {
    let total = found.len();
    let limit = if query.limit == 0 { usize::MAX } else { query.limit };
    let (mut items, mut next, mut remaining) = (Vec::new(), None, None);
    for (at, (key, object)) in found.into_iter().enumerate() {
        if !query.selector.matches(&object) {
            continue;
        }
        items.push(object);
        if items.len() == limit && at + 1 < total {
            // The first key that sorts after this one.
            next = Some(Token { version: Some(version), start: format!("{key}\0") }.encode());
            remaining = query.selector.is_empty().then_some(total - at - 1);
            break;
        }
    }
    Page { version, items, next, remaining }
}
