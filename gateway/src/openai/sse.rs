//! Streams: gRPC chunks in, server-sent events out.

use std::{collections::BTreeSet, convert::Infallible};

use axum::{
    body::{Body, Bytes},
    response::{IntoResponse, Response},
};
use futures_util::{
    Stream, StreamExt,
    stream::{BoxStream, SelectAll, once, unfold},
};
use http::{HeaderName, header};
use phalanx_proto::{
    RpcError,
    v1::{self, Choice, GenerateChunk, PromptOutput},
};
use serde::Serialize;

use super::{
    error::{ApiError, broken_reply},
    reply::{Head, finish_reason},
};
use crate::{backend::Chunks, lifecycle::Ticket};

const DONE: &[u8] = b"data: [DONE]\n\n";

/// How a route writes its events.
pub(crate) trait Events: Send + 'static {
    /// Appends the events for a piece of a choice.
    ///
    /// # Errors
    /// When the choice failed.
    fn piece(&mut self, out: &mut Vec<u8>, head: &Head, piece: Piece<'_>) -> Result<(), RpcError>;

    /// Appends the last event before the end, with the usage of the whole request, when that was asked for.
    fn usage(&mut self, out: &mut Vec<u8>, head: &Head, usage: v1::Usage);

    /// Appends the event that ends a stream that failed, after which comes what [`Events::end`] says.
    fn fail(&mut self, out: &mut Vec<u8>, error: RpcError) {
        out.extend_from_slice(b"data: ");
        ApiError::from(error).write_json(out);
        out.extend_from_slice(b"\n\n");
    }

    /// Appends what every stream ends with.
    fn end(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(DONE);
    }
}

/// A piece of a choice, whose index is already the one that the client sees.
#[derive(Clone, Copy)]
pub(crate) struct Piece<'a> {
    pub(crate) choice: &'a Choice,
    /// What is told of its prompt, with the choice's first piece.
    pub(crate) prompt: Option<&'a PromptOutput>,
    /// The running one, when it was asked for.
    pub(crate) usage: Option<v1::Usage>,
}

/// A request that is about to stream.
pub(crate) struct Streaming<E> {
    pub(crate) id: String,
    /// Choices of every prompt.
    pub(crate) n: u32,
    /// One stream for every prompt.
    pub(crate) prompts: Vec<Chunks>,
    pub(crate) events: E,
    pub(crate) ticket: Ticket,
}

impl<E: Events> Streaming<E> {
    /// Waits for the first chunk, so that an error before it has its own HTTP status; then answers 200.
    ///
    /// # Errors
    /// What the coordinator answered instead of a first chunk.
    pub(crate) async fn respond(self) -> Result<Response, ApiError> {
        let mut pump = Pump::new(self);
        let mut first = Vec::new();
        while first.is_empty() && !pump.done {
            match pump.receive().await? {
                Some((prompt, chunk)) => pump.accept(&mut first, prompt, chunk)?,
                None => pump.finish(&mut first)?,
            }
        }
        let rest = unfold(pump, |mut pump| async {
            let events = pump.next_events().await?;
            Some((events, pump))
        });
        Ok(response(once(async { Bytes::from(first) }).chain(rest)))
    }
}

/// Answers 200 with events as they come.
pub(crate) fn response(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // nginx holds a response back until its buffer is full unless told otherwise.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    let body = Body::from_stream(events.map(Ok::<_, Infallible>));
    (headers, body).into_response()
}

type Numbered = BoxStream<'static, (u32, Result<GenerateChunk, RpcError>)>;

/// Merges the prompts' streams. Dropping it, as hyper does when the client goes, cancels them at the coordinator.
struct Pump<E> {
    streams: SelectAll<Numbered>,
    events: E,
    ticket: Ticket,
    head: Head,
    n: u32,
    unfinished: u32,
    /// What is told of each prompt.
    prompts: Vec<PromptOutput>,
    /// Choices that have had a piece.
    begun: BTreeSet<u32>,
    usage: Option<v1::Usage>,
    done: bool,
}

impl<E: Events> Pump<E> {
    fn new(start: Streaming<E>) -> Self {
        let mut streams = SelectAll::new();
        let prompts = vec![PromptOutput::default(); start.prompts.len()];
        let mut unfinished = 0;
        for (prompt, chunks) in (0_u32..).zip(start.prompts) {
            streams.push(chunks.map(move |chunk| (prompt, chunk)).boxed());
            unfinished += start.n;
        }
        Self {
            streams,
            events: start.events,
            ticket: start.ticket,
            head: Head {
                id: start.id,
                created: 0,
                model: String::new(),
            },
            n: start.n,
            unfinished,
            prompts,
            begun: BTreeSet::new(),
            usage: None,
            done: false,
        }
    }

    /// The next chunk of any prompt, with the prompt's number. `None` when every stream has ended.
    async fn receive(&mut self) -> Result<Option<(u32, GenerateChunk)>, RpcError> {
        let next = tokio::select! {
            next = self.streams.next() => next,
            error = self.ticket.stopped() => return Err(error),
        };
        match next {
            Some((prompt, chunk)) => Ok(Some((prompt, chunk?))),
            None => Ok(None),
        }
    }

    fn accept(&mut self, out: &mut Vec<u8>, prompt: u32, chunk: GenerateChunk) -> Result<(), RpcError> {
        if self.head.model.is_empty() {
            self.head.created = chunk.created;
            self.head.model = chunk.model;
        }
        let Some(mut choice) = chunk.choice else {
            let usage = chunk.usage.unwrap_or_default();
            super::usage::add(self.usage.get_or_insert_default(), usage);
            return Ok(());
        };
        if choice.index >= self.n {
            return Err(broken_reply("a chunk of a choice that was not asked for"));
        }
        if finish_reason(&choice)?.is_some() {
            let left = self.unfinished.checked_sub(1);
            self.unfinished = left.ok_or_else(|| broken_reply("a choice that ends twice"))?;
        }
        let told = &mut self.prompts[prompt as usize];
        if let Some(first) = chunk.prompt {
            *told = first;
        }
        // Below MAX_CHOICES.
        choice.index += prompt * self.n;
        let piece = Piece {
            choice: &choice,
            prompt: self.begun.insert(choice.index).then_some(&*told),
            usage: chunk.usage,
        };
        self.events.piece(out, &self.head, piece)
    }

    /// At least one event, or `None` after the last.
    async fn next_events(&mut self) -> Option<Bytes> {
        let mut out = Vec::new();
        while out.is_empty() {
            if self.done {
                return None;
            }
            let received = self.receive().await;
            let accepted = match received {
                Ok(Some((prompt, chunk))) => self.accept(&mut out, prompt, chunk),
                Ok(None) => self.finish(&mut out),
                Err(error) => Err(error),
            };
            if let Err(error) = accepted {
                self.fail(&mut out, error);
            }
        }
        Some(out.into())
    }

    fn finish(&mut self, out: &mut Vec<u8>) -> Result<(), RpcError> {
        if self.unfinished > 0 {
            return Err(broken_reply("the stream ended before its choices did"));
        }
        if let Some(usage) = self.usage {
            self.events.usage(out, &self.head, usage);
        }
        self.end(out);
        Ok(())
    }

    fn fail(&mut self, out: &mut Vec<u8>, error: RpcError) {
        tracing::warn!(id = self.head.id, %error, "stream failed");
        self.events.fail(out, error);
        self.end(out);
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        self.events.end(out);
        self.done = true;
        // The other prompts of a request that failed need not go on.
        self.streams.clear();
    }
}

/// Appends `data: <json>` and an empty line.
pub(crate) fn event<T: Serialize>(out: &mut Vec<u8>, data: &T) {
    out.extend_from_slice(b"data: ");
    write_json(out, data);
    out.extend_from_slice(b"\n\n");
}

/// Appends `event: <name>` and the same.
pub(crate) fn named_event<T: Serialize>(out: &mut Vec<u8>, name: &str, data: &T) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
    event(out, data);
}

/// Appends compact JSON.
pub(crate) fn write_json<T: Serialize>(out: &mut Vec<u8>, data: &T) {
    // Fails only for maps with keys that are no strings and for a failing writer: neither exists here.
    if let Err(error) = serde_json::to_writer(out, data) {
        tracing::error!(%error, "a reply could not be written as JSON");
    }
}
