//! The OS threads that run the blocks of a grid, and the rows of a matrix product.

use std::{
    sync::{
        Arc, Condvar, LazyLock, Mutex,
        atomic::{AtomicI32, AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
    thread,
};

use crate::{
    handles::lock,
    settings::settings,
    status::{OUT_OF_MEMORY, SUCCESS, Status},
};

/// Runs items `[first, last)`.
pub(crate) type Body = Arc<dyn Fn(u64, u64) -> Status + Send + Sync>;

struct Job {
    body: Body,
    total: u64,
    chunk: u64,
    next: AtomicU64,
    error: AtomicI32,
    /// Helpers at work. A helper that comes when everything is taken does not count, so that nobody ever waits for a
    /// helper that is busy with another stream's kernel, which may spin for something this job produces.
    active: Mutex<usize>,
    idle: Condvar,
}

impl Job {
    fn work(&self) {
        loop {
            let first = self.next.fetch_add(self.chunk, Ordering::Relaxed);
            if first >= self.total || self.error.load(Ordering::Relaxed) != SUCCESS {
                return;
            }
            let status = (self.body)(first, (first + self.chunk).min(self.total));
            if status != SUCCESS {
                self.error.store(status, Ordering::Relaxed);
                self.next.fetch_max(self.total, Ordering::Relaxed); // no helper may start any more
            }
        }
    }

    fn help(&self) {
        {
            let mut active = lock(&self.active);
            if self.next.load(Ordering::Relaxed) >= self.total {
                return;
            }
            *active += 1;
        }
        self.work();
        *lock(&self.active) -= 1;
        self.idle.notify_all();
    }
}

static HELPERS: LazyLock<Vec<Sender<Arc<Job>>>> = LazyLock::new(|| {
    (1..settings().threads)
        .filter_map(|_| {
            let (sender, receiver) = channel::<Arc<Job>>();
            let run = move || {
                for job in receiver {
                    job.help();
                }
            };
            thread::Builder::new()
                .name("softgpu-pool".into())
                .spawn(run)
                .ok()?;
            Some(sender)
        })
        .collect()
});

/// Runs `body` over `[0, total)` in pieces of `chunk`, on the caller and the helpers. The first error ends it.
pub(crate) fn run(total: u64, chunk: u64, body: Body) -> Status {
    let job = Arc::new(Job {
        body,
        total,
        chunk,
        next: AtomicU64::new(0),
        error: AtomicI32::new(SUCCESS),
        active: Mutex::new(0),
        idle: Condvar::new(),
    });
    if total > chunk {
        for helper in HELPERS.iter() {
            if helper.send(job.clone()).is_err() {
                return OUT_OF_MEMORY; // its thread is gone
            }
        }
    }
    job.work();
    let mut active = lock(&job.active);
    while *active > 0 {
        active = job
            .idle
            .wait(active)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
    }
    job.error.load(Ordering::Relaxed)
}
