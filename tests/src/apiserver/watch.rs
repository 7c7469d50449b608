//! Watches: one JSON event per line for as long as the client stays.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use tokio::time::Instant;

use super::Shared;
use super::body::{Closed, Out};
use super::list::{At, Query};
use super::object::{self, Object};
use super::resource::Resource;
use super::selector::Selector;
use super::status::Status;
use super::store::Change;

/// Before its deadline a watch gets a last bookmark by so much, so that the client can
/// go on from there (`bookmark` timer of the API server's watch cache).
const LAST_BOOKMARK_BEFORE_END: Duration = Duration::from_secs(2);

/// Where a watch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// After this version.
    Version(u64),
    /// With an `ADDED` for everything there is.
    Everything {
        /// `sendInitialEvents`: a bookmark says where those end.
        marked_end: bool,
    },
}

/// A watch as it was asked for.
#[derive(Debug)]
pub struct WatchRequest {
    /// Of which resource.
    pub resource: Resource,
    /// In which namespace; `None` for all.
    pub namespace: Option<String>,
    /// Which objects.
    pub selector: Selector,
    /// From where.
    pub from: From,
    /// Whether bookmarks are wanted.
    pub bookmarks: bool,
    /// How long the watch lives.
    pub timeout: Duration,
}

struct Watch {
    shared: Arc<Shared>,
    request: WatchRequest,
    out: Out,
    /// Everything up to this version was sent.
    version: u64,
    /// `State::watches_expired` when the watch began.
    expired: u64,
}

/// Serves a watch in a task of its own; the body ends with it.
pub(super) fn start(shared: &Arc<Shared>, request: WatchRequest) -> Body {
    let (out, body) = Out::new(shared.faults.subscribe());
    let out = out.of_watch();
    let expired = out.faults.borrow().watches_expired;
    let open = shared.log.watch_opened(request.resource);
    let mut watch = Watch { shared: shared.clone(), request, out, version: 0, expired };
    tokio::spawn(async move {
        // An end that the client or a fault brought about needs no further answer.
        let _: Result<(), Closed> = watch.run().await;
        drop(open);
    });
    body
}

impl Watch {
    async fn run(&mut self) -> Result<(), Closed> {
        let mut changed = self.shared.store.subscribe();
        let mut faults = self.out.faults.clone();
        let end = Instant::now() + self.request.timeout;
        let expire_all = self.out.faults.borrow().set.expired_watches;
        match self.request.from {
            From::Version(version) if expire_all => {
                let newest = self.shared.store.version();
                return self.fail(&Status::too_old(version, newest)).await;
            }
            From::Version(version) => self.version = version,
            From::Everything { marked_end } => self.everything(marked_end).await?,
        }
        let mut bookmark = self.next_bookmark(end);
        loop {
            changed.borrow_and_update();
            self.changes().await?;
            tokio::select! {
                got = changed.changed() => got.map_err(|_| Closed)?,
                () = self.out.closed() => return Err(Closed),
                () = tokio::time::sleep_until(end) => return Ok(()),
                () = tokio::time::sleep_until(bookmark), if self.request.bookmarks => {
                    self.bookmark(false).await?;
                    bookmark = self.next_bookmark(end);
                }
                got = faults.changed() => got.map_err(|_| Closed)?,
            }
            self.out.check_cut().await?;
            if self.out.faults.borrow().watches_expired != self.expired {
                let newest = self.shared.store.version();
                return self.fail(&Status::too_old(self.version, newest)).await;
            }
        }
    }

    fn next_bookmark(&self, end: Instant) -> Instant {
        let regular = Instant::now() + self.shared.options.bookmark_interval + self.delay();
        match end.checked_sub(LAST_BOOKMARK_BEFORE_END) {
            Some(last) if last > Instant::now() => regular.min(last),
            _ => regular,
        }
    }

    /// The injected lateness of bookmarks.
    fn delay(&self) -> Duration {
        Duration::from_millis(self.out.faults.borrow().set.delay_bookmarks_ms)
    }

    async fn everything(&mut self, marked_end: bool) -> Result<(), Closed> {
        let query = Query {
            resource: self.request.resource,
            namespace: self.request.namespace.as_deref(),
            selector: &self.request.selector,
            limit: 0,
            at: At::Newest,
        };
        let page = match self.shared.store.list(&query) {
            Ok(page) => page,
            Err(status) => return self.fail(&status).await,
        };
        for object in page.items {
            let body = object.alone(self.request.resource);
            self.event("ADDED", &body).await?;
        }
        self.version = page.version;
        if marked_end && self.request.bookmarks {
            tokio::time::sleep(self.delay()).await;
            self.bookmark(true).await?;
        }
        Ok(())
    }

    /// Sends what changed since the last time.
    async fn changes(&mut self) -> Result<(), Closed> {
        let resource = self.request.resource;
        let (changes, newest) = match self.shared.store.changes_since(resource, self.version) {
            Ok(found) => found,
            Err(status) => return self.fail(&status).await,
        };
        for change in changes {
            if let Some((kind, body)) = self.seen(&change) {
                self.event(kind, &body).await?;
            }
        }
        self.version = self.version.max(newest);
        Ok(())
    }

    /// What a change is to this watch. An object that begins to be selected is `ADDED`
    /// and one that ceases to be is `DELETED`, with its last selected state and the
    /// version of the change (`cacheWatcher.convertToWatchEvent`).
    fn seen(&self, change: &Change) -> Option<(&'static str, Bytes)> {
        let resource = self.request.resource;
        let selected = |object: &Option<Arc<Object>>| {
            object.clone().filter(|object| {
                let here =
                    self.request.namespace.as_deref().is_none_or(|n| n == &*object.namespace);
                here && self.request.selector.matches(object)
            })
        };
        match (selected(&change.before), selected(&change.after)) {
            (None, None) => None,
            (None, Some(after)) => Some(("ADDED", after.alone(resource))),
            (Some(_), Some(after)) => Some(("MODIFIED", after.alone(resource))),
            (Some(before), None) => Some(("DELETED", before.alone_at(resource, change.version))),
        }
    }

    async fn bookmark(&mut self, initial_events_end: bool) -> Result<(), Closed> {
        let object = object::bookmark(self.request.resource, self.version, initial_events_end);
        self.event("BOOKMARK", object.as_bytes()).await
    }

    /// Sends the failure as an event, and ends the watch.
    async fn fail(&mut self, status: &Status) -> Result<(), Closed> {
        let object = status.to_value().to_string();
        self.event("ERROR", object.as_bytes()).await?;
        Err(Closed)
    }

    async fn event(&mut self, kind: &str, object: &[u8]) -> Result<(), Closed> {
        if self.out.faults.borrow().set.rubbish {
            return self.out.send(Bytes::from_static(b"<html>{\"type\":\n")).await;
        }
        let mut line = Vec::with_capacity(object.len() + 40);
        line.extend_from_slice(format!(r#"{{"type":"{kind}","object":"#).as_bytes());
        line.extend_from_slice(object);
        line.extend_from_slice(b"}\n");
        self.out.send(Bytes::from(line)).await
    }
}
