//! Layers that know how they are split over ranks. Their names are Megatron's and vLLM's.

mod embedding;
mod linear;
mod rotary;

pub use embedding::{ParallelLmHead, VocabParallelEmbedding};
pub use linear::{
    ColumnParallelLinear, Dense, MergedColumnParallelLinear, QkvParallelLinear, RowParallelLinear,
};
pub use rotary::RotaryEmbedding;

use std::ops::Range;

use phalanx_kernels::Backend;
use phalanx_model::TensorParallelStyle;

use crate::trace::Trace;

/// Of a [`VocabParallelEmbedding`].
pub(crate) const EMBEDDING_COLLECTIVES: usize = 1;

/// Of a decoder layer, whose attention and MLP each end in a [`RowParallelLinear`].
pub(crate) const fn collectives_per_layer(style: TensorParallelStyle) -> usize {
    2 * match style {
        TensorParallelStyle::Reduce => 1,
        // The input is gathered, too.
        TensorParallelStyle::Gather => 2,
    }
}

/// One forward pass as a layer sees it: the device, the peers and the batch.
pub struct Step<'a, B: Backend, C> {
    pub backend: &'a B,
    pub comm: &'a mut C,
    pub batch: &'a B::Batch,
    /// Leading rows of every activation that count.
    pub rows: usize,
    pub trace: &'a Trace,
}

/// How an activation is split over the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Every rank's columns, in rank order.
    columns: Vec<Range<usize>>,
    rank: usize,
    style: TensorParallelStyle,
}

impl Split {
    pub fn new(columns: Vec<Range<usize>>, rank: usize, style: TensorParallelStyle) -> Self {
        Self { columns, rank, style }
    }
    /// This rank's columns of the whole activation.
    pub fn own(&self) -> Range<usize> {
        self.columns[self.rank].clone()
    }
    /// Where this rank writes its part: at its place in a gathered buffer, at the front of a local one.
    pub fn start(&self) -> usize {
        match self.style {
            TensorParallelStyle::Gather => self.own().start,
            TensorParallelStyle::Reduce => 0,
        }
    }
    /// Width of the buffer that holds it: the whole activation when it is gathered, else this rank's part.
    pub fn width(&self) -> usize {
        match self.style {
            TensorParallelStyle::Gather => self.columns.last().map_or(0, |range| range.end),
            TensorParallelStyle::Reduce => self.own().len(),
        }
    }
}
