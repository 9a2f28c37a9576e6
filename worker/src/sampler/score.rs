//! Log-probabilities of tokens that are known already: those of a prompt.

use phalanx_kernels::{Backend, Candidate, CandidateRequest, Candidates, Communicator, LogitEdit, Threshold};
use phalanx_proto::step::ScoredToken;

use super::{
    Vocabulary,
    decision::{log_softmax, log_sum_exp},
    exchange, listed,
};
use crate::error::RunError;

/// One row of the logits, and the token that is known to come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownRow {
    pub token: u32,
    /// How many of the best tokens to report beside it.
    pub top: u32,
}

/// Scores the token of each row: `rows[i]` belongs to row `i` of `logits`. Every rank returns the same.
pub fn score<B: Backend, C: Communicator<B>>(
    backend: &B,
    comm: &mut C,
    logits: &B::Buffer,
    vocab: Vocabulary<'_>,
    rows: &[KnownRow],
) -> Result<Vec<ScoredToken>, RunError> {
    let lifts: Vec<LogitEdit> = rows.iter().map(|known| listed::lift(known.token)).collect();
    let requests: Vec<CandidateRequest<'_>> = (0..)
        .zip(rows.iter().zip(&lifts))
        .map(|(row, (known, lift))| CandidateRequest {
            raw_top: known.top as usize,
            raw_statistics: true,
            ..listed::request(row, vocab.own(), std::slice::from_ref(lift))
        })
        .collect();
    let local = backend.candidates(logits, &requests)?;
    let merged = exchange::merge_all(comm, vocab, &requests, &local)?;
    let found: Vec<Option<Candidate>> = rows.iter().zip(&merged).map(known_candidate).collect();
    let thresholds = found.iter().enumerate().map(|(row, candidate)| Threshold {
        row,
        // Nothing reaches it: there is nothing to be counted.
        value: candidate.map_or(f32::INFINITY, |candidate| candidate.raw),
    });
    let thresholds: Vec<Threshold> = thresholds.collect();
    let ranks = exchange::count_all(backend, comm, (logits, vocab), &thresholds)?;
    let scored = rows.iter().zip(merged).zip(found.into_iter().zip(ranks));
    Ok(scored
        .map(|((known, merged), (candidate, rank))| scored_token(*known, &merged, candidate, rank))
        .collect())
}

/// The known token's logit; none if the row's logits are not finite.
fn known_candidate((known, merged): (&KnownRow, &Candidates)) -> Option<Candidate> {
    let best = merged.best.first().copied();
    best.filter(|best| merged.finite && best.id == known.token)
}

fn scored_token(known: KnownRow, merged: &Candidates, found: Option<Candidate>, rank: u32) -> ScoredToken {
    let Some(candidate) = found else {
        return ScoredToken {
            token: known.token,
            logprob: f32::NAN,
            rank: 0,
            top_logprobs: Vec::new(),
        };
    };
    let total = log_sum_exp(&merged.raw_statistics);
    let best = merged.raw_best.iter();
    ScoredToken {
        token: known.token,
        logprob: log_softmax(&candidate, total),
        rank,
        top_logprobs: best.map(|other| (other.id, log_softmax(other, total))).collect(),
    }
}
