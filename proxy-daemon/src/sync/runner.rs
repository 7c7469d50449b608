//! The thread around the engine: waits for input or the next deadline, paces rounds.

use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::engine::Engine;
use super::report::Observer;
use crate::dataplane::Dataplane;
use crate::kernel::memory;
use crate::model::Event;

/// What the engine reacts to.
#[derive(Debug)]
pub enum Input {
    Object(Event),
    /// All addresses of the node's links, except those we made ourselves.
    Addresses(Vec<IpAddr>),
    Stop,
}

/// Without a deadline the thread still wakes this often, so that a clock step or a lost
/// wake-up cannot stop it for good.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// With nothing to do for this long, there is time to put things in order.
const IDLE: Duration = Duration::from_millis(500);

/// Runs until [`Input::Stop`] or until every sender is gone. What was programmed stays.
pub fn run<D: Dataplane, O: Observer>(
    mut engine: Engine<D, O>,
    inputs: &Receiver<Input>,
    min_interval: Duration,
) {
    let mut last_round: Option<Instant> = None;
    let mut next = Some(Instant::now());
    loop {
        let now = Instant::now();
        let wait = next.map_or(LONGEST_WAIT, |at| at.saturating_duration_since(now));
        let mut batch = Vec::new();
        match inputs.recv_timeout(wait) {
            Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(input) => batch.push(input),
            Err(RecvTimeoutError::Timeout) => {}
        }
        // Rounds are spaced, not delayed: the first change after a quiet time is
        // programmed at once, and what arrives in the pause comes with the next round.
        if let Some(last) = last_round {
            let pause = (last + min_interval).saturating_duration_since(Instant::now());
            if !pause.is_zero() && !batch.is_empty() {
                std::thread::sleep(pause);
            }
        }
        while let Ok(input) = inputs.try_recv() {
            if matches!(input, Input::Stop) {
                return;
            }
            batch.push(input);
        }
        if !batch.is_empty() {
            last_round = Some(Instant::now());
        }
        next = engine.step(Instant::now(), batch);
        let idle = next.is_none_or(|at| at > Instant::now() + IDLE);
        if idle && engine.take_shed() {
            memory::give_back();
        }
    }
}
