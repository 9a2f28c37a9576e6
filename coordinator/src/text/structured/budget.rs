//! A limit on the tokens of a model's reasoning.

use std::sync::Arc;

use phalanx_proto::step::TokenSet;

use super::mark::MarkFinder;
use crate::{
    engine::{ConstraintError, Grammar, GrammarStatus},
    text::{ReasoningParser, TokenTable},
};

/// How much a completion may think, and where it stands with that when it begins.
#[derive(Clone, Debug)]
pub(crate) struct ThinkingLimit {
    /// Tokens of reasoning after which nothing but the mark that ends it may follow.
    pub(crate) budget: u32,
    /// What spells that mark. Never empty.
    pub(crate) end_tokens: Arc<[u32]>,
    /// The prompt ends within reasoning.
    pub(crate) has_begun: bool,
}

impl ThinkingLimit {
    /// Whether `prompt` ends within reasoning: the last mark in it is the one that begins it.
    pub(crate) fn has_begun_in(prompt: &[u32], table: &TokenTable) -> bool {
        let mut marks = Marks::new();
        let mut phase = Phase::Before;
        for &byte in prompt.iter().flat_map(|&token| table.bytes(token)) {
            phase = match marks.push(byte) {
                Some(Mark::Start) => Phase::Thinking { spent: 0 },
                Some(Mark::End) => Phase::Over,
                None => phase,
            };
        }
        matches!(phase, Phase::Thinking { .. })
    }
}

/// Reasoning within a limit, and whatever the grammar says, which sees all tokens. Reasoning that nobody has begun is not
/// limited before it is, and what comes after its end is no reasoning.
#[derive(Debug)]
pub(super) struct ThinkingBudget {
    table: Arc<TokenTable>,
    vocab_size: u32,
    limit: ThinkingLimit,
    marks: Marks,
    phase: Phase,
    /// None: anything may follow.
    grammar: Option<Box<dyn Grammar>>,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Before,
    /// With so many tokens of it.
    Thinking {
        spent: u32,
    },
    Over,
}

#[derive(Clone, Copy, Debug)]
struct Marks {
    start: MarkFinder,
    end: MarkFinder,
}

enum Mark {
    Start,
    End,
}

impl Marks {
    fn new() -> Self {
        Self {
            start: MarkFinder::new(ReasoningParser::START),
            end: MarkFinder::new(ReasoningParser::END),
        }
    }

    /// The mark that ends with `byte`.
    fn push(&mut self, byte: u8) -> Option<Mark> {
        // No byte ends both: they differ from the second on.
        let (start, end) = (self.start.push(byte), self.end.push(byte));
        start.then_some(Mark::Start).or_else(|| end.then_some(Mark::End))
    }
}

impl ThinkingBudget {
    pub(super) fn new(
        table: Arc<TokenTable>,
        vocab_size: u32,
        limit: ThinkingLimit,
        grammar: Option<Box<dyn Grammar>>,
    ) -> Self {
        Self {
            table,
            vocab_size,
            marks: Marks::new(),
            phase: if limit.has_begun {
                Phase::Thinking { spent: 0 }
            } else {
                Phase::Before
            },
            limit,
            grammar,
        }
    }

    /// The one token that may follow once the budget is spent.
    fn forced(&self) -> Option<u32> {
        match self.phase {
            Phase::Thinking { spent } if spent >= self.limit.budget => {}
            _ => return None,
        }
        // It goes on with what there is of the mark, where the mark's tokens are cut there; else the mark begins anew.
        let missing = self.marks.end.missing().len();
        let mut bytes = 0;
        let rest = self.limit.end_tokens.iter().rev().find(|&&token| {
            bytes += self.table.bytes(token).len();
            bytes == missing
        });
        rest.or(self.limit.end_tokens.first()).copied()
    }

    fn note(&mut self, token: u32) {
        let mut counts = true;
        for &byte in self.table.bytes(token) {
            match (self.marks.push(byte), self.phase) {
                (Some(Mark::Start), Phase::Before) => {
                    self.phase = Phase::Thinking { spent: 0 };
                    // It is no part of what it begins.
                    counts = false;
                }
                (Some(Mark::End), _) => self.phase = Phase::Over,
                _ => {}
            }
        }
        if let (Phase::Thinking { spent }, true) = (&mut self.phase, counts) {
            *spent = spent.saturating_add(1);
        }
    }
}

impl Grammar for ThinkingBudget {
    fn allowed(&mut self) -> Result<TokenSet, ConstraintError> {
        if let Some(token) = self.forced() {
            let mut only = TokenSet::empty(self.vocab_size);
            only.insert(token);
            return Ok(only);
        }
        match &mut self.grammar {
            Some(grammar) => grammar.allowed(),
            None => Ok(TokenSet::full(self.vocab_size)),
        }
    }

    fn accept(&mut self, token: u32) -> Result<GrammarStatus, ConstraintError> {
        self.note(token);
        match &mut self.grammar {
            Some(grammar) => grammar.accept(token),
            None => Ok(GrammarStatus::Open),
        }
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(Self {
            table: Arc::clone(&self.table),
            vocab_size: self.vocab_size,
            limit: self.limit.clone(),
            marks: self.marks,
            phase: self.phase,
            grammar: self.grammar.as_ref().map(|grammar| grammar.fork()),
        })
    }
}
