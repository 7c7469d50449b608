//! The text of one manifest file to API objects.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer};
use serde_json::Value;
use tracing::debug;

use crate::watch::wire::{EndpointSlice, Metadata, Node, Service, ServiceCIDR};

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Object {
    Service(Box<Service>),
    Slice(Box<EndpointSlice>),
    Node(Box<Node>),
    ServiceCidr(Box<ServiceCIDR>),
}

impl Object {
    pub(super) const fn service(&self) -> Option<(&Metadata, &Service)> {
        match self {
            Self::Service(object) => Some((&object.metadata, object)),
            _ => None,
        }
    }

    pub(super) const fn slice(&self) -> Option<(&Metadata, &EndpointSlice)> {
        match self {
            Self::Slice(object) => Some((&object.metadata, object)),
            _ => None,
        }
    }

    pub(super) const fn node(&self) -> Option<(&Metadata, &Node)> {
        match self {
            Self::Node(object) => Some((&object.metadata, object)),
            _ => None,
        }
    }

    pub(super) const fn service_cidr(&self) -> Option<(&Metadata, &ServiceCIDR)> {
        match self {
            Self::ServiceCidr(object) => Some((&object.metadata, object)),
            _ => None,
        }
    }
}

/// Where in a file the first mistake is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// From 1; where the document begins if no better is known.
    pub line: usize,
    pub column: usize,
    /// Names the field where there is one.
    pub message: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

impl std::error::Error for ParseError {}

/// Enough of an object to tell what it is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: Option<String>,
    #[serde(default)]
    kind: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Service,
    Slice,
    Node,
    ServiceCidr,
    List,
}

impl Head {
    fn known(&self) -> Option<Known> {
        match (self.api_version.as_deref()?, self.kind.as_deref()?) {
            ("v1", "Service") => Some(Known::Service),
            ("discovery.k8s.io/v1", "EndpointSlice") => Some(Known::Slice),
            ("v1", "Node") => Some(Known::Node),
            ("networking.k8s.io/v1", "ServiceCIDR") => Some(Known::ServiceCidr),
            ("v1", "List" | "ServiceList" | "NodeList")
            | ("discovery.k8s.io/v1", "EndpointSliceList")
            | ("networking.k8s.io/v1", "ServiceCIDRList") => Some(Known::List),
            _ => None,
        }
    }
}

/// Every object of a kind that is used; others are ignored.
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<Object>, ParseError> {
    let mut objects = Vec::new();
    if path.extension().is_some_and(|kind| kind == "json") {
        json(text, &mut objects)?;
    } else {
        yaml(text, &mut objects)?;
    }
    for object in &mut objects {
        default_namespace(object);
    }
    Ok(objects)
}

/// As `kubectl` does where no namespace is given.
fn default_namespace(object: &mut Object) {
    let metadata: &mut Metadata = match object {
        Object::Service(object) => &mut object.metadata,
        Object::Slice(object) => &mut object.metadata,
        Object::Node(_) | Object::ServiceCidr(_) => return,
    };
    metadata.namespace.get_or_insert_with(|| "default".to_owned());
}

/// Each document is read twice: for its kind, then as its type straight from the text,
/// so that an error still knows line and column.
fn yaml(text: &str, objects: &mut Vec<Object>) -> Result<(), ParseError> {
    let documents = || serde_yaml_ng::Deserializer::from_str(text);
    for (index, (head, body)) in documents().zip(documents()).enumerate() {
        let head = match Option::<Value>::deserialize(head) {
            Ok(None) => continue,
            Ok(Some(value)) => value,
            Err(error) => return Err(yaml_error(&error, text, index)),
        };
        document(&head, objects, body, |error| yaml_error(error, text, index))?;
    }
    Ok(())
}

fn yaml_error(error: &serde_yaml_ng::Error, text: &str, document: usize) -> ParseError {
    let (line, column) = error.location().map_or_else(
        || (first_line(text, document), 1),
        |location| (location.line(), location.column()),
    );
    ParseError { line, column, message: without_location(&error.to_string()) }
}

/// The line on which a YAML document begins.
fn first_line(text: &str, document: usize) -> usize {
    let separators = text
        .lines()
        .enumerate()
        .skip(1)
        .filter(|(_, line)| line.trim_end() == "---" || line.starts_with("--- "))
        .map(|(index, _)| index + 2);
    std::iter::once(1).chain(separators).nth(document).unwrap_or(1)
}

/// The libraries append ` at line L column C`, which the error says already.
fn without_location(message: &str) -> String {
    message.rfind(" at line ").map_or(message, |end| &message[..end]).to_owned()
}

fn json(text: &str, objects: &mut Vec<Object>) -> Result<(), ParseError> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    loop {
        let begin = values.byte_offset();
        let head = match values.next() {
            None => return Ok(()),
            Some(Ok(head)) => head,
            Some(Err(error)) => return Err(json_error(&error, "", text, 0)),
        };
        let part = &text[begin..values.byte_offset()];
        let mut body = serde_json::Deserializer::from_str(part);
        document(&head, objects, &mut body, |error| json_error(error, "", text, begin))?;
    }
}

fn json_error(error: &serde_json::Error, path: &str, text: &str, begin: usize) -> ParseError {
    let before = text[..begin].matches('\n').count();
    let message = without_location(&error.to_string());
    ParseError {
        line: before + error.line().max(1),
        column: error.column().max(1),
        message: if path.is_empty() { message } else { format!("{path}: {message}") },
    }
}

/// One document, of which `head` is the untyped reading and `body` the text.
fn document<'de, D>(
    head: &Value,
    objects: &mut Vec<Object>,
    body: D,
    locate: impl Fn(&D::Error) -> ParseError,
) -> Result<(), ParseError>
where
    D: Deserializer<'de>,
{
    let Some(known) = known(head) else {
        return Ok(());
    };
    if known == Known::List {
        let items = head["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        // An item cannot be read from the text alone: the line is the list's.
        return items.iter().enumerate().try_for_each(|(index, item)| {
            list_item(head, item, objects).map_err(|message| {
                let begin = serde::de::Error::custom(format!("items[{index}].{message}"));
                locate(&begin)
            })
        });
    }
    let object = typed(known, body).map_err(|error| {
        let place = error.path().to_string();
        let inner = error.into_inner();
        let mut located = locate(&inner);
        if place != "." && !located.message.starts_with(&place) {
            located.message = format!("{place}: {}", located.message);
        }
        located
    })?;
    objects.extend(object);
    Ok(())
}

fn known(value: &Value) -> Option<Known> {
    let head = Head::deserialize(value).ok();
    let known = head.as_ref().and_then(Head::known);
    if known.is_none() {
        debug!(?head, "not used");
    }
    known
}

fn list_item(list: &Value, item: &Value, objects: &mut Vec<Object>) -> Result<(), String> {
    // The items of a typed list leave out what the list's kind says.
    let known = if item.get("kind").is_some() {
        known(item)
    } else {
        match list["kind"].as_str() {
            Some("ServiceList") => Some(Known::Service),
            Some("EndpointSliceList") => Some(Known::Slice),
            Some("NodeList") => Some(Known::Node),
            Some("ServiceCIDRList") => Some(Known::ServiceCidr),
            _ => None,
        }
    };
    let Some(known) = known.filter(|known| *known != Known::List) else {
        return Ok(());
    };
    objects.extend(typed(known, item).map_err(|error| error.to_string())?);
    Ok(())
}

fn typed<'de, D: Deserializer<'de>>(
    known: Known,
    body: D,
) -> Result<Option<Object>, serde_path_to_error::Error<D::Error>> {
    fn read<'de, T: DeserializeOwned, D: Deserializer<'de>>(
        body: D,
    ) -> Result<T, serde_path_to_error::Error<D::Error>> {
        serde_path_to_error::deserialize(body)
    }
    Ok(match known {
        Known::Service => Some(Object::Service(Box::new(read(body)?))),
        Known::Slice => Some(Object::Slice(Box::new(read(body)?))),
        Known::Node => Some(Object::Node(Box::new(read(body)?))),
        Known::ServiceCidr => Some(Object::ServiceCidr(Box::new(read(body)?))),
        Known::List => None,
    })
}
