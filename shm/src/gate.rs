//! A gate is a counter that only its owner advances and that anybody may wait on or abort.
//!
//! ```text
//! bit 31..2  count: 30 bits, wraps (18 minutes at one barrier a microsecond), so only distances are compared
//! bit 1      ABORT: set by anybody, never cleared
//! bit 0      SLEEP: set by a waiter before it sleeps, cleared by the owner's next advance
//! ```
//!
//! Count, sleepers and abort share one word. So there is no store-load race between "publish" and "is anybody asleep?",
//! no SeqCst fence, and a polling waiter reads a single cache line, abort included. An abort changes the word, so a
//! sleeper on its way in is turned back by the futex's value check.
//!
//! Payload bytes are plain memory. They are ordered by the Release of the owner's advance and the Acquire of the
//! waiter's load; SLEEP and ABORT are set by read-modify-writes, which continue the release sequence, so an Acquire of
//! a marked value still sees the owner's data.

use crate::deadline::{Deadline, Expired};
use crate::futex::Futex;
use crate::sync::Ordering::{Acquire, Relaxed, Release};

const SLEEP: u32 = 1;
const ABORT: u32 = 2;
const ONE: u32 = 4;
const COUNT_SHIFT: u32 = 2;
pub(crate) const COUNT_MASK: u32 = u32::MAX >> COUNT_SHIFT;
/// Half of the count's range: what is less than this ahead counts as reached.
const HALF: u32 = 1 << 29;

/// Why a wait ended without the count having been reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Aborted,
    TimedOut,
}

/// Alone in 128 bytes: the adjacent-line prefetcher moves cache lines in pairs.
#[derive(Default)]
#[repr(C, align(128))]
pub(crate) struct Gate {
    word: Futex,
}

fn reached(word: u32, want: u32) -> bool {
    (word >> COUNT_SHIFT).wrapping_sub(want) & COUNT_MASK < HALF
}

impl Gate {
    /// Owner only: counts one up, which publishes everything written before, and wakes the sleepers.
    pub(crate) fn advance(&self) -> Result<(), Stop> {
        if self.count_up()? {
            self.word.wake_all();
        }
        Ok(())
    }

    /// The first half of an advance; true if sleepers must be woken. A party may be killed after it.
    pub(crate) fn count_up(&self) -> Result<bool, Stop> {
        // Acquire, here and on failure, only for the abort: whoever finds the bit must also find its reason.
        let mut word = self.word.load(Acquire);
        loop {
            if word & ABORT != 0 {
                return Err(Stop::Aborted);
            }
            let next = word.wrapping_add(ONE) & !SLEEP;
            match self.word.compare_exchange_weak(word, next, Release, Acquire) {
                Ok(_) => return Ok(word & SLEEP != 0),
                Err(now) => word = now,
            }
        }
    }

    /// Waits until the count is `want` or past it: `spins` polls, then asleep. True if it slept. An abort ends it, and
    /// so does the deadline, unless the count has been reached by then.
    pub(crate) fn wait(&self, want: u32, spins: u32, deadline: &mut Deadline) -> Result<bool, Stop> {
        let (mut polls, mut slept) = (0, false);
        loop {
            let word = self.word.load(Acquire);
            if word & ABORT != 0 {
                return Err(Stop::Aborted);
            }
            if reached(word, want) {
                return Ok(slept);
            }
            if polls < spins {
                polls += 1;
                std::hint::spin_loop();
                continue;
            }
            // Relaxed: this only announces a sleeper; the data is acquired by the load above, next time round.
            let marked = word | SLEEP;
            if word == marked || self.word.compare_exchange(word, marked, Relaxed, Relaxed).is_ok() {
                slept = true;
                self.word
                    .sleep(marked, deadline)
                    .map_err(|Expired| Stop::TimedOut)?;
            }
        }
    }

    /// Releases everybody who waits here, now and in future. Release: who acquires the bit sees the reason that was
    /// written before it.
    pub(crate) fn abort(&self) {
        self.word.fetch_or(ABORT, Release);
        self.word.wake_all();
    }

    /// Advances so far, modulo 2^30.
    pub(crate) fn count(&self) -> u32 {
        self.word.load(Acquire) >> COUNT_SHIFT
    }

    /// Wakes sleepers without a change of the word, as the end of a kernel timeout does.
    #[cfg(loom)]
    pub(crate) fn disturb(&self) {
        self.word.wake_all();
    }
}

/// How far `count` is ahead of `base`, negative if behind; counts are modulo 2^30.
pub(crate) fn distance(count: u32, base: u32) -> i32 {
    let ahead = count.wrapping_sub(base) << COUNT_SHIFT;
    ahead.cast_signed() >> COUNT_SHIFT
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(2))
    }

    fn gate_at(count: u32) -> Gate {
        let gate = Gate::default();
        gate.word.store(count << COUNT_SHIFT, Relaxed);
        gate
    }

    #[test]
    fn distances_survive_the_wrap() {
        assert!(reached(0, COUNT_MASK), "the count after the last is 0");
        assert!(reached(5 << 2, 5) && reached(6 << 2, 5) && !reached(4 << 2, 5));
        assert!(!reached(COUNT_MASK << 2, 0));
        assert_eq!(
            (distance(0, COUNT_MASK), distance(COUNT_MASK, 0), distance(7, 7)),
            (1, -1, 0)
        );
    }

    #[test]
    fn advance_wraps_and_clears_the_sleep_mark() {
        let gate = gate_at(COUNT_MASK);
        assert_eq!(gate.wait(0, 0, &mut soon()), Err(Stop::TimedOut));
        assert_eq!(gate.word.load(Relaxed) & SLEEP, SLEEP);
        gate.advance().unwrap();
        assert_eq!(gate.word.load(Relaxed), 0);
        assert_eq!(gate.wait(0, 0, &mut soon()), Ok(false));
    }

    #[test]
    fn abort_is_final_and_wins_over_a_reached_count() {
        let gate = Gate::default();
        gate.abort();
        assert_eq!(gate.advance(), Err(Stop::Aborted));
        assert_eq!(gate.wait(0, 10, &mut soon()), Err(Stop::Aborted));
    }

    #[test]
    fn a_reached_count_wins_over_an_expired_deadline() {
        let gate = gate_at(3);
        assert_eq!(gate.wait(3, 0, &mut Deadline::after(Duration::ZERO)), Ok(false));
    }
}
