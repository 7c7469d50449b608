//! Publishing announcements as `events.k8s.io/v1` Events, as kube-proxy does.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;
use tracing::{debug, warn};

use super::access::Clients;
use crate::model::NodeName;
use crate::watch::announce::{Announced, Announcement};

const CONTROLLER: &str = "node-dataplane";
/// The API refuses longer notes (`events.k8s.io/v1`, Event.note).
const LONGEST_NOTE: usize = 1024;
/// Of an Event that concerns no namespace.
const DEFAULT_NAMESPACE: &str = "default";
/// For one attempt; the next one waits that long.
const ANSWER: Duration = Duration::from_secs(10);

/// Events in a row, and the time that each takes to be made up for: a thousand bad objects
/// on each of a thousand nodes must not be a million writes.
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_secs(12);

/// Publishes until nobody announces any more. What cannot be published is in the log, and
/// not tried again.
pub(super) async fn publish(mut clients: Clients, node: NodeName, mut announced: Announced) {
    let mut limit = Limit::new(Instant::now());
    let mut failing = false;
    while let Some(announcement) = announced.recv().await {
        if !limit.allows(Instant::now()) {
            debug!(?announcement, "one Event too many: only logged");
            continue;
        }
        let event = event(&announcement, &node, Timestamp::now());
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let asked = clients.ask(|client| async move {
            let api: Api<Event> = Api::namespaced(client, &namespace);
            api.create(&PostParams::default(), &event).await
        });
        let outcome = tokio::time::timeout(ANSWER, asked);
        let error = match outcome.await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer in {ANSWER:?}")),
        };
        match &error {
            Some(error) if !failing => warn!(%error, "Events cannot be written; they are logged"),
            _ => {}
        }
        failing = error.is_some();
    }
    // Nobody announces: the other parts of the source go on.
    std::future::pending::<()>().await;
}

fn event(announcement: &Announcement, node: &NodeName, now: Timestamp) -> Event {
    let Announcement { regarding, warning, reason, action, note } = announcement;
    let namespace = Some(regarding.name.namespace.to_string()).filter(|name| !name.is_empty());
    let mut note = note.clone();
    if note.len() > LONGEST_NOTE {
        note.truncate(note.floor_char_boundary(LONGEST_NOTE - 3));
        note.push_str("...");
    }
    Event {
        metadata: ObjectMeta {
            // As client-go names them: unique for each object by the time.
            name: Some(format!("{}.{:x}", regarding.name.name, now.as_nanosecond())),
            namespace: Some(namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned())),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(format!("{CONTROLLER}-{node}")),
        type_: Some(if *warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some((*reason).to_owned()),
        action: Some((*action).to_owned()),
        note: Some(note),
        regarding: Some(ObjectReference {
            api_version: Some(api_version(regarding.kind).to_owned()),
            kind: Some(regarding.kind.to_owned()),
            name: Some(regarding.name.name.to_string()),
            namespace,
            uid: regarding.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Event::default()
    }
}

fn api_version(kind: &str) -> &'static str {
    match kind {
        "EndpointSlice" => "discovery.k8s.io/v1",
        "ServiceCIDR" => "networking.k8s.io/v1",
        _ => "v1",
    }
}

/// A token bucket.
#[derive(Debug)]
struct Limit {
    tokens: u32,
    /// Since when the next token grows.
    since: Instant,
}

impl Limit {
    const fn new(now: Instant) -> Self {
        Self { tokens: BURST, since: now }
    }

    fn allows(&mut self, now: Instant) -> bool {
        while self.tokens < BURST && now.saturating_duration_since(self.since) >= REFILL {
            self.tokens += 1;
            self.since += REFILL;
        }
        if self.tokens == BURST {
            self.since = now;
        }
        let allowed = self.tokens > 0;
        self.tokens -= u32::from(allowed);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectName;
    use crate::watch::announce::Regarding;

    fn announcement(kind: &'static str, name: ObjectName, note: &str) -> Announcement {
        Announcement {
            regarding: Regarding::by_name(kind, name),
            warning: true,
            reason: "Rejected",
            action: "Convert",
            note: note.to_owned(),
        }
    }

    #[test]
    fn an_event_stands_beside_what_it_is_about() {
        let node = NodeName::new("node-a");
        let slice = announcement("EndpointSlice", ObjectName::new("shop", "web-1"), "port 70000");
        let made = event(&slice, &node, Timestamp::UNIX_EPOCH);
        assert_eq!(made.metadata.namespace.as_deref(), Some("shop"));
        assert_eq!(made.metadata.name.as_deref(), Some("web-1.0"));
        assert_eq!(
            (made.type_.as_deref(), made.reason.as_deref()),
            (Some("Warning"), Some("Rejected"))
        );
        let regarding = made.regarding.unwrap();
        assert_eq!(regarding.api_version.as_deref(), Some("discovery.k8s.io/v1"));
        assert_eq!(regarding.uid.as_deref(), Some("shop/web-1"));

        let about_node = announcement("Node", ObjectName::new("", "node-a"), "");
        let made = event(&about_node, &node, Timestamp::UNIX_EPOCH);
        assert_eq!(made.metadata.namespace.as_deref(), Some("default"));
        assert_eq!(made.regarding.unwrap().namespace, None);
    }

    #[test]
    fn a_note_is_as_long_as_the_api_takes() {
        let long = "ä".repeat(2000);
        let about = announcement("Service", ObjectName::new("shop", "web"), &long);
        let note = event(&about, &NodeName::new("n"), Timestamp::UNIX_EPOCH).note.unwrap();
        assert!(note.len() <= LONGEST_NOTE && note.ends_with("..."), "{}", note.len());
    }

    #[test]
    fn a_burst_is_cut_and_made_up_for_over_time() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        let allowed = |limit: &mut Limit, at| (0..100).filter(|_| limit.allows(at)).count();
        assert_eq!(allowed(&mut limit, start), 25);
        assert_eq!(allowed(&mut limit, start + Duration::from_secs(11)), 0);
        assert_eq!(allowed(&mut limit, start + Duration::from_secs(25)), 2);
        assert_eq!(allowed(&mut limit, start + Duration::from_secs(36)), 1);
        assert_eq!(allowed(&mut limit, start + Duration::from_secs(100_000)), 25);
    }
}
