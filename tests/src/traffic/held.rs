//! One connection held open by hand, for tests that act between one exchange and the next.

use std::io::{BufRead, BufReader, Error, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};

use super::Greeting;
use super::server::CLOSE_REQUEST;
use super::socket::connect_within;

/// A TCP connection to a test server that stays open and silent until it is used.
#[derive(Debug)]
pub struct Held {
    stream: BufReader<TcpStream>,
    greeting: Greeting,
}

impl Held {
    /// Connects from the calling thread's network namespace; `timeout` is for this and for
    /// each exchange.
    ///
    /// # Errors
    /// When there is no connection or no greeting.
    pub fn open(target: SocketAddr, timeout: Duration) -> Result<Self> {
        Self::open_watched(target, timeout, |_| {})
    }

    /// The same; `slow` is told the client's own address when there is no answer for long.
    ///
    /// # Errors
    /// When there is no connection or no greeting.
    pub fn open_watched(
        target: SocketAddr,
        timeout: Duration,
        slow: impl FnOnce(SocketAddr),
    ) -> Result<Self> {
        let stream = connect_within(target, timeout, slow)?;
        stream.set_read_timeout(Some(timeout))?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).with_context(|| format!("greeting of {target}"))?;
        let greeting = serde_json::from_str(&line).with_context(|| format!("{line:?}"))?;
        Ok(Self { stream, greeting })
    }

    /// Connects until the connection is one with this server.
    ///
    /// # Errors
    /// When none of 50 connections is.
    pub fn open_to(server: &str, target: SocketAddr, timeout: Duration) -> Result<Self> {
        for _ in 0..50 {
            let held = Self::open(target, timeout)?;
            if held.server() == server {
                return Ok(held);
            }
            held.close()?;
        }
        anyhow::bail!("{target} never led to {server}")
    }

    pub fn server(&self) -> &str {
        &self.greeting.server
    }

    /// Ends the connection by a reset: what tracks it has forgotten it in seconds, where it keeps
    /// one that was closed for minutes.
    ///
    /// # Errors
    /// The socket refuses.
    pub fn reset(self) -> Result<()> {
        let linger = linger { l_onoff: 1, l_linger: 0 };
        Ok(setsockopt(self.stream.get_ref(), sockopt::Linger, &linger)?)
    }

    /// One line there and back.
    ///
    /// # Errors
    /// When the connection is cut or silent.
    pub fn echo(&mut self) -> Result<()> {
        self.stream.get_mut().write_all(b"ping\n")?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        ensure!(line == "ping\n", "echo of ping was {line:?}");
        Ok(())
    }

    /// Ends the connection with a reset: closing a socket that holds unread data sends one
    /// (RFC 2525, section 2.17).
    ///
    /// # Errors
    /// When the connection is cut or silent.
    pub fn abort(mut self) -> Result<()> {
        self.stream.get_mut().write_all(b"ping\n")?;
        self.stream.get_ref().peek(&mut [0; 1])?;
        Ok(())
    }

    /// Lets the server close the connection.
    ///
    /// # Errors
    /// When it ends otherwise: by a reset, or not at all.
    pub fn close(mut self) -> Result<()> {
        self.stream.get_mut().write_all(CLOSE_REQUEST)?;
        let length = self.stream.read(&mut [0; 16])?;
        ensure!(length == 0, Error::other("the server answered the request to close"));
        Ok(())
    }
}
