//! `metadata.managedFields`: who set which field. Written because a real object carries
//! it, and it is about half of a list's bytes; nothing here reads it.

use serde_json::{Map, Value, json};

use super::resource::Resource;

/// One writer of an object.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    /// `fieldManager`, or the first word of the user agent.
    pub manager: &'a str,
    /// `Some("status")` for a write to that subresource.
    pub subresource: Option<&'a str>,
    /// RFC 3339, whole seconds.
    pub time: &'a str,
}

/// Records that `writer` made `new` out of `old`.
pub fn record(resource: Resource, new: &mut Value, old: Option<&Value>, writer: Writer<'_>) {
    let fields = object_fields(new, old);
    if fields.is_empty() {
        return;
    }
    let mut entry = json!({
        "manager": writer.manager, "operation": "Update", "apiVersion": resource.api_version(),
        "time": writer.time, "fieldsType": "FieldsV1", "fieldsV1": fields,
    });
    if let Some(subresource) = writer.subresource {
        entry["subresource"] = json!(subresource);
    }
    let metadata = &mut new["metadata"];
    if !metadata["managedFields"].is_array() {
        metadata["managedFields"] = json!([]);
    }
    let Some(entries) = metadata["managedFields"].as_array_mut() else {
        return;
    };
    let same = |e: &&mut Value| {
        e["manager"] == entry["manager"] && e["subresource"] == entry["subresource"]
    };
    for other in entries.iter_mut().filter(|e| !same(e)) {
        subtract(&mut other["fieldsV1"], &entry["fieldsV1"]);
    }
    match entries.iter_mut().find(same) {
        Some(known) => {
            known["time"] = entry["time"].take();
            merge(&mut known["fieldsV1"], entry["fieldsV1"].take());
        }
        None => entries.push(entry),
    }
}

fn object_fields(new: &Value, old: Option<&Value>) -> Map<String, Value> {
    let mut fields = Map::new();
    for (name, value) in new.as_object().into_iter().flatten() {
        let before = old.map(|o| &o[name]);
        let below = match name.as_str() {
            "kind" | "apiVersion" => continue,
            "metadata" => metadata_fields(value, before),
            // Structs that are always there have no entry of their own.
            "spec" | "status" => children(value, before, name),
            _ if before == Some(value) => continue,
            _ => {
                fields.insert(format!("f:{name}"), json!({}));
                continue;
            }
        };
        if !below.is_empty() {
            fields.insert(format!("f:{name}"), Value::Object(below));
        }
    }
    fields
}

fn metadata_fields(value: &Value, old: Option<&Value>) -> Map<String, Value> {
    let mut fields = Map::new();
    for name in ["annotations", "labels"] {
        let below = children(&value[name], old.map(|o| &o[name]), name);
        if !below.is_empty() {
            fields.insert(format!("f:{name}"), marked(below, old.map(|o| &o[name])));
        }
    }
    fields
}

fn children(value: &Value, old: Option<&Value>, path: &str) -> Map<String, Value> {
    let mut fields = Map::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        let before = old.map(|o| &o[name]);
        if before == Some(value) || value.is_null() {
            continue;
        }
        let below = match (path, name.as_str()) {
            ("spec", "ports") => Some(marked(port_fields(value, before), before)),
            // Atomic maps: owned as a whole.
            ("spec", "selector") => None,
            ("status", "loadBalancer") => {
                let below = children(value, before, name);
                if below.is_empty() {
                    continue;
                }
                Some(Value::Object(below))
            }
            _ if value.is_object() => Some(marked(children(value, before, name), before)),
            _ => None,
        };
        fields.insert(format!("f:{name}"), below.unwrap_or_else(|| json!({})));
    }
    fields
}

/// Service ports are a keyed list: one entry for each (port, protocol).
fn port_fields(ports: &Value, old: Option<&Value>) -> Map<String, Value> {
    let mut fields = Map::new();
    let old_ports = old.and_then(Value::as_array);
    for port in ports.as_array().into_iter().flatten() {
        if old_ports.is_some_and(|ports| ports.contains(port)) {
            continue;
        }
        let key = json!({"port": port["port"], "protocol": port["protocol"]});
        fields.insert(format!("k:{key}"), marked(children(port, None, ""), None));
    }
    fields
}

/// Adds the entry that says the container itself is owned, by whoever made it.
fn marked(mut fields: Map<String, Value>, old: Option<&Value>) -> Value {
    if old.is_none_or(Value::is_null) {
        fields.insert(".".to_owned(), json!({}));
    }
    Value::Object(fields)
}

/// Takes from one writer what another one has changed.
fn subtract(from: &mut Value, taken: &Value) {
    let (Some(from), Some(taken)) = (from.as_object_mut(), taken.as_object()) else {
        return;
    };
    for (key, below) in taken.iter().filter(|(key, _)| *key != ".") {
        if below.as_object().is_some_and(Map::is_empty) {
            from.remove(key);
        } else if let Some(known) = from.get_mut(key) {
            subtract(known, below);
        }
    }
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert_with(|| json!({})), value);
            }
        }
        (into, from) => *into = from,
    }
}
