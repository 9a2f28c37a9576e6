//! Nobody waits for ever: a thread that looks after the collectives of a step, because the rank's own thread is then
//! blocked in the driver.
//!
//! A collective on the device cannot end while a peer is missing, and NCCL itself notices only some losses. The thread
//! looks at three things: whether the group has been aborted in shared memory, which is how the coordinator tells that
//! a process has died; NCCL's own errors; and the time since the step's first collective. Any of them aborts the
//! communicator, which ends its kernels and thereby wakes the rank's thread.

use std::fmt::Display;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use phalanx_shm::{AbortReason, Party, Segment};

use cudarc::nccl::result::{NcclError, NcclStatus};
use cudarc::nccl::sys;

use super::handle::{Handle, Poll};
use super::ledger::{Culprit, Ledger, Operation};
use crate::{KernelError, Result};

/// Between two looks while a step runs.
const PERIOD: Duration = Duration::from_millis(10);
/// After so long without a step the thread sleeps until there is one.
const REST: Duration = Duration::from_millis(200);

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
    /// The step's collectives are done; the rank exchanges messages, which have a limit of their own.
    Meeting,
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

    /// Makes a call on the communicator, which begins a step if none is under way.
    ///
    /// # Errors
    /// [`KernelError::Collective`], and then the group is over.
    pub(super) fn call(
        &self,
        operation: Operation,
        call: impl FnOnce(sys::ncclComm_t) -> Result<NcclStatus, NcclError>,
    ) -> Result<()> {
        self.begin(operation);
        self.capture(operation, call)
    }

    /// As [`call`](Self::call) while a graph is captured: the operation starts when the graph is launched.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub(super) fn capture(
        &self,
        operation: Operation,
        call: impl FnOnce(sys::ncclComm_t) -> Result<NcclStatus, NcclError>,
    ) -> Result<()> {
        let handle = &self.shared.handle;
        handle
            .call(operation.name, call)
            .map_err(|error| match handle.aborted() {
                Some(reason) => KernelError::Collective(reason),
                None => {
                    let reason = self.shared.failed(error);
                    handle.abort(&reason);
                    KernelError::Collective(reason)
                }
            })
    }

    /// The operations of a graph start, which begins a step if none is under way.
    ///
    /// # Errors
    /// [`KernelError::Collective`] if the group is over: a graph does not ask.
    pub(super) fn launch(&self, operations: impl IntoIterator<Item = Operation>) -> Result<()> {
        for operation in operations {
            self.begin(operation);
        }
        self.aborted()
            .map_or(Ok(()), |reason| Err(KernelError::Collective(reason)))
    }

    fn begin(&self, operation: Operation) {
        let mut watch = self.shared.lock();
        let before = watch.state;
        if !matches!(before, State::Step(_)) {
            watch.ledger.begin_step();
            watch.state = State::Step(Instant::now());
        }
        watch.ledger.start(operation);
        drop(watch);
        if before == State::Resting {
            self.shared.wake.notify_one();
        }
    }

    /// Why the communicator was aborted, if it was.
    pub(super) fn aborted(&self) -> Option<String> {
        self.shared.handle.aborted()
    }

    /// The rank's thread has come back from the device, the step's collectives are done, and it goes on to meet the
    /// others elsewhere.
    pub(super) fn meet(&self) {
        self.set(State::Meeting);
    }

    /// Until the next collective there is nothing to look after.
    pub(super) fn rest(&self) {
        self.set(State::Between(Instant::now()));
    }

    fn set(&self, state: State) {
        let mut watch = self.shared.lock();
        let before = std::mem::replace(&mut watch.state, state);
        drop(watch);
        if before == State::Resting {
            self.shared.wake.notify_one();
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
                State::Between(_) | State::Meeting | State::Step(_) => {
                    let waited = self.wake.wait_timeout(watch, PERIOD);
                    let (mut watch, _) = waited.unwrap_or_else(PoisonError::into_inner);
                    watch.ledger.beat();
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
            return Err(self.aborted(reason));
        }
        match self.handle.poll() {
            Poll::Settled | Poll::InProgress => {}
            Poll::Failed(error) => return Err(self.failed(error)),
            // By the rank's own thread, which knows why.
            Poll::Aborted(reason) => return Err(reason),
        }
        if since.elapsed() < self.limit {
            return Ok(());
        }
        let watch = self.lock();
        let (stall, own) = (watch.ledger.stall(), watch.ledger.rank());
        // Somebody must be named, and this rank's own device is as good as any.
        let blamed = stall.culprit.map_or(own, Culprit::rank);
        let said = format!("{} within {:?}", stall.predicate(), self.limit);
        watch.ledger.testify(blamed, &said);
        self.segment.abort(AbortReason::TimedOut(Party::Rank(blamed)));
        Err(format!("{stall} within {:?}", self.limit))
    }

    /// NCCL has given up: nobody else's collectives will end either. A rank that is behind is a suspicion and no more.
    fn failed(&self, error: impl Display) -> String {
        if let Some(reason) = self.segment.abort_reason() {
            return self.aborted(reason);
        }
        let watch = self.lock();
        let said = format!("{error}; {}", watch.ledger.stall());
        watch
            .ledger
            .testify(watch.ledger.rank(), &format!("reports: {said}"));
        // Unless a process has ended, of which the coordinator hears by itself, it is this rank that cannot go on.
        self.segment
            .abort(AbortReason::Lost(Party::Rank(watch.ledger.rank())));
        said
    }

    /// The group was aborted elsewhere.
    fn aborted(&self, reason: AbortReason) -> String {
        match self.lock().ledger.testimony(reason) {
            Some(said) => format!("the group was aborted: {reason}: {said}"),
            None => format!("the group was aborted: {reason}"),
        }
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
