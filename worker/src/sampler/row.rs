//! One row's sampling parameters, turned into what to ask the kernels for.

use std::ops::Range;

use phalanx_kernels::{Candidate, CandidateRequest, LogitEdit, Noise};
use phalanx_proto::step::{RowSampling, TokenSet};

use super::SamplingRow;

/// Below this a temperature means greedy, as in vLLM.
const MIN_TEMPERATURE: f32 = 1e-5;
/// Candidates asked for at first when only the logits can tell how many the filters leave.
const FIRST_CANDIDATES: usize = 64;
/// By how much more to ask for when they were not enough.
const GROWTH: usize = 8;

/// Tokens of a word of a mask.
const MASK_BITS: usize = u32::BITS as usize;

/// What restricts the tokens that may be drawn, beside a mask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Filter {
    /// Below the vocabulary size.
    pub(super) top_k: Option<usize>,
    /// Below 1.
    pub(super) top_p: Option<f64>,
    /// Natural logarithm of min-p, at most 0: distance from the best scaled logit.
    pub(super) ln_min_p: Option<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Strategy {
    Greedy,
    /// A draw from the whole vocabulary.
    Unfiltered,
    Filtered(Filter),
}

pub(super) struct Row<'a> {
    pub(super) strategy: Strategy,
    pub(super) noise: Noise,
    /// How many of the best tokens to report; none: no log-probabilities.
    pub(super) logprobs: Option<usize>,
    /// Which tokens to report in place of the best.
    pub(super) listed: &'a [u32],
    /// Their candidates, by rising id.
    pub(super) found: Vec<Candidate>,
    pub(super) vocab_size: usize,
    /// Best scaled logits asked for in this round.
    pub(super) top: usize,
    inverse_temperature: f32,
    edits: Vec<LogitEdit>,
    allowed: Option<&'a TokenSet>,
}

impl<'a> Row<'a> {
    pub(super) fn new(row: &SamplingRow<'a>, vocab_size: usize) -> Self {
        let sampling = row.sampling;
        let strategy = Strategy::of(sampling, vocab_size);
        let top = match strategy {
            Strategy::Greedy => 1,
            Strategy::Unfiltered => 0,
            Strategy::Filtered(Filter { top_k: Some(k), .. }) => k,
            Strategy::Filtered(_) => FIRST_CANDIDATES.min(vocab_size),
        };
        Self {
            strategy,
            noise: Noise {
                seed: sampling.seed,
                position: row.position,
            },
            logprobs: sampling.logprobs.map(|n| n as usize),
            listed: &sampling.logprob_token_ids,
            found: Vec::new(),
            vocab_size,
            top,
            inverse_temperature: match strategy {
                Strategy::Greedy => 1.0,
                _ => 1.0 / sampling.temperature,
            },
            edits: edits(sampling),
            allowed: row.allowed,
        }
    }

    /// What to ask the kernels of the rank whose columns are `vocab`. The numbers of candidates are those wanted of all
    /// ranks together, as any one may hold them all.
    pub(super) fn request(&self, row: usize, vocab: Range<usize>) -> CandidateRequest<'_> {
        let first = self
            .edits
            .partition_point(|edit| (edit.id as usize) < vocab.start);
        let last = self.edits.partition_point(|edit| (edit.id as usize) < vocab.end);
        CandidateRequest {
            row,
            // Ranks hold whole chunks of the vocabulary, and a chunk is whole words.
            allowed: self.allowed.map(|set| &set.words()[vocab.start / MASK_BITS..]),
            vocab,
            edits: &self.edits[first..last],
            inverse_temperature: self.inverse_temperature,
            noise: (self.strategy == Strategy::Unfiltered).then_some(self.noise),
            top: self.top,
            raw_top: self.logprobs.filter(|_| self.listed.is_empty()).unwrap_or(0),
            // With top-k or min-p, top-p looks at the mass of what these leave, and all of that is candidates.
            scaled_statistics: matches!(
                self.strategy,
                Strategy::Filtered(Filter {
                    top_k: None,
                    top_p: Some(_),
                    ln_min_p: None
                })
            ),
            raw_statistics: self.logprobs.is_some(),
        }
    }

    /// Notes all ranks' candidates of the listed tokens.
    pub(super) fn note_listed(&mut self, candidates: &[Candidate]) {
        self.found = candidates.to_vec();
        self.found.sort_unstable_by_key(|candidate| candidate.id);
    }

    /// Asks for more candidates in the next round.
    pub(super) fn grow(&mut self) {
        self.top = self.top.saturating_mul(GROWTH).min(self.vocab_size);
    }
}

impl Strategy {
    fn of(sampling: &RowSampling, vocab_size: usize) -> Self {
        if sampling.temperature < MIN_TEMPERATURE {
            return Self::Greedy;
        }
        let top_k = sampling.top_k as usize;
        let filter = Filter {
            top_k: (1..vocab_size).contains(&top_k).then_some(top_k),
            top_p: (sampling.top_p < 1.0).then_some(sampling.top_p.into()),
            ln_min_p: (sampling.min_p > 0.0).then(|| sampling.min_p.min(1.0).ln()),
        };
        let off = Filter {
            top_k: None,
            top_p: None,
            ln_min_p: None,
        };
        if filter == off {
            Self::Unfiltered
        } else {
            Self::Filtered(filter)
        }
    }
}

/// Penalties and bias as edits of single logits: each id once, by rising id.
fn edits(sampling: &RowSampling) -> Vec<LogitEdit> {
    let penalties = sampling.penalties.iter().flat_map(|penalties| {
        penalties.history.iter().map(|&(id, count)| LogitEdit {
            id,
            repetition: penalties.repetition,
            add: if count == 0 {
                0.0
            } else {
                -penalties.presence - penalties.frequency * count as f32
            },
        })
    });
    let bias = sampling.bias.iter().map(|&(id, add)| LogitEdit {
        id,
        repetition: 1.0,
        add,
    });
    let mut edits: Vec<LogitEdit> = penalties.chain(bias).collect();
    // Stable: of one id, the penalty stays ahead of the bias. History comes sorted, which makes this linear.
    edits.sort_by_key(|edit| edit.id);
    edits.dedup_by(|next, kept| {
        let same = next.id == kept.id;
        if same {
            kept.repetition *= next.repetition;
            kept.add += next.add;
        }
        same
    });
    edits
}

#[cfg(test)]
mod tests {
    use phalanx_proto::step::Penalties;

    use super::*;

    #[test]
    fn penalties_and_bias_of_one_token_become_one_edit() {
        let sampling = RowSampling {
            penalties: Some(Penalties {
                repetition: 1.5,
                presence: 0.25,
                frequency: 0.5,
                history: vec![(3, 0), (7, 2)],
            }),
            bias: vec![(7, 1.0), (5, f32::NEG_INFINITY), (7, 2.0)],
            ..RowSampling::GREEDY
        };
        let edit = |id, repetition, add| LogitEdit { id, repetition, add };
        let want = [
            edit(3, 1.5, 0.0),
            edit(5, 1.0, f32::NEG_INFINITY),
            edit(7, 1.5, -0.25 - 1.0 + 3.0),
        ];
        assert_eq!(edits(&sampling), want);
    }

    #[test]
    fn parameters_that_change_nothing_are_off() {
        let with = |top_k, top_p, min_p| {
            let sampling = RowSampling {
                temperature: 1.0,
                top_k,
                top_p,
                min_p,
                ..RowSampling::GREEDY
            };
            Strategy::of(&sampling, 100)
        };
        assert_eq!(with(0, 1.0, 0.0), Strategy::Unfiltered);
        assert_eq!(with(100, 1.0, 0.0), Strategy::Unfiltered);
        assert!(matches!(
            with(99, 1.0, 0.0),
            Strategy::Filtered(Filter { top_k: Some(99), .. })
        ));
        assert!(matches!(
            with(0, 0.9, 0.0),
            Strategy::Filtered(Filter { top_k: None, .. })
        ));
        assert_eq!(Strategy::of(&RowSampling::GREEDY, 100), Strategy::Greedy);
    }
}
