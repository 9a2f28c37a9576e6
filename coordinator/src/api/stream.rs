//! One running request: the events of its sequences become chunks, merged in the order they happen.

use std::{future::poll_fn, pin::Pin, sync::Arc, task::Poll};

use phalanx_proto::{ErrorKind, RpcError, v1};
use tokio::{
    sync::mpsc,
    time::{Sleep, sleep_until},
};

use super::{
    Envelope,
    choice::{Choice, Queued},
    inference::Parts,
    observe::Observation,
    prompt::PromptReport,
    registry::Registration,
};
use crate::{engine::FinishReason, engine_thread::StreamEvent, metrics::Metrics, text::PreparedRequest};

/// Tokens that are put into one chunk when a client reads more slowly than tokens are made.
const MAX_TOKENS_PER_CHUNK: usize = 256;

/// A running request. It makes progress only while its client reads; dropping it aborts its sequences.
pub(super) struct RequestStream {
    envelope: Envelope,
    registration: Registration,
    choices: Vec<Choice>,
    prompt: PromptReport,
    /// The choice that is looked at first, so that a fast one does not starve the others.
    turn: usize,
    prompt_tokens: u32,
    cached_tokens: u32,
    continuous_usage: bool,
    /// The usage is still to be sent, as the last chunk.
    final_usage: bool,
    /// Still to be sent, instead of the usage.
    failure: Option<RpcError>,
    /// Tells the operator of it when it ends.
    observation: Option<Observation>,
    /// Where its end is still to be recorded.
    metrics: Option<Arc<Metrics>>,
    /// Ends at the deadline.
    time: Option<Pin<Box<Sleep>>>,
}

enum Wake {
    Aborted,
    TimeIsUp(RpcError),
    /// Of the choice with this index; none if the engine is gone.
    Event(usize, Option<StreamEvent>),
}

impl RequestStream {
    /// Queues the request's sequences; all of them or none. Errors: the engine's.
    pub(super) fn start(
        mut request: PreparedRequest,
        envelope: Envelope,
        (registration, mut observation): (Registration, Option<Observation>),
        parts: &Parts,
    ) -> Result<Self, RpcError> {
        // All are submitted before anything is set up for them: a full queue must not cost more than the refusal.
        let sequences = std::mem::take(&mut request.sequences).into_iter();
        let queued = sequences
            .zip(std::mem::take(&mut request.ended_after))
            .map(|(sequence, ended_after)| Queued::submit(sequence, ended_after, &parts.engine));
        let queued = queued.collect::<Result<Vec<_>, RpcError>>();
        match (&mut observation, &queued) {
            (Some(observation), Ok(queued)) => {
                observation.queued(queued.first().and_then(Queued::milestones))
            }
            (Some(observation), Err(error)) => observation.failed(error),
            (None, _) => {}
        }
        let prompt = PromptReport::new(&mut request, parts.text.tokenizer());
        let choices = queued?.into_iter().enumerate();
        let choices =
            choices.map(|(index, queued)| Choice::new(&request, index, queued, parts.text.tokenizer()));
        let mut stream = Self {
            choices: choices.collect(),
            metrics: Some(parts.metrics.clone()),
            observation,
            time: registration
                .deadline
                .map(|deadline| Box::pin(sleep_until(deadline.at))),
            envelope,
            registration,
            prompt,
            turn: 0,
            prompt_tokens: request.prompt_tokens,
            cached_tokens: 0,
            continuous_usage: request.output.continuous_usage,
            final_usage: request.output.include_usage,
            failure: None,
        };
        // A prompt of one token has nothing to be scored.
        if stream.prompt.is_complete() {
            stream.echo();
        }
        Ok(stream)
    }

    /// The next chunk; none after the last. An error is the last; what was made before it comes first.
    pub(super) async fn next(&mut self) -> Option<Result<v1::GenerateChunk, RpcError>> {
        loop {
            if let Some(chunk) = self.take_piece() {
                return Some(Ok(chunk));
            }
            if self.choices.iter().all(|choice| choice.submission.is_none()) {
                break;
            }
            match self.wake().await {
                Wake::Aborted => self.abort(),
                Wake::TimeIsUp(error) => self.fail(error),
                Wake::Event(index, event) => {
                    if let Err(error) = self.handle(index, event) {
                        self.fail(error);
                    }
                }
            }
        }
        let metrics = self.metrics.take();
        if let Some(error) = self.failure.take() {
            return Some(Err(error));
        }
        if let Some(metrics) = metrics {
            metrics.request_completed(self.choices.iter().map(|choice| choice.assembler.tokens()));
        }
        std::mem::take(&mut self.final_usage).then(|| Ok(self.envelope.chunk(None, Some(self.usage()))))
    }

    /// The whole reply at once.
    pub(super) async fn collect(mut self) -> Result<v1::GenerateResponse, RpcError> {
        let mut choices: Vec<v1::Choice> = (0..self.choices.len() as u32)
            .map(|index| v1::Choice {
                index,
                ..v1::Choice::default()
            })
            .collect();
        let mut prompt = None;
        while let Some(chunk) = self.next().await {
            let chunk = chunk?;
            prompt = prompt.or(chunk.prompt);
            let Some(piece) = chunk.choice else { continue };
            append(&mut choices[piece.index as usize], piece);
        }
        let usage = self.usage();
        Ok(v1::GenerateResponse {
            prompt,
            ..self.envelope.response(choices, usage)
        })
    }

    async fn wake(&mut self) -> Wake {
        poll_fn(|context| {
            if let Poll::Ready(Ok(())) = Pin::new(&mut self.registration.aborted).poll(context) {
                return Poll::Ready(Wake::Aborted);
            }
            if let (Some(time), Some(deadline)) = (&mut self.time, &self.registration.deadline)
                && time.as_mut().poll(context).is_ready()
            {
                return Poll::Ready(Wake::TimeIsUp(deadline.error()));
            }
            let count = self.choices.len();
            for index in (0..count).map(|offset| (self.turn + offset) % count) {
                let Some(submission) = &mut self.choices[index].submission else {
                    continue;
                };
                if let Poll::Ready(event) = submission.events.poll_recv(context) {
                    self.turn = (index + 1) % count;
                    return Poll::Ready(Wake::Event(index, event));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Feeds `event`, and what else the choice has ready, to its assembler.
    fn handle(&mut self, index: usize, mut event: Option<StreamEvent>) -> Result<(), RpcError> {
        let choice = &mut self.choices[index];
        loop {
            match event {
                Some(StreamEvent::Started { cached_tokens }) if index == 0 => {
                    self.cached_tokens = cached_tokens;
                }
                Some(StreamEvent::Started { .. }) => {}
                Some(StreamEvent::PromptLogprobs(scored)) => {
                    self.prompt.extend(scored);
                    if self.prompt.is_complete() {
                        self.echo();
                        return Ok(());
                    }
                }
                Some(StreamEvent::Token(sampled)) => choice.assembler.token(&sampled),
                Some(StreamEvent::Finished(reason)) => choice.assembler.finish(reason),
                Some(StreamEvent::Failed(error)) => return Err(error),
                None => {
                    return Err(RpcError::new(
                        ErrorKind::Unavailable,
                        "the engine stopped before the request was finished",
                    ));
                }
            }
            if choice.stop_if_finished() {
                return Ok(());
            }
            if choice.assembler.piece_tokens() >= MAX_TOKENS_PER_CHUNK {
                return Ok(());
            }
            let Some(submission) = &mut choice.submission else {
                return Ok(());
            };
            event = match submission.events.try_recv() {
                Ok(event) => Some(event),
                Err(mpsc::error::TryRecvError::Empty) => return Ok(()),
                Err(mpsc::error::TryRecvError::Disconnected) => None,
            };
        }
    }

    /// The prompt's scores are complete: every choice begins with them, if it echoes.
    fn echo(&mut self) {
        let echoed = self.prompt.echoed();
        for choice in &mut self.choices {
            choice.assembler.echo(echoed.iter().cloned());
        }
    }

    fn abort(&mut self) {
        if !self.prompt.is_complete() {
            self.prompt.give_up();
            self.echo();
        }
        for choice in &mut self.choices {
            if choice.submission.take().is_some() {
                choice.assembler.finish(FinishReason::Abort);
            }
        }
    }

    fn fail(&mut self, error: RpcError) {
        for choice in &mut self.choices {
            choice.submission = None;
        }
        self.final_usage = false;
        if let Some(observation) = &mut self.observation {
            observation.failed(&error);
        }
        self.failure = Some(error);
    }

    fn take_piece(&mut self) -> Option<v1::GenerateChunk> {
        if !self.prompt.is_complete() {
            return None;
        }
        let piece = self
            .choices
            .iter_mut()
            .find_map(|choice| choice.assembler.take())?;
        if let Some(observation) = &mut self.observation {
            observation.piece(&piece, self.cached_tokens);
        }
        let usage = self.continuous_usage.then(|| self.usage());
        Some(v1::GenerateChunk {
            prompt: self.prompt.take(),
            ..self.envelope.chunk(Some(piece), usage)
        })
    }

    fn usage(&self) -> v1::Usage {
        v1::Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.choices.iter().map(|choice| choice.assembler.tokens()).sum(),
            cached_tokens: self.cached_tokens,
        }
    }
}

/// Puts the next piece of a choice to those before it.
fn append(choice: &mut v1::Choice, piece: v1::Choice) {
    choice.text.push_str(&piece.text);
    choice.token_ids.extend(piece.token_ids);
    choice.logprobs.extend(piece.logprobs);
    choice.finish_reason = piece.finish_reason;
    choice.stop_reason = piece.stop_reason;
    if let Some(reasoning) = piece.reasoning {
        choice.reasoning.get_or_insert_default().push_str(&reasoning);
    }
    for call in piece.tool_calls {
        match choice
            .tool_calls
            .last_mut()
            .filter(|last| last.index == call.index)
        {
            Some(last) => last.arguments.push_str(&call.arguments),
            None => choice.tool_calls.push(call),
        }
    }
}
