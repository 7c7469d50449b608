//! The test API server against the recorded answers of a real one, and against what the
//! Kubernetes API conventions say where no answer was recorded.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; clippy sees tests only in #[test] functions"
)]

mod client;
mod faults;
mod kubectl;
mod recorded;
mod semantics;
mod services;

use proxy_tests::apiserver::{ApiServer, Options};
use serde_json::{Value, json};

/// A server without TLS, for tests that are not about it.
pub fn plain() -> ApiServer {
    ApiServer::start(Options { tls: false, ..Options::default() }).unwrap()
}

/// A server that holds nothing at all.
pub fn empty() -> ApiServer {
    let options = Options { tls: false, kubernetes_endpoint: None, ..Options::default() };
    ApiServer::start(options).unwrap()
}

/// A Service with a label `app` that is its name.
pub fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "test", "labels": {"app": name}},
        "spec": {"ports": [{"name": "http", "port": 80}]},
    })
}

/// Names of a list's items.
pub fn names(list: &Value) -> Vec<&str> {
    let items = list["items"].as_array().unwrap();
    items.iter().map(|item| item["metadata"]["name"].as_str().unwrap()).collect()
}
