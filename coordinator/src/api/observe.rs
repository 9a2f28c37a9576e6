//! What an operator learns of a request beside its metrics: a line when it ends, if that is wanted, and the spans of its
//! trace. Never a word of its text.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use phalanx_proto::{
    RpcError,
    spans::{Span, TRACEPARENT, TraceContext, Tracer, Value},
    v1::{self, FinishReason},
};
use tonic::metadata::MetadataMap;

use super::Envelope;
use crate::{engine_thread::Milestones, text::PreparedRequest};

/// Who wants to know.
#[derive(Clone, Debug, Default)]
pub struct Observers {
    /// A log line for every request.
    pub log_requests: bool,
    pub tracer: Tracer,
}

/// The caller's span, from the call's metadata.
pub(super) fn parent_of(metadata: &MetadataMap) -> Option<TraceContext> {
    TraceContext::parse(metadata.get(TRACEPARENT)?.to_str().ok()?)
}

/// A request being watched. Everybody is told when it is dropped, however it ended.
pub(super) struct Observation {
    observers: Observers,
    parent: Option<TraceContext>,
    request_id: String,
    model: String,
    parameters: Parameters,
    arrived: (SystemTime, Instant),
    /// Of the first sequence; none before it was queued.
    milestones: Option<Arc<Milestones>>,
    completion_tokens: u32,
    cached_tokens: u32,
    /// Of the choice that ended last.
    finish_reason: FinishReason,
    error: Option<String>,
}

struct Parameters {
    prompt_tokens: u32,
    n: u32,
    max_tokens: u32,
    temperature: f32,
    top_p: f32,
}

impl Observation {
    /// None if nobody wants to know.
    pub(super) fn start(
        observers: &Observers,
        parent: Option<TraceContext>,
        envelope: &Envelope,
        request: &PreparedRequest,
    ) -> Option<Self> {
        if !observers.log_requests && !observers.tracer.is_on() {
            return None;
        }
        let first = request.sequences.first()?;
        Some(Self {
            observers: observers.clone(),
            parent,
            request_id: envelope.request_id.clone(),
            model: envelope.model.clone(),
            parameters: Parameters {
                prompt_tokens: request.prompt_tokens,
                n: request.sequences.len() as u32,
                max_tokens: first.stop.max_tokens,
                temperature: first.sampling.temperature,
                top_p: first.sampling.top_p,
            },
            arrived: (SystemTime::now(), Instant::now()),
            milestones: None,
            completion_tokens: 0,
            cached_tokens: 0,
            finish_reason: FinishReason::Unspecified,
            error: None,
        })
    }

    /// `milestones` are none of a sequence that was over before it began.
    pub(super) fn queued(&mut self, milestones: Option<Arc<Milestones>>) {
        self.milestones = milestones;
    }

    pub(super) fn piece(&mut self, choice: &v1::Choice, cached_tokens: u32) {
        self.completion_tokens += choice.token_ids.len() as u32;
        self.cached_tokens = cached_tokens;
        if choice.finish_reason() != FinishReason::Unspecified {
            self.finish_reason = choice.finish_reason();
        }
    }

    pub(super) fn failed(&mut self, error: &RpcError) {
        self.error = Some(error.message.clone());
    }

    /// As OpenAI names it; a request that has no reason was given up by its client.
    fn finish_reason(&self) -> &'static str {
        match self.finish_reason {
            _ if self.error.is_some() => "error",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Repetition => "repetition",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::Error => "error",
            FinishReason::Abort | FinishReason::Unspecified => "abort",
        }
    }

    fn log(&self, times: &Times) {
        let Parameters {
            prompt_tokens,
            n,
            max_tokens,
            temperature,
            top_p,
        } = self.parameters;
        tracing::info!(
            request_id = self.request_id,
            prompt_tokens,
            cached_tokens = self.cached_tokens,
            completion_tokens = self.completion_tokens,
            n,
            max_tokens,
            temperature,
            top_p,
            finish_reason = self.finish_reason(),
            error = self.error,
            queue_ms = milliseconds(times.queue()),
            ttft_ms = milliseconds(times.to_first_token()),
            e2e_ms = milliseconds(Some(times.end - times.arrived)),
            "request ended"
        );
    }

    /// The names are those of OpenTelemetry's conventions for generative AI, and of vLLM's own spans.
    fn attributes(&self, times: &Times) -> Vec<(&'static str, Value)> {
        let parameters = &self.parameters;
        let mut attributes: Vec<(&'static str, Value)> = vec![
            ("gen_ai.operation.name", "text_completion".to_owned().into()),
            ("gen_ai.response.model", self.model.clone().into()),
            ("gen_ai.response.id", self.request_id.clone().into()),
            (
                "gen_ai.response.finish_reasons",
                self.finish_reason().to_owned().into(),
            ),
            ("gen_ai.request.id", self.request_id.clone().into()),
            ("gen_ai.request.n", parameters.n.into()),
            ("gen_ai.request.max_tokens", parameters.max_tokens.into()),
            (
                "gen_ai.request.temperature",
                f64::from(parameters.temperature).into(),
            ),
            ("gen_ai.request.top_p", f64::from(parameters.top_p).into()),
            ("gen_ai.usage.num_sequences", parameters.n.into()),
            ("gen_ai.usage.input_tokens", parameters.prompt_tokens.into()),
            ("gen_ai.usage.output_tokens", self.completion_tokens.into()),
            ("gen_ai.usage.prompt_tokens", parameters.prompt_tokens.into()),
            ("gen_ai.usage.completion_tokens", self.completion_tokens.into()),
            ("gen_ai.usage.cached_tokens", self.cached_tokens.into()),
            (
                "gen_ai.latency.e2e",
                (times.end - times.arrived).as_secs_f64().into(),
            ),
        ];
        let latencies = [
            ("gen_ai.latency.time_in_queue", times.queue()),
            ("gen_ai.latency.time_to_first_token", times.to_first_token()),
            ("gen_ai.latency.time_in_model_prefill", times.prefill()),
            ("gen_ai.latency.time_in_model_decode", times.decode()),
        ];
        let known = latencies
            .into_iter()
            .filter_map(|(name, took)| Some((name, took?.as_secs_f64().into())));
        attributes.extend(known);
        attributes
    }

    fn trace(&self, times: &Times) {
        let tracer = &self.observers.tracer;
        let context = TraceContext::below(self.parent.as_ref());
        let at = |instant: Instant| self.arrived.0 + (instant - times.arrived);
        let part = |name: &'static str, start: Instant, end: Option<Instant>| {
            tracer.record(Span {
                name: name.into(),
                is_server: false,
                context: context.child(),
                parent: Some(context.span_id),
                start: at(start),
                end: at(end.unwrap_or(times.end)),
                attributes: Vec::new(),
                error: None,
            });
        };
        part("queue", times.arrived, times.started);
        if let Some(started) = times.started {
            part("prefill", started, times.first_token);
        }
        if let Some(first_token) = times.first_token {
            part("decode", first_token, None);
        }
        tracer.record(Span {
            name: "llm_request".into(),
            is_server: true,
            context,
            parent: self.parent.map(|parent| parent.span_id),
            start: self.arrived.0,
            end: at(times.end),
            attributes: self.attributes(times),
            error: self.error.clone(),
        });
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        let milestones = self.milestones.as_deref();
        let times = Times {
            arrived: self.arrived.1,
            started: milestones.and_then(Milestones::started),
            first_token: milestones.and_then(Milestones::first_token),
            end: Instant::now(),
        };
        if self.observers.log_requests {
            self.log(&times);
        }
        if self.observers.tracer.is_on() {
            self.trace(&times);
        }
    }
}

/// When what happened to a request; none for what did not.
struct Times {
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    end: Instant,
}

impl Times {
    fn queue(&self) -> Option<Duration> {
        Some(self.started?.saturating_duration_since(self.arrived))
    }
    fn to_first_token(&self) -> Option<Duration> {
        Some(self.first_token?.saturating_duration_since(self.arrived))
    }
    fn prefill(&self) -> Option<Duration> {
        Some(self.first_token?.saturating_duration_since(self.started?))
    }
    fn decode(&self) -> Option<Duration> {
        Some(self.end.saturating_duration_since(self.first_token?))
    }
}

fn milliseconds(took: Option<Duration>) -> Option<f64> {
    took.map(|took| took.as_secs_f64() * 1e3)
}
