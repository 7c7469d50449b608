//! The server: greets, echoes, answers datagrams.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;

use super::{Greeting, Protocol, runtime, socket};

/// A connection whose text begins with this is closed by the server, so that TIME_WAIT
/// stays there and the client's port is free for its next connection.
pub(super) const CLOSE_REQUEST: &[u8] = b"Q\n";
/// The longest text echoed at once.
const BUFFER: usize = 4096;

/// A socket to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    pub protocol: Protocol,
    /// Port 0 picks one.
    pub address: SocketAddr,
}

/// A running server. Dropping it closes its sockets and every connection.
#[derive(Debug)]
pub struct Server {
    addresses: Vec<SocketAddr>,
    served: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Binds in the calling thread's network namespace and serves on a thread of its own.
    pub fn start(name: &str, listen: &[Listen]) -> Result<Self> {
        let mut sockets = Vec::new();
        let mut addresses = Vec::new();
        for &Listen { protocol, address } in listen {
            let fd = socket::listener(protocol, address)
                .with_context(|| format!("{name}: listen on {protocol} {address}"))?;
            let (bound, fd) = socket::local_address(protocol, fd)?;
            addresses.push(bound);
            sockets.push((protocol, fd));
        }
        let runtime = runtime().context("runtime of a test server")?;
        let (stop, stopped) = oneshot::channel();
        let served = Arc::new(AtomicU64::new(0));
        let shared = Arc::new(Shared { name: name.to_owned(), served: Arc::clone(&served) });
        let thread = thread::Builder::new().name(format!("serve {name}")).spawn(move || {
            runtime.block_on(async {
                for (protocol, fd) in sockets {
                    tokio::spawn(serve(protocol, fd, Arc::clone(&shared)));
                }
                // An error means that the handle is gone, which ends the server too.
                let _ = stopped.await;
            });
            runtime.shutdown_background();
        })?;
        Ok(Self { addresses, served, stop: Some(stop), thread: Some(thread) })
    }

    /// What it is bound to, in the order asked for.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Connections and datagrams so far.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; the test sees the missing answers.
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
struct Shared {
    name: String,
    served: Arc<AtomicU64>,
}

impl Shared {
    fn greeting(&self, peer: SocketAddr, local: SocketAddr, echo: String) -> Vec<u8> {
        self.served.fetch_add(1, Ordering::Relaxed);
        let greeting = Greeting { server: self.name.clone(), peer, local, echo };
        let mut line = serde_json::to_vec(&greeting).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

async fn serve(protocol: Protocol, fd: OwnedFd, shared: Arc<Shared>) {
    let name = shared.name.clone();
    let ended = if protocol == Protocol::Udp {
        match socket::into_udp(fd) {
            Ok(socket) => answer_datagrams(socket, &shared).await,
            Err(error) => Err(error),
        }
    } else {
        match socket::into_listener(fd) {
            Ok(listener) => accept(listener, shared).await,
            Err(error) => Err(error),
        }
    };
    if let Err(error) = ended {
        tracing::warn!(server = %name, %protocol, %error, "test server ended");
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) -> io::Result<()> {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    // The client reports what became of its connection.
                    let _ = converse(stream, peer, &shared).await;
                });
            }
            // The connection was reset while it waited to be accepted (accept(2)).
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

async fn converse(mut stream: TcpStream, peer: SocketAddr, shared: &Shared) -> io::Result<()> {
    let greeting = shared.greeting(peer, stream.local_addr()?, String::new());
    stream.write_all(&greeting).await?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = stream.read(&mut buffer).await?;
        let text = &buffer[..length];
        if text.is_empty() || text.starts_with(CLOSE_REQUEST) {
            return Ok(());
        }
        stream.write_all(text).await?;
    }
}

async fn answer_datagrams(socket: UdpSocket, shared: &Shared) -> io::Result<()> {
    let local = socket.local_addr()?;
    let mut buffer = vec![0; BUFFER];
    loop {
        // Errors here are ICMP messages about earlier answers; the socket goes on.
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let echo = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let _ = socket.send_to(&shared.greeting(peer, local, echo), peer).await;
    }
}
