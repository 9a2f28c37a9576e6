//! The bound of the queue: a ticket for every sequence that has not begun its first step.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use phalanx_proto::{ErrorKind, RpcError};

/// Counts what has been admitted and has not started. Only the counts are shared, nothing is published through them, so
/// relaxed ordering suffices.
pub(super) struct AdmissionQueue {
    num_reqs: AtomicUsize,
    num_tokens: AtomicUsize,
    /// Sequences that need not wait: so many may come beside those that may.
    free_seats: AtomicUsize,
    max_reqs: usize,
    max_tokens: usize,
}

/// The queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{queued} requests or prompt tokens are queued, {limit} is {max}")]
pub(super) struct QueueFull {
    /// The setting that refuses.
    pub(super) limit: &'static str,
    queued: usize,
    max: usize,
}

impl From<QueueFull> for RpcError {
    fn from(full: QueueFull) -> Self {
        Self::new(ErrorKind::QueueFull, full.to_string())
    }
}

/// A place in the queue, given back on drop.
pub(super) struct Ticket {
    queue: Arc<AdmissionQueue>,
    num_tokens: usize,
}

impl AdmissionQueue {
    pub(super) fn new(max_reqs: usize, max_tokens: usize, free_seats: usize) -> Self {
        Self {
            num_reqs: AtomicUsize::new(0),
            num_tokens: AtomicUsize::new(0),
            free_seats: AtomicUsize::new(free_seats),
            max_reqs,
            max_tokens,
        }
    }

    /// How many sequences more would run at once.
    pub(super) fn set_free_seats(&self, free_seats: usize) {
        self.free_seats.store(free_seats, Ordering::Relaxed);
    }

    pub(super) fn take(self: &Arc<Self>, num_tokens: usize) -> Result<Ticket, QueueFull> {
        let max_reqs = self
            .max_reqs
            .saturating_add(self.free_seats.load(Ordering::Relaxed));
        let one_more = |queued: usize| (queued < max_reqs).then_some(queued + 1);
        add(&self.num_reqs, one_more).map_err(|queued| QueueFull {
            limit: "max_num_queued_reqs",
            queued,
            max: self.max_reqs,
        })?;
        let fits = |queued: usize| {
            let sum = queued.saturating_add(num_tokens);
            (queued == 0 || sum <= self.max_tokens).then_some(sum)
        };
        if let Err(queued) = add(&self.num_tokens, fits) {
            self.num_reqs.fetch_sub(1, Ordering::Relaxed);
            return Err(QueueFull {
                limit: "max_num_queued_tokens",
                queued,
                max: self.max_tokens,
            });
        }
        Ok(Ticket {
            queue: Arc::clone(self),
            num_tokens,
        })
    }
}

fn add(counter: &AtomicUsize, next: impl FnMut(usize) -> Option<usize>) -> Result<usize, usize> {
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next)
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queue.num_reqs.fetch_sub(1, Ordering::Relaxed);
        self.queue
            .num_tokens
            .fetch_sub(self.num_tokens, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_tickets_come_back() {
        let queue = Arc::new(AdmissionQueue::new(2, 10, 0));
        let limit = |taken: Result<Ticket, QueueFull>| taken.err().map(|full| full.limit);
        let alone = queue.take(50).expect("may be longer than the limit");
        assert_eq!(limit(queue.take(1)), Some("max_num_queued_tokens"));
        drop(alone);
        let (_a, b) = (queue.take(4), queue.take(6));
        assert_eq!(limit(queue.take(0)), Some("max_num_queued_reqs"));
        drop(b);
        assert_eq!(limit(queue.take(7)), Some("max_num_queued_tokens"));
        assert_eq!(limit(queue.take(6)), None);
        let (_b, _) = (queue.take(1), queue.set_free_seats(1));
        let _c = queue.take(1).expect("need not wait");
        assert_eq!(limit(queue.take(0)), Some("max_num_queued_reqs"));
    }
}
