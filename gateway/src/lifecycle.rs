//! Serving, draining, stopped: what the server is doing, and which requests are still running.

use std::sync::Arc;

use phalanx_proto::{ErrorKind, RpcError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Shutdown was asked for: running requests go on, new ones are refused.
    Draining,
    /// The drain time is over: running requests end now.
    Stopped,
}

/// The server's phase. Its receivers are the running requests: that makes counting them and telling them one thing.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: watch::Sender<Phase>,
    prompts: Arc<Semaphore>,
}

impl Lifecycle {
    /// `running_prompts`: how many may run at once.
    pub(crate) fn new(running_prompts: usize) -> Self {
        Self {
            phase: watch::Sender::new(Phase::Serving),
            prompts: Arc::new(Semaphore::new(running_prompts)),
        }
    }

    /// Lets a request in; it counts as running until the ticket is dropped.
    pub(crate) fn admit(&self) -> Result<Ticket, RpcError> {
        // Subscribed before the look, so a drain that starts in between waits for this request or refuses it.
        let ticket = Ticket {
            phase: self.phase.subscribe(),
            prompts: Arc::clone(&self.prompts),
            running: None,
        };
        match *self.phase.borrow() {
            Phase::Serving => Ok(ticket),
            Phase::Draining | Phase::Stopped => Err(RpcError::new(
                ErrorKind::Unavailable,
                "the server is shutting down",
            )),
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.phase.borrow() != Phase::Serving
    }

    /// Number of running requests.
    pub(crate) fn running(&self) -> usize {
        self.phase.receiver_count()
    }

    pub(crate) fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
    }

    pub(crate) fn stop(&self) {
        self.phase.send_replace(Phase::Stopped);
    }

    /// Resolves when no request is running.
    pub(crate) async fn idle(&self) {
        self.phase.closed().await;
    }
}

/// A running request.
#[derive(Debug)]
pub(crate) struct Ticket {
    phase: watch::Receiver<Phase>,
    prompts: Arc<Semaphore>,
    running: Option<OwnedSemaphorePermit>,
}

impl Ticket {
    /// Counts the request's prompts as running for as long as the ticket lives.
    ///
    /// # Errors
    /// `QueueFull` when they would be too many.
    pub(crate) fn start(&mut self, prompts: usize) -> Result<(), RpcError> {
        let permit = u32::try_from(prompts)
            .ok()
            .and_then(|prompts| Arc::clone(&self.prompts).try_acquire_many_owned(prompts).ok());
        match permit {
            Some(permit) => {
                self.running = Some(permit);
                Ok(())
            }
            None => Err(RpcError::new(
                ErrorKind::QueueFull,
                "the gateway has too many requests running",
            )),
        }
    }

    /// Resolves, with the error to send, when the drain time is over.
    pub(crate) async fn stopped(&mut self) -> RpcError {
        // The sender outlives the connections; were it gone, the server would be too.
        let _ = self.phase.wait_for(|phase| *phase == Phase::Stopped).await;
        RpcError::new(
            ErrorKind::Unavailable,
            "the server shut down before the request was finished",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_refuses_new_requests_and_waits_for_running_ones() {
        let lifecycle = Lifecycle::new(1);
        let mut ticket = lifecycle.admit().expect("serving");
        lifecycle.drain();
        assert_eq!(
            lifecycle.admit().expect_err("draining").kind,
            ErrorKind::Unavailable
        );
        assert_eq!(lifecycle.running(), 1);
        lifecycle.stop();
        assert_eq!(ticket.stopped().await.kind, ErrorKind::Unavailable);
        drop(ticket);
        lifecycle.idle().await;
        assert_eq!(lifecycle.running(), 0);
    }
}
