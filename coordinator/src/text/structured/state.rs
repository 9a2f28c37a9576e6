//! llguidance's matcher as the engine's grammar, and the model's tokens as llguidance wants them.

use std::{fmt, sync::Arc};

use llguidance::{
    Matcher,
    toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie},
};
use phalanx_proto::step::TokenSet;

use super::said;
use crate::{
    engine::{ConstraintError, Grammar, GrammarStatus},
    text::TokenTable,
};

/// The trie's limit is 1024.
const MAX_TOKEN_BYTES: usize = 1000;
const SPECIAL: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// One completion's place in a language.
pub(super) struct LlGrammar {
    matcher: Matcher,
    vocab_size: u32,
}

impl LlGrammar {
    pub(super) fn new(matcher: Matcher, vocab_size: u32) -> Self {
        Self { matcher, vocab_size }
    }

    /// An independent one: clones of a matcher share their lexer and its lock.
    pub(super) fn copy(&self) -> Self {
        Self::new(self.matcher.deep_clone(), self.vocab_size)
    }

    fn failed(what: &str, error: &impl fmt::Display) -> ConstraintError {
        ConstraintError(format!("structured_outputs: {what}: {}", said(error)))
    }
}

impl fmt::Debug for LlGrammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LlGrammar")
            .field("stop_reason", &self.matcher.stop_reason())
            .finish_non_exhaustive()
    }
}

impl Grammar for LlGrammar {
    fn allowed(&mut self) -> Result<TokenSet, ConstraintError> {
        let what = "what may follow cannot be told within the limits of a token";
        let mask = self.matcher.compute_mask_or_eos();
        let mask = mask.map_err(|error| Self::failed(what, &error))?;
        // It has room for one token more than there are.
        let mut words = mask.as_slice().to_vec();
        words.resize(TokenSet::num_words(self.vocab_size), 0);
        let set = TokenSet::from_words(self.vocab_size, words);
        set.ok_or_else(|| ConstraintError("structured_outputs: a mask of another vocabulary".to_owned()))
    }

    fn accept(&mut self, token: u32) -> Result<GrammarStatus, ConstraintError> {
        let consumed = self.matcher.consume_token(token);
        consumed.map_err(|error| Self::failed("the text cannot go on", &error))?;
        Ok(if self.matcher.is_stopped() {
            GrammarStatus::Complete
        } else {
            GrammarStatus::Open
        })
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(self.copy())
    }
}

/// The vocabulary. Special tokens are no text, so that no string of a grammar yields one; it can name them.
pub(super) fn token_env(table: &TokenTable, end_of_generation: &[u32], vocab_size: u32) -> TokEnv {
    let word = |id: u32| {
        let bytes = table.bytes(id);
        // A lone byte of this value is no text either, and would be taken for the marker.
        if bytes.len() > MAX_TOKEN_BYTES || bytes.first() == Some(&SPECIAL) {
            return Vec::new();
        }
        let special = table.is_special(id) || end_of_generation.contains(&id);
        let marker = special.then_some(SPECIAL);
        marker.into_iter().chain(bytes.iter().copied()).collect()
    };
    let words: Vec<Vec<u8>> = (0..vocab_size).map(word).collect();
    let ends: Vec<u32> = end_of_generation
        .iter()
        .copied()
        .filter(|&id| id < vocab_size)
        .collect();
    let first = ends.first().copied().unwrap_or(INVALID_TOKEN);
    let mut trie = TokTrie::from(&TokRxInfo::new(vocab_size, first), &words);
    if !ends.is_empty() {
        trie = trie.with_eos_tokens(&ends);
    }
    // How text is cut into tokens is the model's choice.
    Arc::new(ApproximateTokEnv::new(trie))
}
