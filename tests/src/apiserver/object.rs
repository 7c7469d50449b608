//! A stored object: its JSON as bytes, and the little that lists and watches ask of it.
//!
//! Kept as bytes because the scale tests hold 10,000 Services with 100,000 endpoints:
//! a list is then a concatenation, and a `Value` tree costs several times the memory.

use bytes::Bytes;
use serde_json::{Value, json};

use super::resource::Resource;

/// One version of one object.
#[derive(Debug)]
pub struct Object {
    /// Namespace, empty when the resource has none.
    pub namespace: Box<str>,
    /// Name.
    pub name: Box<str>,
    /// Version this is.
    pub version: u64,
    labels: Box<[(Box<str>, Box<str>)]>,
    /// The object without `kind` and `apiVersion`, as it stands in a list.
    body: Bytes,
}

impl Object {
    /// Takes an object that is complete, `metadata.resourceVersion` included.
    pub fn new(mut value: Value, version: u64) -> Self {
        if let Some(map) = value.as_object_mut() {
            map.remove("kind");
            map.remove("apiVersion");
        }
        let metadata = &value["metadata"];
        let text = |field: &str| Box::from(metadata[field].as_str().unwrap_or_default());
        let (namespace, name) = (text("namespace"), text("name"));
        let labels = metadata["labels"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, v)| (Box::from(k.as_str()), Box::from(v.as_str().unwrap_or_default())))
            .collect();
        Self { namespace, name, version, labels, body: exact(value.to_string()) }
    }

    /// Takes a body that is known to be right, without parsing it: bulk loading.
    pub fn from_parts(
        (namespace, name): (&str, &str),
        version: u64,
        labels: &[(&str, &str)],
        body: String,
    ) -> Self {
        let labels = labels.iter().map(|(k, v)| (Box::from(*k), Box::from(*v))).collect();
        let (namespace, name) = (namespace.into(), name.into());
        Self { namespace, name, version, labels, body: exact(body) }
    }

    /// The value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.iter().find(|(k, _)| &**k == key).map(|(_, v)| &**v)
    }

    /// The object as it stands among a list's items.
    pub fn item(&self) -> &Bytes {
        &self.body
    }

    /// The object parsed, without `kind` and `apiVersion`.
    pub fn value(&self) -> Value {
        // Every body was printed by us from a `Value` or by the generator, whose output
        // a test parses; a body that is not JSON can only be a bug here.
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The object parsed, with `kind` and `apiVersion`.
    pub fn full_value(&self, resource: Resource) -> Value {
        let mut value = self.value();
        value["kind"] = json!(resource.info().kind);
        value["apiVersion"] = json!(resource.api_version());
        value
    }

    /// The object on its own, with `kind` and `apiVersion`.
    pub fn alone(&self, resource: Resource) -> Bytes {
        with_kind(resource, &self.body)
    }

    /// The object on its own, claiming to be of `version`: the last state of something
    /// that is deleted, or that a selector lost, is sent with the version of that event.
    pub fn alone_at(&self, resource: Resource, version: u64) -> Bytes {
        let mut value = self.value();
        value["metadata"]["resourceVersion"] = json!(version.to_string());
        with_kind(resource, value.to_string().as_bytes())
    }
}

/// What a bookmark carries: an empty object with a version, and the annotation that
/// ends a watch-list's initial events.
pub fn bookmark(resource: Resource, version: u64, initial_events_end: bool) -> String {
    let info = resource.info();
    let end = if initial_events_end {
        r#","annotations":{"k8s.io/initial-events-end":"true"}"#
    } else {
        ""
    };
    let (kind, api, empty) = (info.kind, resource.api_version(), info.empty);
    format!(
        r#"{{"kind":"{kind}","apiVersion":"{api}","metadata":{{"resourceVersion":"{version}"{end}}},{empty}}}"#
    )
}

/// Without the spare room that printing leaves, which is up to half of all memory.
fn exact(body: String) -> Bytes {
    Bytes::from(body.into_bytes().into_boxed_slice())
}

fn with_kind(resource: Resource, body: &[u8]) -> Bytes {
    let (kind, api) = (resource.info().kind, resource.api_version());
    let mut out = Vec::with_capacity(body.len() + 64);
    out.extend_from_slice(format!(r#"{{"kind":"{kind}","apiVersion":"{api}","#).as_bytes());
    // A body always begins with `{` and holds at least its metadata.
    out.extend_from_slice(&body[1..]);
    Bytes::from(out)
}
