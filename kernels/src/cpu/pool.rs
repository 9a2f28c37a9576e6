//! A rank's threads: short parallel loops with microsecond start, and no cost while idle.
//!
//! The caller publishes a job and works on it too; the other threads join if they are quick enough. A thread that sleeps
//! through a whole job delays nobody: a job is over when its tasks are done, not when every thread has seen it.
//!
//! Tasks are handed out one by one through `ticket`, a job number and the tasks left of it in one word. A job's fields
//! are replaced only after all its tasks are over, so a thread that claims a task by compare-and-swap has thereby proved
//! that the fields it read are that job's.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::{KernelError, Result};

/// Polls before a waiting thread goes to sleep. About 26 µs, which is what falling asleep and waking up costs.
const MAX_POLLS: u32 = 1000;
/// The least a thread polls when spinning has not paid off lately.
const MIN_POLLS: u32 = 50;
/// Every so many waits the full budget is tried again.
const PROBE_EVERY: u32 = 32;

/// Most threads of a pool, the caller included.
pub const MAX_THREADS: usize = 256;

type Call = unsafe fn(*const (), usize);

/// What the threads share. `call`, `context` and `tasks` describe the job whose number `ticket` holds.
struct Shared {
    /// Job number (high half) and how many of its tasks nobody has claimed yet (low half).
    ticket: AtomicU64,
    call: AtomicPtr<()>,
    context: AtomicPtr<()>,
    tasks: AtomicUsize,
    /// Tasks of the current job that are over.
    finished: AtomicUsize,
    stop: AtomicBool,
    /// Set while a job runs: a second one at the same time, or from within a task, runs on its caller alone.
    busy: AtomicBool,
    sleeping: Vec<AtomicBool>,
    /// Whether the caller sleeps on `done`.
    caller_sleeps: AtomicBool,
    /// First panic of the current job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    done: Condvar,
}

/// Threads of one rank, the caller included.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Polls adapt: a wait that ended in sleep halves the budget, one that paid off raises it by a quarter.
struct Spinner {
    polls: u32,
    waits: u32,
}

impl Spinner {
    const fn new() -> Self {
        Self {
            polls: MAX_POLLS,
            waits: 0,
        }
    }

    /// Polls `ready`; whether it came true within the budget.
    fn wait(&mut self, ready: impl Fn() -> bool) -> bool {
        self.waits = self.waits.wrapping_add(1);
        let probe = self.waits.is_multiple_of(PROBE_EVERY);
        let budget = if probe { MAX_POLLS } else { self.polls };
        for _ in 0..budget {
            if ready() {
                self.polls = if probe {
                    MAX_POLLS
                } else {
                    (budget + budget / 4).min(MAX_POLLS)
                };
                return true;
            }
            std::hint::spin_loop();
        }
        self.polls = (self.polls / 2).max(MIN_POLLS);
        false
    }
}

const fn job_of(ticket: u64) -> u32 {
    (ticket >> 32) as u32
}

/// # Safety
/// `context` points to a live `F`.
unsafe fn trampoline<F: Fn(usize) + Sync>(context: *const (), task: usize) {
    // SAFETY: the caller's promise.
    unsafe { (*context.cast::<F>())(task) }
}

impl Shared {
    fn lock_panic(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on the current job until no task of it is left.
    fn work(&self) {
        loop {
            let ticket = self.ticket.load(Acquire);
            let left = (ticket & u64::from(u32::MAX)) as usize;
            if left == 0 {
                return;
            }
            let (call, context) = (self.call.load(Relaxed), self.context.load(Relaxed));
            let tasks = self.tasks.load(Relaxed);
            // Success proves that this job had an unclaimed task all along, so the three fields are its own.
            // (A job number comes back after 2^32 jobs; no thread is held up that long between two instructions.)
            if self
                .ticket
                .compare_exchange_weak(ticket, ticket - 1, Acquire, Relaxed)
                .is_err()
            {
                continue;
            }
            let task = tasks - left;
            // SAFETY: `call` was stored by `run` from a `Call`; the two have the same size and validity.
            let call = unsafe { std::mem::transmute::<*mut (), Call>(call) };
            // SAFETY: `run` keeps the closure alive until all claimed tasks are finished, and this one is not.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { call(context, task) }));
            if let Err(panic) = result {
                self.lock_panic().get_or_insert(panic);
            }
            self.finish_task(tasks);
        }
    }

    /// Counts a task of a job of `tasks`; wakes the caller after the last one.
    fn finish_task(&self, tasks: usize) {
        if self.finished.fetch_add(1, SeqCst) + 1 == tasks && self.caller_sleeps.load(SeqCst) {
            // The lock makes sure the caller is either before its check of `finished` or asleep.
            drop(self.lock_panic());
            self.done.notify_one();
        }
    }

    fn worker(&self, index: usize) {
        let mut spinner = Spinner::new();
        let mut seen = 0;
        loop {
            let fresh = || job_of(self.ticket.load(Acquire)) != seen;
            if !spinner.wait(fresh) {
                self.sleeping[index].store(true, SeqCst);
                while job_of(self.ticket.load(SeqCst)) == seen {
                    thread::park();
                }
                self.sleeping[index].store(false, SeqCst);
            }
            seen = job_of(self.ticket.load(Acquire));
            if self.stop.load(Acquire) {
                return;
            }
            self.work();
        }
    }
}

impl Pool {
    /// `threads` counts the caller. Threads inherit the CPU affinity of the thread that calls this.
    ///
    /// # Errors
    /// [`KernelError::Device`] if `threads` is 0 or above [`MAX_THREADS`], or the system refuses a thread.
    pub fn new(threads: usize) -> Result<Self> {
        if threads == 0 || threads > MAX_THREADS {
            let message = format!("{threads} threads asked for; 1 to {MAX_THREADS} are possible");
            return Err(KernelError::Device {
                op: "thread pool",
                message,
            });
        }
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            call: AtomicPtr::new(std::ptr::null_mut()),
            context: AtomicPtr::new(std::ptr::null_mut()),
            tasks: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            sleeping: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            caller_sleeps: AtomicBool::new(false),
            panic: Mutex::new(None),
            done: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(threads - 1),
        };
        for index in 0..threads - 1 {
            let shared = pool.shared.clone();
            let builder = thread::Builder::new().name(format!("kernel-{}", index + 1));
            let handle =
                builder
                    .spawn(move || shared.worker(index))
                    .map_err(|error| KernelError::Device {
                        op: "thread pool",
                        message: format!("cannot start a thread: {error}"),
                    })?;
            pool.workers.push(handle);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(i)` for every `i` in `0..tasks`, each exactly once, on some thread of the pool, and returns when all are
    /// done. Which thread runs a task, and in which order, is not determined. A call from within a task, or while
    /// another thread's call is running, does all its work on the calling thread.
    ///
    /// # Panics
    /// A panic in `f` reaches the caller once all other tasks are over; it does not harm the pool.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, f: F) {
        let shared = &*self.shared;
        let alone = self.workers.is_empty() || tasks <= 1 || tasks > u32::MAX as usize;
        if alone || shared.busy.swap(true, Acquire) {
            (0..tasks).for_each(f);
            return;
        }
        shared.finished.store(0, Relaxed);
        shared.call.store(trampoline::<F> as *mut (), Relaxed);
        shared.context.store((&raw const f).cast_mut().cast(), Relaxed);
        shared.tasks.store(tasks, Relaxed);
        self.publish(tasks as u32, tasks - 1);
        shared.work();
        self.join(tasks);
        let panic = shared.lock_panic().take();
        shared.busy.store(false, Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Publishes the next job number with `tasks` tasks and wakes up to `helpers` sleeping threads.
    fn publish(&self, tasks: u32, helpers: usize) {
        let job = job_of(self.shared.ticket.load(Relaxed)).wrapping_add(1);
        self.shared
            .ticket
            .store(u64::from(job) << 32 | u64::from(tasks), SeqCst);
        let sleepers = self.shared.sleeping.iter().zip(&self.workers);
        for (sleeping, worker) in sleepers.take(helpers) {
            if sleeping.load(SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Waits until all tasks are over: claimed tasks are running, so this takes no longer than one task.
    fn join(&self, tasks: usize) {
        let shared = &*self.shared;
        let over = || shared.finished.load(Acquire) == tasks;
        if Spinner::new().wait(over) {
            return;
        }
        let mut guard = shared.lock_panic();
        shared.caller_sleeps.store(true, SeqCst);
        while shared.finished.load(SeqCst) != tasks {
            guard = shared.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        shared.caller_sleeps.store(false, SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Release);
        self.publish(0, self.workers.len());
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so there is no other error to report.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 3, 64, 1000] {
                for _ in 0..20 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, |i| {
                        counts[i].fetch_add(1, Relaxed);
                    });
                    assert!(
                        counts.iter().all(|c| c.load(Relaxed) == 1),
                        "{threads} threads, {tasks} tasks"
                    );
                }
            }
        }
    }

    #[test]
    fn short_jobs_in_quick_succession_see_their_own_closure() {
        let pool = Pool::new(4).unwrap();
        for round in 0..20_000_usize {
            let sum = AtomicUsize::new(0);
            let tasks = 2 + round % 5;
            pool.run(tasks, |i| {
                sum.fetch_add(round * 10 + i, Relaxed);
            });
            assert_eq!(sum.into_inner(), tasks * round * 10 + tasks * (tasks - 1) / 2);
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(3).unwrap();
        for bad in 0..8 {
            let ran = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, |i| {
                    ran.fetch_add(1, Relaxed);
                    assert!(i != bad, "task {i} fails");
                });
            }));
            let message = *result
                .expect_err("the panic is passed on")
                .downcast::<String>()
                .unwrap();
            assert!(message.contains(&format!("task {bad} fails")), "{message}");
            assert_eq!(ran.into_inner(), 8);
        }
        let ran = AtomicUsize::new(0);
        pool.run(5, |_| {
            ran.fetch_add(1, Relaxed);
        });
        assert_eq!(ran.into_inner(), 5);
    }

    #[test]
    fn nested_and_concurrent_calls_complete() {
        let pool = Pool::new(2).unwrap();
        let ran = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(4, |_| {
                            pool.run(3, |_| {
                                ran.fetch_add(1, Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(ran.into_inner(), 3 * 200 * 12);
    }

    #[test]
    fn limits_are_errors() {
        assert!(Pool::new(0).is_err());
        assert!(Pool::new(MAX_THREADS + 1).is_err());
    }
}
