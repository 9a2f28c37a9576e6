//! One completion: sampled tokens in, pieces of a [`v1::Choice`] out.

use std::sync::Arc;

use phalanx_proto::{
    step::{SampledToken, SequenceId},
    v1::{self, choice::StopReason},
};

use super::logprobs;
use crate::{
    engine::{FinishReason, StopRules},
    text::{Detokenizer, OutputParser, Parsed, PreparedRequest, StopMatcher, TokenTable, Tokenizer},
};

pub(super) struct ChoiceAssembler {
    table: Arc<TokenTable>,
    detokenizer: Detokenizer,
    stop_strings: StopMatcher,
    /// None if all text is content.
    parser: Option<OutputParser>,
    rules: StopRules,
    eos: Option<u32>,
    include_stop_in_output: bool,
    logprobs: bool,
    /// The request lists the tokens that are reported beside the chosen ones.
    lists: bool,
    /// Whether there is more than the echo.
    generates: bool,
    /// Another server has begun it.
    resumed: bool,
    /// A stop token whose text is not shown until it turns out not to have ended the sequence.
    undecided: Option<u32>,
    /// Tokens of the completion.
    tokens: u32,
    /// Characters of output text, those held back included.
    chars: u32,
    finished: bool,
    /// What has been assembled since the last [`Self::take`].
    piece: v1::Choice,
    /// The part of it that went through the parser.
    parsed: Parsed,
}

impl ChoiceAssembler {
    /// The assembler of completion `index` of `request`, which ends by `rules`.
    pub(super) fn new(
        request: &PreparedRequest,
        index: usize,
        rules: StopRules,
        tokenizer: &Tokenizer,
    ) -> Self {
        let table = tokenizer.table().clone();
        let echo = request.echo.clone().unwrap_or_default();
        Self {
            detokenizer: Detokenizer::new(table.clone(), request.skip_special_tokens)
                .showing(request.plan.markers().clone()),
            table,
            include_stop_in_output: request.stop_strings.includes_in_output(),
            stop_strings: request.stop_strings.clone(),
            parser: (!request.plan.is_plain()).then(|| request.plan.parser()),
            rules,
            eos: tokenizer.special_tokens().eos,
            logprobs: request.output.logprobs.is_some() && !request.plan.hides_tokens(),
            lists: request.lists_logprobs,
            generates: request.generates,
            resumed: false,
            undecided: None,
            tokens: 0,
            chars: echo.chars().count() as u32,
            finished: false,
            piece: v1::Choice {
                index: index as u32,
                text: echo,
                reasoning: request.plan.tells_reasoning().then(String::new),
                ..v1::Choice::default()
            },
            parsed: Parsed::default(),
        }
    }

    /// Puts the echoed prompt's log-probabilities before all others, unless another server has. Before the first
    /// [`Self::take`].
    pub(super) fn echo(&mut self, logprobs: impl IntoIterator<Item = v1::TokenLogprobs>) {
        if !self.resumed {
            self.piece.logprobs.splice(0..0, logprobs);
        }
    }

    pub(super) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Tokens since the last [`Self::take`].
    pub(super) fn piece_tokens(&self) -> usize {
        self.piece.token_ids.len()
    }

    /// No more tokens are wanted.
    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Takes the next token; a stop string it completes finishes the completion.
    pub(super) fn token(&mut self, sampled: &SampledToken) {
        if let Some(before) = self.undecided.take() {
            self.push_text_of(before);
        }
        if self.finished || !self.generates {
            return;
        }
        self.tokens += 1;
        self.piece.token_ids.push(sampled.token);
        if self.logprobs {
            self.piece.logprobs.extend(self.logprobs_of(sampled));
        }
        // Its end shows with the engine's next event: the last token's text is left out.
        if self.rules.stop_token_ids.binary_search(&sampled.token).is_ok() {
            self.undecided = Some(sampled.token);
        } else {
            self.push_text_of(sampled.token);
        }
    }

    /// Takes tokens that the client has got from another server, with the text each of them completed and its
    /// log-probabilities. Only an end that they bring about is still to be told.
    pub(super) fn replay(&mut self, tokens: &[u32]) {
        if tokens.is_empty() {
            return;
        }
        self.resumed = true;
        for &token in tokens {
            self.token(&SampledToken {
                sequence: SequenceId(0),
                token,
                finite: true,
                logprob: None,
                rank: None,
                top_logprobs: Vec::new(),
            });
        }
        if let Some(told) = self.take() {
            self.piece.finish_reason = told.finish_reason;
            self.piece.stop_reason = told.stop_reason;
        }
    }

    /// The client has got the whole completion, of so many tokens, from another server.
    pub(super) fn skip(&mut self, tokens: u32) {
        self.tokens = tokens;
        self.resumed = true;
        self.finished = true;
    }

    /// The engine is done with the sequence.
    pub(super) fn finish(&mut self, reason: FinishReason) {
        if let Some(last) = self.undecided.take() {
            if reason != FinishReason::Stop || self.include_stop_in_output {
                self.push_text_of(last);
            }
            if self.finished {
                return;
            }
            // As in vLLM, the end-of-sequence token itself is no reason worth telling.
            if reason == FinishReason::Stop && Some(last) != self.eos {
                self.piece.stop_reason = Some(StopReason::StopTokenId(last));
            }
        }
        let mut rest = String::new();
        self.detokenizer.finish(&mut rest);
        if !self.show(&rest) {
            self.put(|stop_strings, out| stop_strings.finish(out));
            self.end(match reason {
                FinishReason::Stop if !self.generates => v1::FinishReason::Length,
                FinishReason::Stop => v1::FinishReason::Stop,
                FinishReason::Length => v1::FinishReason::Length,
                FinishReason::Repetition => v1::FinishReason::Repetition,
                FinishReason::Abort => v1::FinishReason::Abort,
                FinishReason::NotFinite => v1::FinishReason::Error,
            });
        }
    }

    /// What was assembled since the last call; none if there is neither a token nor an end to tell.
    pub(super) fn take(&mut self) -> Option<v1::Choice> {
        if self.piece.token_ids.is_empty() && self.piece.finish_reason() == v1::FinishReason::Unspecified {
            return None;
        }
        let next = v1::Choice {
            index: self.piece.index,
            ..v1::Choice::default()
        };
        let mut piece = std::mem::replace(&mut self.piece, next);
        let parsed = std::mem::take(&mut self.parsed);
        piece.text.push_str(&parsed.content);
        if !parsed.reasoning.is_empty() {
            piece.reasoning = Some(parsed.reasoning);
        }
        piece.tool_calls = parsed.calls;
        Some(piece)
    }

    fn push_text_of(&mut self, token: u32) {
        let mut text = String::new();
        self.detokenizer.push(token, &mut text);
        self.show(&text);
    }

    /// Puts text out, as far as stop strings let it; true if one ended the completion.
    fn show(&mut self, text: &str) -> bool {
        self.chars = self.chars.saturating_add(text.chars().count() as u32);
        let armed = self.tokens > self.rules.min_tokens;
        let found = self.put(|stop_strings, out| stop_strings.push(text, armed, out));
        let Some(found) = found else { return false };
        self.piece.stop_reason = Some(StopReason::StopString(found));
        self.end(v1::FinishReason::Stop);
        true
    }

    /// Puts out the text that `take` gets past the stop strings.
    fn put<T>(&mut self, take: impl FnOnce(&mut StopMatcher, &mut String) -> T) -> T {
        let Some(parser) = &mut self.parser else {
            return take(&mut self.stop_strings, &mut self.piece.text);
        };
        let mut text = String::new();
        let taken = take(&mut self.stop_strings, &mut text);
        parser.push(&text, &mut self.parsed);
        taken
    }

    fn end(&mut self, reason: v1::FinishReason) {
        let mut reason = reason;
        if let Some(parser) = &mut self.parser {
            parser.finish(&mut self.parsed);
            if reason == v1::FinishReason::Stop && parser.has_called() {
                reason = v1::FinishReason::ToolCalls;
            }
        }
        self.piece.set_finish_reason(reason);
        self.finished = true;
    }

    fn logprobs_of(&self, sampled: &SampledToken) -> Option<v1::TokenLogprobs> {
        let chosen = (sampled.token, sampled.logprob?, sampled.rank?);
        let of = if self.lists {
            logprobs::of_listed
        } else {
            logprobs::of
        };
        Some(of(&self.table, chosen, &sampled.top_logprobs, self.chars))
    }
}
