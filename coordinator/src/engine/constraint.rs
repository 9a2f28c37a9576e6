//! Which tokens a sequence may draw next: what a grammar, a list of tokens and words to avoid leave of the vocabulary.
//!
//! The state is a function of the sequence's output alone and stays with it: preemption and lost ranks take nothing of it.

use std::fmt;

use phalanx_proto::step::TokenSet;

/// The state of one completion within a language. The text layer brings real ones, the simulator its own.
pub trait Grammar: fmt::Debug + Send {
    /// What may come next, end-of-sequence tokens included where the text may end.
    ///
    /// # Errors
    /// The state has become too complex to say.
    fn allowed(&mut self) -> Result<TokenSet, ConstraintError>;

    /// Goes on by the token that was drawn.
    ///
    /// # Errors
    /// The token was not allowed, or the state has become too complex.
    fn accept(&mut self, token: u32) -> Result<GrammarStatus, ConstraintError>;

    /// The same state once more.
    fn fork(&self) -> Box<dyn Grammar>;
}

/// Where a completion stands after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrammarStatus {
    /// Something may follow.
    Open,
    /// The text is complete and nothing can follow.
    Complete,
}

/// Why a sequence cannot go on under its constraint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);

/// What restricts the tokens of a sequence beside its sampling parameters.
#[derive(Debug, Default)]
pub struct Constraint {
    pub grammar: Option<Box<dyn Grammar>>,
    /// None: all.
    pub allowed_token_ids: Option<TokenSet>,
    /// The last token of each is not drawn where the output ends with those before it. None is empty.
    pub bad_words: Vec<Vec<u32>>,
    /// Tokens not drawn as long as there are others: end-of-sequence tokens that the caller wants to be ignored.
    pub postponed: Vec<u32>,
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        Self {
            grammar: self.grammar.as_ref().map(|grammar| grammar.fork()),
            allowed_token_ids: self.allowed_token_ids.clone(),
            bad_words: self.bad_words.clone(),
            postponed: self.postponed.clone(),
        }
    }
}

impl Constraint {
    /// Whether any token is ever ruled out.
    pub fn is_active(&self) -> bool {
        self.grammar.is_some() || self.allowed_token_ids.is_some() || !self.bad_words.is_empty()
    }

    /// What may follow `output`. Tokens of `held_back` are left out while there are others: a text that can only end does
    /// so, however many tokens were asked for.
    ///
    /// # Errors
    /// Nothing may follow, or the grammar cannot say what.
    pub(super) fn mask(
        &mut self,
        output: &[u32],
        held_back: &[u32],
        vocab_size: u32,
    ) -> Result<TokenSet, ConstraintError> {
        let mut allowed = match &mut self.grammar {
            Some(grammar) => grammar.allowed()?,
            None => TokenSet::full(vocab_size),
        };
        if let Some(ids) = &self.allowed_token_ids {
            allowed.intersect(ids);
        }
        for word in &self.bad_words {
            if let Some((last, before)) = word.split_last()
                && output.ends_with(before)
            {
                allowed.remove(*last);
            }
        }
        if allowed.vocab_size() != vocab_size || allowed.is_empty() {
            let message = "no token is allowed by structured_outputs, thinking_token_budget, allowed_token_ids and \
                           bad_words together";
            return Err(ConstraintError(message.into()));
        }
        let mut preferred = allowed.clone();
        for &id in held_back.iter().chain(&self.postponed) {
            preferred.remove(id);
        }
        Ok(if preferred.is_empty() { allowed } else { preferred })
    }

    /// Goes on by a token of the output.
    pub(super) fn accept(&mut self, token: u32) -> Result<GrammarStatus, ConstraintError> {
        match &mut self.grammar {
            Some(grammar) => grammar.accept(token),
            None => Ok(GrammarStatus::Open),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u32]) -> TokenSet {
        let mut set = TokenSet::empty(10);
        ids.iter().for_each(|&id| set.insert(id));
        set
    }

    #[test]
    fn bad_words_end_where_their_last_token_would_be() {
        let mut constraint = Constraint {
            bad_words: vec![vec![3], vec![1, 2, 4]],
            ..Constraint::default()
        };
        assert!(constraint.is_active() && !Constraint::default().is_active());
        let mut without = |output: &[u32], id: u32| !constraint.mask(output, &[], 10).unwrap().contains(id);
        assert!(without(&[], 3) && without(&[1, 2], 3));
        assert!(!without(&[], 4) && !without(&[2], 4) && !without(&[1, 2, 2], 4));
        assert!(without(&[1, 2], 4) && without(&[9, 1, 2], 4));
    }

    #[test]
    fn what_is_held_back_comes_if_there_is_nothing_else() {
        let mut constraint = Constraint {
            allowed_token_ids: Some(set(&[0, 5])),
            postponed: vec![0],
            ..Constraint::default()
        };
        assert_eq!(constraint.mask(&[], &[], 10), Ok(set(&[5])));
        assert_eq!(constraint.mask(&[], &[5], 10), Ok(set(&[0, 5])));
        constraint.bad_words = vec![vec![0], vec![5]];
        assert!(constraint.mask(&[], &[], 10).is_err(), "nothing is left");
    }
}
