//! Ways in which the server misbehaves, switched while it runs.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::store::Store;

/// Faults that last until they are switched off. The same names, in camel case, are the
/// JSON of `/testing/faults`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct FaultSet {
    /// Nobody listens: connections are refused, and those that are open are cut.
    pub refuse: bool,
    /// Every request is answered 401.
    pub unauthorized: bool,
    /// Every request is answered 500.
    pub internal_errors: bool,
    /// Every new watch from a version is answered with the 410 event.
    pub expired_watches: bool,
    /// Bodies and watch lines are not JSON.
    pub rubbish: bool,
    /// Requests get no answer and watches deliver nothing; connections stay open.
    pub stall: bool,
    /// Bodies come at this speed (bytes per second).
    pub bytes_per_second: Option<u32>,
    /// Connections are cut after so many bytes of a list.
    pub cut_lists_after: Option<usize>,
    /// Bookmarks come so much later (milliseconds), the one that ends a watch-list too.
    pub delay_bookmarks_ms: u64,
}

/// The faults, and the count of every cut asked for: whoever sees a count move knows
/// that it is meant, even when it looks late.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    pub(super) set: FaultSet,
    pub(super) connections_cut: u64,
    pub(super) watches_cut: u64,
    pub(super) watches_expired: u64,
}

/// Handle to a server's faults.
#[derive(Debug, Clone)]
pub struct Faults {
    sender: Arc<watch::Sender<State>>,
    store: Arc<Store>,
}

impl Faults {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { sender: Arc::new(watch::Sender::new(State::default())), store }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<State> {
        self.sender.subscribe()
    }

    /// The faults that are on.
    pub fn current(&self) -> FaultSet {
        self.sender.borrow().set.clone()
    }

    /// Switches faults: `faults.set(|f| f.stall = true)`.
    pub fn set(&self, change: impl FnOnce(&mut FaultSet)) {
        self.sender.send_modify(|state| {
            let refused = state.set.refuse;
            change(&mut state.set);
            if state.set.refuse && !refused {
                state.connections_cut += 1;
            }
        });
    }

    /// Switches all faults off.
    pub fn clear(&self) {
        self.set(|set| *set = FaultSet::default());
    }

    /// Cuts every connection.
    pub fn disconnect_all(&self) {
        self.sender.send_modify(|state| state.connections_cut += 1);
    }

    /// Ends every watch in the middle: the stream breaks off without its end.
    pub fn disconnect_watches(&self) {
        self.sender.send_modify(|state| state.watches_cut += 1);
    }

    /// Compacts, and ends every watch with the 410 event: clients must list anew.
    pub fn expire_watches(&self) {
        self.store.compact();
        self.sender.send_modify(|state| state.watches_expired += 1);
    }
}
