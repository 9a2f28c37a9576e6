//! Compiled grammars by what they were compiled from: a few, the least recently used go first.

use std::collections::VecDeque;

use phalanx_proto::v1;

use super::state::LlGrammar;

pub(super) struct GrammarCache {
    capacity: usize,
    /// The most recently used is the last.
    entries: VecDeque<(v1::StructuredOutputs, LlGrammar)>,
}

impl GrammarCache {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            entries: VecDeque::new(),
        }
    }

    /// A copy, so that nobody waits for the lock while it is stepped.
    pub(super) fn get(&mut self, spec: &v1::StructuredOutputs) -> Option<LlGrammar> {
        let at = self.entries.iter().position(|(known, _)| same(known, spec))?;
        let entry = self.entries.remove(at)?;
        let grammar = entry.1.copy();
        self.entries.push_back(entry);
        Some(grammar)
    }

    pub(super) fn insert(&mut self, spec: v1::StructuredOutputs, grammar: LlGrammar) {
        // Two requests may have compiled it at the same time.
        self.entries.retain(|(known, _)| !same(known, &spec));
        if self.entries.len() >= self.capacity {
            self.entries.pop_front();
        }
        self.entries.push_back((spec, grammar));
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// What the caller calls the field is no part of the language.
fn same(a: &v1::StructuredOutputs, b: &v1::StructuredOutputs) -> bool {
    a.constraint == b.constraint
        && a.disable_any_whitespace == b.disable_any_whitespace
        && a.disable_additional_properties == b.disable_additional_properties
        && a.whitespace_pattern == b.whitespace_pattern
}
