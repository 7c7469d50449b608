//! `/statusz`, `/flagz`, `/metrics/slis` and `/debug/`: what kube-proxy 1.36 has beside its
//! metrics.
//!
//! The first two are text for people, or JSON for whoever asks for exactly that kind by its
//! `Accept` header (`component-base/zpages`).

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use axum::Router;
use axum::extract::State;
use axum::http::header::{ACCEPT, HeaderMap};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::json;

use super::http::{JSON, Shared, TEXT, headers};
use super::{Status, exposition};
use crate::config::KUBERNETES;

const COMPONENT: &str = "proxy-daemon";
const GROUP: &str = "config.k8s.io";
/// The pages are the same in both.
const VERSIONS: [&str; 2] = ["v1alpha1", "v1beta1"];
const WARNING: &str = "Warning: This endpoint is not meant to be machine parseable, has no \
                       formatting compatibility guarantees and is for debugging purposes only.";
const PATHS: [&str; 6] =
    ["/configz", "/flagz", "/healthz", "/metrics", "/metrics/slis", "/proxyMode"];
const NO_PROFILES: &str = "there is no Go runtime here whose profiles could be served\n";

pub(super) fn routes(profiling: bool) -> Router<Arc<Status>> {
    let pages = Router::new()
        .route("/statusz", any(statusz))
        .route("/flagz", any(flagz))
        .route("/metrics/slis", any(slis));
    if !profiling {
        return pages;
    }
    pages
        .route("/debug/flags/v", any(verbosity))
        .route("/debug/pprof/", any(no_profiles))
        .route("/debug/pprof/{*profile}", any(no_profiles))
}

/// How a page was asked for.
#[derive(Debug, PartialEq, Eq)]
enum Form {
    Text,
    /// In this version.
    Object(&'static str),
}

/// The first form of `accept` that there is.
fn negotiate(accept: Option<&str>, kind: &str) -> Option<Form> {
    let accept = accept.unwrap_or("*/*");
    accept.split(',').find_map(|range| {
        let mut parts = range.split(';').map(str::trim);
        match parts.next().unwrap_or_default() {
            "" | "*/*" | "text/*" | "text/plain" => Some(Form::Text),
            "application/json" => {
                let parameters: Vec<_> = parts.filter_map(|part| part.split_once('=')).collect();
                let given = |name: &str| {
                    parameters.iter().find(|(held, _)| *held == name).map(|(_, value)| *value)
                };
                let version = VERSIONS.into_iter().find(|version| given("v") == Some(*version))?;
                (given("as") == Some(kind) && given("g") == Some(GROUP))
                    .then_some(Form::Object(version))
            }
            _ => None,
        }
    })
}

fn form(request: &HeaderMap, kind: &str) -> Option<Form> {
    let accept = request.get(ACCEPT).map(|value| value.to_str().unwrap_or_default());
    negotiate(accept, kind)
}

fn not_acceptable(kind: &str) -> Response {
    let [_, version] = VERSIONS;
    let text = format!(
        "media type not acceptable, must be one of: text/plain, \
         application/json;as={kind};v={version};g={GROUP}\n"
    );
    (StatusCode::NOT_ACCEPTABLE, headers(TEXT), text).into_response()
}

async fn statusz(State(status): Shared, request: HeaderMap) -> Response {
    let Some(form) = form(&request, "Statusz") else { return not_acceptable("Statusz") };
    let up = status.now().wall.duration_since(status.started).unwrap_or_default().as_secs();
    let started = timestamp(status.started);
    let version = env!("CARGO_PKG_VERSION");
    match form {
        Form::Text => {
            let started = started.to_zoned(TimeZone::UTC).strftime("%a %b %e %H:%M:%S UTC %Y");
            let page = format!(
                "\n{COMPONENT} statusz\n{WARNING}\n\n\
                 Started: {started}\n\
                 Up: {} hr {:02} min {:02} sec\n\
                 Binary version: {version}\n\
                 Emulation version: {KUBERNETES}\n\
                 Paths: {}\n",
                up / 3600,
                up / 60 % 60,
                up % 60,
                PATHS.join(" ")
            );
            (headers(TEXT), page).into_response()
        }
        Form::Object(of) => {
            let object = json!({
                "kind": "Statusz",
                "apiVersion": format!("{GROUP}/{of}"),
                "metadata": {"name": COMPONENT},
                "startTime": started.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                "uptimeSeconds": up,
                "binaryVersion": version,
                "emulationVersion": KUBERNETES,
                "paths": PATHS,
            });
            (headers(JSON), object.to_string()).into_response()
        }
    }
}

/// A time before the epoch or after the year 9999 is no start of a process.
fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH)
}

async fn flagz(State(status): Shared, request: HeaderMap) -> Response {
    match form(&request, "Flagz") {
        None => not_acceptable("Flagz"),
        Some(Form::Text) => {
            let mut page = format!("\n{COMPONENT} flagz\n{WARNING}\n\n");
            for (name, value) in &status.flags {
                // Writing to a string cannot fail.
                let _ = writeln!(page, "{name}={value}");
            }
            (headers(TEXT), page).into_response()
        }
        Some(Form::Object(of)) => {
            let object = json!({
                "kind": "Flagz",
                "apiVersion": format!("{GROUP}/{of}"),
                "metadata": {"name": COMPONENT},
                "flags": status.flags,
            });
            (headers(JSON), object.to_string()).into_response()
        }
    }
}

/// How often each check was asked, by its answer.
#[derive(Debug, Default)]
pub(super) struct Slis {
    /// Of `/healthz` and `/livez`: healthy, not.
    asked: [[AtomicU64; 2]; 2],
}

/// The position in [`Slis`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Check {
    Healthz = 0,
    Livez = 1,
}

impl Slis {
    pub(super) fn count(&self, check: Check, healthy: bool) {
        self.asked[check as usize][usize::from(!healthy)].fetch_add(1, Relaxed);
    }

    fn reset(&self) {
        self.asked.iter().flatten().for_each(|count| count.store(0, Relaxed));
    }

    fn page(&self, healthy: [bool; 2]) -> String {
        let mut now = "# HELP kubernetes_healthcheck This metric records the result of a single \
                       healthcheck.\n# TYPE kubernetes_healthcheck gauge\n"
            .to_owned();
        let mut total = "# HELP kubernetes_healthchecks_total This metric records the results of \
                         all healthcheck.\n# TYPE kubernetes_healthchecks_total counter\n"
            .to_owned();
        for (kind, healthy, counts) in
            [("healthz", healthy[0], &self.asked[0]), ("livez", healthy[1], &self.asked[1])]
        {
            // Writing to a string cannot fail.
            let _ = writeln!(
                now,
                "kubernetes_healthcheck{{name=\"proxy\",type=\"{kind}\"}} {}",
                u8::from(healthy)
            );
            for (result, count) in ["success", "error"].into_iter().zip(counts) {
                let _ = writeln!(
                    total,
                    "kubernetes_healthchecks_total{{name=\"proxy\",status=\"{result}\",\
                     type=\"{kind}\"}} {}",
                    count.load(Relaxed)
                );
            }
        }
        now + &total
    }
}

/// Service level indicators; DELETE starts the counters anew.
async fn slis(State(status): Shared, method: Method) -> Response {
    if method == Method::DELETE {
        status.slis.reset();
        return (headers(TEXT), "metrics reset\n").into_response();
    }
    let now = status.now();
    let healthy = {
        let health = status.health();
        [health.healthz(now).healthy, health.livez(now).healthy]
    };
    let content_type = [(axum::http::header::CONTENT_TYPE, exposition::CLASSIC)];
    (content_type, status.slis.page(healthy)).into_response()
}

/// klog's: the body of a PUT is the new verbosity.
async fn verbosity(State(status): Shared, method: Method, body: String) -> Response {
    let (code, text) = match (method, body.trim().parse::<u32>()) {
        (Method::PUT, Ok(verbosity)) if status.set_verbosity(verbosity) => {
            (StatusCode::OK, format!("successfully set klog.logging.verbosity to {verbosity}"))
        }
        (Method::PUT, Ok(_)) => {
            let text = "RUST_LOG decides how much is logged";
            (StatusCode::CONFLICT, text.to_owned())
        }
        (Method::PUT, Err(error)) => {
            (StatusCode::BAD_REQUEST, format!("failed set klog.logging.verbosity {body}: {error}"))
        }
        _ => (StatusCode::NOT_ACCEPTABLE, "unsupported http method".to_owned()),
    };
    (code, headers(TEXT), text).into_response()
}

async fn no_profiles() -> Response {
    (StatusCode::NOT_IMPLEMENTED, headers(TEXT), NO_PROFILES).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_text_unless_its_kind_is_asked_for_exactly() {
        let object = "application/json;as=Statusz;v=v1beta1;g=config.k8s.io";
        for (accept, expected) in [
            (None, Some(Form::Text)),
            (Some("*/*"), Some(Form::Text)),
            (Some("text/plain;charset=utf-8"), Some(Form::Text)),
            (Some(object), Some(Form::Object("v1beta1"))),
            (
                Some("application/json; v=v1alpha1; g=config.k8s.io; as=Statusz, */*"),
                Some(Form::Object("v1alpha1")),
            ),
            (Some("application/json, text/*"), Some(Form::Text)),
            (Some("application/json"), None),
            (Some("application/json;as=Flagz;v=v1beta1;g=config.k8s.io"), None),
            (Some("application/json;as=Statusz;v=v9;g=config.k8s.io"), None),
            (Some("text/html"), None),
        ] {
            assert_eq!(negotiate(accept, "Statusz"), expected, "{accept:?}");
        }
    }
}
