//! One sequence: its tokens, how far they are computed, and what its next row looks like.

use std::collections::BTreeMap;

use phalanx_proto::step::{BlockId, PromptLogprobs, RowSampling, SequenceId, StepRow, TokenMask, TokenSet};

use super::{
    Constraint, ConstraintError, EngineConfig, EngineRequest, FinishReason, GrammarStatus, NgramSpeculation,
    SamplingParams, StopRules, TenantId, kv_cache_manager::SequenceKv, ngram::NgramIndex,
    repetition::RepetitionDetector,
};

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
    pub(super) tenant: TenantId,
    /// Prompt and output.
    pub(super) tokens: Vec<u32>,
    num_prompt_tokens: usize,
    /// The next prompt token to be scored; the prompt's length if there is none left. The first has nothing before it.
    next_scored: usize,
    /// Tokens whose KV is in the blocks.
    pub(super) num_computed_tokens: usize,
    pub(super) kv: SequenceKv,
    sampling: SamplingParams,
    stop: StopRules,
    repetition: Option<RepetitionDetector>,
    constraint: Constraint,
    /// Why the last mask allows nothing.
    masked_out: Option<ConstraintError>,
    /// Kept only for sequences with penalties.
    history: Option<TokenHistory>,
    /// Made when guesses are first wanted.
    ngrams: Option<NgramIndex>,
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
            tenant: request.tenant,
            num_prompt_tokens: request.prompt.len(),
            next_scored: match request.sampling.prompt_logprobs {
                Some(_) => 1,
                None => request.prompt.len(),
            },
            num_computed_tokens: 0,
            kv,
            history: penalized.then(|| {
                // The other penalties look at the output only.
                let repetition = request.sampling.repetition_penalty != 1.0;
                TokenHistory::of_prompt(if repetition { &request.prompt } else { &[] })
            }),
            tokens: request.prompt,
            sampling: request.sampling,
            repetition: request.stop.repetition.map(RepetitionDetector::new),
            stop: request.stop,
            constraint: *request.constraint,
            masked_out: None,
            ngrams: None,
            started: false,
            failed_steps: 0,
        };
        // Wherever it was made, output is output: to the limits, the penalties and the position of each draw.
        for token in request.output {
            // A grammar that this breaks says so again when it is asked what may follow.
            let _ = sequence.push(token);
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

    /// Leading tokens whose logits nobody wants, so that their KV may come from the prefix cache.
    pub(super) fn num_cacheable_tokens(&self) -> usize {
        // The token at `next_scored` is scored by the logits of the one before.
        let wanted = if self.next_scored < self.num_prompt_tokens {
            self.next_scored
        } else {
            self.tokens.len()
        };
        wanted - 1
    }

    /// The next `num_new_tokens` tokens; samples if they reach the last one.
    pub(super) fn row(&self, num_new_tokens: usize, config: &EngineConfig) -> StepRow {
        let end = self.num_computed_tokens + num_new_tokens;
        let sampling = || self.row_sampling(0, self.history.as_ref());
        StepRow {
            sequence: self.id,
            token_ids: self.tokens[self.num_computed_tokens..end].to_vec(),
            num_computed_tokens: self.num_computed_tokens as u32,
            block_table: self.blocks(end, config),
            sampling: (end == self.tokens.len()).then(sampling),
            prompt_logprobs: self.row_prompt_logprobs(end),
        }
    }

    /// What a row that ends before token `end` has to score.
    fn row_prompt_logprobs(&self, end: usize) -> Option<PromptLogprobs> {
        let top = self.sampling.prompt_logprobs?;
        let last = self.num_prompt_tokens.min(end + 1);
        (self.next_scored < last).then(|| PromptLogprobs {
            top,
            first: (self.next_scored - 1 - self.num_computed_tokens) as u32,
            targets: self.tokens[self.next_scored..last].to_vec(),
        })
    }

    /// So many more prompt tokens have been scored.
    pub(super) fn scored(&mut self, num_tokens: usize) {
        self.next_scored += num_tokens;
        debug_assert!(self.next_scored <= self.num_prompt_tokens, "{:?}", self.id);
    }

    /// One row for each guess at what follows the last token, see [`super::speculation`].
    pub(super) fn draft_rows(&self, drafts: &[u32], config: &EngineConfig) -> Vec<StepRow> {
        let mut history = self.history.clone();
        let row = |(index, &token): (usize, &u32)| {
            let position = self.tokens.len() + index;
            if let Some(history) = &mut history {
                history.push_output(token);
            }
            StepRow {
                sequence: self.id,
                token_ids: vec![token],
                num_computed_tokens: position as u32,
                block_table: self.blocks(position + 1, config),
                sampling: Some(self.row_sampling(index + 1, history.as_ref())),
                prompt_logprobs: None,
            }
        };
        drafts.iter().enumerate().map(row).collect()
    }

    /// Guesses at what follows the last token: none that would come after the end, and none under a mask, which is known
    /// for the next token only.
    pub(super) fn propose(&mut self, speculation: &NgramSpeculation, most: usize) -> Vec<u32> {
        if self.is_masked() {
            return Vec::new();
        }
        // One token is sampled behind the last guess.
        let left = self.stop.max_tokens as usize - self.num_output_tokens() - 1;
        let most = most.min(speculation.num_speculative_tokens as usize).min(left);
        if most == 0 {
            return Vec::new();
        }
        let shortest = speculation.prompt_lookup_min as usize;
        let ngrams = self.ngrams.get_or_insert_with(|| NgramIndex::new(shortest));
        let mut drafts = ngrams.propose(&self.tokens, speculation.prompt_lookup_max as usize, most);
        let stops = |token: &u32| self.stop.stop_token_ids.contains(token);
        if let Some(end) = drafts.iter().position(stops) {
            drafts.truncate(end);
        }
        drafts
    }

    /// Those that hold the first `num_tokens` tokens; there may be more, for guesses that were wrong.
    fn blocks(&self, num_tokens: usize, config: &EngineConfig) -> Vec<BlockId> {
        self.kv.table[..num_tokens.div_ceil(config.block_size as usize)].to_vec()
    }

    /// The state after `num_drafts` guesses, which `history` knows.
    fn row_sampling(&self, num_drafts: usize, history: Option<&TokenHistory>) -> RowSampling {
        let s = &self.sampling;
        let history = || history.map_or_else(Vec::new, TokenHistory::entries);
        RowSampling {
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            seed: s.seed,
            logprobs: s.logprobs,
            logprob_token_ids: s.logprob_token_ids.clone(),
            penalties: s.penalties(history),
            bias: self.bias(self.num_output_tokens() + num_drafts),
        }
    }

    /// Whether what it may draw is said by a mask.
    pub(super) fn is_masked(&self) -> bool {
        self.constraint.is_active()
    }

    /// What the next token may be. Allows nothing if the constraint fails; [`Self::take_masked_out`] then says why.
    pub(super) fn mask(&mut self, vocab_size: u32) -> TokenMask {
        self.masked_out = None;
        let held_back = if self.is_kept_from_stopping(self.num_output_tokens()) {
            &self.stop.stop_token_ids[..]
        } else {
            &[]
        };
        let output = &self.tokens[self.num_prompt_tokens..];
        let allowed = self.constraint.mask(output, held_back, vocab_size);
        let allowed = match allowed {
            Ok(allowed) => allowed,
            Err(error) => {
                self.masked_out = Some(error);
                TokenSet::empty(vocab_size)
            }
        };
        TokenMask {
            sequence: self.id,
            allowed,
        }
    }

    /// Why nothing could be drawn, if that is the constraint's fault.
    pub(super) fn take_masked_out(&mut self) -> Option<ConstraintError> {
        self.masked_out.take()
    }

    fn is_kept_from_stopping(&self, num_output_tokens: usize) -> bool {
        num_output_tokens < self.stop.min_tokens as usize
    }

    /// The caller's bias; until `min_tokens` are there, stop tokens are banned, whatever the caller's bias for them. Where
    /// there is a mask, that is its business: it knows whether anything else is left.
    fn bias(&self, num_output_tokens: usize) -> Vec<(u32, f32)> {
        if !self.is_kept_from_stopping(num_output_tokens) || self.is_masked() {
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
    ///
    /// # Errors
    /// The grammar cannot go on.
    pub(super) fn push(&mut self, token: u32) -> Result<Option<FinishReason>, ConstraintError> {
        if let Some(history) = &mut self.history {
            history.push_output(token);
        }
        self.tokens.push(token);
        let output = &self.tokens[self.num_prompt_tokens..];
        let repeats = self
            .repetition
            .as_mut()
            .is_some_and(|detector| detector.push(output));
        match self.stop.end_after(output.len(), token, repeats) {
            Some(FinishReason::Stop) => Ok(Some(FinishReason::Stop)),
            // The end of a grammar is an end, whatever else was asked for: no token can follow.
            end => Ok(match self.constraint.accept(token)? {
                GrammarStatus::Complete => Some(FinishReason::Stop),
                GrammarStatus::Open => end,
            }),
        }
    }
}

/// Each distinct token of a sequence, maintained as it grows, with how often the output holds it.
#[derive(Clone)]
struct TokenHistory {
    counts: BTreeMap<u32, u32>,
}

impl TokenHistory {
    fn of_prompt(prompt: &[u32]) -> Self {
        Self {
            counts: prompt.iter().map(|&token| (token, 0)).collect(),
        }
    }

    fn push_output(&mut self, token: u32) {
        *self.counts.entry(token).or_default() += 1;
    }

    /// By rising id.
    fn entries(&self) -> Vec<(u32, u32)> {
        self.counts
            .iter()
            .map(|(&token, &count)| (token, count))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_counts_output_and_forgets_nothing() {
        let mut history = TokenHistory::of_prompt(&[5, 3, 5, 9]);
        assert_eq!(history.entries(), [(3, 0), (5, 0), (9, 0)]);
        for token in [5, 1, 5] {
            history.push_output(token);
        }
        assert_eq!(history.entries(), [(1, 1), (3, 0), (5, 2), (9, 0)]);
    }
}
