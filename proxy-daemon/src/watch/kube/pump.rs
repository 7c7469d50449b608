//! List, then watch from the list's version, for ever.
//!
//! `kube::runtime::watcher` does this as well, but it hides bookmarks and the start of
//! a watch (so that nobody could tell that the source is well on a quiet cluster), goes
//! on after a line it could not decode as if nothing had been missed, and retries for
//! ever from a version that the server answered with HTTP 410.

use std::pin::pin;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use kube::api::{ListParams, ObjectList, WatchEvent, WatchParams};
use kube::core::Request;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::access::Clients;
use super::failure::{Failure, Halt};
use super::lenient::Lenient;
use crate::watch::intake::{Intake, Kind, Listing, Outlet};
use crate::watch::outage::{Backoff, Outage, random};
use crate::watch::stats::Cause;
use crate::watch::wire::Object as _;

/// client-go's page size: bounds the memory of a list on both sides.
const PAGE: u32 = 500;
/// Time for one page, or for a watch to begin. Doubled after each page that took
/// longer, so that a slow link does not list for ever.
const ANSWER: Duration = Duration::from_secs(60);
const LONGEST_ANSWER: Duration = Duration::from_secs(960);
/// Bookmarks come about every minute. After this long without a word the watch is
/// resumed, which costs little if the server merely sends none.
const SILENCE: Duration = Duration::from_secs(150);
/// A watch that stood this long after trouble is well.
const SETTLE: Duration = Duration::from_secs(1);
/// Versions can become useless without a 410, as after a restore of the server's
/// database from a backup: after so many failures in a row the list is made anew.
const GIVE_UP: u32 = 5;

/// How often an API server without a kind is asked for it again: it may be upgraded.
const PROBE: Duration = Duration::from_secs(300);

/// What the server shall select.
#[derive(Debug, Clone, Default)]
pub(super) struct Selectors {
    labels: Option<String>,
    fields: Option<String>,
}

impl Selectors {
    pub(super) fn labels(labels: &str) -> Self {
        Self { labels: Some(labels.to_owned()), fields: None }
    }

    pub(super) const fn fields(fields: String) -> Self {
        Self { labels: None, fields: Some(fields) }
    }
}

pub(super) struct Pump<K: Kind> {
    clients: Clients,
    request: Request,
    selectors: Selectors,
    intake: Intake<K>,
    outage: Outage,
    backoff: Backoff,
    /// Time allowed for one page.
    answer: Duration,
    /// Off for one list after the server forgot the version that pages go on from:
    /// the list is slower to make than versions live.
    paged: bool,
    /// Watches that failed since anything was heard.
    failed_watches: u32,
}

type Item<K> = Lenient<<K as Kind>::Object>;

impl<K: Kind> Pump<K> {
    pub(super) fn new(clients: Clients, selectors: Selectors, outlet: Outlet) -> Self {
        Self {
            clients,
            request: Request::new(K::Object::PATH),
            selectors,
            intake: Intake::new(outlet),
            outage: Outage::default(),
            backoff: Backoff::default(),
            answer: ANSWER,
            paged: true,
            failed_watches: 0,
        }
    }

    /// Returns once the receiver of events is gone.
    pub(super) async fn run(mut self) {
        let mut version: Option<String> = None;
        while !self.intake.is_closed() {
            let step = match &mut version {
                None => self.list().await.map(|listed| version = Some(listed)),
                Some(version) => self.watch(version).await,
            };
            match step {
                Ok(()) => {}
                Err(Halt::Closed) => return,
                Err(Halt::Failed(failure)) => {
                    let doing = if version.is_some() { "watch" } else { "list" };
                    self.failed_watches += u32::from(version.is_some());
                    if failure.must_relist() || self.failed_watches >= GIVE_UP {
                        version = None;
                    }
                    self.retry_later(doing, &failure).await;
                }
            }
        }
    }

    async fn retry_later(&mut self, doing: &str, failure: &Failure) {
        if K::OPTIONAL && failure.cause == Cause::Absent {
            return self.probe_later().await;
        }
        self.intake.stats().count_failure(failure.cause);
        self.intake.stats().disconnected();
        let delay = self.backoff.next(Instant::now(), random());
        let kind = K::KIND.label();
        let message = &failure.message;
        if failure.cause == Cause::Expired {
            // Ordinary after a while without connection: no trouble to report.
            info!(%kind, "{doing}: {message}; listing anew");
        } else if let Some(line) = self.outage.failed(Instant::now(), failure.cause, message) {
            warn!(
                %kind,
                server = %self.clients.server(),
                cause = failure.cause.label(),
                "cannot {doing}: {line}; what is programmed stays, next attempt in {delay:.1?}"
            );
        } else {
            debug!(%kind, "cannot {doing}: {message}; next attempt in {delay:.1?}");
        }
        self.clients.pause(delay).await;
    }

    /// No trouble: what it has told before stays, and it may never have told anything.
    async fn probe_later(&mut self) {
        if !self.intake.stats().is_absent() {
            let kind = K::KIND.label();
            info!(%kind, "the API server has no such kind, which is fine; asking every {PROBE:?}");
        }
        self.intake.stats().absent();
        // Between a half and the whole, so that nodes do not ask in step.
        let jitter = Duration::from_millis(random() % 150_000);
        self.clients.pause(PROBE - jitter).await;
    }

    fn well(&mut self) {
        self.intake.stats().contact();
        self.failed_watches = 0;
        if let Some(lasted) = self.outage.well(Instant::now()) {
            info!(kind = K::KIND.label(), "well again after {lasted:.1?}");
        }
    }

    /// One whole list; the version to watch from.
    async fn list(&mut self) -> Result<String, Halt> {
        let mut params = ListParams {
            label_selector: self.selectors.labels.clone(),
            field_selector: self.selectors.fields.clone(),
            limit: self.paged.then_some(PAGE),
            ..ListParams::default()
        };
        let mut listing = Listing::default();
        loop {
            let page = match timeout(self.answer, self.page(&params)).await {
                Ok(page) => page.map_err(|error| self.list_failed(error))?,
                Err(_) => {
                    let message = format!("no whole answer within {:?}", self.answer);
                    self.answer = (self.answer * 2).min(LONGEST_ANSWER);
                    return Err(Failure::new(Cause::NoAnswer, message).into());
                }
            };
            self.intake.stats().contact();
            for item in &page.items {
                self.intake.list(&item.name(), item.object(), &mut listing);
            }
            let given = |text: Option<String>| text.filter(|text| !text.is_empty());
            params.continue_token = given(page.metadata.continue_);
            if params.continue_token.is_none() {
                let version = given(page.metadata.resource_version).ok_or_else(|| {
                    Failure::new(Cause::Rubbish, "the list has no metadata.resourceVersion")
                })?;
                self.intake.listed(listing).await?;
                self.paged = true;
                self.answer = ANSWER;
                return Ok(version);
            }
        }
    }

    async fn page(&mut self, params: &ListParams) -> Result<ObjectList<Item<K>>, kube::Error> {
        let request = self.request.list(params).map_err(kube::Error::BuildRequest)?;
        self.clients.ask(|client| async move { client.request(request).await }).await
    }

    async fn events(
        &mut self,
        params: &WatchParams,
        version: &str,
    ) -> Result<impl Stream<Item = Result<WatchEvent<Item<K>>, kube::Error>> + use<K>, kube::Error>
    {
        let request = self.request.watch(params, version).map_err(kube::Error::BuildRequest)?;
        self.clients
            .ask(|client| async move { client.request_events::<Item<K>>(request).await })
            .await
    }

    fn list_failed(&mut self, error: kube::Error) -> Failure {
        let failure = Failure::from(error);
        if failure.cause == Cause::Expired {
            self.paged = false;
        }
        failure
    }

    /// One watch, until it ends; `version` follows what was seen.
    async fn watch(&mut self, version: &mut String) -> Result<(), Halt> {
        let params = WatchParams {
            label_selector: self.selectors.labels.clone(),
            field_selector: self.selectors.fields.clone(),
            // Spread over a minute, so that watches begun together do not end together.
            timeout: Some(230 + u32::try_from(random() % 60).unwrap_or_default()),
            ..WatchParams::default()
        };
        let begun = Instant::now();
        let stream = timeout(ANSWER, self.events(&params, version))
            .await
            .map_err(|_| Failure::new(Cause::NoAnswer, format!("no answer within {ANSWER:?}")))?
            .map_err(Failure::from)?;
        let mut stream = pin!(stream);
        self.intake.stats().connected();
        let mut heard = false;
        loop {
            let patience = if self.outage.is_out() { SETTLE } else { SILENCE };
            let next = tokio::select! {
                next = timeout(patience, stream.next()) => next,
                // Other credentials or another server: go on there from what was seen.
                () = self.clients.replaced() => return Ok(()),
            };
            match next {
                Err(_) if self.outage.is_out() => self.well(),
                Err(_) => return Ok(()),
                Ok(Some(event)) => {
                    self.event(event.map_err(Failure::from)?, version).await?;
                    heard = true;
                }
                Ok(None) if heard || begun.elapsed() >= SETTLE => return Ok(()),
                Ok(None) => {
                    let message = "the watch ended as soon as it began";
                    return Err(Failure::new(Cause::Unreachable, message).into());
                }
            }
        }
    }

    async fn event(
        &mut self,
        event: WatchEvent<Item<K>>,
        version: &mut String,
    ) -> Result<(), Halt> {
        let seen = match event {
            WatchEvent::Added(item) | WatchEvent::Modified(item) => {
                self.well();
                self.intake.applied(&item.name(), item.object()).await?;
                item.version()
            }
            WatchEvent::Deleted(item) => {
                self.well();
                self.intake.gone(&item.name()).await?;
                item.version()
            }
            WatchEvent::Bookmark(bookmark) => {
                self.well();
                Some(bookmark.metadata.resource_version).filter(|seen| !seen.is_empty())
            }
            WatchEvent::Error(status) => return Err(Failure::from(&*status).into()),
        };
        *version = seen.ok_or_else(|| {
            Failure::new(Cause::Rubbish, "an event has no metadata.resourceVersion")
        })?;
        Ok(())
    }
}
