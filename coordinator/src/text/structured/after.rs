//! A grammar that begins where a model's reasoning ends.

use std::{fmt, sync::Arc};

use phalanx_proto::step::TokenSet;

use super::mark::MarkFinder;
use crate::{
    engine::{ConstraintError, Grammar, GrammarStatus},
    text::{ReasoningParser, TokenTable},
};

/// Anything up to the mark that ends the reasoning, which may be one token or several, and then a text of the language.
pub(super) struct AfterReasoning {
    table: Arc<TokenTable>,
    vocab_size: u32,
    /// None once the mark has come.
    end: Option<MarkFinder>,
    grammar: Box<dyn Grammar>,
}

impl AfterReasoning {
    pub(super) fn new(table: Arc<TokenTable>, vocab_size: u32, grammar: Box<dyn Grammar>) -> Self {
        Self {
            table,
            vocab_size,
            end: Some(MarkFinder::new(ReasoningParser::END)),
            grammar,
        }
    }

    /// Whether a token with the mark's end in it has more behind it, which the grammar would not see.
    fn overshoots(&self, missing: &[u8], token: u32) -> bool {
        let bytes = self.table.bytes(token);
        bytes.len() > missing.len() && bytes.starts_with(missing)
    }
}

impl fmt::Debug for AfterReasoning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AfterReasoning")
            .field("end", &self.end)
            .field("grammar", &self.grammar)
            .finish_non_exhaustive()
    }
}

impl Grammar for AfterReasoning {
    fn allowed(&mut self) -> Result<TokenSet, ConstraintError> {
        let Some(end) = self.end else {
            return self.grammar.allowed();
        };
        let mut all = TokenSet::full(self.vocab_size);
        // The vocabulary is only gone through where the mark has begun.
        if end.has_begun() {
            (0..self.vocab_size)
                .filter(|&id| self.overshoots(end.missing(), id))
                .for_each(|id| all.remove(id));
        }
        Ok(all)
    }

    fn accept(&mut self, token: u32) -> Result<GrammarStatus, ConstraintError> {
        let Some(end) = &mut self.end else {
            return self.grammar.accept(token);
        };
        if self.table.bytes(token).iter().any(|&byte| end.push(byte)) {
            self.end = None;
        }
        Ok(GrammarStatus::Open)
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(Self {
            table: Arc::clone(&self.table),
            vocab_size: self.vocab_size,
            end: self.end,
            grammar: self.grammar.fork(),
        })
    }
}
