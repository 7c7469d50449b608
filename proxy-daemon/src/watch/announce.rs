//! What operators shall see beside the object that it is about: Events of the API.

use tokio::sync::mpsc;

use crate::model::{NodeName, ObjectName};

/// The object an announcement is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regarding {
    pub kind: &'static str,
    pub name: ObjectName,
    /// `metadata.uid`, where it is known: `kubectl describe` looks for it.
    pub uid: Option<String>,
}

impl Regarding {
    /// As kube-proxy names objects it has no reference to: by their name in place of the uid.
    #[must_use]
    pub fn by_name(kind: &'static str, name: ObjectName) -> Self {
        let namespaced = !name.namespace.is_empty();
        let uid = if namespaced { name.to_string() } else { name.name.to_string() };
        Self { kind, name, uid: Some(uid) }
    }

    #[must_use]
    pub fn node(name: &NodeName) -> Self {
        Self::by_name("Node", ObjectName::new("", &name.0))
    }
}

/// Something to be told once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    pub regarding: Regarding,
    pub warning: bool,
    /// Why, as one word in CamelCase.
    pub reason: &'static str,
    /// What was done or tried, as one word in CamelCase.
    pub action: &'static str,
    pub note: String,
}

/// Announcements that wait; more are dropped, since the log has them all.
const WAITING: usize = 256;

/// Takes announcements from anywhere without waiting. The default one is mute.
#[derive(Debug, Clone, Default)]
pub struct Announcer(Option<mpsc::Sender<Announcement>>);

/// What was announced, for whoever publishes it.
pub type Announced = mpsc::Receiver<Announcement>;

impl Announcer {
    #[must_use]
    pub fn new() -> (Self, Announced) {
        let (sender, announced) = mpsc::channel(WAITING);
        (Self(Some(sender)), announced)
    }

    pub fn announce(&self, announcement: Announcement) {
        if let Some(sender) = &self.0 {
            let _ = sender.try_send(announcement);
        }
    }
}
