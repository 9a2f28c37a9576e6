//! Streams that outlive their replica.
//!
//! The tokens that a client has got decide all that follows: the position of each draw, the penalties, the text that is
//! held back for a stop string or a character's end. So the request and those tokens, sent to another replica, give the
//! rest of the very same stream.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream::unfold};
use phalanx_proto::{ErrorKind, RpcError, v1::GenerateChunk};
use tokio::time::sleep;

use super::{Replicas, affinity::Affinity, call::Call, ledger::Ledger, replica::Running};
use crate::backend::Chunks;

/// Losses in a row over which a stream makes no progress: it may be what kills its replicas.
const MAX_LOSSES: u32 = 3;
/// How long a stream waits for a replica that can take it, and how often it looks.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);

/// A stream, and what it takes to go on with it elsewhere.
pub(super) struct Migrating {
    route: Route,
    call: Call,
    ledger: Ledger,
    /// None after the end.
    source: Option<Source>,
    losses: u32,
    /// The client has got a chunk.
    begun: bool,
}

/// A replica's part of the stream.
struct Source {
    chunks: Chunks,
    running: Running,
}

/// The way to a replica.
struct Route {
    replicas: Replicas,
    affinity: Affinity,
}

impl Migrating {
    /// Begins `call` on the first replica that takes it.
    ///
    /// # Errors
    /// As of the last replica that was asked.
    pub(super) async fn start(replicas: Replicas, mut call: Call) -> Result<Chunks, RpcError> {
        call.fix_seed();
        let route = Route {
            affinity: replicas.affinity(&call),
            replicas,
        };
        let stream = Self {
            source: Some(route.open(&call, &mut Vec::new()).await?),
            ledger: Ledger::new(call.n()),
            route,
            call,
            losses: 0,
            begun: false,
        };
        let chunks = unfold(stream, |mut stream| async {
            let chunk = stream.next().await?;
            Some((chunk, stream))
        });
        Ok(chunks.boxed())
    }

    async fn next(&mut self) -> Option<Result<GenerateChunk, RpcError>> {
        loop {
            let source = self.source.as_mut()?;
            let error = match source.chunks.next().await {
                Some(Ok(mut chunk)) => {
                    // Each replica tells of the prompt as if it were the first.
                    if std::mem::replace(&mut self.begun, true) {
                        chunk.prompt = None;
                    }
                    if self.ledger.record(&chunk) {
                        self.losses = 0;
                    }
                    return Some(Ok(chunk));
                }
                Some(Err(error)) => error,
                None => {
                    self.source = None;
                    return None;
                }
            };
            let lost = self.source.take()?.running;
            if !matches!(error.kind, ErrorKind::Unavailable | ErrorKind::WorkerLost) {
                return Some(Err(error));
            }
            match self.go_on_without(&lost, error).await {
                Ok(source) => self.source = source,
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Another source of the rest; none if nothing is left to come.
    ///
    /// # Errors
    /// The loss, if nobody can go on.
    async fn go_on_without(&mut self, lost: &Running, error: RpcError) -> Result<Option<Source>, RpcError> {
        lost.replica().failed(&error);
        if self.ledger.is_complete() && !self.call.ends_with_usage() {
            return Ok(None);
        }
        self.losses += 1;
        let resume = self.ledger.resume().filter(|_| self.losses <= MAX_LOSSES);
        let moved = match resume {
            Some(resume) => {
                let call = self.call.resumed(resume);
                self.route.find(&call, lost.replica().id()).await
            }
            None => Err(RpcError::new(error.kind, "it cannot be tried again")),
        };
        self.route.replicas.shared.metrics.migrated(moved.is_ok());
        let (from, id) = (lost.replica().address(), self.call.id());
        match moved {
            Ok(source) => {
                tracing::info!(id, from, to = source.running.replica().address(), %error, "stream migrated");
                Ok(Some(source))
            }
            Err(reason) => {
                tracing::warn!(id, from, %error, %reason, "stream lost");
                let message = format!(
                    "{}; no other replica could go on: {}",
                    error.message, reason.message
                );
                Err(RpcError::new(error.kind, message))
            }
        }
    }
}

impl Route {
    /// The first replica that takes `call`.
    async fn open(&self, call: &Call, avoid: &mut Vec<u64>) -> Result<Source, RpcError> {
        let ask = |backend| {
            let call = call.clone();
            async move { call.stream(&backend).await }
        };
        let (chunks, running) = self.replicas.attempt(&self.affinity, avoid, ask).await?;
        Ok(Source { chunks, running })
    }

    /// Waits a little for a replica to take `call`: first of all the others, then of those that may be asked again.
    async fn find(&self, call: &Call, lost: u64) -> Result<Source, RpcError> {
        let deadline = Instant::now() + PATIENCE;
        let mut avoid = vec![lost];
        loop {
            match self.open(call, &mut avoid).await {
                Err(error) if error.kind.is_retryable() && Instant::now() < deadline => sleep(PAUSE).await,
                outcome => return outcome,
            }
            avoid.clear();
        }
    }
}
