//! The times of one request, as vLLM defines them.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use crate::{
    engine::FinishReason,
    metrics::{Metrics, RequestStats},
};

/// The engine's side of a sequence's times, for its owner to read.
#[derive(Debug, Default)]
pub(crate) struct Milestones {
    started: OnceLock<Instant>,
    first_token: OnceLock<Instant>,
}

impl Milestones {
    /// When the turn began that planned its first step.
    pub(crate) fn started(&self) -> Option<Instant> {
        self.started.get().copied()
    }
    pub(crate) fn first_token(&self) -> Option<Instant> {
        self.first_token.get().copied()
    }
}

pub(super) struct Lifecycle {
    milestones: Arc<Milestones>,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    num_prompt_tokens: usize,
    num_cached_tokens: usize,
    num_generation_tokens: usize,
    num_preemptions: u32,
    max_tokens: u32,
    /// False for the server's own sequences.
    measured: bool,
}

impl Lifecycle {
    pub(super) fn new(num_prompt_tokens: usize, max_tokens: u32) -> Self {
        Self {
            milestones: Arc::default(),
            submitted: Instant::now(),
            started: None,
            first_token: None,
            last_token: None,
            num_prompt_tokens,
            num_cached_tokens: 0,
            num_generation_tokens: 0,
            num_preemptions: 0,
            max_tokens,
            measured: true,
        }
    }

    /// Counts in no metric of requests and tokens.
    pub(super) fn unmeasured(mut self) -> Self {
        self.measured = false;
        self
    }

    pub(super) fn milestones(&self) -> Arc<Milestones> {
        self.milestones.clone()
    }

    pub(super) fn is_measured(&self) -> bool {
        self.measured
    }

    /// `now` is when the turn that planned the first step began.
    pub(super) fn start(&mut self, now: Instant, num_cached_tokens: u32) {
        self.started = Some(now);
        // Once: after a preemption it starts anew, which is no milestone.
        let _ = self.milestones.started.set(now);
        self.num_cached_tokens = num_cached_tokens as usize;
    }

    pub(super) fn preempt(&mut self) {
        self.num_preemptions += 1;
    }

    pub(super) fn token(&mut self, now: Instant, metrics: &Metrics) {
        self.num_generation_tokens += 1;
        let _ = self.milestones.first_token.set(now);
        match self.last_token.replace(now) {
            _ if !self.measured => {}
            Some(last) => metrics.next_token(now - last),
            None => {
                self.first_token = Some(now);
                let waited = now - self.submitted;
                metrics.first_token(self.num_prompt_tokens, self.num_cached_tokens, waited);
            }
        }
    }

    pub(super) fn finish(&self, now: Instant, reason: FinishReason) -> RequestStats {
        let between = |from: Option<Instant>, to: Option<Instant>| Some(to? - from?);
        RequestStats {
            reason,
            num_prompt_tokens: self.num_prompt_tokens,
            num_cached_tokens: self.num_cached_tokens,
            num_generation_tokens: self.num_generation_tokens,
            max_tokens: self.max_tokens,
            num_preemptions: self.num_preemptions,
            e2e: now - self.submitted,
            queue: between(Some(self.submitted), self.started),
            prefill: between(self.started, self.first_token),
            decode: between(self.first_token, self.last_token),
        }
    }
}
