//! `/testing/...`: the switches of a server that runs as a process of its own, such as
//! in a guest. Faults do not touch these paths, or nobody could switch them off again.
//!
//! - `GET /testing/requests`: the counters; `DELETE` resets them.
//! - `GET /testing/faults`; `PUT /testing/faults?stall=true&bytesPerSecond=1000` sets
//!   those and clears all others; with `forMs=N` everything is cleared after that time.
//! - `POST /testing/{disconnect,disconnect-watches,expire-watches,compact}`.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use axum::http::request::Parts;
use serde_json::{Map, Value, json};

use super::Shared;
use super::faults::FaultSet;
use super::http::Reply;
use super::request::Params;
use super::status::Status;

/// Answers a request for a switch; `None` if it is for something else. `allowed` says
/// that the client is authenticated.
pub(super) fn answer(
    shared: &Arc<Shared>,
    parts: &Parts,
    allowed: bool,
) -> Option<Result<Reply, Status>> {
    let what = parts.uri.path().strip_prefix("/testing/")?;
    if !allowed {
        return Some(Err(Status::unauthorized()));
    }
    let faults = &shared.faults;
    let act: &dyn Fn() = match (&parts.method, what) {
        (&Method::GET, "requests") => return Some(Ok(Reply::Json(200, shared.log.to_value()))),
        (&Method::DELETE, "requests") => &|| shared.log.reset(),
        (&Method::GET, "faults") => return Some(Ok(Reply::Json(200, json!(faults.current())))),
        (&Method::PUT, "faults") => {
            return Some(Params::parse(&parts.uri).and_then(|p| set(shared, &p)));
        }
        (&Method::POST, "disconnect") => &|| faults.disconnect_all(),
        (&Method::POST, "disconnect-watches") => &|| faults.disconnect_watches(),
        (&Method::POST, "expire-watches") => &|| faults.expire_watches(),
        (&Method::POST, "compact") => &|| shared.store.compact(),
        _ => return Some(Err(Status::no_such_path())),
    };
    act();
    Some(Ok(Reply::Json(200, json!({}))))
}

fn set(shared: &Arc<Shared>, params: &Params) -> Result<Reply, Status> {
    let mut given = Map::new();
    let mut clear_after = None;
    for (name, text) in params.iter() {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| Status::bad_request(format!("{name}={text}: {e}")))?;
        if name == "forMs" {
            clear_after = value.as_u64().map(Duration::from_millis);
        } else {
            given.insert(name.to_owned(), value);
        }
    }
    let wanted: FaultSet = serde_json::from_value(Value::Object(given))
        .map_err(|e| Status::bad_request(e.to_string()))?;
    if wanted.refuse && clear_after.is_none() {
        return Err(Status::bad_request("refuse needs forMs: nobody could switch it off again"));
    }
    shared.faults.set(|faults| *faults = wanted);
    if let Some(time) = clear_after {
        let faults = shared.faults.clone();
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            faults.clear();
        });
    }
    Ok(Reply::Json(200, json!(shared.faults.current())))
}
