//! Response bodies: whole where they are small, streamed where not, and streamed badly
//! where a fault says so.

use std::io;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::stream;
use tokio::sync::{mpsc, watch};

use super::faults::State;

/// Go's HTTP server knows the length of what fits its write buffer and sends everything
/// else chunked; the recorded answers show it.
const WITH_LENGTH: usize = 4096;
/// Pacing sends this often.
const TICK: Duration = Duration::from_millis(20);

/// The client is gone, or a fault cut it off: stop producing.
#[derive(Debug)]
pub(super) struct Closed;

/// The sending half of a streamed body.
#[derive(Debug)]
pub(super) struct Out {
    sender: mpsc::Sender<io::Result<Bytes>>,
    pub(super) faults: watch::Receiver<State>,
    /// Bytes after which a fault cuts the body off.
    cut_after: Option<usize>,
    /// `State::watches_cut` when the body began; a watch ends when it moves.
    watches_cut: Option<u64>,
}

impl Out {
    /// A streamed body and its sending half.
    pub(super) fn new(faults: watch::Receiver<State>) -> (Self, Body) {
        let (sender, mut receiver) = mpsc::channel(16);
        let body = Body::from_stream(stream::poll_fn(move |cx| receiver.poll_recv(cx)));
        (Self { sender, faults, cut_after: None, watches_cut: None }, body)
    }

    /// Cuts the body off after so many bytes.
    pub(super) fn cut_after(mut self, bytes: Option<usize>) -> Self {
        self.cut_after = bytes;
        self
    }

    /// Lets `Faults::disconnect_watches` end this body.
    pub(super) fn of_watch(mut self) -> Self {
        self.watches_cut = Some(self.faults.borrow().watches_cut);
        self
    }

    /// Sends as the faults allow.
    pub(super) async fn send(&mut self, mut bytes: Bytes) -> Result<(), Closed> {
        while !bytes.is_empty() {
            self.wait_while_stalled().await?;
            let rate = self.faults.borrow_and_update().set.bytes_per_second;
            let mut take = bytes.len();
            if let Some(rate) = rate {
                self.pause(TICK).await?;
                let ticks = u32::try_from(1000 / TICK.as_millis()).unwrap_or(1);
                take = take.min(usize::try_from(rate.div_ceil(ticks)).unwrap_or(take));
            }
            if let Some(left) = &mut self.cut_after {
                take = take.min(*left);
                *left -= take;
            }
            self.sender.send(Ok(bytes.split_to(take))).await.map_err(|_| Closed)?;
            if self.cut_after == Some(0) {
                return Err(self.cut().await);
            }
        }
        Ok(())
    }

    /// Waits, unless the body ends before.
    async fn pause(&mut self, time: Duration) -> Result<(), Closed> {
        let until = tokio::time::Instant::now() + time;
        loop {
            self.check_cut().await?;
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Ok(()),
                () = self.sender.closed() => return Err(Closed),
                changed = self.faults.changed() => changed.map_err(|_| Closed)?,
            }
        }
    }

    async fn wait_while_stalled(&mut self) -> Result<(), Closed> {
        self.check_cut().await?;
        while self.faults.borrow_and_update().set.stall {
            tokio::select! {
                () = self.sender.closed() => return Err(Closed),
                changed = self.faults.changed() => changed.map_err(|_| Closed)?,
            }
            self.check_cut().await?;
        }
        Ok(())
    }

    /// Breaks off if `Faults::disconnect_watches` was called since the body began.
    pub(super) async fn check_cut(&mut self) -> Result<(), Closed> {
        let now = self.faults.borrow().watches_cut;
        match self.watches_cut {
            Some(then) if then != now => Err(self.cut().await),
            _ => Ok(()),
        }
    }

    /// Ends the body with an error, which the HTTP layer turns into a broken stream.
    async fn cut(&mut self) -> Closed {
        let error = io::Error::new(io::ErrorKind::ConnectionAborted, "cut off by a fault");
        // The receiver being gone is the end that was asked for.
        let _ = self.sender.send(Err(error)).await;
        Closed
    }

    /// Resolves when the client is gone.
    pub(super) async fn closed(&self) {
        self.sender.closed().await;
    }
}

/// A body made of pieces. `may_cut` says that it is a list.
pub(super) fn of_pieces(pieces: Vec<Bytes>, faults: watch::Receiver<State>, may_cut: bool) -> Body {
    let length: usize = pieces.iter().map(Bytes::len).sum();
    let set = faults.borrow().set.clone();
    let cut = if may_cut { set.cut_lists_after } else { None };
    if cut.is_none() && set.bytes_per_second.is_none() {
        if length <= WITH_LENGTH {
            return Body::from(pieces.concat());
        }
        return Body::from_stream(stream::iter(joined(pieces).into_iter().map(io::Result::Ok)));
    }
    let (out, body) = Out::new(faults);
    let mut out = out.cut_after(cut);
    tokio::spawn(async move {
        for piece in joined(pieces) {
            if out.send(piece).await.is_err() {
                return;
            }
        }
    });
    body
}

/// Small pieces joined into chunks of tens of kilobytes, so that a list of thousands of
/// objects is not thousands of writes.
fn joined(pieces: Vec<Bytes>) -> Vec<Bytes> {
    const CHUNK: usize = 32 * 1024;
    let mut chunks = Vec::new();
    let mut chunk = Vec::new();
    for piece in pieces {
        chunk.extend_from_slice(&piece);
        if chunk.len() >= CHUNK {
            chunks.push(Bytes::from(std::mem::take(&mut chunk)));
        }
    }
    chunks.push(Bytes::from(chunk));
    chunks
}
