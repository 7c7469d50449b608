//! Which indices of the array maps are in use.
//!
//! A program may still hold an index that it read before the last frontend stopped naming
//! it, so what is freed rests for a while before it is given out again.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Longer than any program runs.
pub const REST: Duration = Duration::from_secs(1);

/// Ranges of one array: first fit, neighbours joined.
#[derive(Debug)]
pub struct Ranges {
    /// Start to length; no two touch.
    free: BTreeMap<u32, u32>,
    resting: VecDeque<(Instant, u32, u32)>,
    capacity: u32,
    in_use: u32,
}

impl Ranges {
    pub fn new(capacity: u32) -> Self {
        let free = if capacity == 0 { BTreeMap::new() } else { BTreeMap::from([(0, capacity)]) };
        Self { free, resting: VecDeque::new(), capacity, in_use: 0 }
    }

    /// A range that nobody names, or `None` when there is no room.
    pub fn allocate(&mut self, length: u32, now: Instant) -> Option<u32> {
        self.wake(now);
        let (&start, &room) = self.free.iter().find(|(_, room)| **room >= length)?;
        self.free.remove(&start);
        if room > length {
            self.free.insert(start + length, room - length);
        }
        self.in_use += length;
        Some(start)
    }

    /// Takes a range that is in use already; false when part of it is not free.
    pub fn claim(&mut self, start: u32, length: u32) -> bool {
        let Some(end) = start.checked_add(length) else { return false };
        let Some((&from, &room)) = self.free.range(..=start).next_back() else { return false };
        if from + room < end {
            return false;
        }
        self.free.remove(&from);
        if start > from {
            self.free.insert(from, start - from);
        }
        if from + room > end {
            self.free.insert(end, from + room - end);
        }
        self.in_use += length;
        true
    }

    /// Nobody names it any more.
    pub fn release(&mut self, start: u32, length: u32, now: Instant) {
        if length > 0 {
            self.in_use -= length;
            self.resting.push_back((now, start, length));
        }
    }

    /// It was never named.
    pub fn give_back(&mut self, start: u32, length: u32) {
        if length > 0 {
            self.in_use -= length;
            self.join(start, length);
        }
    }

    fn wake(&mut self, now: Instant) {
        while let Some(&(since, start, length)) = self.resting.front() {
            if now.saturating_duration_since(since) < REST {
                return;
            }
            self.resting.pop_front();
            self.join(start, length);
        }
    }

    fn join(&mut self, mut start: u32, mut length: u32) {
        if let Some(after) = self.free.remove(&(start + length)) {
            length += after;
        }
        if let Some((&before, &room)) = self.free.range(..start).next_back()
            && before + room == start
        {
            self.free.remove(&before);
            start = before;
            length += room;
        }
        self.free.insert(start, length);
    }

    /// There are more now.
    pub fn grow(&mut self, capacity: u32) {
        let more = capacity.saturating_sub(self.capacity);
        if more > 0 {
            self.join(self.capacity, more);
            self.capacity = capacity;
        }
    }

    /// In use, and how many there are.
    pub const fn fill(&self) -> (u32, u32) {
        (self.in_use, self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_freed_rests() {
        let start = Instant::now();
        let mut ranges = Ranges::new(4);
        assert_eq!(ranges.allocate(4, start), Some(0));
        assert_eq!(ranges.allocate(1, start), None);
        ranges.release(0, 4, start);
        assert_eq!(ranges.allocate(4, start + REST / 2), None);
        assert_eq!(ranges.allocate(4, start + REST), Some(0));
    }

    #[test]
    fn what_is_added_joins_what_is_free_at_the_end() {
        let now = Instant::now();
        let mut ranges = Ranges::new(4);
        assert_eq!(ranges.allocate(3, now), Some(0));
        ranges.grow(8);
        ranges.grow(6);
        assert_eq!(ranges.fill(), (3, 8));
        assert_eq!(ranges.allocate(5, now), Some(3));
        assert_eq!(ranges.allocate(1, now), None);
    }

    proptest! {
        /// No index is given out twice, and all come back.
        #[test]
        fn ranges_never_overlap(steps in prop::collection::vec((any::<bool>(), 1_u32..9, any::<prop::sample::Index>()), 1..80)) {
            let now = Instant::now();
            let mut ranges = Ranges::new(64);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (round, (take, length, index)) in (0_u32..).zip(steps) {
                let now = now + REST * round;
                if take {
                    if let Some(start) = ranges.allocate(length, now) {
                        prop_assert!(start + length <= 64);
                        for (other, size) in &held {
                            prop_assert!(start + length <= *other || other + size <= start);
                        }
                        held.push((start, length));
                    }
                } else if !held.is_empty() {
                    let (start, length) = held.swap_remove(index.index(held.len()));
                    ranges.release(start, length, now);
                }
                prop_assert_eq!(ranges.fill().0, held.iter().map(|h| h.1).sum::<u32>());
            }
            // A picture read from the kernel claims the same.
            let mut read = Ranges::new(64);
            for (start, length) in &held {
                prop_assert!(read.claim(*start, *length));
                prop_assert!(!read.claim(*start, *length));
            }
            let end = now + REST * 1000;
            for (start, length) in held {
                ranges.release(start, length, end);
            }
            prop_assert_eq!(ranges.allocate(64, end + REST), Some(0));
        }
    }
}
