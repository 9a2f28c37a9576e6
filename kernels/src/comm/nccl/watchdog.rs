//! Nobody waits for ever: a thread that looks after the collectives of a step, because the rank's own thread is then
//! blocked in the driver.
//!
//! A collective on the device cannot end while a peer is missing, and NCCL itself notices only some losses. The thread
//! looks at three things: whether the group has been aborted in shared memory, which is how the coordinator tells that
//! a process has died; NCCL's own errors; and the time since the step's first collective. Any of them aborts the
//! communicator, which ends its kernels and thereby wakes the rank's thread.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use phalanx_shm::{AbortReason, Party, Segment};

use super::handle::Handle;
use super::ledger::{Ledger, Operation};
use crate::{KernelError, Result};

/// Between two looks while a step runs.
const PERIOD: Duration = Duration::from_millis(10);
/// After so long without a step the thread sleeps until there is one.
const REST: Duration = Duration::from_millis(200);

/// The code of a group that stalled without anybody being behind.
const STALLED: u16 = 1;
/// A call into NCCL that takes longer than this, when all is over, never ends.
const STUCK: Duration = Duration::from_secs(2);

/// Looks after one communicator until it is dropped.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    handle: Handle,
    segment: Arc<Segment>,
    /// From a step's first collective to its end.
    limit: Duration,
    watch: Mutex<Watch>,
    wake: Condvar,
}

struct Watch {
    ledger: Ledger,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A step has started collectives at this time and not ended.
    Step(Instant),
    /// The last step ended at this time.
    Between(Instant),
    /// The thread sleeps until it is woken.
    Resting,
    /// The communicator is no longer used.
    Over,
}

impl Watchdog {
    /// # Errors
    /// [`KernelError::Device`] if there can be no more threads.
    pub(super) fn start(
        handle: Handle,
        ledger: Ledger,
        segment: Arc<Segment>,
        limit: Duration,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            handle,
            segment,
            limit,
            watch: Mutex::new(Watch {
                ledger,
                state: State::Between(Instant::now()),
            }),
            wake: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("nccl-watchdog".to_owned())
            .spawn(move || watched.watch());
        let thread = thread.map_err(|error| KernelError::Device {
            op: "starting the NCCL watchdog",
            message: error.to_string(),
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The communicator, for one more `operation`: of a step that begins with it, if none is under way.
    pub(super) fn begin(&self, operation: Operation) -> &Handle {
        let mut watch = self.shared.lock();
        watch.ledger.start(operation);
        let before = watch.state;
        if !matches!(before, State::Step(_)) {
            watch.state = State::Step(Instant::now());
        }
        drop(watch);
        if before == State::Resting {
            self.shared.wake.notify_one();
        }
        &self.shared.handle
    }

    /// The rank's thread has come back from the device: the step's collectives are done.
    pub(super) fn end_step(&self) {
        let mut watch = self.shared.lock();
        if matches!(watch.state, State::Step(_)) {
            watch.state = State::Between(Instant::now());
        }
    }

    pub(super) fn abort(&self, reason: &str) {
        self.shared.handle.abort(reason);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().state = State::Over;
        self.shared.wake.notify_one();
        self.shared.handle.abort("the group is closed");
        if let Some(thread) = self.thread.take() {
            // It has not panicked: that would have ended the process.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn watch(&self) {
        while let Some(since) = self.next_look() {
            if let Err(reason) = self.look(since) {
                return self.end(reason);
            }
        }
    }

    /// Waits for the time of the next look at a step, and returns since when it has been going on; none when all is over.
    fn next_look(&self) -> Option<Instant> {
        let mut watch = self.lock();
        loop {
            watch = match watch.state {
                State::Over => return None,
                State::Resting => self.wake.wait(watch).unwrap_or_else(PoisonError::into_inner),
                State::Between(since) if since.elapsed() >= REST => {
                    watch.state = State::Resting;
                    watch
                }
                State::Between(_) | State::Step(_) => {
                    let waited = self.wake.wait_timeout(watch, PERIOD);
                    let (watch, _) = waited.unwrap_or_else(PoisonError::into_inner);
                    match watch.state {
                        State::Step(since) => return Some(since),
                        _ => watch,
                    }
                }
            }
        }
    }

    /// An error is the reason to abort.
    fn look(&self, since: Instant) -> Result<(), String> {
        if let Some(reason) = self.segment.abort_reason() {
            return Err(format!("the group was aborted: {reason}"));
        }
        if let Err(error) = self.handle.poll() {
            let stall = self.lock().ledger.stall();
            self.segment.abort(blame(stall.rank));
            return Err(format!("{error}; {stall}"));
        }
        if since.elapsed() < self.limit {
            return Ok(());
        }
        let stall = self.lock().ledger.stall();
        self.segment.abort(blame(stall.rank));
        Err(format!("{stall} within {:?}", self.limit))
    }

    /// Aborts the communicator. The rank's thread may be inside a call that waits for room in the device's queue, which
    /// there will not be: then only the end of the process helps, and the coordinator sees to the rest.
    fn end(&self, reason: String) {
        let deadline = Instant::now() + STUCK;
        while !self.handle.try_abort(&reason) {
            if Instant::now() >= deadline {
                std::process::abort();
            }
            thread::sleep(PERIOD);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is to be told as the reason of the group's end.
fn blame(rank: Option<u32>) -> AbortReason {
    rank.map_or(AbortReason::Other(STALLED), |rank| {
        AbortReason::TimedOut(Party::Rank(rank))
    })
}
