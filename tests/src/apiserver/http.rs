//! From a request to its answer.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use serde_json::{Value, json};

use super::Shared;
use super::body;
use super::defaults::StatusOf;
use super::list::Query;
use super::log::{Entry, Verb};
use super::object::Object;
use super::patch::PatchKind;
use super::request::{Params, Target};
use super::resource::{self, Resource};
use super::status::Status;
use super::store::Write;
use super::{control, watch};

/// Largest request body (etcd refuses objects above 1.5 MiB by default).
const MAX_BODY: usize = 3 * 1024 * 1024;

/// What an answer carries.
pub(super) enum Reply {
    /// One JSON document.
    Json(u16, Value),
    /// JSON in pieces; `true` for a list.
    Pieces(Vec<Bytes>, bool),
    /// A body that is produced elsewhere.
    Stream(Body),
    /// Plain text.
    Text(&'static str),
}

/// Answers a request; never fails, since every failure is an answer too.
pub(super) async fn answer(shared: Arc<Shared>, request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    if let Some(result) = control::answer(&shared, &parts, authorized(&shared, &parts)) {
        return respond(&shared, result);
    }
    wait_while_stalled(&shared).await;
    let target = Target::parse(parts.uri.path());
    let params = Params::parse(&parts.uri);
    let verb = match (&target, &params) {
        (Some(target), Ok(params)) => params.verb(&parts.method, target),
        _ => Verb::Other,
    };
    let resource = target.as_ref().map(|target| target.resource);
    let result = match (admit(&shared, &parts), params) {
        (Err(status), _) | (_, Err(status)) => Err(status),
        (Ok(()), Ok(params)) => match target {
            Some(target) => Call { shared: &shared, target, params, parts: &parts }.run(body).await,
            None => other(&shared, parts.uri.path()),
        },
    };
    let response = respond(&shared, result);
    let entry = Entry {
        verb,
        method: parts.method.to_string(),
        uri: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
        version: format!("{:?}", parts.version),
        code: response.status().as_u16(),
    };
    shared.log.record(resource, entry);
    response
}

async fn wait_while_stalled(shared: &Shared) {
    let mut faults = shared.faults.subscribe();
    // The sender lives in `shared`, so waiting cannot fail.
    let _ = faults.wait_for(|state| !state.set.stall).await;
}

fn authorized(shared: &Shared, parts: &Parts) -> bool {
    let Some(token) = &shared.options.token else {
        return true;
    };
    let given = parts.headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    given.and_then(|v| v.strip_prefix("Bearer ")).is_some_and(|given| given == token)
}

/// Authentication, and the faults that stand before everything else.
fn admit(shared: &Shared, parts: &Parts) -> Result<(), Status> {
    let faults = shared.faults.current();
    // Readable by anyone, as the default RBAC role system:public-info-viewer has it.
    let public = ["/healthz", "/livez", "/readyz", "/version"].contains(&parts.uri.path());
    let anonymous = public && !parts.headers.contains_key(header::AUTHORIZATION);
    if faults.unauthorized || !(anonymous || authorized(shared, parts)) {
        return Err(Status::unauthorized());
    }
    if faults.internal_errors {
        return Err(Status::internal());
    }
    Ok(())
}

/// Paths that are not resources.
fn other(shared: &Shared, path: &str) -> Result<Reply, Status> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let document = match parts.as_slice() {
        ["healthz" | "livez" | "readyz", ..] => return Ok(Reply::Text("ok")),
        ["version"] => resource::version(),
        ["api"] => resource::api_versions(&shared.address.to_string()),
        ["apis"] => resource::api_groups(),
        ["api", version] => {
            resource::api_resource_list("", version).ok_or_else(Status::no_such_path)?
        }
        ["apis", group, version] => {
            resource::api_resource_list(group, version).ok_or_else(Status::no_such_path)?
        }
        _ => return Err(Status::no_such_path()),
    };
    Ok(Reply::Json(200, document))
}

/// One request for a resource.
struct Call<'a> {
    shared: &'a Arc<Shared>,
    target: Target,
    params: Params,
    parts: &'a Parts,
}

impl Call<'_> {
    async fn run(self, body: Body) -> Result<Reply, Status> {
        let known = match self.target.subresource.as_deref() {
            None => true,
            Some(sub) => sub == "status" && self.target.resource.info().status,
        };
        if !known {
            return Err(Status::no_such_path());
        }
        match (&self.parts.method, self.target.name.as_deref()) {
            (&Method::GET, _) if self.params.flag("watch") => self.watch(),
            (&Method::GET, Some(name)) => self.get(name),
            (&Method::GET, None) => self.list(),
            (&Method::POST, None) => self.create(self.read(body).await?),
            (&Method::PUT, Some(name)) => self.update(name, self.read(body).await?),
            (&Method::PATCH, Some(name)) => self.patch(name, self.read(body).await?),
            (&Method::DELETE, Some(name)) => self.delete(name),
            (&Method::DELETE, None) => self.delete_all(),
            _ => Err(Status::method_not_allowed()),
        }
    }

    fn namespace(&self) -> &str {
        self.target.namespace.as_deref().unwrap_or_default()
    }

    /// JSON, or the YAML that server-side apply may send: JSON is YAML too.
    async fn read(&self, body: Body) -> Result<Value, Status> {
        let bytes = to_bytes(body, MAX_BODY).await;
        let bytes = bytes.map_err(|e| Status::bad_request(format!("reading the body: {e}")))?;
        let mime = header_text(&self.parts.headers, header::CONTENT_TYPE);
        if mime.contains("protobuf") {
            return Err(Status::unsupported_media_type(&mime));
        }
        if mime.contains("yaml") {
            serde_yaml_ng::from_slice(&bytes).map_err(|e| Status::bad_request(e.to_string()))
        } else {
            serde_json::from_slice(&bytes).map_err(|e| Status::bad_request(e.to_string()))
        }
    }

    /// `fieldManager`, or the user agent's first word.
    fn manager(&self) -> String {
        let agent = header_text(&self.parts.headers, header::USER_AGENT);
        let agent = agent.split('/').next().unwrap_or_default();
        match (self.params.text("fieldManager"), agent) {
            ("", "") => "unknown".to_owned(),
            ("", agent) => agent.to_owned(),
            (manager, _) => manager.to_owned(),
        }
    }

    fn write<'a>(&'a self, manager: &'a str) -> Write<'a> {
        let subresource = self.target.subresource.as_deref();
        Write { manager, status: StatusOf::Server, subresource }
    }

    fn watch(&self) -> Result<Reply, Status> {
        let request = self.params.watch(&self.target)?;
        Ok(Reply::Stream(watch::start(self.shared, request)))
    }

    fn get(&self, name: &str) -> Result<Reply, Status> {
        let resource = self.target.resource;
        let found = self.shared.store.find(resource, self.namespace(), name);
        let found = found.ok_or_else(|| Status::not_found(resource, name))?;
        Ok(Reply::Pieces(vec![found.alone(resource)], false))
    }

    fn list(&self) -> Result<Reply, Status> {
        let resource = self.target.resource;
        let (limit, at) = self.params.list_at(self.shared.store.version())?;
        let page = self.shared.store.list(&Query {
            resource,
            namespace: self.target.namespace.as_deref(),
            selector: &self.params.selector(&self.target)?,
            limit,
            at,
        })?;
        let head = format!(
            r#"{{"kind":"{}List","apiVersion":"{}","metadata":{},"items":["#,
            resource.info().kind,
            resource.api_version(),
            page.metadata()
        );
        let mut pieces = Vec::with_capacity(2 * page.items.len() + 2);
        pieces.push(Bytes::from(head));
        for (at, object) in page.items.iter().enumerate() {
            if at > 0 {
                pieces.push(Bytes::from_static(b","));
            }
            pieces.push(object.item().clone());
        }
        pieces.push(Bytes::from_static(b"]}"));
        Ok(Reply::Pieces(pieces, true))
    }

    fn create(&self, mut object: Value) -> Result<Reply, Status> {
        let resource = self.target.resource;
        check_kind(resource, &object)?;
        if resource.info().namespaced {
            let in_path = self.target.namespace.as_deref().unwrap_or("default");
            let metadata = &mut object["metadata"];
            match metadata["namespace"].as_str() {
                Some(own) if own != in_path => {
                    return Err(Status::bad_request(
                        "the namespace of the provided object does not match the namespace sent \
                         on the request",
                    ));
                }
                _ => metadata["namespace"] = json!(in_path),
            }
        }
        let manager = self.manager();
        let stored = self.shared.store.create(resource, object, self.write(&manager))?;
        Ok(self.object(201, &stored))
    }

    fn update(&self, name: &str, object: Value) -> Result<Reply, Status> {
        let resource = self.target.resource;
        check_kind(resource, &object)?;
        let manager = self.manager();
        let at = (self.namespace(), name);
        let stored =
            self.shared.store.update(resource, at, self.write(&manager), |_| Ok(object))?;
        Ok(self.object(200, &stored))
    }

    fn patch(&self, name: &str, patch: Value) -> Result<Reply, Status> {
        let kind = PatchKind::of(&header_text(&self.parts.headers, header::CONTENT_TYPE))?;
        let resource = self.target.resource;
        let manager = self.manager();
        let at = (self.namespace(), name);
        let exists = self.shared.store.find(resource, self.namespace(), name).is_some();
        if kind == PatchKind::Apply && !exists {
            return self.create(patch);
        }
        let stored =
            self.shared.store.update(resource, at, self.write(&manager), |mut object| {
                kind.apply(&mut object, &patch);
                Ok(object)
            })?;
        Ok(self.object(200, &stored))
    }

    fn delete(&self, name: &str) -> Result<Reply, Status> {
        let resource = self.target.resource;
        let gone = self.shared.store.remove(resource, self.namespace(), name)?;
        let mut details = json!({
            "name": name, "kind": resource.info().plural, "uid": gone.value()["metadata"]["uid"],
        });
        if !resource.info().group.is_empty() {
            details["group"] = json!(resource.info().group);
        }
        Ok(Reply::Json(
            200,
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                   "details": details}),
        ))
    }

    fn delete_all(&self) -> Result<Reply, Status> {
        let resource = self.target.resource;
        let page = self.shared.store.list(&Query {
            resource,
            namespace: self.target.namespace.as_deref(),
            selector: &self.params.selector(&self.target)?,
            limit: 0,
            at: super::list::At::Newest,
        })?;
        let items: Vec<Value> = page.items.iter().map(|object| object.value()).collect();
        for object in &page.items {
            // Somebody else may have deleted it since; gone is what was asked for.
            let _ = self.shared.store.remove(resource, &object.namespace, &object.name);
        }
        Ok(Reply::Json(
            200,
            json!({"kind": format!("{}List", resource.info().kind), "items": items,
                   "apiVersion": resource.api_version(), "metadata": page.metadata()}),
        ))
    }

    fn object(&self, code: u16, object: &Object) -> Reply {
        Reply::Json(code, object.full_value(self.target.resource))
    }
}

fn check_kind(resource: Resource, object: &Value) -> Result<(), Status> {
    let (kind, version) = (&object["kind"], &object["apiVersion"]);
    let fits = (kind.is_null() || kind == resource.info().kind)
        && (version.is_null() || *version == resource.api_version());
    if object.is_object() && fits {
        return Ok(());
    }
    Err(Status::bad_request(format!(
        "{} in version {version} cannot be handled as a {}",
        kind.as_str().unwrap_or("an object without kind"),
        resource.info().kind
    )))
}

fn header_text(headers: &HeaderMap, name: header::HeaderName) -> String {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

fn respond(shared: &Shared, result: Result<Reply, Status>) -> Response<Body> {
    let faults = shared.faults.subscribe();
    let (code, mime, body) = match result {
        Ok(Reply::Text(text)) => (200, "text/plain; charset=utf-8", Body::from(text)),
        Ok(Reply::Stream(body)) => (200, "application/json", body),
        Ok(_) if shared.faults.current().rubbish => {
            let rubbish = Bytes::from_static(b"{\"kind\":\"ServiceList\",\"items\":[<html>");
            (200, "application/json", Body::from(rubbish))
        }
        Ok(Reply::Json(code, value)) => {
            let pieces = vec![Bytes::from(value.to_string())];
            (code, "application/json", body::of_pieces(pieces, faults, false))
        }
        Ok(Reply::Pieces(pieces, list)) => {
            (200, "application/json", body::of_pieces(pieces, faults, list))
        }
        Err(status) => {
            let pieces = vec![Bytes::from(status.to_value().to_string())];
            (status.code, "application/json", body::of_pieces(pieces, faults, false))
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::OK);
    let headers = response.headers_mut();
    let mut set = |name: &'static str, value: &str| {
        if let Ok(value) = value.parse() {
            headers.insert(name, value);
        }
    };
    set("audit-id", &shared.next_audit_id());
    set("cache-control", "no-cache, private");
    set("content-type", mime);
    // Priority and fairness comes after authentication.
    if code != 401 {
        set("x-kubernetes-pf-flowschema-uid", "5e1f0000-0000-4000-8001-000000000001");
        set("x-kubernetes-pf-prioritylevel-uid", "5e1f0000-0000-4000-8001-000000000002");
    }
    response
}
