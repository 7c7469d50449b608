//! Decoding one item of an answer without letting it fail the whole answer.

use serde::de::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::model::ObjectName;
use crate::watch::wire::{Metadata, Object};

/// An object, or why it does not decode, with as much of its metadata as could be read.
///
/// As `kube`'s `DeserializeGuard`, but metadata that does not decode either is no error, and
/// the reason names the field.
#[derive(Debug, Clone)]
pub(super) struct Lenient<K> {
    metadata: Metadata,
    object: Result<K, String>,
}

impl<K: Object> Lenient<K> {
    fn metadata(&self) -> &Metadata {
        self.object.as_ref().map_or(&self.metadata, Object::metadata)
    }

    pub(super) fn name(&self) -> ObjectName {
        let metadata = self.metadata();
        ObjectName::new(
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
        )
    }

    pub(super) fn version(&self) -> Option<String> {
        self.metadata().resource_version.clone().filter(|version| !version.is_empty())
    }

    pub(super) fn object(&self) -> Result<&K, String> {
        self.object.as_ref().map_err(Clone::clone)
    }
}

impl<'de, K: Object> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The text of the item, so that it can be read a second time; most are read once.
        let text = Box::<RawValue>::deserialize(deserializer)?;
        Ok(match serde_json::from_str(text.get()) {
            Ok(object) => Self { metadata: Metadata::default(), object: Ok(object) },
            Err(_) => undecodable(text.get()),
        })
    }
}

fn undecodable<K: Object>(text: &str) -> Lenient<K> {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    Lenient {
        metadata: metadata(&value),
        // Now to learn the path of the field.
        object: serde_path_to_error::deserialize(&value).map_err(|error| error.to_string()),
    }
}

fn metadata(value: &Value) -> Metadata {
    let metadata = &value["metadata"];
    Metadata::deserialize(metadata).unwrap_or_else(|_| {
        let text = |key: &str| metadata[key].as_str().map(str::to_owned);
        Metadata {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..Metadata::default()
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::watch::wire::Service;

    fn decode(value: Value) -> Lenient<Service> {
        serde_json::from_value(value).expect("never an error")
    }

    #[test]
    fn an_object_that_does_not_decode_keeps_its_name_and_the_reason_names_the_field() {
        let item = decode(json!({
            "metadata": {"name": "web", "namespace": "shop", "resourceVersion": "7"},
            "spec": {"ports": [{"port": 80}, {"port": "eighty"}]},
        }));
        assert_eq!(item.name(), ObjectName::new("shop", "web"));
        assert_eq!(item.version().as_deref(), Some("7"));
        let reason = item.object().expect_err("a port that is a string");
        assert!(reason.starts_with("spec.ports[1].port: "), "{reason}");
        // A number that no port field can hold is no different.
        let item = decode(json!({"metadata": {"name": "web"},
            "spec": {"ports": [{"port": 99_999_999_999_u64}]}}));
        assert!(item.object().is_err());
    }

    #[test]
    fn metadata_that_does_not_decode_either_still_gives_the_name() {
        let item = decode(json!({
            "metadata": {"name": "web", "namespace": "shop", "resourceVersion": "7", "labels": 5},
        }));
        assert_eq!(item.name(), ObjectName::new("shop", "web"));
        assert_eq!(item.version().as_deref(), Some("7"));
        assert!(item.object().is_err());
        for nothing in [json!(5), json!("x"), json!([]), json!({"metadata": []}), json!(null)] {
            assert_eq!(decode(nothing).name(), ObjectName::new("", ""));
        }
    }

    #[test]
    fn what_nobody_reads_is_dropped_even_if_it_would_not_decode() {
        let item = decode(json!({
            "metadata": {"name": "web", "namespace": "shop", "managedFields": 5,
                "labels": {"app": 7, "service.kubernetes.io/headless": ""},
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": []}},
            "spec": {"selector": 5},
        }));
        let object = item.object().expect("a Service");
        assert_eq!(object.metadata.labels.get("service.kubernetes.io/headless"), Some(""));
    }
}
