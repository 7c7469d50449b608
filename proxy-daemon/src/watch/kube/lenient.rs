//! Decoding one item of an answer without letting it fail the whole answer.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{Deserialize, DeserializeOwned, Deserializer};
use serde_json::Value;

use crate::model::ObjectName;

/// An object, or why it does not decode, with as much of its metadata as could be read.
///
/// As `kube`'s `DeserializeGuard`, but metadata that does not decode either is no error,
/// the reason names the field, and what nobody reads is dropped before it is decoded
/// (managed fields are about half of an object).
#[derive(Debug, Clone)]
pub(super) struct Lenient<K> {
    metadata: ObjectMeta,
    object: Result<K, String>,
}

impl<K: Resource> Lenient<K> {
    pub(super) fn name(&self) -> ObjectName {
        let metadata = self.meta();
        ObjectName::new(
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
        )
    }

    pub(super) fn version(&self) -> Option<String> {
        self.meta().resource_version.clone().filter(|version| !version.is_empty())
    }

    pub(super) fn object(&self) -> Result<&K, String> {
        self.object.as_ref().map_err(Clone::clone)
    }
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        prune(&mut value);
        Ok(match K::deserialize(&value) {
            Ok(object) => Self { metadata: ObjectMeta::default(), object: Ok(object) },
            Err(_) => Self {
                metadata: metadata(&value),
                // A second time, now to learn the path of the field.
                object: serde_path_to_error::deserialize(&value).map_err(|error| error.to_string()),
            },
        })
    }
}

fn prune(value: &mut Value) {
    let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) else {
        return;
    };
    metadata.remove("managedFields");
    if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

fn metadata(value: &Value) -> ObjectMeta {
    let metadata = &value["metadata"];
    ObjectMeta::deserialize(metadata).unwrap_or_else(|_| {
        let text = |key: &str| metadata[key].as_str().map(str::to_owned);
        ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        }
    })
}

impl<K: Resource> Resource for Lenient<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        self.object.as_ref().map_or(&self.metadata, Resource::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.object.as_mut().map_or(&mut self.metadata, Resource::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use serde_json::json;

    use super::*;

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
            "metadata": {"name": "web", "namespace": "shop", "managedFields": 5, "annotations":
                {"kubectl.kubernetes.io/last-applied-configuration": "{}", "kept": "yes"}},
        }));
        let object = item.object().expect("a Service");
        assert_eq!(object.metadata.managed_fields, None);
        let annotations = object.metadata.annotations.as_ref().expect("annotations");
        assert_eq!(annotations.keys().collect::<Vec<_>>(), ["kept"]);
    }
}
