//! A made-up language: what may follow is a hash of what came before, and now and then that is the end, or nothing.

use phalanx_proto::step::TokenSet;

use super::{Prng, VOCAB_SIZE, mix};
use crate::engine::{Constraint, ConstraintError, Grammar, GrammarStatus};

/// The tokens that end a text where it may end.
const END: u32 = 0;

#[derive(Clone, Debug)]
struct SimGrammar {
    state: u64,
}

impl SimGrammar {
    /// One token in four may follow.
    fn allows(&self, token: u32) -> bool {
        mix(self.state, token.into()).is_multiple_of(4)
    }

    fn check(&self) -> Result<(), ConstraintError> {
        if self.state.is_multiple_of(61) {
            return Err(ConstraintError("the state is too complex".into()));
        }
        Ok(())
    }
}

impl Grammar for SimGrammar {
    fn allowed(&mut self) -> Result<TokenSet, ConstraintError> {
        self.check()?;
        let mut set = TokenSet::empty(VOCAB_SIZE);
        (0..VOCAB_SIZE)
            .filter(|&token| self.allows(token))
            .for_each(|token| set.insert(token));
        Ok(set)
    }

    fn accept(&mut self, token: u32) -> Result<GrammarStatus, ConstraintError> {
        assert!(self.allows(token), "a masked row only gets allowed tokens");
        self.state = mix(self.state, u64::from(token) + 1);
        if self.state.is_multiple_of(67) {
            return Err(ConstraintError("the state has become too complex".into()));
        }
        let complete = token == END || self.state.is_multiple_of(13);
        Ok(if complete {
            GrammarStatus::Complete
        } else {
            GrammarStatus::Open
        })
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(self.clone())
    }
}

/// Nothing for half of the requests, some of everything for the others.
pub(super) fn constraint(prng: &mut Prng) -> Constraint {
    let mut constraint = Constraint::default();
    if prng.one_in(2) {
        return constraint;
    }
    if prng.one_in(2) {
        constraint.grammar = Some(Box::new(SimGrammar { state: prng.next() }));
    }
    if prng.one_in(3) {
        let mut set = TokenSet::empty(VOCAB_SIZE);
        let every = prng.range(1, 40);
        (0..VOCAB_SIZE)
            .filter(|id| id % every == 0)
            .for_each(|id| set.insert(id));
        constraint.allowed_token_ids = Some(set);
    }
    let mut token = || prng.below(VOCAB_SIZE.into()) as u32;
    constraint.bad_words = vec![vec![token()], vec![token(), token()]];
    constraint.postponed = vec![END];
    constraint
}
