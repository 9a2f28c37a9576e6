//! Token embedding and LM head, split by vocabulary.

use std::{ops::Range, sync::Arc};

use phalanx_kernels::{Backend, Columns, Communicator, GatherLayout, Linear, Result};

use super::Step;

/// Embeddings of this rank's token ids.
pub struct VocabParallelEmbedding<B: Backend> {
    table: Arc<B::Weight>,
    /// Token ids of every rank, in rank order.
    vocab: Vec<Range<usize>>,
    rank: usize,
}

impl<B: Backend> VocabParallelEmbedding<B> {
    pub fn new(table: Arc<B::Weight>, vocab: Vec<Range<usize>>, rank: usize) -> Self {
        Self { table, vocab, rank }
    }

    /// Token ids this rank holds.
    pub fn vocab(&self) -> Range<usize> {
        self.vocab[self.rank].clone()
    }

    /// The rank that holds a token. Ids are below the vocabulary size: the step codec sees to it.
    pub fn owner(&self, token_id: u32) -> u32 {
        self.vocab.partition_point(|range| range.end <= token_id as usize) as u32
    }

    /// `out[t]` = the embedding of token `t`, written by the rank `owners[t]` and gathered, in either style: there is
    /// nothing to be summed.
    pub fn forward<C: Communicator<B>>(
        &self,
        step: &mut Step<'_, B, C>,
        out: &mut B::Buffer,
        owners: &[u32],
    ) -> Result<()> {
        step.comm.start_rows(out, step.rows)?;
        step.trace.op("embedding", || {
            step.backend.embedding(out, &self.table, self.vocab(), step.batch)
        })?;
        step.trace.op("all_gather", || {
            step.comm.all_gather(out, step.rows, GatherLayout::Rows(owners))
        })
    }
}

/// Output embedding of this rank's token ids; its logits stay on the rank.
pub struct ParallelLmHead<B: Backend> {
    /// Shared with the embedding when the model ties the two.
    weight: Arc<B::Weight>,
}

impl<B: Backend> ParallelLmHead<B> {
    pub fn new(weight: Arc<B::Weight>) -> Self {
        Self { weight }
    }

    /// `out[i, t - vocab.start]` = the logit of token `t` after the hidden state `x[i]`.
    pub fn forward(&self, backend: &B, out: &mut B::Buffer, x: &B::Buffer, rows: usize) -> Result<()> {
        let out = Columns {
            buffer: out,
            start: 0,
        };
        let linear = Linear {
            weight: self.weight.as_ref(),
            bias: None,
        };
        backend.linear(out, x, &linear, rows)
    }
}
