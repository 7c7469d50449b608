//! Bodies of PATCH.

use serde_json::Value;

use super::status::Status;

/// How a patch is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchKind {
    /// JSON merge patch, RFC 7386.
    Merge,
    /// Kubernetes' strategic merge: lists of objects merge by key.
    Strategic,
    /// Server-side apply; here a strategic merge that may create. Fields that an earlier
    /// apply named and this one does not are kept, unlike on a real server.
    Apply,
}

impl PatchKind {
    /// From `Content-Type`.
    pub fn of(content_type: &str) -> Result<Self, Status> {
        match content_type.split(';').next().unwrap_or_default().trim() {
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            "application/apply-patch+yaml" => Ok(Self::Apply),
            other => Err(Status::unsupported_media_type(other)),
        }
    }

    /// Applies `patch` to `target`.
    pub fn apply(self, target: &mut Value, patch: &Value) {
        match self {
            Self::Merge => merge(target, patch),
            Self::Strategic | Self::Apply => strategic(target, patch, ""),
        }
    }
}

/// RFC 7386: objects merge, null removes, anything else replaces.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Some(map) = target.as_object_mut() else {
        return;
    };
    for (key, value) in patch {
        if value.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.as_str()).or_insert(Value::Null), value);
        }
    }
}

/// The key by which a list of objects merges, for the lists of the objects served
/// (`patchMergeKey` in the API types). Others are replaced as a whole.
fn merge_key(field: &str, item: &Value) -> Option<&'static str> {
    match field {
        "ports" if item.get("port").is_some() => Some("port"),
        "conditions" | "addresses" if item.get("type").is_some() => Some("type"),
        _ => None,
    }
}

fn strategic(target: &mut Value, patch: &Value, field: &str) {
    match patch {
        Value::Object(fields) => {
            if fields.get("$patch").is_some_and(|p| p == "replace") || !target.is_object() {
                *target = Value::Object(serde_json::Map::new());
            }
            let Some(map) = target.as_object_mut() else {
                return;
            };
            for (key, value) in fields {
                match value {
                    _ if key.starts_with('$') => {}
                    Value::Null => drop(map.remove(key)),
                    _ => strategic(map.entry(key.as_str()).or_insert(Value::Null), value, key),
                }
            }
            for (key, order) in fields {
                if let Some(name) = key.strip_prefix("$setElementOrder/")
                    && let Some(list) = map.get_mut(name)
                {
                    reorder(list, order, name);
                }
            }
        }
        Value::Array(items) => strategic_list(target, items, field),
        other => *target = other.clone(),
    }
}

fn strategic_list(target: &mut Value, items: &[Value], field: &str) {
    let key = items.first().and_then(|item| merge_key(field, item));
    let (Some(key), true) = (key, target.is_array()) else {
        let plain = items.iter().filter(|i| i["$patch"] != "delete").cloned();
        *target = Value::Array(plain.collect());
        return;
    };
    let Some(list) = target.as_array_mut() else {
        return;
    };
    for item in items {
        let at = list.iter().position(|known| known[key] == item[key]);
        match (at, item["$patch"] == "delete") {
            (Some(at), true) => drop(list.remove(at)),
            (None, true) => {}
            (Some(at), false) => strategic(&mut list[at], item, ""),
            // kubectl expects added items first, as the recorded `shop/api` shows.
            (None, false) => list.insert(0, item.clone()),
        }
    }
}

fn reorder(list: &mut Value, order: &Value, field: &str) {
    let (Some(list), Some(order)) = (list.as_array_mut(), order.as_array()) else {
        return;
    };
    let Some(key) = order.first().and_then(|item| merge_key(field, item)) else {
        return;
    };
    let place = |item: &Value| order.iter().position(|o| o[key] == item[key]);
    list.sort_by_key(|item| place(item).unwrap_or(usize::MAX));
}
