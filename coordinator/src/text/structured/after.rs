//! A grammar that begins where a model's reasoning ends.

use std::{fmt, sync::Arc};

use phalanx_proto::step::TokenSet;

use crate::{
    engine::{ConstraintError, Grammar, GrammarStatus},
    text::{ReasoningParser, TokenTable},
};

const END: &[u8] = ReasoningParser::END.as_bytes();

/// Anything up to the mark that ends the reasoning, which may be one token or several, and then a text of the language.
pub(super) struct AfterReasoning {
    table: Arc<TokenTable>,
    vocab_size: u32,
    /// As much of the mark as the text ends with; none once the mark has come.
    matched: Option<usize>,
    grammar: Box<dyn Grammar>,
}

impl AfterReasoning {
    pub(super) fn new(table: Arc<TokenTable>, vocab_size: u32, grammar: Box<dyn Grammar>) -> Self {
        Self {
            table,
            vocab_size,
            matched: Some(0),
            grammar,
        }
    }

    /// Whether a token with the mark's end in it has more behind it, which the grammar would not see.
    fn overshoots(&self, matched: usize, token: u32) -> bool {
        let bytes = self.table.bytes(token);
        let missing = &END[matched..];
        bytes.len() > missing.len() && bytes.starts_with(missing)
    }
}

impl fmt::Debug for AfterReasoning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AfterReasoning")
            .field("matched", &self.matched)
            .field("grammar", &self.grammar)
            .finish_non_exhaustive()
    }
}

impl Grammar for AfterReasoning {
    fn allowed(&mut self) -> Result<TokenSet, ConstraintError> {
        let Some(matched) = self.matched else {
            return self.grammar.allowed();
        };
        let mut all = TokenSet::full(self.vocab_size);
        // The vocabulary is only gone through where the mark has begun.
        if matched > 0 {
            (0..self.vocab_size)
                .filter(|&id| self.overshoots(matched, id))
                .for_each(|id| all.remove(id));
        }
        Ok(all)
    }

    fn accept(&mut self, token: u32) -> Result<GrammarStatus, ConstraintError> {
        let Some(mut matched) = self.matched else {
            return self.grammar.accept(token);
        };
        for &byte in self.table.bytes(token) {
            // The mark's first byte occurs nowhere else in it.
            matched = match byte {
                _ if byte == END[matched] => matched + 1,
                _ if byte == END[0] => 1,
                _ => 0,
            };
            if matched == END.len() {
                self.matched = None;
                return Ok(GrammarStatus::Open);
            }
        }
        self.matched = Some(matched);
        Ok(GrammarStatus::Open)
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(Self {
            table: Arc::clone(&self.table),
            vocab_size: self.vocab_size,
            matched: self.matched,
            grammar: self.grammar.fork(),
        })
    }
}
