//! Limits on the tokens of a completion's reasoning.

use std::sync::Arc;

use phalanx_proto::{RpcError, v1};

use super::{
    ReasoningParser, Tokenizer,
    structured::{GrammarCompiler, ThinkingLimit},
};
use crate::engine::Constraint;

/// What a server can do about the length of reasoning: the tokens that spell the mark of its end, or why there are none.
#[derive(Clone, Debug)]
pub(super) struct ThinkingEnd(Result<Arc<[u32]>, &'static str>);

impl ThinkingEnd {
    pub(super) fn new(parser: Option<ReasoningParser>, tokenizer: &Tokenizer, vocab_size: u32) -> Self {
        if parser.is_none() {
            return Self(Err("needs a server with --reasoning-parser"));
        }
        let tokens = tokenizer.encode(ReasoningParser::END, false).unwrap_or_default();
        let spelled = tokens.iter().flat_map(|&token| tokenizer.table().bytes(token));
        let spells = spelled.eq(ReasoningParser::END.as_bytes());
        if !spells || tokens.iter().any(|&token| token >= vocab_size) {
            return Self(Err("needs a model whose tokens spell the end of its reasoning"));
        }
        Self(Ok(tokens.into()))
    }

    /// The limit that a request asks for; none for one without. `has_begun` is left to [`limit`].
    ///
    /// # Errors
    /// `InvalidArgument` where no reasoning can be limited.
    pub(super) fn limit(&self, params: &v1::SamplingParams) -> Result<Option<ThinkingLimit>, RpcError> {
        const PARAM: &str = "thinking_token_budget";
        let Some(budget) = params.thinking_token_budget else {
            return Ok(None);
        };
        match &self.0 {
            Ok(end_tokens) => Ok(Some(ThinkingLimit {
                budget,
                end_tokens: Arc::clone(end_tokens),
                has_begun: false,
            })),
            Err(why) => Err(RpcError::invalid(PARAM, format!("{PARAM} {why}."))),
        }
    }
}

/// Puts `limit` before the constraint of completions of `prompt`. Completions that are structured from their first token
/// on, which is what `thinks` tells, do not reason.
pub(super) fn limit(
    constraint: &mut Constraint,
    limit: Option<ThinkingLimit>,
    prompt: &[u32],
    (grammars, thinks): (&GrammarCompiler, bool),
) {
    if let Some(limit) = limit
        && (thinks || constraint.grammar.is_none())
    {
        let grammar = constraint.grammar.take();
        constraint.grammar = Some(grammars.limit_thinking(limit, prompt, grammar));
    }
}
