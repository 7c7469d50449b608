//! A netlink for tests: answers from a function, records what was sent, and fails when
//! told to. It shares its record with its clones, so that a test keeps one clone and
//! hands the other to the code under test.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Counters, Errno, Message, Netlink, NetlinkError};

/// One call of the trait, as it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exchange {
    Requests(Vec<Message>),
    Transaction(Vec<Message>),
    Dump(Message),
    Get(Message),
}

/// What a responder says to one message: for a plain request any `Ok` is success; for
/// a dump all parts; for a get its first message.
pub type Reply = Result<Vec<Message>, Errno>;

type Responder = Box<dyn FnMut(&Message) -> Reply + Send>;

struct State {
    responder: Responder,
    failures: VecDeque<NetlinkError>,
    exchanges: Vec<Exchange>,
    counters: Counters,
}

#[derive(Clone)]
pub struct FakeNetlink {
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for FakeNetlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeNetlink").field("exchanges", &self.state().exchanges).finish()
    }
}

impl Default for FakeNetlink {
    /// Accepts every request; every dump is empty.
    fn default() -> Self {
        Self::new(|_| Ok(Vec::new()))
    }
}

impl FakeNetlink {
    pub fn new(responder: impl FnMut(&Message) -> Reply + Send + 'static) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                responder: Box::new(responder),
                failures: VecDeque::new(),
                exchanges: Vec::new(),
                counters: Counters::default(),
            })),
        }
    }

    /// Answers the messages in turn with `replies`, then accepts everything.
    #[must_use]
    pub fn scripted(replies: impl IntoIterator<Item = Reply>) -> Self {
        let mut replies: VecDeque<Reply> = replies.into_iter().collect();
        Self::new(move |_| replies.pop_front().unwrap_or_else(|| Ok(Vec::new())))
    }

    /// The next call fails as a whole, without any message reaching the responder;
    /// several queue up.
    pub fn fail_next(&self, error: NetlinkError) {
        self.state().failures.push_back(error);
    }

    /// From now on.
    pub fn respond(&self, responder: impl FnMut(&Message) -> Reply + Send + 'static) {
        self.state().responder = Box::new(responder);
    }

    /// Everything sent since the last call of this.
    #[must_use]
    pub fn take_exchanges(&self) -> Vec<Exchange> {
        std::mem::take(&mut self.state().exchanges)
    }

    /// Every message sent since the exchanges were last taken, dumps and gets included.
    #[must_use]
    pub fn messages(&self) -> Vec<Message> {
        self.state()
            .exchanges
            .iter()
            .flat_map(|exchange| match exchange {
                Exchange::Requests(messages) | Exchange::Transaction(messages) => messages.clone(),
                Exchange::Dump(message) | Exchange::Get(message) => vec![message.clone()],
            })
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked while holding the lock has failed already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, exchange: Exchange) -> Result<MutexGuard<'_, State>, NetlinkError> {
        let mut state = self.state();
        state.counters.sends += 1;
        match &exchange {
            Exchange::Requests(messages) | Exchange::Transaction(messages) => {
                state.counters.requests += messages.len() as u64;
            }
            Exchange::Dump(_) => state.counters.dumps += 1,
            Exchange::Get(_) => state.counters.requests += 1,
        }
        state.exchanges.push(exchange);
        match state.failures.pop_front() {
            Some(error) => Err(error),
            None => Ok(state),
        }
    }
}

impl Netlink for FakeNetlink {
    fn request_all(
        &mut self,
        requests: &[Message],
    ) -> Result<Vec<Result<(), Errno>>, NetlinkError> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let mut state = self.begin(Exchange::Requests(requests.to_vec()))?;
        Ok(requests.iter().map(|request| (state.responder)(request).map(drop)).collect())
    }

    fn transaction(
        &mut self,
        requests: &[Message],
    ) -> Result<Result<(), (usize, Errno)>, NetlinkError> {
        let mut state = self.begin(Exchange::Transaction(requests.to_vec()))?;
        let refused = requests.iter().enumerate().find_map(|(index, request)| {
            (state.responder)(request).err().map(|errno| (index, errno))
        });
        Ok(refused.map_or(Ok(()), Err))
    }

    fn dump(&mut self, request: &Message) -> Result<Vec<Message>, NetlinkError> {
        let mut state = self.begin(Exchange::Dump(request.clone()))?;
        (state.responder)(request)
            .map_err(|errno| NetlinkError::Refused { operation: "dump", errno })
    }

    fn get(&mut self, request: &Message) -> Result<Result<Message, Errno>, NetlinkError> {
        let mut state = self.begin(Exchange::Get(request.clone()))?;
        match (state.responder)(request) {
            Err(errno) => Ok(Err(errno)),
            Ok(replies) => replies
                .into_iter()
                .next()
                .map(Ok)
                .ok_or(NetlinkError::Malformed("an answer without content")),
        }
    }

    fn counters(&self) -> Counters {
        self.state().counters
    }
}
