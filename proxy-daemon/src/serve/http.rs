//! The routes of both servers, with kube-proxy's bodies and headers.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;

use super::health::Answer;
use super::zpages::{self, Check};
use super::{Status, exposition};

pub(super) type Shared = State<Arc<Status>>;

pub(super) const JSON: &str = "application/json";
pub(super) const TEXT: &str = "text/plain; charset=utf-8";

pub(super) fn health_router(status: Arc<Status>) -> Router {
    Router::new()
        .route("/healthz", any(healthz))
        .route("/livez", any(livez))
        .fallback(not_found)
        .with_state(status)
}

pub(super) fn metrics_router(status: Arc<Status>) -> Router {
    Router::new()
        .route("/metrics", any(metrics))
        .route("/healthz", any(ok))
        .route("/healthz/ping", any(ok))
        .route("/proxyMode", any(proxy_mode))
        .route("/configz", any(configz))
        .merge(zpages::routes(status.profiling))
        .fallback(not_found)
        .with_state(status)
}

/// Content type and `nosniff`, which kube-proxy sends with every answer.
pub(super) fn headers(content_type: &'static str) -> [(HeaderName, HeaderValue); 2] {
    [
        (CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ]
}

async fn healthz(State(status): Shared) -> Response {
    let answer = status.health().healthz(status.now());
    let code = code_of(&answer);
    status.metrics.healthz(code.as_u16());
    status.slis.count(Check::Healthz, answer.healthy);
    respond(code, &answer)
}

async fn livez(State(status): Shared) -> Response {
    let answer = status.health().livez(status.now());
    let code = code_of(&answer);
    status.metrics.livez(code.as_u16());
    status.slis.count(Check::Livez, answer.healthy);
    respond(code, &answer)
}

const fn code_of(answer: &Answer) -> StatusCode {
    if answer.healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn respond(code: StatusCode, answer: &Answer) -> Response {
    match serde_json::to_string(answer) {
        Ok(body) => (code, headers(JSON), body).into_response(),
        Err(error) => failure(&error),
    }
}

fn failure(error: &dyn std::fmt::Display) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, headers(TEXT), format!("{error}\n")).into_response()
}

async fn metrics(State(status): Shared, request: HeaderMap) -> Response {
    let accept = request.get(ACCEPT).and_then(|value| value.to_str().ok()).map(str::to_owned);
    // The kernel is read meanwhile, which may take as long as a thread of the runtime must not
    // be kept from its other work.
    let rendered = tokio::task::spawn_blocking(move || {
        exposition::render(status.metrics.registry(), accept.as_deref())
    });
    match rendered.await {
        Ok(Ok((content_type, body))) => {
            ([(CONTENT_TYPE, HeaderValue::from_static(content_type))], body).into_response()
        }
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&error),
    }
}

/// That the process answers; whether it keeps up is the other server's to say.
async fn ok() -> Response {
    (headers(TEXT), "ok").into_response()
}

async fn proxy_mode(State(status): Shared) -> Response {
    (headers(TEXT), status.mode.to_string()).into_response()
}

async fn configz(State(status): Shared) -> Response {
    (headers(JSON), status.configz.to_string()).into_response()
}

/// The body of Go's `http.NotFound`.
async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, headers(TEXT), "404 page not found\n").into_response()
}
