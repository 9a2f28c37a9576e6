//! The group this rank is in, as its two sides share it: the attach stream, which may end it at any time, and the rank's
//! thread, which may be blocked in it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use phalanx_shm::{AbortReason, Segment};

/// Holds the segment of the newest group.
#[derive(Default)]
pub(crate) struct GroupSlot {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    segment: Option<Arc<Segment>>,
    closed: bool,
}

impl GroupSlot {
    /// Puts a new group in the place of the old one, which is aborted. False once the slot is closed: then the new one
    /// is aborted as well.
    pub(crate) fn replace(&self, segment: Arc<Segment>) -> bool {
        let mut state = self.lock();
        if state.closed {
            segment.abort(AbortReason::Shutdown);
            return false;
        }
        if let Some(old) = state.segment.replace(segment) {
            old.abort(AbortReason::Shutdown);
        }
        true
    }

    /// Aborts the current group, if there is one. Does not wait for the lock: it is called from the panic hook, too,
    /// whose thread may hold it.
    pub(crate) fn abort(&self, reason: AbortReason) {
        let state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if let Some(segment) = &state.segment {
            segment.abort(reason);
        }
    }

    /// Ends the current group and lets no other one in.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        if let Some(segment) = state.segment.take() {
            segment.abort(AbortReason::Shutdown);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
