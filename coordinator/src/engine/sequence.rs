//! One sequence: its tokens, how far they are computed, and what its next row looks like.

use std::collections::BTreeMap;

use phalanx_proto::step::{RowSampling, SequenceId, StepRow};

use super::{EngineRequest, FinishReason, SamplingParams, StopRules, kv_cache_manager::SequenceKv};

/// Order of service: the smallest runs first and gives way last. No two sequences are equal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Urgency {
    /// The same for all under first come, first served.
    pub(super) priority: i32,
    /// Counts submissions.
    pub(super) arrival: u64,
}

/// There is no prefill and no decode phase: `num_computed_tokens` catches up with `num_tokens`, be it over a prompt, by
/// one new token at a time, after preemption or after a lost rank.
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    pub(super) urgency: Urgency,
    /// Prompt and output.
    pub(super) tokens: Vec<u32>,
    num_prompt_tokens: usize,
    /// Tokens whose KV is in the blocks.
    pub(super) num_computed_tokens: usize,
    pub(super) kv: SequenceKv,
    sampling: SamplingParams,
    stop: StopRules,
    /// Kept only for sequences with penalties.
    history: Option<TokenHistory>,
    /// Has been part of a plan, so its owner knows.
    pub(super) started: bool,
    /// Steps in a row that this sequence was part of and that lost the group.
    pub(super) failed_steps: u32,
}

impl Sequence {
    pub(super) fn new(request: EngineRequest, urgency: Urgency, kv: SequenceKv) -> Self {
        let penalized = request.sampling.penalties(Vec::new).is_some();
        let mut sequence = Self {
            id: request.id,
            urgency,
            num_prompt_tokens: request.prompt.len(),
            num_computed_tokens: 0,
            kv,
            history: penalized.then(|| TokenHistory::of_prompt(&request.prompt)),
            tokens: request.prompt,
            sampling: request.sampling,
            stop: request.stop,
            started: false,
            failed_steps: 0,
        };
        // Wherever it was made, output is output: to the limits, the penalties and the position of each draw.
        for token in request.output {
            sequence.push(token);
        }
        sequence
    }

    pub(super) fn num_prompt_tokens(&self) -> usize {
        self.num_prompt_tokens
    }

    pub(super) fn num_remaining_tokens(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    fn num_output_tokens(&self) -> usize {
        self.tokens.len() - self.num_prompt_tokens
    }

    /// The next `num_new_tokens` tokens; samples if they reach the last one.
    pub(super) fn row(&self, num_new_tokens: usize, max_edits: u32) -> StepRow {
        let end = self.num_computed_tokens + num_new_tokens;
        StepRow {
            sequence: self.id,
            token_ids: self.tokens[self.num_computed_tokens..end].to_vec(),
            num_computed_tokens: self.num_computed_tokens as u32,
            block_table: self.kv.table.clone(),
            sampling: (end == self.tokens.len()).then(|| self.row_sampling(max_edits as usize)),
        }
    }

    fn row_sampling(&self, max_edits: usize) -> RowSampling {
        let s = &self.sampling;
        let history = || {
            self.history
                .as_ref()
                .map_or_else(Vec::new, |history| history.entries(max_edits))
        };
        RowSampling {
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            seed: s.seed,
            logprobs: s.logprobs,
            penalties: s.penalties(history),
            bias: self.bias(),
        }
    }

    /// The caller's bias; until `min_tokens` are there, stop tokens are banned, whatever the caller's bias for them.
    fn bias(&self) -> Vec<(u32, f32)> {
        if self.num_output_tokens() >= self.stop.min_tokens as usize {
            return self.sampling.logit_bias.clone();
        }
        let banned = &self.stop.stop_token_ids;
        let kept = self
            .sampling
            .logit_bias
            .iter()
            .filter(|(id, _)| !banned.contains(id));
        kept.copied()
            .chain(banned.iter().map(|&id| (id, f32::NEG_INFINITY)))
            .collect()
    }

    /// Appends a sampled token; the reason if it is the last.
    pub(super) fn push(&mut self, token: u32) -> Option<FinishReason> {
        if let Some(history) = &mut self.history {
            history.push_output(token, self.tokens.len());
        }
        self.tokens.push(token);
        self.stop.end_after(self.num_output_tokens(), token)
    }
}

/// Each distinct token of a sequence, maintained as it grows.
struct TokenHistory {
    uses: BTreeMap<u32, TokenUse>,
}

#[derive(Clone, Copy)]
struct TokenUse {
    num_in_output: u32,
    last_position: usize,
}

impl TokenHistory {
    fn of_prompt(prompt: &[u32]) -> Self {
        let uses = prompt.iter().enumerate().map(|(position, &token)| {
            let token_use = TokenUse {
                num_in_output: 0,
                last_position: position,
            };
            (token, token_use)
        });
        Self { uses: uses.collect() }
    }

    fn push_output(&mut self, token: u32, position: usize) {
        let token_use = self.uses.entry(token).or_insert(TokenUse {
            num_in_output: 0,
            last_position: position,
        });
        token_use.num_in_output += 1;
        token_use.last_position = position;
    }

    /// At most `limit` tokens with their counts, by rising id. Where there are more, those seen last count: output
    /// before prompt, and the same choice wherever and whenever the sequence runs.
    fn entries(&self, limit: usize) -> Vec<(u32, u32)> {
        let mut since = 0;
        if self.uses.len() > limit {
            let mut positions: Vec<_> = self.uses.values().map(|u| u.last_position).collect();
            let forgotten = positions.len() - limit;
            since = *positions.select_nth_unstable(forgotten).1;
        }
        let recent = self.uses.iter().filter(|(_, u)| u.last_position >= since);
        recent.map(|(&token, u)| (token, u.num_in_output)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_counts_output_and_keeps_the_latest() {
        let mut history = TokenHistory::of_prompt(&[5, 3, 5, 9]);
        assert_eq!(history.entries(8), [(3, 0), (5, 0), (9, 0)]);
        history.push_output(5, 4);
        history.push_output(1, 5);
        history.push_output(5, 6);
        assert_eq!(history.entries(8), [(1, 1), (3, 0), (5, 2), (9, 0)]);
        assert_eq!(history.entries(3), [(1, 1), (5, 2), (9, 0)]);
        assert_eq!(history.entries(1), [(5, 2)]);
    }
}
