//! Label and field selectors of list, watch and deletecollection.

use serde_json::Value;

use super::object::Object;
use super::resource::Resource;
use super::status::Status;

/// One requirement on labels.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    /// `key in (a, b)`; equality is a set of one.
    In(String, Vec<String>),
    /// `key notin (a, b)` and `key!=a`: an object without the key matches.
    NotIn(String, Vec<String>),
    /// `key`.
    Exists(String),
    /// `!key`.
    Absent(String),
}

/// Labels and fields an object must have to be seen.
#[derive(Debug, Clone, Default)]
pub struct Selector {
    labels: Vec<Requirement>,
    /// Dotted path, wanted value, and whether it must be equal or different.
    fields: Vec<(String, String, bool)>,
}

impl Selector {
    /// Parses the two query parameters.
    pub fn parse(resource: Resource, labels: &str, fields: &str) -> Result<Self, Status> {
        let labels = split_requirements(labels)
            .into_iter()
            .map(|text| requirement(text.trim()))
            .collect::<Result<_, _>>()?;
        let fields = fields
            .split(',')
            .filter(|part| !part.is_empty())
            .map(|part| field(resource, part))
            .collect::<Result<_, _>>()?;
        Ok(Self { labels, fields })
    }

    /// Adds `metadata.name=name`: a watch on a single object's path.
    pub fn and_name(mut self, name: &str) -> Self {
        self.fields.push(("metadata.name".into(), name.to_owned(), true));
        self
    }

    /// Whether everything matches; then a list can say how many items remain.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether `object` is selected.
    pub fn matches(&self, object: &Object) -> bool {
        self.labels.iter().all(|r| r.matches(object)) && self.fields_match(object)
    }

    fn fields_match(&self, object: &Object) -> bool {
        self.fields.iter().all(|(path, wanted, equal)| {
            let found = match path.as_str() {
                "metadata.name" => object.name.to_string(),
                "metadata.namespace" => object.namespace.to_string(),
                other => body_field(object, other),
            };
            (found == *wanted) == *equal
        })
    }
}

fn body_field(object: &Object, path: &str) -> String {
    let body = object.value();
    let found = path.split('.').fold(&body, |value, part| &value[part]);
    match found {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

impl Requirement {
    fn matches(&self, object: &Object) -> bool {
        match self {
            Self::In(key, values) => {
                object.label(key).is_some_and(|found| values.iter().any(|v| v == found))
            }
            Self::NotIn(key, values) => {
                object.label(key).is_none_or(|found| values.iter().all(|v| v != found))
            }
            Self::Exists(key) => object.label(key).is_some(),
            Self::Absent(key) => object.label(key).is_none(),
        }
    }
}

/// Splits on commas that do not stand inside the parentheses of a set.
fn split_requirements(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0u32, 0);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

fn requirement(text: &str) -> Result<Requirement, Status> {
    if let Some(rest) = text.strip_prefix('!') {
        return Ok(Requirement::Absent(key(rest, text)?));
    }
    if let Some((name, value)) = text.split_once("!=") {
        return Ok(Requirement::NotIn(key(name, text)?, vec![value.trim().to_owned()]));
    }
    if let Some((name, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return Ok(Requirement::In(key(name, text)?, vec![value.trim().to_owned()]));
    }
    if let Some((head, set)) = text.split_once('(') {
        let values = set.strip_suffix(')').ok_or_else(|| unparsable(text))?;
        let values = values.split(',').map(|v| v.trim().to_owned()).collect();
        return match head.trim().rsplit_once(char::is_whitespace) {
            Some((name, "in")) => Ok(Requirement::In(key(name, text)?, values)),
            Some((name, "notin")) => Ok(Requirement::NotIn(key(name, text)?, values)),
            _ => Err(unparsable(text)),
        };
    }
    Ok(Requirement::Exists(key(text, text)?))
}

fn key(name: &str, whole: &str) -> Result<String, Status> {
    let name = name.trim();
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if name.is_empty() || !name.chars().all(fits) {
        return Err(unparsable(whole));
    }
    Ok(name.to_owned())
}

fn unparsable(text: &str) -> Status {
    Status::bad_request(format!("unable to parse requirement: {text:?} is not a label requirement"))
}

fn field(resource: Resource, text: &str) -> Result<(String, String, bool), Status> {
    let (path, value, equal) = if let Some((path, value)) = text.split_once("!=") {
        (path, value, false)
    } else if let Some((path, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        (path, value, true)
    } else {
        return Err(Status::bad_request(format!(
            "invalid selector: {text:?}; can't understand {text:?}"
        )));
    };
    let extra: &[&str] = match resource {
        Resource::Service => &["spec.clusterIP", "spec.type"],
        Resource::Node => &["spec.unschedulable"],
        Resource::Event => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "reason",
            "type",
        ],
        _ => &[],
    };
    if !["metadata.name", "metadata.namespace"].contains(&path) && !extra.contains(&path) {
        return Err(Status::bad_request(format!("field label not supported: {path}")));
    }
    Ok((path.to_owned(), value.to_owned(), equal))
}
