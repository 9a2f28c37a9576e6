//! Responses that are made while nobody waits for them, and those who look on.

use std::sync::Arc;

use axum::body::Bytes;
use futures_util::{Stream, StreamExt, stream::unfold};
use phalanx_proto::{RpcError, v1::GenerateChunk};

use super::{
    draft::Draft,
    events::Log,
    store::{Key, Record, Store},
};
use crate::{backend::Chunks, lifecycle::Ticket};

/// A response that is being made.
pub(super) struct Job {
    pub(super) store: Arc<Store>,
    pub(super) key: Key,
    pub(super) record: Arc<Record>,
    pub(super) draft: Draft,
    pub(super) chunks: Chunks,
    pub(super) ticket: Ticket,
    /// Of a response that streams.
    pub(super) log: Option<Log>,
}

impl Job {
    /// Ends with the response, when it is cancelled, or with the server's drain time. Dropping the chunks then ends the
    /// request at the coordinator.
    pub(super) async fn run(mut self) {
        let record = Arc::clone(&self.record);
        while self.draft.reply.is_running() {
            let next = tokio::select! {
                next = self.chunks.next() => next,
                error = self.ticket.stopped() => Some(Err(error)),
                () = record.ended() => return,
            };
            if let Err(error) = self.step(next).and_then(|()| self.publish()) {
                tracing::warn!(id = self.key.id, %error, "a background response failed");
                self.draft.fail(&mut self.log, &error);
                // Nothing is running any more that would have to be told of a full store.
                let _ = self.publish();
            }
        }
    }

    fn step(&mut self, next: Option<Result<GenerateChunk, RpcError>>) -> Result<(), RpcError> {
        match next {
            Some(chunk) => self.draft.chunk(&mut self.log, &chunk?),
            None => self.draft.end(&mut self.log),
        }
    }

    /// Shows what is new. Errors: there is no room for it.
    fn publish(&mut self) -> Result<(), RpcError> {
        let events = self.log.as_mut().map(Log::take).unwrap_or_default();
        let mut bytes: usize = events.iter().map(Bytes::len).sum();
        let reply = &self.draft.reply;
        let reply = (self.record.reply().status != reply.status).then(|| Arc::new(reply.clone()));
        if let Some(reply) = reply.as_ref().filter(|reply| !reply.is_running()) {
            bytes += reply.bytes();
        }
        self.record.update(|state| {
            state.reply = reply.unwrap_or_else(|| Arc::clone(&state.reply));
            if let Some(kept) = &mut state.events {
                kept.extend(events);
            }
        });
        self.store.grow(&self.key, bytes)
    }
}

/// The events of a background response from this number on, until it has ended.
pub(super) fn follow(record: &Record, from: usize) -> impl Stream<Item = Bytes> + Send + use<> {
    unfold((record.watch(), from), |(mut watch, from)| async move {
        let (events, known) = {
            let kept = |events: &Option<Vec<Bytes>>| events.as_ref().map_or(0, Vec::len);
            let news = watch.wait_for(|state| kept(&state.events) > from || !state.reply.is_running());
            // Whoever makes the response does not go before it has ended.
            let state = news.await.ok()?;
            let fresh = state
                .events
                .as_ref()
                .and_then(|events| events.get(from..))
                .unwrap_or_default();
            (fresh.concat(), kept(&state.events))
        };
        (!events.is_empty()).then(|| (Bytes::from(events), (watch, known)))
    })
}
