//! When to try again, and when to say so. Time is passed in.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use super::stats::Cause;

/// Trouble of one source: turns repeated failures into few log lines.
#[derive(Debug, Default)]
pub(super) struct Outage {
    since: Option<Instant>,
    /// Per cause: when it was last logged, and how often it came since.
    logged: HashMap<Cause, (Instant, u64)>,
}

impl Outage {
    /// One line a minute and cause says enough, and stays readable in a log that
    /// covers a day of the API server being away.
    const QUIET: Duration = Duration::from_secs(60);

    /// The line to log for this failure, if it is to be logged.
    pub(super) fn failed(&mut self, now: Instant, cause: Cause, message: &str) -> Option<String> {
        self.since.get_or_insert(now);
        let Some((last, suppressed)) = self.logged.get_mut(&cause) else {
            self.logged.insert(cause, (now, 0));
            return Some(message.to_owned());
        };
        if now.saturating_duration_since(*last) < Self::QUIET {
            *suppressed += 1;
            return None;
        }
        let line = format!("{message} (and {suppressed} times since the last such line)");
        (*last, *suppressed) = (now, 0);
        Some(line)
    }

    pub(super) const fn is_out(&self) -> bool {
        self.since.is_some()
    }

    /// The line to log once the source works again. What was logged lately stays
    /// remembered, or trouble that comes and goes would be logged each time.
    pub(super) fn well(&mut self, now: Instant) -> Option<Duration> {
        let since = self.since.take()?;
        self.logged.retain(|_, (last, _)| now.saturating_duration_since(*last) < Self::QUIET);
        Some(now.saturating_duration_since(since))
    }
}

/// Delay before the next attempt: exponential, with jitter, so that the nodes of a
/// large cluster do not all come back in the same instant after the API server did.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    attempt: u32,
    last: Option<Instant>,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(400);
    const LONGEST: Duration = Duration::from_secs(30);
    /// A failure after this long without one counts as the first again.
    const FORGET: Duration = Duration::from_secs(120);

    pub(super) fn next(&mut self, now: Instant, random: u64) -> Duration {
        let recent =
            self.last.is_some_and(|last| now.saturating_duration_since(last) < Self::FORGET);
        self.attempt = if recent { self.attempt.saturating_add(1) } else { 0 };
        self.last = Some(now);
        let full = Self::FIRST
            .saturating_mul(2_u32.saturating_pow(self.attempt.min(16)))
            .min(Self::LONGEST);
        // Between a half and the whole.
        full.mul_f64(
            0.5 + f64::from(u32::try_from(random >> 32).unwrap_or(0)) / f64::from(u32::MAX) / 2.0,
        )
    }
}

/// Enough randomness to spread retries: the seed that std draws for its hash maps.
pub(super) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_failure_is_logged_at_once_then_once_a_minute_and_cause() {
        let mut outage = Outage::default();
        let start = Instant::now();
        assert!(!outage.is_out());
        assert_eq!(outage.failed(start, Cause::Unreachable, "x").as_deref(), Some("x"));
        for count in 1..60 {
            assert_eq!(outage.failed(start + seconds(count), Cause::Unreachable, "x"), None);
        }
        // Another cause is news.
        let at = start + seconds(59);
        assert_eq!(outage.failed(at, Cause::Unauthorized, "y").as_deref(), Some("y"));
        let line = outage.failed(start + seconds(60), Cause::Unreachable, "x");
        assert_eq!(line.as_deref(), Some("x (and 59 times since the last such line)"));
        assert!(outage.is_out());
    }

    #[test]
    fn recovery_is_told_once_and_flapping_is_not_logged_each_time() {
        let mut outage = Outage::default();
        let start = Instant::now();
        assert_eq!(outage.well(start), None);
        assert!(outage.failed(start, Cause::Rubbish, "x").is_some());
        assert_eq!(outage.well(start + seconds(5)), Some(seconds(5)));
        assert_eq!(outage.well(start + seconds(6)), None);
        assert_eq!(outage.failed(start + seconds(7), Cause::Rubbish, "x"), None);
        assert_eq!(outage.well(start + seconds(200)), Some(seconds(193)));
        assert!(outage.failed(start + seconds(300), Cause::Rubbish, "x").is_some());
    }

    #[test]
    fn delays_double_to_30_seconds_with_jitter_and_start_over_after_quiet() {
        let mut backoff = Backoff::default();
        let start = Instant::now();
        let delays: Vec<u128> = (0..10)
            .map(|count| backoff.next(start + seconds(count), u64::MAX).as_millis())
            .collect();
        assert_eq!(delays, [400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000, 30000]);
        let half = backoff.next(start + seconds(20), 0);
        assert_eq!(half.as_millis(), 15_000);
        assert_eq!(backoff.next(start + seconds(141), u64::MAX).as_millis(), 400);
    }
}
