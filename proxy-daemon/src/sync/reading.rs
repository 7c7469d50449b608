//! A readback beside the rounds: it runs elsewhere and hands over what it finds in pieces.

use std::io;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::Instant;

use crate::dataplane::{Piece, PlaneError, Reader};
use crate::plan::ObjectKey;

/// Where readbacks run.
pub trait Background: Send {
    /// # Errors
    /// When the job cannot be started; it was not run then.
    fn start(&mut self, job: Box<dyn FnOnce() + Send>) -> io::Result<()>;

    /// Pieces that may wait for the engine before the reader waits for it: this bounds
    /// what a readback takes of memory.
    fn read_ahead(&self) -> usize;
}

/// Each on a thread of its own.
#[derive(Debug)]
pub struct Threads;

impl Background for Threads {
    fn start(&mut self, job: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        std::thread::Builder::new().name("readback".to_owned()).spawn(job).map(|_| ())
    }

    fn read_ahead(&self) -> usize {
        8
    }
}

/// A readback under way.
pub struct Reading<K: ObjectKey> {
    pub started: Instant,
    news: Receiver<News<K>>,
}

pub enum News<K: ObjectKey> {
    Nothing,
    Piece(Piece<K>),
    End(Result<(), PlaneError>),
}

impl<K: ObjectKey> Reading<K> {
    pub fn start(
        background: &mut dyn Background,
        reader: Reader<K>,
        now: Instant,
    ) -> Result<Self, PlaneError> {
        let (sender, news) = sync_channel(background.read_ahead());
        let job = move || {
            // Without an engine that listens nothing is left to be done for.
            let result = reader(&mut |piece| drop(sender.send(News::Piece(piece))));
            let _ = sender.send(News::End(result));
        };
        background.start(Box::new(job)).map_err(|error| PlaneError::new("readback", error))?;
        Ok(Self { started: now, news })
    }

    pub fn next(&self) -> News<K> {
        match self.news.try_recv() {
            Ok(news) => news,
            Err(TryRecvError::Empty) => News::Nothing,
            // The reader panicked.
            Err(TryRecvError::Disconnected) => {
                News::End(Err(PlaneError::new("readback", "it ended in the middle")))
            }
        }
    }
}
