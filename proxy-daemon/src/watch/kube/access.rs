//! One client for all watches, replaced while they run.
//!
//! Certificates and kubeconfigs are rotated under a daemon that runs for months. client-go reads
//! client certificates again; `kube` only what a Pod has (token and authority). So the files are
//! looked at here, and when one changed everybody goes on with a new client, from the version
//! that each has seen.

use std::path::Path;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::Client;
use tokio::sync::{mpsc, watch};
use tower::buffer::error::{Closed, ServiceError};
use tracing::{info, warn};

use super::client::{ClientError, Made, Origin};
use super::kubeconfig::Contents;

/// How often the files are read. Not watched: they may be symbolic links through a directory
/// that is exchanged.
const POLL: Duration = Duration::from_secs(5);
/// Credentials of a plugin are fetched anew so long before they end.
const EARLY: SignedDuration = SignedDuration::from_secs(30);
/// Reports of a client that is no use; more at a time say nothing new.
const REPORTS: usize = 8;

/// What everybody uses now.
#[derive(Clone)]
struct Current {
    /// Tells a client from those after it.
    generation: u64,
    client: Client,
    server: String,
}

/// The way to the API server: hand it to [`super::run`].
pub struct Access {
    pub(super) clients: Clients,
    pub(super) keeper: Keeper,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("origin", &self.keeper.origin).finish_non_exhaustive()
    }
}

impl Access {
    /// As kube-proxy: the kubeconfig's server and credentials, `master` in place of its server;
    /// without either, the Pod's service account.
    ///
    /// # Errors
    /// [`ClientError`]: what was given, or a file that it names, cannot be used.
    pub fn open(kubeconfig: Option<&Path>, master: Option<&str>) -> Result<Self, ClientError> {
        let origin =
            Origin { kubeconfig: kubeconfig.map(Into::into), master: master.map(str::to_owned) };
        let made = origin.client()?;
        Ok(Self::with(origin, made, POLL))
    }

    fn with(origin: Origin, made: Made, poll: Duration) -> Self {
        let Made { client, server, contents } = made;
        let (sender, current) = watch::channel(Current { generation: 0, client, server });
        let (useless, reports) = mpsc::channel(REPORTS);
        let keeper =
            Keeper { origin, contents, sender, reports, poll, due: false, complaint: None };
        Self { clients: Clients { current, useless }, keeper }
    }
}

/// The client as it is at each request.
#[derive(Clone)]
pub(super) struct Clients {
    current: watch::Receiver<Current>,
    useless: mpsc::Sender<u64>,
}

impl Clients {
    /// Asks the API server. A client that will never answer again is reported.
    pub(super) async fn ask<T, F>(
        &mut self,
        ask: impl FnOnce(Client) -> F,
    ) -> Result<T, kube::Error>
    where
        F: Future<Output = Result<T, kube::Error>>,
    {
        let (client, generation) = {
            let current = self.current.borrow_and_update();
            (current.client.clone(), current.generation)
        };
        let answer = ask(client).await;
        if let Err(kube::Error::Service(error)) = &answer
            && (error.is::<Closed>() || error.is::<ServiceError>())
        {
            // When there is no room, enough was said.
            let _ = self.useless.try_send(generation);
        }
        answer
    }

    /// The server's URL.
    pub(super) fn server(&self) -> String {
        self.current.borrow().server.clone()
    }

    /// Until there is another client than at the last question.
    pub(super) async fn replaced(&mut self) {
        if self.current.changed().await.is_err() {
            // Nobody replaces any more: the daemon is ending.
            std::future::pending::<()>().await;
        }
    }

    /// Waits for so long, or until there is another client.
    pub(super) async fn pause(&mut self, duration: Duration) {
        let _ = tokio::time::timeout(duration, self.replaced()).await;
    }
}

/// Replaces the client when it has to be.
pub(super) struct Keeper {
    origin: Origin,
    contents: Contents,
    sender: watch::Sender<Current>,
    reports: mpsc::Receiver<u64>,
    poll: Duration,
    /// The client has to be replaced, and could not be so far.
    due: bool,
    /// Why it could not; said once.
    complaint: Option<String>,
}

impl Keeper {
    /// Never ends.
    pub(super) async fn run(mut self) {
        loop {
            let useless = tokio::select! {
                Some(generation) = self.reports.recv() => {
                    generation == self.sender.borrow().generation
                }
                () = tokio::time::sleep(self.poll) => false,
            };
            if useless {
                warn!("the API client is of no more use: making a new one");
            }
            self.due |= useless || self.expires() || self.changed().await;
            if self.due {
                self.replace().await;
            }
        }
    }

    /// Whether credentials that a plugin gave end soon.
    fn expires(&self) -> bool {
        let until = *self.sender.borrow().client.valid_until();
        until.is_some_and(|until| until.duration_since(Timestamp::now()) < EARLY)
    }

    async fn changed(&mut self) -> bool {
        let mut changed = false;
        for (path, held) in &mut self.contents {
            // A file that is away for a moment is being replaced.
            let Ok(content) = tokio::fs::read(path).await else { continue };
            if *held != content {
                info!(file = %path.display(), "changed: the API client follows");
                *held = content;
                changed = true;
            }
        }
        changed
    }

    /// What cannot be used is said once; until it can, everybody goes on with what there is. A
    /// certificate without its new key is such a case, for a moment.
    async fn replace(&mut self) {
        let origin = self.origin.clone();
        // A plugin may take its time, and what panics there must not end this.
        let made = tokio::task::spawn_blocking(move || origin.client()).await;
        let made = made.map_err(|error| error.to_string());
        match made.and_then(|made| made.map_err(|error| error.to_string())) {
            Ok(Made { client, server, contents }) => {
                self.contents = contents;
                (self.due, self.complaint) = (false, None);
                let generation = self.sender.borrow().generation + 1;
                info!(%server, "a new API client is in use");
                // Those who listen live as long as this.
                self.sender.send_replace(Current { generation, client, server });
            }
            Err(complaint) => {
                if self.complaint.as_ref() != Some(&complaint) {
                    warn!("the API client stays as it is: {complaint}");
                }
                self.complaint = Some(complaint);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use axum::http::{Request, Response};
    use kube::client::Body;

    use super::*;

    const TICK: Duration = Duration::from_millis(5);
    const PATIENCE: Duration = Duration::from_secs(20);

    fn kubeconfig(server: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
             contexts: [{{name: a, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: '{server}'}}}}]\n\
             users: [{{name: u, user: {{token: t}}}}]\n"
        )
    }

    struct Bed {
        file: tempfile::NamedTempFile,
        clients: Clients,
    }

    fn start(client: Option<Client>) -> Bed {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), kubeconfig("http://192.0.2.1:1")).unwrap();
        let origin = Origin { kubeconfig: Some(file.path().into()), master: None };
        let mut made = origin.client().unwrap();
        made.client = client.unwrap_or(made.client);
        let Access { clients, keeper } = Access::with(origin, made, TICK);
        tokio::spawn(keeper.run());
        Bed { file, clients }
    }

    #[tokio::test]
    async fn everybody_follows_a_changed_kubeconfig_and_what_cannot_be_used_changes_nothing() {
        let Bed { file, mut clients } = start(None);
        let mut other = clients.clone();
        for unusable in ["[", "apiVersion: v1\nkind: Config\n"] {
            fs::write(file.path(), unusable).unwrap();
            clients.pause(TICK * 10).await;
            assert_eq!(clients.server(), "http://192.0.2.1:1", "{unusable}");
        }
        fs::write(file.path(), kubeconfig("http://192.0.2.2:2")).unwrap();
        for clients in [&mut clients, &mut other] {
            tokio::time::timeout(PATIENCE, clients.replaced()).await.expect("replaced");
            assert_eq!(clients.server(), "http://192.0.2.2:2");
        }
        // Nothing changed since, so nothing is replaced.
        clients.pause(TICK * 10).await;
        assert_eq!(clients.current.borrow().generation, 1);
    }

    /// What is missing need not be a file that is looked at.
    #[tokio::test]
    async fn what_cannot_be_used_is_tried_until_it_can() {
        let Bed { file, mut clients } = start(None);
        let directory = tempfile::tempdir().unwrap();
        let answer = directory.path().join("answer");
        let plugin = format!(
            "exec: {{apiVersion: client.authentication.k8s.io/v1, command: cat, args: ['{}'], \
             interactiveMode: Never}}",
            answer.display()
        );
        let text = kubeconfig("http://192.0.2.2:2").replace("token: t", &plugin);
        fs::write(file.path(), text).unwrap();
        clients.pause(TICK * 40).await;
        assert_eq!(clients.server(), "http://192.0.2.1:1");
        let token = r#"{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
                        "status": {"token": "t"}}"#;
        fs::write(&answer, token).unwrap();
        tokio::time::timeout(PATIENCE, clients.replaced()).await.expect("replaced");
        assert_eq!(clients.server(), "http://192.0.2.2:2");
    }

    /// Its worker ends with the first request, as it did with a server without a scheme.
    fn broken() -> Client {
        type Answer = std::future::Ready<std::io::Result<Response<Body>>>;
        let service =
            tower::service_fn(|_: Request<Body>| -> Answer { panic!("no scheme, for example") });
        Client::new(service, "default")
    }

    #[tokio::test]
    async fn credentials_of_a_plugin_are_fetched_anew_before_they_end() {
        let until = |seconds| {
            let end = Timestamp::now() + SignedDuration::from_secs(seconds);
            start(Some(broken().with_valid_until(Some(end))))
        };
        let Bed { file: _file, mut clients } = until(10);
        tokio::time::timeout(PATIENCE, clients.replaced()).await.expect("replaced");
        let Bed { file: _file, mut clients } = until(3600);
        clients.pause(TICK * 10).await;
        assert_eq!(clients.current.borrow().generation, 0, "they are good for long");
    }

    #[tokio::test]
    async fn a_client_whose_worker_ended_is_replaced_once() {
        let Bed { file: _file, mut clients } = start(Some(broken()));
        let mut others = vec![clients.clone(), clients.clone()];
        others.push(clients.clone());
        for clients in &mut others {
            let asked = clients.ask(|client| async move { client.apiserver_version().await });
            asked.await.expect_err("no answer");
        }
        tokio::time::timeout(PATIENCE, clients.replaced()).await.expect("replaced");
        clients.pause(TICK * 10).await;
        assert_eq!(clients.current.borrow().generation, 1);
        assert_eq!(clients.server(), "http://192.0.2.1:1");
    }
}
