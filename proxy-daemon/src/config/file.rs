//! A configuration file: kube-proxy's kind, our own, or both as documents of one file.
//!
//! kube-proxy reads the first document of a file and no other. So its kind comes first and
//! ours second, and a cluster goes back to kube-proxy without an edit.

use super::build::{Problem, Problems};
use super::fields::{self, Field, Shape, Target};
use super::inert::Inert;
use super::tree::{self, Node};
use super::value::{self, Expected};

pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
pub const KIND: &str = "KubeProxyConfiguration";
pub const OWN_API_VERSION: &str = "node-dataplane/v1alpha1";
pub const OWN_KIND: &str = "NodeDataplaneConfiguration";

/// A field that was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The flag that means the same.
    pub flag: &'static str,
    pub field: &'static str,
    pub value: String,
}

/// What a file says.
#[derive(Debug, Default)]
pub struct Contents {
    /// Of kube-proxy's kind.
    pub settings: Vec<Setting>,
    /// Of ours.
    pub own: Vec<Setting>,
    /// Fields that no flag stands for.
    pub inert: Vec<(&'static Inert, String)>,
    /// Unknown or doubtful, and left out.
    pub warnings: Vec<String>,
    /// Of the wrong type.
    pub problems: Vec<Problem>,
}

/// Reads a file for `--config`.
///
/// # Errors
/// A sentence about what the file is instead.
pub fn kube_proxy(text: &str) -> Result<Contents, String> {
    let documents = tree::documents(text)?;
    let mut contents = Contents::default();
    let Some((first, more)) = documents.split_first() else {
        return Err(format!("is empty; it must be a {KIND} ({API_VERSION})"));
    };
    if is(first, OWN_API_VERSION, OWN_KIND) {
        return Err(format!(
            "begins with a {OWN_KIND}: kube-proxy reads the first document only, so {KIND} must \
             come first. A file with {OWN_KIND} alone belongs to --dataplane-config"
        ));
    }
    check_kind(first, API_VERSION, KIND)?;
    contents.read(first, Of::KubeProxy);
    for document in more {
        if is(document, OWN_API_VERSION, OWN_KIND) {
            contents.read(document, Of::Us);
        } else {
            let kind = document.get("kind").and_then(Node::text).unwrap_or("unknown");
            contents.warnings.push(format!(
                "a document of kind {kind} behind the {KIND} is not read; {OWN_KIND} \
                 ({OWN_API_VERSION}) is"
            ));
        }
    }
    Ok(contents)
}

/// Reads a file for `--dataplane-config`.
///
/// # Errors
/// As [`kube_proxy`].
pub fn own(text: &str) -> Result<Contents, String> {
    let mut contents = Contents::default();
    for document in &tree::documents(text)? {
        check_kind(document, OWN_API_VERSION, OWN_KIND)?;
        contents.read(document, Of::Us);
    }
    Ok(contents)
}

/// The configuration inside a ConfigMap, under whatever key: kubeadm's is `config.conf`,
/// that of EKS `config`. `None`: this is no ConfigMap.
///
/// # Errors
/// When it is one without a configuration.
pub fn in_config_map(text: &str) -> Result<Option<(String, String)>, String> {
    let documents = tree::documents(text)?;
    let Some(map) = documents.iter().find(|document| is(document, "v1", "ConfigMap")) else {
        return Ok(None);
    };
    let Some(Node::Map(data)) = map.get("data") else {
        return Err("is a ConfigMap without data".to_owned());
    };
    let found = data.iter().find_map(|(key, value)| {
        let text = value.text().filter(|text| text.contains(KIND))?;
        Some((key.clone(), text.to_owned()))
    });
    found.map(Some).ok_or_else(|| format!("is a ConfigMap of which no key holds a {KIND}"))
}

fn is(document: &Node, api_version: &str, kind: &str) -> bool {
    let text = |key| document.get(key).and_then(Node::text);
    text("apiVersion") == Some(api_version) && text("kind") == Some(kind)
}

fn check_kind(document: &Node, api_version: &str, kind: &str) -> Result<(), String> {
    if !matches!(document, Node::Map(_)) {
        return Err(format!("is {}; it must be a {kind} ({api_version})", document.what()));
    }
    for (key, wanted) in [("apiVersion", api_version), ("kind", kind)] {
        match document.get(key) {
            Some(Node::Text(found)) if found == wanted => {}
            Some(found) => return Err(format!("{key} is {found}; it must be {wanted}")),
            None => return Err(format!("has no {key}; it must be {wanted}")),
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    KubeProxy,
    Us,
}

impl Of {
    const fn fields(self) -> &'static [Field] {
        match self {
            Self::KubeProxy => fields::KUBE_PROXY,
            Self::Us => fields::OWN,
        }
    }
}

impl Contents {
    fn read(&mut self, document: &Node, of: Of) {
        self.unknown(document, "", of.fields());
        for field in of.fields() {
            let Some(node) = document.at(field.path).filter(|node| **node != Node::Null) else {
                continue;
            };
            match render(field.shape, node) {
                Err(expected) => self.problem(field.path, node, expected),
                Ok((_, true)) if !field.zero_counts => {}
                Ok((value, _)) => self.set(field, value, of),
            }
        }
        if of == Of::KubeProxy {
            self.addresses_of_family();
            self.as_in_nftables_mode();
        }
    }

    fn set(&mut self, field: &'static Field, value: String, of: Of) {
        match &field.target {
            Target::Inert(inert) => self.inert.push((inert, value)),
            Target::Flag(flag) => {
                let setting = Setting { flag, field: field.path, value };
                match of {
                    Of::KubeProxy => self.settings.push(setting),
                    Of::Us => self.own.push(setting),
                }
            }
        }
    }

    fn problem(&mut self, field: &str, node: &Node, expected: Expected) {
        let (name, value) = (field.to_owned(), node.to_string());
        self.problems.push(Problem { name, value, expected });
    }

    /// Names what no field is called, and what is given twice.
    fn unknown(&mut self, node: &Node, prefix: &str, known: &'static [Field]) {
        let Node::Map(entries) = node else { return };
        for (index, (key, value)) in entries.iter().enumerate() {
            let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            if entries[..index].iter().any(|(earlier, _)| earlier == key) {
                self.warnings.push(format!("{path} is given twice; the last one counts"));
            }
            let section = format!("{path}.");
            if known.iter().any(|field| field.path == path)
                || (prefix.is_empty() && matches!(key.as_str(), "apiVersion" | "kind"))
            {
                continue;
            }
            if known.iter().any(|field| field.path.starts_with(&section)) {
                match value {
                    Node::Map(_) => self.unknown(value, &path, known),
                    Node::Null => {}
                    other => self.problem(&path, other, "must be a section of fields".to_owned()),
                }
            } else {
                let meant = fields::nearest(known, &path)
                    .map(|field| format!(" Is {field} meant?"))
                    .unwrap_or_default();
                self.warnings.push(format!("there is no field {path}: it is left out.{meant}"));
            }
        }
    }

    /// kube-proxy's defaults for a node whose bindAddress is of IPv6.
    fn addresses_of_family(&mut self) {
        let value = |flag| self.settings.iter().find(|s| s.flag == flag).map(|s| s.value.as_str());
        if !value("--bind-address").is_some_and(|address| address.contains(':')) {
            return;
        }
        for (flag, field, address) in [
            ("--healthz-bind-address", "healthzBindAddress", "[::]:10256"),
            ("--metrics-bind-address", "metricsBindAddress", "[::1]:10249"),
        ] {
            if !self.settings.iter().any(|setting| setting.flag == flag) {
                self.settings.push(Setting { flag, field, value: address.to_owned() });
            }
        }
    }

    /// A file for kube-proxy's nftables mode means the masquerade settings of that section,
    /// and node ports on the node's own addresses only: in the mode that takes its place too.
    fn as_in_nftables_mode(&mut self) {
        let value = |flag| self.settings.iter().find(|s| s.flag == flag).map(|s| s.value.as_str());
        if value("--proxy-mode") != Some("nftables") {
            return;
        }
        for (field, flag) in [
            ("nftables.masqueradeBit", "--iptables-masquerade-bit"),
            ("nftables.masqueradeAll", "--masquerade-all"),
        ] {
            self.settings.retain(|setting| setting.flag != flag);
            if let Some(at) = self.inert.iter().position(|(inert, _)| inert.flag == field) {
                let (_, value) = self.inert.remove(at);
                self.settings.push(Setting { flag, field, value });
            }
        }
        let (flag, field) = ("--nodeport-addresses", "nodePortAddresses");
        if !self.settings.iter().any(|setting| setting.flag == flag) {
            self.settings.push(Setting { flag, field, value: "primary".to_owned() });
        }
    }

    /// What has no effect, and what of it cannot be accepted either.
    pub fn judge_inert(&self, problems: &mut Problems, notes: &mut Vec<String>) {
        for (inert, value) in &self.inert {
            inert.judge(inert.flag, value, problems, notes);
        }
    }
}

/// The value as a flag writes it, and whether it is Go's zero value.
fn render(shape: Shape, node: &Node) -> Result<(String, bool), Expected> {
    let zero_duration = |text: &str| value::duration(text).is_ok_and(|duration| duration.is_zero());
    match (shape, &as_yaml_1_1(shape, node)) {
        (Shape::Bool, Node::Bool(value)) => Ok((value.to_string(), !value)),
        (Shape::Integer | Shape::Float | Shape::Quantity, Node::Integer(value)) => {
            Ok((value.to_string(), *value == 0))
        }
        (Shape::Float, Node::Float(value)) => Ok((value.to_string(), *value == 0.0)),
        (Shape::Word, Node::Bool(value)) => {
            Ok((if *value { "on" } else { "off" }.to_owned(), false))
        }
        (Shape::Numbers, Node::Map(numbers)) => {
            let whole = numbers.iter().all(|(_, value)| matches!(value, Node::Integer(_)));
            if whole { Ok((node.to_string(), numbers.is_empty())) } else { Err(expected(shape)) }
        }
        (Shape::Text | Shape::Word, Node::Text(value)) => Ok((value.clone(), value.is_empty())),
        (Shape::Quantity, Node::Text(value)) => Ok((value.clone(), value == "0")),
        (Shape::Duration | Shape::Flush, Node::Text(value)) => {
            Ok((value.clone(), zero_duration(value)))
        }
        (Shape::Flush, Node::Integer(nanos)) => match u64::try_from(*nanos) {
            Ok(nanos) => {
                let duration = std::time::Duration::from_nanos(nanos);
                Ok((value::format_duration(duration), nanos == 0))
            }
            Err(_) => Err("must not be negative".to_owned()),
        },
        (Shape::TextList, Node::List(items)) => {
            let texts: Option<Vec<&str>> = items.iter().map(Node::text).collect();
            let texts = texts.ok_or_else(|| expected(shape))?;
            Ok((texts.join(","), texts.is_empty()))
        }
        (Shape::Gates, Node::Map(gates)) => {
            let gate = |(name, value): &(String, Node)| match as_yaml_1_1(Shape::Bool, value) {
                Node::Bool(on) => Some(format!("{name}={on}")),
                _ => None,
            };
            let gates: Option<Vec<String>> = gates.iter().map(gate).collect();
            let gates = gates.ok_or_else(|| expected(shape))?;
            Ok((gates.join(","), gates.is_empty()))
        }
        (Shape::Vmodule, Node::List(items)) => {
            let items: Option<Vec<String>> = items.iter().map(vmodule_item).collect();
            let items = items.ok_or_else(|| expected(shape))?;
            Ok((items.join(","), items.is_empty()))
        }
        (shape, _) => Err(expected(shape)),
    }
}

/// What kube-proxy's reader makes of it, which follows YAML 1.1 and then JSON: our reader follows
/// 1.2, where `yes` and `010` are texts. Quotes cannot be seen here, so these are taken quoted, too.
fn as_yaml_1_1(shape: Shape, node: &Node) -> Node {
    /// Up to there JSON's numbers are whole ones without doubt.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match (shape, node) {
        (Shape::Bool, Node::Text(text)) => match text.as_str() {
            "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Node::Bool(true),
            "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => Node::Bool(false),
            _ => node.clone(),
        },
        (Shape::Integer, Node::Float(number)) if number.fract() == 0.0 && number.abs() < EXACT => {
            // Whole and below 2^53.
            format!("{number:.0}").parse().map_or_else(|_| node.clone(), Node::Integer)
        }
        (Shape::Integer, Node::Text(text)) => {
            whole_of_yaml_1_1(text).map_or_else(|| node.clone(), Node::Integer)
        }
        _ => node.clone(),
    }
}

/// Octal with a leading zero, and digits with `_` between them: texts in YAML 1.2.
fn whole_of_yaml_1_1(text: &str) -> Option<i128> {
    let digits = text.replace('_', "");
    if !text.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    match digits.strip_prefix('0') {
        Some(octal) if !octal.is_empty() => i128::from_str_radix(octal, 8).ok(),
        _ if digits.len() < text.len() => digits.parse().ok(),
        _ => None,
    }
}

fn vmodule_item(item: &Node) -> Option<String> {
    let pattern = item.get("filePattern").and_then(Node::text)?;
    match item.get("verbosity") {
        Some(Node::Integer(level)) => Some(format!("{pattern}={level}")),
        None | Some(Node::Null) => Some(format!("{pattern}=0")),
        _ => None,
    }
}

fn expected(shape: Shape) -> Expected {
    match shape {
        Shape::Bool => "must be true or false, without quotes",
        Shape::Integer => "must be a whole number, without quotes",
        Shape::Float => "must be a number, without quotes",
        Shape::Word => "must be a word",
        Shape::Numbers => "must be names with whole numbers",
        Shape::Text => "must be text; quote it if it looks like something else",
        Shape::Duration => "must be a duration with units, for example 30s or 1m0s",
        Shape::Flush => "must be a duration with units, or a number of nanoseconds",
        Shape::Quantity => "must be a number of bytes, for example 512 or 2Ki",
        Shape::TextList => "must be a list of texts",
        Shape::Gates => "must be names with true or false",
        Shape::Vmodule => "must be a list of filePattern (text) and verbosity (a number)",
    }
    .to_owned()
}
