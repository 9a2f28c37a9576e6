//! Raw logits of tokens that are named beforehand, whichever rank holds them.

use std::ops::Range;

use phalanx_kernels::{CandidateRequest, LogitEdit};

use super::SamplingRow;

/// What [`lift`] adds: no model's logits come near it.
const LIFT: f32 = 1e30;

/// An edit that makes a token one of the best, so that its raw logit is reported.
pub(super) fn lift(id: u32) -> LogitEdit {
    LogitEdit {
        id,
        repetition: 1.0,
        add: LIFT,
    }
}

/// Asks for the tokens of `lifts`, each once and by rising id: after the merge they are the best candidates, and all of
/// them. A rank that holds few of them fills up with others, which do not survive it.
pub(super) fn request(row: usize, vocab: Range<usize>, lifts: &[LogitEdit]) -> CandidateRequest<'_> {
    CandidateRequest {
        row,
        vocab,
        edits: lifts,
        allowed: None,
        inverse_temperature: 1.0,
        noise: None,
        top: lifts.len(),
        raw_top: 0,
        scaled_statistics: false,
        raw_statistics: false,
    }
}

/// A row's tokens that are reported in place of the best.
pub(super) struct Listed {
    pub(super) row: usize,
    lifts: Vec<LogitEdit>,
}

impl Listed {
    /// Of the rows that list any.
    pub(super) fn of(rows: &[SamplingRow<'_>]) -> Vec<Self> {
        let lists = rows.iter().map(|row| &row.sampling.logprob_token_ids);
        let listing = lists.enumerate().filter(|(_, ids)| !ids.is_empty());
        listing
            .map(|(row, ids)| {
                let mut ids = ids.clone();
                ids.sort_unstable();
                ids.dedup();
                let lifts = ids.into_iter().map(lift).collect();
                Self { row, lifts }
            })
            .collect()
    }

    pub(super) fn request(&self, vocab: Range<usize>) -> CandidateRequest<'_> {
        request(self.row, vocab, &self.lifts)
    }
}
