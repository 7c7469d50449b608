//! Reading the kernel back beside the rounds, and comparing all of it with what is wanted.

use std::collections::BTreeSet;
use std::time::Instant;

use tracing::{info, warn};

use super::super::reading::{News, Reading};
use super::super::report::Observer;
use super::super::retry::backoff;
use super::standing::Standings;
use super::{DRAIN_POLL, Engine, Outcome};
use crate::dataplane::{Dataplane, Piece, PlaneError};
use crate::plan::{ObjectKey as _, Op, Sweep};

/// After this many comparisons in a row what an earlier proxy left does not wait any longer
/// for the few objects that the kernel refuses.
const PATIENCE: u32 = 3;

/// Pieces of a readback folded in before a round.
const PIECES: usize = 4;

pub(super) struct Comparison<K> {
    /// When the readback began.
    pub started: Instant,
    pub sweep: Sweep<K>,
    /// What was wanted otherwise than the readback found it.
    pub diverged: Vec<K>,
}

impl<D: Dataplane, O: Observer> Engine<D, O> {
    /// Begins to read the kernel back, if that is due and not under way. Until it has
    /// been read once, nothing is written.
    pub(super) fn start_readback(&mut self, now: Instant) {
        if self.next_resync.is_some_and(|at| at <= now) {
            self.readback_due.get_or_insert(now);
        }
        let due = self.readback_due.is_some_and(|at| at <= now);
        // A sweep acts on the readback before: it ends first.
        if !due || self.reading.is_some() || self.sweep.is_some() {
            return;
        }
        self.readback_due = None;
        self.next_resync = None;
        let started = self.plane.prepare().and_then(|()| self.plane.reader());
        self.totals.repaired += self.plane.take_put_back();
        match started.and_then(|reader| Reading::start(self.background.as_mut(), reader, now)) {
            Ok(reading) => {
                self.ledger.begin_readback();
                self.foreign_found.clear();
                self.reading = Some(reading);
            }
            Err(error) => self.readback_failed(&error, now),
        }
    }

    fn readback_failed(&mut self, error: &PlaneError, now: Instant) {
        self.readback_attempts += 1;
        let delay = backoff(self.readback_attempts);
        warn!(%error, retry_in = ?delay, "cannot prepare or read the kernel");
        self.readback_due = Some(now + delay);
    }

    /// Folds in what was read so far, some pieces at a time.
    pub(super) fn fold_readback(&mut self, now: Instant) {
        for _ in 0..PIECES {
            let Some(reading) = &self.reading else { return };
            match reading.next() {
                News::Nothing => return,
                News::Piece(piece) => self.fold_piece(piece),
                News::End(result) => {
                    let started = reading.started;
                    self.reading = None;
                    let ledger = &self.ledger;
                    self.foreign_found
                        .retain(|key, _| ledger.held(key).is_none() && !ledger.is_newer(key));
                    self.ledger.end_readback();
                    self.end_readback(result, started, now);
                }
            }
        }
    }

    fn fold_piece(&mut self, piece: Piece<D::Key>) {
        for (key, value) in piece.ours {
            if !self.ledger.is_newer(&key) {
                self.plane.found(&key, &value);
                self.ledger.hold(&key, value);
            }
        }
        for (key, value) in piece.foreign {
            if self.ledger.is_newer(&key) {
                continue;
            }
            // What was ours stays ours, even if somebody has removed the mark.
            if self.ledger.held(&key).is_some() {
                self.ledger.hold(&key, value);
            } else {
                self.foreign_found.insert(key, value);
            }
        }
    }

    fn end_readback(&mut self, result: Result<(), PlaneError>, started: Instant, now: Instant) {
        if let Err(error) = result {
            self.readback_failed(&error, now);
            return;
        }
        self.foreign = std::mem::take(&mut self.foreign_found);
        if self.readback_attempts > 0 {
            info!("the kernel answers again");
        }
        self.readback_attempts = 0;
        self.was_read = true;
        self.sweep = Some(Comparison { started, sweep: Sweep::default(), diverged: Vec::new() });
        self.next_resync =
            (!self.config.sync_period.is_zero()).then(|| now + self.config.sync_period);
    }

    /// Objects that are not ours become ours when they are wanted (what an earlier proxy
    /// left): they are then updated in place instead of made twice.
    pub(super) fn adopt(&mut self, touched: &BTreeSet<D::Key>) {
        if self.foreign.is_empty() {
            return;
        }
        for key in touched {
            if self.ledger.wanted(key).is_some()
                && let Some(value) = self.foreign.remove(key)
            {
                self.ledger.hold(key, value);
            }
        }
    }

    /// What stands inside an adopted object was made for it, and is ours too.
    fn adopt_children(&mut self) {
        let ledger = &self.ledger;
        let children: Vec<D::Key> = self
            .foreign
            .keys()
            .filter(|key| key.parent().is_some_and(|parent| ledger.held(&parent).is_some()))
            .cloned()
            .collect();
        for key in children {
            if let Some(value) = self.foreign.remove(&key) {
                self.ledger.hold(&key, value);
            }
        }
    }

    /// Normally not before all that is wanted is there. But rules that nobody looks after any
    /// more grow wrong for all Services: one that can never be programmed must not keep them.
    /// When most of what is wanted fails, what there is may be all that works.
    fn may_supersede(&mut self) -> bool {
        let failing = self.retry.len();
        if failing == 0 {
            self.held_back = 0;
            return true;
        }
        if failing * 2 > self.ledger.len() || !self.retry.all_refused() {
            return false;
        }
        self.held_back = self.held_back.saturating_add(1);
        if self.held_back == PATIENCE {
            warn!(
                failing,
                "what another proxy left is removed although the kernel goes on refusing these"
            );
        }
        self.held_back >= PATIENCE
    }

    /// What an earlier proxy left and nobody wants goes once all that is wanted is there.
    fn supersede(&mut self, now: Instant) -> Outcome {
        let left: BTreeSet<D::Key> = self.plane.superseded(&self.foreign).into_iter().collect();
        for key in &left {
            if let Some(value) = self.foreign.remove(key) {
                self.ledger.hold(key, value);
            }
        }
        let ops = self.differences(&left);
        self.apply(&ops, now)
    }

    /// Everything wanted was looked at: what is not goes, in one go, so that of a Service
    /// that is gone the mark of ownership goes last.
    pub(super) fn finish_comparison(
        &mut self,
        Comparison { sweep, diverged, .. }: Comparison<D::Key>,
        now: Instant,
    ) -> Outcome {
        self.shed = true;
        if !std::mem::replace(&mut self.compacted, true) {
            self.ledger.compact();
        }
        let before = self.foreign.len();
        self.adopt_children();
        let mut unwanted: BTreeSet<D::Key> = sweep.unwanted.into_iter().collect();
        if self.foreign.len() < before {
            unwanted.extend(self.unwanted());
        }
        self.resume_drains(&unwanted, now);
        let ops = self.differences(&unwanted);
        let mut outcome = self.apply(&ops, now);
        if self.may_supersede() {
            outcome = outcome + self.supersede(now);
        }
        self.settle_retries();
        let unrepaired = |key: &&D::Key| !self.ledger.agrees(key) && !self.drain.contains(key);
        self.totals.missing = diverged.iter().filter(unrepaired).count();
        self.totals.unwanted = ops.iter().map(Op::key).filter(unrepaired).count();
        self.totals.repaired += (diverged.len() + ops.len()) as u64;
        outcome
    }

    fn unwanted(&self) -> impl Iterator<Item = D::Key> {
        let unwanted = |(key, wanted, held): (&D::Key, Option<&_>, Option<&_>)| {
            (wanted.is_none() && held.is_some()).then(|| key.clone())
        };
        self.ledger.iter().filter_map(unwanted)
    }

    /// Retired objects found in the kernel (after a restart) wait like any other.
    pub(super) fn resume_drains(&mut self, keys: &BTreeSet<D::Key>, now: Instant) {
        let mut standings = Standings::default();
        for key in keys.iter().filter(|key| self.ledger.wanted(key).is_none()) {
            let Some(value) = self.ledger.held(key) else { continue };
            let standing = self.standing(key, &mut standings);
            if key.retired(value, standing).as_ref() == Some(value) {
                self.drain.begin(key.clone(), standing, now);
                self.next_drain_poll.get_or_insert(now + DRAIN_POLL);
            }
        }
    }
}
