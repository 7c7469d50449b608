//! What a request's path and query ask for.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::Query as QueryString;
use axum::http::{Method, Uri};

use super::list::{At, Token};
use super::log::Verb;
use super::resource::Resource;
use super::selector::Selector;
use super::status::Status;
use super::watch::{From, WatchRequest};

/// A real server picks 30 to 60 minutes when the client does not say
/// (`--min-request-timeout`).
const DEFAULT_WATCH: Duration = Duration::from_secs(30 * 60);

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
pub struct Target {
    /// The resource.
    pub resource: Resource,
    /// The namespace, if the path has one.
    pub namespace: Option<String>,
    /// The object, if the path has one.
    pub name: Option<String>,
    /// `status`.
    pub subresource: Option<String>,
}

impl Target {
    /// Reads `/api/v1/...` and `/apis/GROUP/VERSION/...`; `None` for anything that is
    /// not a resource.
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let find = |plural: &str| Resource::by_path(group, version, plural);
        let owned = |text: &&str| Some((*text).to_owned());
        if let ["namespaces", namespace, plural, rest @ ..] = rest
            && let Some(resource) = find(plural).filter(|r| r.info().namespaced)
        {
            let (name, subresource) = match rest {
                [] => (None, None),
                [name] => (owned(name), None),
                [name, sub] => (owned(name), owned(sub)),
                _ => return None,
            };
            return Some(Self { resource, namespace: owned(namespace), name, subresource });
        }
        let (plural, name, subresource) = match rest {
            [plural] => (plural, None, None),
            [plural, name] => (plural, owned(name), None),
            [plural, name, sub] => (plural, owned(name), owned(sub)),
            _ => return None,
        };
        let resource = find(plural)?;
        if name.is_some() && resource.info().namespaced {
            return None;
        }
        Some(Self { resource, namespace: None, name, subresource })
    }
}

/// The query parameters.
#[derive(Debug, Default)]
pub struct Params(HashMap<String, String>);

impl Params {
    /// Reads a URI's query.
    pub fn parse(uri: &Uri) -> Result<Self, Status> {
        let query = QueryString::<HashMap<String, String>>::try_from_uri(uri);
        query.map(|q| Self(q.0)).map_err(|e| Status::bad_request(e.to_string()))
    }

    /// All parameters.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }

    /// A parameter's text, empty when it is absent.
    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// A boolean as the API's query conversion reads it: there and not `0` or `false`.
    pub fn flag(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|v| !matches!(v.to_ascii_lowercase().as_str(), "0" | "false"))
    }

    fn number(&self, name: &str) -> Result<u64, Status> {
        match self.text(name) {
            "" => Ok(0),
            text => text.parse().map_err(|_| {
                Status::bad_request(format!(
                    "{name}: Invalid value: \"{text}\": strconv.ParseUint: parsing \"{text}\": \
                     invalid syntax"
                ))
            }),
        }
    }

    /// The verb of a request.
    pub fn verb(&self, method: &Method, target: &Target) -> Verb {
        match *method {
            Method::GET if self.flag("watch") && self.flag("sendInitialEvents") => Verb::WatchList,
            Method::GET if self.flag("watch") => Verb::Watch,
            Method::GET if target.name.is_some() => Verb::Get,
            Method::GET if self.text("continue").is_empty() => Verb::List,
            Method::GET => Verb::Page,
            Method::POST => Verb::Create,
            Method::PUT => Verb::Update,
            Method::PATCH => Verb::Patch,
            Method::DELETE => Verb::Delete,
            _ => Verb::Other,
        }
    }

    /// The selectors.
    pub fn selector(&self, target: &Target) -> Result<Selector, Status> {
        let selector = Selector::parse(
            target.resource,
            self.text("labelSelector"),
            self.text("fieldSelector"),
        )?;
        Ok(match &target.name {
            Some(name) => selector.and_name(name),
            None => selector,
        })
    }

    /// Page size and version of a list. `newest` is the server's version.
    pub fn list_at(&self, newest: u64) -> Result<(usize, At), Status> {
        let limit = usize::try_from(self.number("limit")?).unwrap_or(0);
        let version = self.number("resourceVersion")?;
        let given = !self.text("resourceVersion").is_empty();
        let matching = self.text("resourceVersionMatch");
        let token = self.text("continue");
        if !token.is_empty() {
            if version != 0 || !matching.is_empty() {
                return Err(Status::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            return Ok((limit, At::Continue(Token::parse(token)?)));
        }
        if !matching.is_empty() && !given {
            return Err(Status::invalid_options(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        // The watch cache answers "any version" whole: `limit` counts for nothing then.
        let limit = if given && version == 0 { 0 } else { limit };
        let exact = match matching {
            "Exact" if version == 0 => {
                return Err(Status::invalid_options(
                    "resourceVersionMatch",
                    "resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\"",
                ));
            }
            "Exact" => true,
            "NotOlderThan" => false,
            "" => version > 0 && limit > 0,
            other => {
                return Err(Status::invalid_options(
                    "resourceVersionMatch",
                    &format!("unsupported value {other:?}"),
                ));
            }
        };
        if exact {
            return Ok((limit, At::Exact(version)));
        }
        if version > newest {
            return Err(Status::too_large(version, newest));
        }
        Ok((limit, At::Newest))
    }

    /// The watch that is asked for.
    pub fn watch(&self, target: &Target) -> Result<WatchRequest, Status> {
        let version = self.number("resourceVersion")?;
        let matching = self.text("resourceVersionMatch");
        let from = if self.flag("sendInitialEvents") {
            if matching != "NotOlderThan" {
                return Err(Status::invalid_options(
                    "resourceVersionMatch",
                    "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
                ));
            }
            From::Everything { marked_end: true }
        } else if !matching.is_empty() {
            return Err(Status::invalid_options(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        } else if version == 0 {
            From::Everything { marked_end: false }
        } else {
            From::Version(version)
        };
        let timeout = match self.number("timeoutSeconds")? {
            0 => DEFAULT_WATCH,
            seconds => Duration::from_secs(seconds),
        };
        Ok(WatchRequest {
            resource: target.resource,
            namespace: target.namespace.clone(),
            selector: self.selector(target)?,
            from,
            bookmarks: self.flag("allowWatchBookmarks"),
            timeout,
        })
    }
}
