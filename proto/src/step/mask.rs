//! Which tokens a row may draw: a set of token ids with one bit each.

use super::SequenceId;

const BITS: usize = u32::BITS as usize;

/// A set of token ids of one vocabulary.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenSet {
    vocab_size: u32,
    /// Token `id` is bit `id % 32` of word `id / 32`; bits from the vocabulary's size on are 0.
    words: Vec<u32>,
}

impl TokenSet {
    /// Words that a set over so many tokens takes.
    pub fn num_words(vocab_size: u32) -> usize {
        (vocab_size as usize).div_ceil(BITS)
    }

    pub fn empty(vocab_size: u32) -> Self {
        Self {
            vocab_size,
            words: vec![0; Self::num_words(vocab_size)],
        }
    }

    pub fn full(vocab_size: u32) -> Self {
        let mut words = vec![u32::MAX; Self::num_words(vocab_size)];
        if let Some(last) = words.last_mut() {
            *last &= last_word(vocab_size);
        }
        Self { vocab_size, words }
    }

    /// None unless there are as many words as the vocabulary needs, with no bit beyond it.
    pub fn from_words(vocab_size: u32, words: Vec<u32>) -> Option<Self> {
        let fits = words.len() == Self::num_words(vocab_size)
            && words.last().is_none_or(|last| last & !last_word(vocab_size) == 0);
        fits.then_some(Self { vocab_size, words })
    }

    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Token `id` is bit `id % 32` of word `id / 32`.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    pub fn contains(&self, id: u32) -> bool {
        let word = self.words.get(id as usize / BITS);
        word.is_some_and(|word| word >> (id as usize % BITS) & 1 == 1)
    }

    /// An id outside of the vocabulary stays outside of the set.
    pub fn insert(&mut self, id: u32) {
        if id < self.vocab_size {
            self.words[id as usize / BITS] |= 1 << (id as usize % BITS);
        }
    }

    pub fn remove(&mut self, id: u32) {
        if id < self.vocab_size {
            self.words[id as usize / BITS] &= !(1 << (id as usize % BITS));
        }
    }

    /// Keeps what is in `other`, a set over the same vocabulary, as well.
    pub fn intersect(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= other;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }
}

/// The bits of a set's last word that stand for tokens.
fn last_word(vocab_size: u32) -> u32 {
    match vocab_size as usize % BITS {
        0 => u32::MAX,
        used => (1 << used) - 1,
    }
}

/// What one sequence may draw in a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenMask {
    pub sequence: SequenceId,
    pub allowed: TokenSet,
}

/// The masks that follow a plan, in the order of its rows; a sampled row without one may draw any token.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StepMasks {
    /// Those of the plan.
    pub epoch: u32,
    pub step: u64,
    pub masks: Vec<TokenMask>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_end_with_the_vocabulary() {
        for vocab_size in [0, 1, 31, 32, 33, 100] {
            let full = TokenSet::full(vocab_size);
            assert!((0..vocab_size).all(|id| full.contains(id)));
            assert!((vocab_size..vocab_size + 64).all(|id| !full.contains(id)));
            assert_eq!(
                TokenSet::from_words(vocab_size, full.words().to_vec()),
                Some(full.clone())
            );
            let mut rest = full;
            (0..vocab_size).for_each(|id| rest.remove(id));
            assert_eq!(rest, TokenSet::empty(vocab_size));
        }
        assert_eq!(TokenSet::from_words(33, vec![0, 2]), None);
        assert_eq!(TokenSet::from_words(33, vec![0]), None);
    }

    #[test]
    fn what_both_hold_is_left() {
        let of = |ids: &[u32]| {
            let mut set = TokenSet::empty(70);
            ids.iter().for_each(|&id| set.insert(id));
            set
        };
        let mut both = of(&[1, 33, 69, 70]);
        both.intersect(&of(&[0, 33, 69]));
        assert_eq!(both, of(&[33, 69]));
        assert!(!both.is_empty() && of(&[70]).is_empty());
    }
}
