//! Connections: accepting them, or not.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::Shared;
use super::http;

/// Opens the listening socket, in the network namespace of the calling thread.
pub(super) fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Accepts connections until the runtime ends.
pub(super) async fn accept_loop(
    shared: Arc<Shared>,
    first: std::net::TcpListener,
    tls: Option<Arc<ServerConfig>>,
) {
    let acceptor = tls.map(TlsAcceptor::from);
    let mut faults = shared.faults.subscribe();
    let mut listener = TcpListener::from_std(first).ok();
    loop {
        if faults.borrow_and_update().set.refuse {
            listener = None;
            // The sender lives in `shared`, so waiting cannot fail.
            let _ = faults.wait_for(|state| !state.set.refuse).await;
        }
        let Some(open) = &listener else {
            // The port may still be on its way out of use.
            listener = TcpListener::bind(shared.address).await.ok();
            if listener.is_none() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            continue;
        };
        tokio::select! {
            accepted = open.accept() => if let Ok((stream, _)) = accepted {
                tokio::spawn(connection(shared.clone(), stream, acceptor.clone()));
            },
            // The sender lives in `shared`, so this cannot fail.
            _ = faults.changed() => {}
        }
    }
}

async fn connection(shared: Arc<Shared>, stream: TcpStream, tls: Option<TlsAcceptor>) {
    let mut faults = shared.faults.subscribe();
    let cut = faults.borrow_and_update().connections_cut;
    let serve = async {
        // A watch event is one small write that somebody waits for.
        let _ = stream.set_nodelay(true);
        match tls {
            Some(acceptor) => {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(shared.clone(), stream).await;
                }
            }
            None => serve(shared.clone(), stream).await,
        }
    };
    tokio::select! {
        () = serve => {}
        // Dropping the connection closes it without the courtesies of HTTP or TLS.
        // One that was accepted while the refusal began is refused too.
        _ = faults.wait_for(|state| state.set.refuse || state.connections_cut != cut) => {}
    }
}

async fn serve(shared: Arc<Shared>, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let service = service_fn(move |request: Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(http::answer(shared, request.map(Body::new)).await) }
    });
    // How a client leaves is no concern of the server's.
    let _ =
        Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
}
