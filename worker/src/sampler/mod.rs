//! From logits that no rank holds whole to tokens.
//!
//! The order of operations is vLLM's: mask, penalties, bias, temperature, min-p, top-k, top-p, draw. Every rank reports a few
//! candidates of its part of the vocabulary, the ranks exchange them, and each computes the same decision from the same
//! candidates; so when a row needs more candidates than it asked for, all ranks go round again together. A draw is the
//! argmax of scaled logit + Gumbel noise over the tokens the filters leave (Gumbel, 1954): it depends on the row's
//! logits, seed and position, and on nothing else.

mod decision;
mod exchange;
mod listed;
mod row;
mod score;
mod wire;

pub use exchange::MESSAGE_BYTES;
pub use score::{KnownRow, score};
pub use wire::WireError;

use std::ops::Range;

use phalanx_kernels::{Backend, CandidateRequest, Communicator, Threshold};
use phalanx_proto::step::{RowSampling, SampledToken, SequenceId, TokenSet};

use crate::error::RunError;
use listed::Listed;
use row::Row;

/// One row of the logits, and how to draw from it.
#[derive(Clone, Copy, Debug)]
pub struct SamplingRow<'a> {
    pub sequence: SequenceId,
    /// Index in its sequence of the token that is drawn.
    pub position: u64,
    pub sampling: &'a RowSampling,
    /// What may be drawn, out of the whole vocabulary; none: every token.
    pub allowed: Option<&'a TokenSet>,
}

/// The split vocabulary, and this rank's place in it.
#[derive(Clone, Copy, Debug)]
pub struct Vocabulary<'a> {
    /// Token ids of each rank; they tile the vocabulary in rank order.
    pub ranks: &'a [Range<usize>],
    pub rank: usize,
}

impl Vocabulary<'_> {
    fn own(&self) -> Range<usize> {
        self.ranks[self.rank].clone()
    }
    fn size(&self) -> usize {
        self.ranks.last().map_or(0, |range| range.end)
    }
}

/// Draws one token for each row: `rows[i]` belongs to row `i` of `logits`. Every rank returns the same.
pub fn sample<B: Backend, C: Communicator<B>>(
    backend: &B,
    comm: &mut C,
    logits: &B::Buffer,
    vocab: Vocabulary<'_>,
    rows: &[SamplingRow<'_>],
) -> Result<Vec<SampledToken>, RunError> {
    let mut states: Vec<Row<'_>> = rows.iter().map(|row| Row::new(row, vocab.size())).collect();
    let mut sampled: Vec<Option<SampledToken>> = vec![None; rows.len()];
    let mut reported = Vec::new();
    let mut open: Vec<usize> = (0..rows.len()).collect();
    let lists = Listed::of(rows);
    // Part of the first round only: what was found stays.
    let mut listed: Vec<CandidateRequest<'_>> = lists.iter().map(|list| list.request(vocab.own())).collect();
    loop {
        let mut requests: Vec<CandidateRequest<'_>> =
            open.iter().map(|&i| states[i].request(i, vocab.own())).collect();
        requests.extend(std::mem::take(&mut listed));
        let local = backend.candidates(logits, &requests)?;
        // Without rows, too: this is what keeps a fast rank's next step off the buffers of a slow one's last.
        let merged = exchange::merge_all(comm, vocab, &requests, &local)?;
        let (merged, found) = merged.split_at(open.len());
        for (list, found) in lists.iter().zip(found) {
            states[list.row].note_listed(&found.best);
        }
        let mut undecided = Vec::new();
        for (&row, candidates) in open.iter().zip(merged) {
            match states[row].decide(candidates) {
                Some(choice) => {
                    let logit = choice.reported_logit();
                    reported.extend(logit.map(|value| Threshold { row, value }));
                    sampled[row] = Some(choice.into_token(rows[row].sequence));
                }
                None => {
                    states[row].grow();
                    undecided.push(row);
                }
            }
        }
        open = undecided;
        if open.is_empty() {
            break;
        }
    }
    if !reported.is_empty() {
        let ranks = exchange::count_all(backend, comm, (logits, vocab), &reported)?;
        for (threshold, rank) in reported.iter().zip(ranks) {
            if let Some(token) = &mut sampled[threshold.row] {
                token.rank = Some(rank);
            }
        }
    }
    // Every row left `open` with its token.
    Ok(sampled.into_iter().flatten().collect())
}
