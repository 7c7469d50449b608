//! How a test changes the objects of a server in its own process.

use serde::Deserialize;
use serde_json::{Value, json};

use super::patch;
use super::resource::Resource;
use super::status::Status;
use super::store::{Store, Write};

impl Store {
    /// Makes the object, or makes it what `object` says; returns its version. A
    /// `.status` is taken as given, and left as it is when there is none.
    pub fn apply(&self, object: Value) -> Result<u64, Status> {
        let resource = resource_of(&object)?;
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
        let stored = if self.find(resource, &namespace, &name).is_some() {
            self.update(resource, (&namespace, &name), Write::TEST, |_| {
                let mut object = object;
                object["metadata"]["resourceVersion"] = Value::Null;
                Ok(object)
            })?
        } else {
            self.create(resource, object, Write::TEST)?
        };
        Ok(stored.version)
    }

    /// Applies a JSON merge patch, `.status` included; returns the version.
    pub fn patch(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        change: &Value,
    ) -> Result<u64, Status> {
        let at = (namespace, name);
        let stored = self.update(named(kind)?, at, Write::TEST, |mut object| {
            patch::merge(&mut object, change);
            Ok(object)
        })?;
        Ok(stored.version)
    }

    /// Deletes an object by its kind (`"Service"`); returns the version of that.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<u64, Status> {
        self.remove(named(kind)?, namespace, name)?;
        Ok(self.version())
    }

    /// Applies every document of a YAML stream, and every item of a `List`; returns how
    /// many objects that were.
    pub fn load_yaml(&self, text: &str) -> anyhow::Result<usize> {
        let mut count = 0;
        for (nth, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
            let about = |what: &dyn std::fmt::Display| format!("document {}: {what}", nth + 1);
            let value = Value::deserialize(document).map_err(|e| anyhow::anyhow!(about(&e)))?;
            let objects = match (&value, &value["items"]) {
                (Value::Null, _) => continue,
                (_, Value::Array(items)) => items.clone(),
                _ => vec![value],
            };
            for object in objects {
                self.apply(object).map_err(|e| anyhow::anyhow!(about(&e)))?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// Sets the addresses that a load balancer gave the Service:
    /// `json!([{"ip": "203.0.113.80"}])`. `ipMode` defaults to `VIP`.
    pub fn set_status_lb(
        &self,
        namespace: &str,
        name: &str,
        ingress: &Value,
    ) -> Result<u64, Status> {
        let change = json!({"status": {"loadBalancer": {"ingress": ingress}}});
        self.patch("Service", namespace, name, &change)
    }

    /// Every event that clients wrote, of both APIs.
    pub fn events(&self) -> Vec<Value> {
        let mut events = self.all(Resource::Event);
        events.extend(self.all(Resource::EventsEvent));
        events
    }
}

fn resource_of(object: &Value) -> Result<Resource, Status> {
    let kind = object["kind"].as_str().unwrap_or_default();
    Resource::by_kind(object["apiVersion"].as_str(), kind).ok_or_else(|| {
        Status::bad_request(format!("no kind {kind:?} in version {}", object["apiVersion"]))
    })
}

fn named(kind: &str) -> Result<Resource, Status> {
    Resource::by_kind(None, kind)
        .ok_or_else(|| Status::bad_request(format!("no kind {kind:?} is served")))
}
