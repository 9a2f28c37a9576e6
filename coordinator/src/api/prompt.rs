//! What a reply tells of its prompt: token ids, and log-probabilities once all of them are known.

use std::sync::Arc;

use phalanx_proto::{step::ScoredToken, v1};

use super::logprobs;
use crate::text::{Detokenizer, PreparedRequest, TokenTable, Tokenizer};

pub(super) struct PromptReport {
    table: Arc<TokenTable>,
    /// Empty if nothing is told.
    token_ids: Vec<u32>,
    output: v1::OutputOptions,
    skip_special_tokens: bool,
    /// Of the tokens after the first.
    scored: Vec<ScoredToken>,
    /// Scores that are still to come.
    missing: usize,
    /// It has been told.
    sent: bool,
}

impl PromptReport {
    pub(super) fn new(request: &mut PreparedRequest, tokenizer: &Tokenizer) -> Self {
        let token_ids = request.prompt.take().unwrap_or_default();
        let output = request.output;
        let echoes = output.echo && output.logprobs.is_some();
        let is_scored = echoes || output.prompt_logprobs.is_some();
        Self {
            table: tokenizer.table().clone(),
            missing: if is_scored {
                token_ids.len().saturating_sub(1)
            } else {
                0
            },
            scored: Vec::new(),
            token_ids,
            output,
            skip_special_tokens: request.skip_special_tokens,
            sent: false,
        }
    }

    /// Nothing of the reply may be sent before this.
    pub(super) fn is_complete(&self) -> bool {
        self.missing == 0
    }

    pub(super) fn extend(&mut self, scored: Vec<ScoredToken>) {
        self.missing = self.missing.saturating_sub(scored.len());
        self.scored.extend(scored);
    }

    /// No more scores will come: the request is aborted.
    pub(super) fn give_up(&mut self) {
        self.missing = 0;
    }

    /// For the first chunk, once; none if nothing is to be told.
    pub(super) fn take(&mut self) -> Option<v1::PromptOutput> {
        if std::mem::replace(&mut self.sent, true) {
            return None;
        }
        let prompt = v1::PromptOutput {
            token_ids: if self.output.return_prompt_token_ids {
                self.token_ids.clone()
            } else {
                Vec::new()
            },
            logprobs: self
                .output
                .prompt_logprobs
                .map_or_else(Vec::new, |top| self.logprobs(top)),
        };
        (prompt != v1::PromptOutput::default()).then_some(prompt)
    }

    /// What comes before a completion's own log-probabilities.
    pub(super) fn echoed(&self) -> Vec<v1::TokenLogprobs> {
        let top = self.output.logprobs.filter(|_| self.output.echo);
        top.map_or_else(Vec::new, |top| self.logprobs(top))
    }

    /// Of the prompt's tokens as far as they are scored, with at most `top` alternatives each.
    fn logprobs(&self, top: u32) -> Vec<v1::TokenLogprobs> {
        let Some((&first, rest)) = self.token_ids.split_first() else {
            return Vec::new();
        };
        let mut detokenizer = Detokenizer::new(self.table.clone(), self.skip_special_tokens);
        let mut text = String::new();
        let mut chars_of = |token: u32| {
            text.clear();
            detokenizer.push(token, &mut text);
            text.chars().count() as u32
        };
        let mut offset = chars_of(first);
        let mut all = vec![logprobs::of_first(&self.table, first)];
        for (&token, scored) in rest.iter().zip(&self.scored) {
            let best = &scored.top_logprobs[..scored.top_logprobs.len().min(top as usize)];
            let chosen = (token, scored.logprob, scored.rank);
            all.push(logprobs::of(&self.table, chosen, best, offset));
            offset += chars_of(token);
        }
        all
    }
}
