//! Guesses by n-gram lookup: what followed the last few tokens when they stood in the sequence before (prompt lookup
//! decoding, Saxena 2023). Good where output repeats its input: summaries, edits, code.
//!
//! Earlier places of an n-gram are chained as in deflate's hash chains (RFC 1951, section 4), so that a lookup looks at a
//! few places, however long the sequence, and every token is indexed once.

use std::collections::HashMap;

/// Earlier places that a lookup compares.
const MAX_PLACES: usize = 16;

/// What guesses are made of, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NgramSpeculation {
    /// Most guesses for a sequence in one step.
    pub num_speculative_tokens: u32,
    /// Fewest and most of the last tokens that must have stood before.
    pub prompt_lookup_min: u32,
    pub prompt_lookup_max: u32,
}

impl NgramSpeculation {
    /// Most guesses for a sequence in one step that may be configured.
    pub const MOST_TOKENS: u32 = 16;
    /// Longest n-gram that may be configured.
    pub const LONGEST_NGRAM: u32 = 32;
}

/// Where n-grams of one sequence stand. Its tokens only ever grow at the end.
#[derive(Debug)]
pub(super) struct NgramIndex {
    n: usize,
    /// By an n-gram's hash: the end of its last place, which is the index of the token that follows. Only looked up.
    latest: HashMap<u64, u32>,
    /// By place, the first being that of the n-gram that ends at `n`: the end of the place before with the same hash; 0
    /// if there is none.
    before: Vec<u32>,
}

impl NgramIndex {
    /// Of n-grams of `n` tokens, at least 1.
    pub(super) fn new(n: usize) -> Self {
        Self {
            n,
            latest: HashMap::new(),
            before: Vec::new(),
        }
    }

    /// At most `most` tokens that may follow `tokens`: those that followed the longest match of its end, up to `longest`
    /// tokens; of equally long ones the last.
    pub(super) fn propose(&mut self, tokens: &[u32], longest: usize, most: usize) -> Vec<u32> {
        self.index(tokens);
        let Some(start) = self.longest_match(tokens, longest) else {
            return Vec::new();
        };
        let mut proposed: Vec<u32> = Vec::with_capacity(most);
        for offset in 0..most {
            // What follows may reach the guesses themselves: the sequence goes round in a circle.
            let next = match tokens.get(start + offset) {
                Some(&token) => token,
                None => proposed[start + offset - tokens.len()],
            };
            proposed.push(next);
        }
        proposed
    }

    /// Every n-gram but the one at the end, which nothing follows yet.
    fn index(&mut self, tokens: &[u32]) {
        for end in self.n + self.before.len()..tokens.len() {
            let before = self.latest.insert(hash(&tokens[end - self.n..end]), end as u32);
            self.before.push(before.unwrap_or(0));
        }
    }

    /// The end of the match.
    fn longest_match(&self, tokens: &[u32], longest: usize) -> Option<usize> {
        let last = tokens.len().checked_sub(self.n)?;
        let mut place = *self.latest.get(&hash(&tokens[last..]))? as usize;
        let mut best: Option<(usize, usize)> = None;
        for _ in 0..MAX_PLACES {
            let backward = tokens[..place].iter().rev().zip(tokens.iter().rev());
            let length = backward.take(longest).take_while(|(a, b)| a == b).count();
            // Less than n is another n-gram of the same hash.
            if length >= self.n && best.is_none_or(|(most, _)| length > most) {
                best = Some((length, place));
            }
            place = self.before[place - self.n] as usize;
            if place == 0 || best.is_some_and(|(most, _)| most == longest) {
                break;
            }
        }
        best.map(|(_, place)| place)
    }
}

/// FNV-1a (Fowler, Noll, Vo) over whole tokens. Whoever makes them collide gains guesses that are compared in vain.
fn hash(ngram: &[u32]) -> u64 {
    let step = |hash: u64, token: &u32| (hash ^ u64::from(*token)).wrapping_mul(0x0100_0000_01B3);
    ngram.iter().fold(0xCBF2_9CE4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn propose(tokens: &[u32], (shortest, longest): (usize, usize), most: usize) -> Vec<u32> {
        let mut index = NgramIndex::new(shortest);
        // The index must not depend on how often it was asked while the sequence grew.
        for end in 1..tokens.len() {
            index.propose(&tokens[..end], longest, most);
        }
        let proposed = index.propose(tokens, longest, most);
        assert_eq!(proposed, NgramIndex::new(shortest).propose(tokens, longest, most));
        proposed
    }

    #[test]
    fn the_longest_match_wins_then_the_last() {
        let tokens = [1, 2, 3, 40, 9, 3, 50, 8, 3, 60, 1, 2, 3];
        assert_eq!(propose(&tokens, (1, 1), 1), [60], "the last 3");
        assert_eq!(propose(&tokens, (1, 3), 2), [40, 9], "1 2 3 stood at the start");
        assert_eq!(propose(&tokens, (2, 2), 1), [40]);
    }

    #[test]
    fn nothing_is_proposed_for_what_is_new() {
        let nothing = |tokens: &[u32], shortest| propose(tokens, (shortest, 4), 4).is_empty();
        assert!(nothing(&[1, 2, 3], 1) && nothing(&[1], 1));
        assert!(nothing(&[1, 2], 3), "shorter than an n-gram");
        assert!(nothing(&[1, 2, 9, 2], 2), "9 2 is new");
    }

    #[test]
    fn a_circle_is_followed_past_the_end() {
        assert_eq!(propose(&[7, 7, 7], (2, 4), 5), [7, 7, 7, 7, 7]);
        assert_eq!(propose(&[1, 2, 3, 1, 2, 3], (2, 3), 7), [1, 2, 3, 1, 2, 3, 1]);
    }
}
