//! Time limits of waits.

#[cfg(not(loom))]
pub(crate) use clock::{Deadline, SLICE};
#[cfg(loom)]
pub(crate) use model::{Alarm, Deadline};

/// The time limit has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expired;

#[cfg(not(loom))]
mod clock {
    use std::time::{Duration, Instant};

    use super::Expired;

    /// The longest single sleep. A party that is killed between its advance and its wake-up call leaves sleepers that
    /// nobody wakes; after a slice they look for themselves.
    pub(crate) const SLICE: Duration = Duration::from_millis(500);

    /// A time limit whose clock starts at the first look, which is after the polls: the fast path reads no clock.
    #[derive(Debug)]
    pub(crate) struct Deadline {
        limit: Duration,
        started: Option<Instant>,
    }

    impl Deadline {
        pub(crate) fn after(limit: Duration) -> Self {
            Self { limit, started: None }
        }

        /// How long to sleep next: at most a slice.
        pub(crate) fn next_sleep(&mut self) -> Result<Duration, Expired> {
            let spent = self.started.get_or_insert_with(Instant::now).elapsed();
            let left = self.limit.saturating_sub(spent);
            if left.is_zero() {
                Err(Expired)
            } else {
                Ok(left.min(SLICE))
            }
        }
    }
}

/// A model has no clock: a deadline expires when another thread says so, at any point of the execution.
#[cfg(loom)]
mod model {
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    pub(crate) struct Alarm(AtomicBool);

    impl Alarm {
        pub(crate) fn ring(&self) {
            self.0.store(true, Ordering::Release);
        }
    }

    pub(crate) struct Deadline(Option<Arc<Alarm>>);

    impl Deadline {
        pub(crate) fn never() -> Self {
            Self(None)
        }
        pub(crate) fn on(alarm: Arc<Alarm>) -> Self {
            Self(Some(alarm))
        }
        pub(crate) fn expired(&self) -> bool {
            self.0
                .as_ref()
                .is_some_and(|alarm| alarm.0.load(Ordering::Acquire))
        }
    }
}
