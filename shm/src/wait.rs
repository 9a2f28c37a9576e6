//! How long to poll before sleeping.

use std::time::{Duration, Instant};

/// A wait polls up to a budget, then sleeps on a futex. The budget adapts between `floor` and `spins`.
///
/// There is no `sched_yield` and no endless polling. Beside a busy stranger on the core a yield costs a whole time
/// slice (7 to 34 times slower than the best policy, measured), and endless polling is 66 times slower once there are
/// more ranks than cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    spins: u32,
    floor: u32,
}

impl Wait {
    /// 1000 polls, down to 50. On Zen 3 that is at most 26 µs, about what a sleep and its wake-up cost.
    pub const ADAPTIVE: Self = Self {
        spins: 1000,
        floor: 50,
    };
    /// No polling at all: for groups with more parties than cores, and for tests.
    pub const PASSIVE: Self = Self { spins: 0, floor: 0 };

    const FULL_BUDGET: Duration = Duration::from_micros(26);
    const MAX_SPINS: u32 = 20_000;

    /// At most `spins` polls and, when those do not pay, at least `floor`; both are capped at 20 000.
    pub fn new(spins: u32, floor: u32) -> Self {
        let spins = spins.min(Self::MAX_SPINS);
        Self {
            spins,
            floor: floor.min(spins),
        }
    }

    /// [`Self::ADAPTIVE`] in this machine's time: a pause is 5 to 40 ns, depending on the CPU. Takes about 1 ms.
    pub fn calibrated() -> Self {
        const PAUSES: u32 = 8192;
        let time = |_| {
            let start = Instant::now();
            (0..PAUSES).for_each(|_| std::hint::spin_loop());
            start.elapsed()
        };
        // The shortest of several: an interrupted one says nothing about the pause.
        let shortest = (0..4)
            .map(time)
            .min()
            .unwrap_or_default()
            .max(Duration::from_nanos(1));
        let spins = Self::FULL_BUDGET.as_nanos() * u128::from(PAUSES) / shortest.as_nanos();
        Self::new(u32::try_from(spins).unwrap_or(u32::MAX), Self::ADAPTIVE.floor)
    }

    /// Polls of every wait between engine and ranks: the engine has no core of its own, so a rank that polls keeps it
    /// from waking the next one (a 4 KB plan took 31 instead of 11 µs with 1000 polls).
    pub(crate) fn short(self) -> u32 {
        self.floor
    }
}

impl Default for Wait {
    fn default() -> Self {
        Self::ADAPTIVE
    }
}

/// The budget of one waiter's barriers. A spin that ended in sleep halves it, one that paid off raises it by a quarter,
/// and every 32nd wait tries all of it, so that a group that got its cores back finds out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    wait: Wait,
    budget: u32,
    waits: u32,
}

impl Patience {
    const PROBE_EVERY: u32 = 32;

    pub(crate) fn new(wait: Wait) -> Self {
        Self {
            wait,
            budget: wait.spins,
            waits: 0,
        }
    }

    fn probing(&self) -> bool {
        self.waits.is_multiple_of(Self::PROBE_EVERY)
    }

    /// Polls to spend on the next wait.
    pub(crate) fn next_budget(&mut self) -> u32 {
        self.waits = self.waits.wrapping_add(1);
        if self.probing() {
            self.wait.spins
        } else {
            self.budget
        }
    }

    pub(crate) fn learn(&mut self, slept: bool) {
        let next = match slept {
            true => self.budget / 2,
            false if self.probing() => self.wait.spins,
            false => self.budget.saturating_add(self.budget / 4).saturating_add(1),
        };
        self.budget = next.clamp(self.wait.floor, self.wait.spins);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_falls_to_the_floor_and_a_probe_restores_it() {
        let mut patience = Patience::new(Wait::ADAPTIVE);
        for _ in 0..31 {
            patience.next_budget();
            patience.learn(true);
        }
        assert_eq!(patience.budget, 50);
        assert_eq!(patience.next_budget(), 1000, "the 32nd wait probes");
        patience.learn(false);
        assert_eq!(patience.next_budget(), 1000);
    }

    #[test]
    fn budget_grows_while_polling_pays() {
        let mut patience = Patience::new(Wait::new(1000, 0));
        for _ in 0..20 {
            patience.next_budget();
            patience.learn(true);
        }
        assert_eq!(patience.budget, 0);
        patience.next_budget();
        patience.learn(false);
        assert!(patience.budget > 0);
    }

    #[test]
    fn calibration_stays_within_its_bounds() {
        let wait = Wait::calibrated();
        assert!((50..=Wait::MAX_SPINS).contains(&wait.spins), "{wait:?}");
        assert_eq!(
            Wait::new(u32::MAX, u32::MAX),
            Wait {
                spins: Wait::MAX_SPINS,
                floor: Wait::MAX_SPINS
            }
        );
    }
}
