//! A bounded pool for text work that would hold up the async threads.

use std::sync::Arc;

use phalanx_proto::{ErrorKind, RpcError};
use tokio::{sync::Semaphore, task};

/// Runs a few jobs at a time on Tokio's blocking threads, lets a bounded number wait, and refuses the rest.
#[derive(Clone, Debug)]
pub struct TextPool {
    /// One permit per job that runs or waits.
    admitted: Arc<Semaphore>,
    /// One permit per job that runs.
    running: Arc<Semaphore>,
}

impl TextPool {
    pub fn new(threads: usize, max_waiting: usize) -> Self {
        let threads = threads.max(1);
        Self {
            admitted: Arc::new(Semaphore::new(threads + max_waiting)),
            running: Arc::new(Semaphore::new(threads)),
        }
    }

    /// The result of `job`. Errors: `QueueFull`; the job's own. A caller that goes away while its job waits takes the
    /// job with it.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, RpcError> + Send + 'static,
    ) -> Result<T, RpcError> {
        let admitted = self
            .admitted
            .clone()
            .try_acquire_owned()
            .map_err(|_| RpcError::new(ErrorKind::QueueFull, "too many prompts wait to be tokenized"))?;
        let running = self
            .running
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| RpcError::new(ErrorKind::Unavailable, "the server is shutting down"))?;
        // The permits go with the job: a caller that stops waiting does not free the thread it still occupies.
        let job = task::spawn_blocking(move || {
            let _permits = (admitted, running);
            job()
        });
        match job.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => {
                Err(RpcError::new(ErrorKind::Internal, "text processing failed"))
            }
            Err(_) => Err(RpcError::new(
                ErrorKind::Unavailable,
                "the server is shutting down",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn refuses_what_would_wait_beyond_the_bound() {
        let pool = TextPool::new(1, 1);
        let (release, gate) = mpsc::channel::<()>();
        let (started, has_started) = tokio::sync::oneshot::channel();
        let first = tokio::spawn({
            let pool = pool.clone();
            async move {
                pool.run(move || {
                    let _ = started.send(());
                    let _ = gate.recv();
                    Ok(1)
                })
                .await
            }
        });
        has_started.await.expect("the first job runs");
        let second = tokio::spawn({
            let pool = pool.clone();
            async move { pool.run(|| Ok(2)).await }
        });
        while pool.admitted.available_permits() > 0 {
            task::yield_now().await;
        }
        let third = pool.run(|| Ok(3)).await.expect_err("one runs, one waits");
        assert_eq!(third.kind, ErrorKind::QueueFull);
        release.send(()).expect("the first job waits");
        assert_eq!(first.await.expect("no panic"), Ok(1));
        assert_eq!(second.await.expect("no panic"), Ok(2));
    }
}
