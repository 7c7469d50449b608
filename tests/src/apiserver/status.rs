//! Failures as the API server words them: a `Status` object, which is also what the
//! HTTP reply and a watch's `ERROR` event carry.

use serde_json::{Value, json};

use super::resource::Resource;

/// A failed request. Wording, reason and code follow
/// `k8s.io/apimachinery/pkg/api/errors`, because clients branch on reason and code.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable cause, such as `Expired`.
    pub reason: &'static str,
    /// Text for people.
    pub message: String,
    /// `details` of the Status object, `Null` when there are none.
    details: Value,
    /// Token in `metadata.continue`, given with an expired list (see `expired_continue`).
    continue_token: Option<String>,
}

impl Status {
    fn new(code: u16, reason: &'static str, message: String) -> Self {
        Self { code, reason, message, details: Value::Null, continue_token: None }
    }

    /// No valid bearer token.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized".into())
    }

    /// The path names nothing this server has.
    pub fn no_such_path() -> Self {
        let message = "the server could not find the requested resource".into();
        Self { details: json!({}), ..Self::new(404, "NotFound", message) }
    }

    /// No object of that name.
    pub fn not_found(resource: Resource, name: &str) -> Self {
        let message = format!("{} \"{name}\" not found", resource.qualified());
        Self { details: named(resource, name), ..Self::new(404, "NotFound", message) }
    }

    /// An object of that name is there already.
    pub fn already_exists(resource: Resource, name: &str) -> Self {
        let message = format!("{} \"{name}\" already exists", resource.qualified());
        Self { details: named(resource, name), ..Self::new(409, "AlreadyExists", message) }
    }

    /// A write names a resource version that is no longer the object's.
    pub fn conflict(resource: Resource, name: &str) -> Self {
        let message = format!(
            "Operation cannot be fulfilled on {} \"{name}\": the object has been modified; \
             please apply your changes to the latest version and try again",
            resource.qualified()
        );
        Self { details: named(resource, name), ..Self::new(409, "Conflict", message) }
    }

    /// The object is well formed and still not acceptable.
    pub fn invalid(resource: Resource, name: &str, field: &str, why: &str) -> Self {
        let kind = resource.info().kind;
        let message = format!("{kind} \"{name}\" is invalid: {field}: {why}");
        let mut details = named(resource, name);
        details["kind"] = json!(kind);
        details["causes"] =
            json!([{"reason": "FieldValueInvalid", "message": why, "field": field}]);
        Self { details, ..Self::new(422, "Invalid", message) }
    }

    /// The request itself cannot be understood.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message.into())
    }

    /// List or watch parameters that do not go together.
    pub fn invalid_options(field: &str, why: &str) -> Self {
        let message = format!("ListOptions.meta.k8s.io \"\" is invalid: {field}: Forbidden: {why}");
        Self::new(422, "Invalid", message)
    }

    /// The body is in a form this server does not read.
    pub fn unsupported_media_type(content_type: &str) -> Self {
        let message = format!("the body of the request was in an unknown format: {content_type}");
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// The resource does not know this verb.
    pub fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource".into();
        Self::new(405, "MethodNotAllowed", message)
    }

    /// The injected failure of `Faults::internal_errors`.
    pub fn internal() -> Self {
        let message = "Internal error occurred: injected by the test".into();
        Self::new(500, "InternalError", message)
    }

    /// A watch from before the history that is kept. `oldest` is the newest version
    /// that is *not* kept any more, as the watch cache reports it.
    pub fn too_old(asked: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {asked} ({oldest})"))
    }

    /// An exact list at a version that is compacted.
    pub fn list_too_old() -> Self {
        let message = "The resourceVersion for the provided list is too old.".into();
        Self::new(410, "Expired", message)
    }

    /// A continue token whose version is compacted; `token` continues at the newest
    /// version instead, for clients that accept an inconsistent list.
    pub fn expired_continue(token: String) -> Self {
        let message = "The provided continue parameter is too old to display a consistent list \
            result. You can start a new list without the continue parameter, or use the continue \
            token in this response to retrieve the remainder of the results. Continuing with the \
            provided token results in an inconsistent list - objects that were created, \
            modified, or deleted between the time the first chunk was returned and now may show \
            up in the list.";
        Self { continue_token: Some(token), ..Self::new(410, "Expired", message.into()) }
    }

    /// A version this server has not reached.
    pub fn too_large(asked: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {asked}, current: {current}");
        let causes = json!([{"reason": "ResourceVersionTooLarge",
                             "message": "Too large resource version"}]);
        Self {
            details: json!({"causes": causes, "retryAfterSeconds": 1}),
            ..Self::new(504, "Timeout", message)
        }
    }

    /// The `Status` object.
    pub fn to_value(&self) -> Value {
        let mut value = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if !self.details.is_null() {
            value["details"] = self.details.clone();
        }
        if let Some(token) = &self.continue_token {
            value["metadata"]["continue"] = json!(token);
        }
        value
    }
}

fn named(resource: Resource, name: &str) -> Value {
    let info = resource.info();
    let mut details = json!({"name": name, "kind": info.plural});
    if !info.group.is_empty() {
        details["group"] = json!(info.group);
    }
    details
}
