//! A YAML document as it stands, every key kept, so that one that is given twice can be
//! named instead of ending the start. The only place of `config` that knows the library.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Self>),
    Map(Vec<(String, Self)>),
}

/// The documents of a file that are not empty, with merge keys (`<<`) resolved.
///
/// # Errors
/// What is wrong with the first that is no YAML, with line and column.
pub fn documents(text: &str) -> Result<Vec<Node>, String> {
    // What some editors put first says nothing else than that this is UTF-8.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        match Node::deserialize(document).map_err(|error| error.to_string())? {
            Node::Null => {}
            node => documents.push(node),
        }
    }
    Ok(documents)
}

impl Node {
    /// The value of a key; the last one counts, as in Go.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Map(entries) => entries.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }

    /// The value below a path of keys joined by dots.
    pub fn at(&self, path: &str) -> Option<&Self> {
        path.split('.').try_fold(self, |node, key| node.get(key))
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// What it is, for a message.
    pub const fn what(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Integer(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => value.fmt(f),
            Self::Integer(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Text(value) => f.write_str(value),
            Self::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    write!(f, "{}{item}", if index == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            Self::Map(entries) => {
                for (index, (key, value)) in entries.iter().enumerate() {
                    write!(f, "{}{key}={value}", if index == 0 { "" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

/// Of YAML 1.1, which kube-proxy reads.
const MERGE: &str = "<<";

fn not_mergeable<E: serde::de::Error>() -> E {
    E::custom("a merge key (<<) takes a map or a list of maps")
}

fn has(map: &[(String, Node)], key: &str) -> bool {
    map.iter().any(|(own, _)| own == key)
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML without tags")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Integer(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let (mut map, mut merged) = (Vec::new(), Vec::new());
        while let Some((key, value)) = entries.next_entry::<Node, Node>()? {
            match (key.to_string(), value) {
                (key, Node::Map(more)) if key == MERGE => merged.extend(more),
                (key, Node::List(maps)) if key == MERGE => {
                    // The first goes before the others: here the last counts.
                    for more in maps.into_iter().rev() {
                        let Node::Map(more) = more else { return Err(not_mergeable()) };
                        merged.extend(more);
                    }
                }
                (key, _) if key == MERGE => return Err(not_mergeable()),
                entry => map.push(entry),
            }
        }
        // The map's own go before what is merged, and are not said to be given twice.
        let mut whole: Vec<(String, Node)> = Vec::new();
        for (key, value) in merged.into_iter().filter(|(key, _)| !has(&map, key)) {
            whole.retain(|(earlier, _)| *earlier != key);
            whole.push((key, value));
        }
        whole.extend(map);
        Ok(Node::Map(whole))
    }
}
