//! Speculative decoding in numbers, as vLLM counts it.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::families::add;
use crate::engine::{NgramSpeculation, SpeculationStats};

pub(super) struct SpeculationMetrics {
    drafts: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
    accepted_per_position: Family<Vec<(&'static str, String)>, Counter>,
}

impl SpeculationMetrics {
    pub(super) fn new(r: &mut Registry) -> Self {
        Self {
            drafts: add(
                r,
                "vllm:spec_decode_num_drafts",
                "Steps of a sequence that guessed tokens",
                Counter::default(),
            ),
            draft_tokens: add(
                r,
                "vllm:spec_decode_num_draft_tokens",
                "Tokens that were guessed",
                Counter::default(),
            ),
            accepted_tokens: add(
                r,
                "vllm:spec_decode_num_accepted_tokens",
                "Guesses that were what was sampled",
                Counter::default(),
            ),
            accepted_per_position: add(
                r,
                "vllm:spec_decode_num_accepted_tokens_per_pos",
                "Those by their place behind the last known token",
                Family::default(),
            ),
        }
    }

    /// A rate over a counter that appears only with its first event misses that event.
    pub(super) fn started(&self, speculation: Option<&NgramSpeculation>) {
        let positions = speculation.map_or(0, |speculation| speculation.num_speculative_tokens);
        for position in 0..positions as usize {
            let _zero = self.at(position);
        }
    }

    pub(super) fn grew(&self, before: &SpeculationStats, now: &SpeculationStats) {
        if before == now {
            return;
        }
        self.drafts.inc_by(now.num_drafts - before.num_drafts);
        self.draft_tokens
            .inc_by(now.num_draft_tokens - before.num_draft_tokens);
        self.accepted_tokens
            .inc_by(now.num_accepted_tokens - before.num_accepted_tokens);
        let positions = now.num_accepted_per_position.iter();
        for (position, (now, before)) in positions.zip(&before.num_accepted_per_position).enumerate() {
            if now > before {
                self.at(position).inc_by(now - before);
            }
        }
    }

    fn at(&self, position: usize) -> Counter {
        let labels = vec![("position", position.to_string())];
        self.accepted_per_position.get_or_create_owned(&labels)
    }
}
