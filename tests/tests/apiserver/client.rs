//! A small HTTP client that hides nothing: status, headers, and bodies as they come.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream, to_bytes};
use axum::http::{HeaderMap, Method, Request, Response, Version, header};
use futures::StreamExt;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proxy_tests::apiserver::ApiServer;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Nothing in these tests takes longer unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Client {
    pub address: std::net::SocketAddr,
    pub token: Option<String>,
    pub ca_pem: Option<String>,
    pub http2: bool,
}

pub struct Reply {
    pub code: u16,
    pub version: Version,
    pub headers: HeaderMap,
    pub text: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {:?}", self.text))
    }
}

impl Client {
    pub fn new(server: &ApiServer) -> Self {
        Self {
            address: server.address(),
            token: server.token().map(str::to_owned),
            ca_pem: server.ca_pem().map(str::to_owned),
            http2: false,
        }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, "", &Value::Null).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(Method::POST, path, "application/json", body).await
    }

    pub async fn patch(&self, path: &str, how: &str, body: &Value) -> Reply {
        self.send(Method::PATCH, path, &format!("application/{how}"), body).await
    }

    pub async fn send(&self, method: Method, path: &str, mime: &str, body: &Value) -> Reply {
        self.try_send(method, path, mime, body).await.unwrap()
    }

    pub async fn try_get(&self, path: &str) -> anyhow::Result<Reply> {
        self.try_send(Method::GET, path, "", &Value::Null).await
    }

    pub async fn try_send(
        &self,
        method: Method,
        path: &str,
        mime: &str,
        body: &Value,
    ) -> anyhow::Result<Reply> {
        let response =
            tokio::time::timeout(PATIENCE, self.open(method, path, mime, body)).await??;
        let (parts, body) = response.into_parts();
        let bytes = tokio::time::timeout(PATIENCE, to_bytes(body, usize::MAX)).await??;
        Ok(Reply {
            code: parts.status.as_u16(),
            version: parts.version,
            headers: parts.headers,
            text: String::from_utf8(bytes.to_vec())?,
        })
    }

    /// A watch, by its path and query.
    pub async fn watch(&self, path: &str) -> Events {
        let response = self.open(Method::GET, path, "", &Value::Null).await.unwrap();
        assert_eq!(response.status(), 200, "watch {path}");
        let headers = response.headers().clone();
        Events { headers, stream: response.into_body().into_data_stream(), buffer: Vec::new() }
    }

    async fn open(
        &self,
        method: Method,
        path: &str,
        mime: &str,
        body: &Value,
    ) -> anyhow::Result<Response<Body>> {
        let stream = TcpStream::connect(self.address).await?;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header(header::HOST, self.address.to_string());
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if !mime.is_empty() {
            request = request.header(header::CONTENT_TYPE, mime);
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        let request = request.body(body)?;
        match &self.ca_pem {
            None => self.exchange(stream, request).await,
            Some(pem) => {
                let connector = TlsConnector::from(Arc::new(tls(pem, self.http2)?));
                let name = ServerName::from(self.address.ip());
                self.exchange(connector.connect(name, stream).await?, request).await
            }
        }
    }

    async fn exchange(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        request: Request<Body>,
    ) -> anyhow::Result<Response<Body>> {
        let io = TokioIo::new(stream);
        let response = if self.http2 {
            let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            sender.send_request(request).await?
        } else {
            let (mut sender, connection) = http1::handshake(io).await?;
            tokio::spawn(connection);
            sender.send_request(request).await?
        };
        Ok(response.map(Body::new))
    }
}

fn tls(ca_pem: &str, http2: bool) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
    Ok(config)
}

/// The lines of a watch.
pub struct Events {
    pub headers: HeaderMap,
    stream: BodyDataStream,
    buffer: Vec<u8>,
}

/// How a watch went on.
#[derive(Debug, PartialEq)]
pub enum Next {
    Event(Value),
    /// A line that is not JSON.
    Rubbish(String),
    /// The stream ended as a stream should.
    End,
    /// The stream broke off.
    Broken,
    /// Nothing came in the time given.
    Silence,
}

impl Events {
    /// The next event, which must come.
    pub async fn event(&mut self) -> Value {
        match self.next(PATIENCE).await {
            Next::Event(event) => event,
            other => panic!("expected an event, got {other:?}"),
        }
    }

    /// The next event as `TYPE name`.
    pub async fn brief(&mut self) -> String {
        let event = self.event().await;
        let name = event["object"]["metadata"]["name"].as_str().unwrap_or("-");
        format!("{} {name}", event["type"].as_str().unwrap_or("?"))
    }

    pub async fn next(&mut self, patience: Duration) -> Next {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return match serde_json::from_slice(&line) {
                    Ok(event) => Next::Event(event),
                    Err(_) => Next::Rubbish(String::from_utf8_lossy(&line).into_owned()),
                };
            }
            match tokio::time::timeout(patience, self.stream.next()).await {
                Err(_) => return Next::Silence,
                Ok(None) => return Next::End,
                Ok(Some(Err(_))) => return Next::Broken,
                Ok(Some(Ok(bytes))) => self.buffer.extend_from_slice(&bytes),
            }
        }
    }
}
