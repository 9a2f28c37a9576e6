//! Speculative decoding without a second kind of step: a guessed token is one more row of the plan.
//!
//! Behind the row that a sequence samples from stand rows of one guess each, with the block table and the sampling state
//! that the sequence would have if the guess were true. Within a layer the ranks write the KV of all rows before any row
//! attends, so a row sees the guesses before it. Each row samples what the sequence would sample there, with the same
//! Philox(seed, position); the engine keeps a row's token as long as all guesses before it were what was sampled. So
//! output is the same with and without speculation, token by token, greedy or not (Leviathan et al., "Fast Inference from
//! Transformers via Speculative Decoding", 2023, with a draft that is certain of itself).

use phalanx_proto::step::{SampledToken, SequenceId, StepRow};

use super::NgramSpeculation;

/// Counters since the engine's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculationStats {
    /// Rows of guesses: one for each sequence and step that had any.
    pub num_drafts: u64,
    pub num_draft_tokens: u64,
    pub num_accepted_tokens: u64,
    /// Of the accepted ones, those that were guessed first, second, and so on.
    pub num_accepted_per_position: [u64; NgramSpeculation::MOST_TOKENS as usize],
}

/// Goes through the rows of a plan and what they sampled.
#[derive(Default)]
pub(super) struct Verifier {
    sequence: Option<SequenceId>,
    /// What the next row must have guessed; none once a guess was wrong.
    sampled: Option<u32>,
    /// Guesses of the sequence so far.
    num_drafts: usize,
}

impl Verifier {
    /// Whether the row's tokens are the sequence's: always for its first row, for a guess if it is what was sampled before
    /// it. Rows come in the plan's order.
    pub(super) fn check(
        &mut self,
        row: &StepRow,
        sampled: Option<&SampledToken>,
        stats: &mut SpeculationStats,
    ) -> bool {
        let is_draft = self.sequence == Some(row.sequence);
        if !is_draft {
            *self = Self {
                sequence: Some(row.sequence),
                ..Self::default()
            };
        }
        let holds = !is_draft || row.token_ids.first().copied() == self.sampled;
        if is_draft {
            stats.num_drafts += u64::from(self.num_drafts == 0);
            stats.num_draft_tokens += 1;
            if holds {
                stats.num_accepted_tokens += 1;
                stats.num_accepted_per_position[self.num_drafts] += 1;
            }
            self.num_drafts += 1;
        }
        let usable = sampled.filter(|sampled| holds && sampled.finite);
        self.sampled = usable.map(|sampled| sampled.token);
        holds
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::step::{BlockId, RowSampling};

    use super::*;

    fn row(sequence: u64, token_ids: &[u32]) -> StepRow {
        StepRow {
            sequence: SequenceId(sequence),
            token_ids: token_ids.to_vec(),
            num_computed_tokens: 0,
            block_table: vec![BlockId(0)],
            sampling: Some(RowSampling::GREEDY),
            prompt_logprobs: None,
        }
    }

    fn sampled(sequence: u64, token: u32) -> SampledToken {
        SampledToken {
            sequence: SequenceId(sequence),
            token,
            finite: true,
            logprob: None,
            rank: None,
            top_logprobs: Vec::new(),
        }
    }

    #[test]
    fn guesses_hold_up_to_the_first_wrong_one() {
        let (mut verifier, mut stats) = (Verifier::default(), SpeculationStats::default());
        let mut check = |tokens: (u64, u32), token| {
            let (sequence, guess) = tokens;
            verifier.check(
                &row(sequence, &[guess]),
                Some(&sampled(sequence, token)),
                &mut stats,
            )
        };
        assert!(check((1, 5), 6));
        assert!(check((1, 6), 7), "6 was guessed and drawn");
        assert!(!check((1, 8), 9), "7 was drawn");
        assert!(!check((1, 9), 10), "right after a wrong guess is wrong");
        assert!(check((2, 9), 3), "another sequence");
        assert!(check((2, 3), 4));
        assert_eq!((stats.num_drafts, stats.num_draft_tokens), (2, 4));
        assert_eq!(stats.num_accepted_tokens, 2);
        assert_eq!(stats.num_accepted_per_position[..2], [2, 0]);
    }

    #[test]
    fn nothing_holds_behind_logits_that_are_no_numbers() {
        let (mut verifier, mut stats) = (Verifier::default(), SpeculationStats::default());
        let broken = SampledToken {
            finite: false,
            ..sampled(1, 6)
        };
        assert!(verifier.check(&row(1, &[5]), Some(&broken), &mut stats));
        assert!(!verifier.check(&row(1, &[6]), Some(&sampled(1, 7)), &mut stats));
    }
}
