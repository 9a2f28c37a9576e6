//! Who holds what: ranges of whole units per rank, never a division.

use std::ops::Range;

/// How partial results of the ranks become whole activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorParallelStyle {
    /// Every matrix is split by output column; activations are all-gathered. Each output element is summed whole by
    /// one rank, in one order, so the result does not depend on the number of ranks.
    Gather,
    /// Megatron (Shoeybi et al., 2019): column split, then row split and an all-reduce.
    Reduce,
}

/// One rank's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankShard {
    /// Query heads; the ranks' ranges tile all heads.
    pub q_heads: Range<usize>,
    /// KV heads its query heads read. Ranges overlap (are replicated) only when there are more ranks than KV heads.
    pub kv_heads: Range<usize>,
    /// Columns of the MLP's inner activation.
    pub intermediate: Range<usize>,
    /// Columns of the residual stream that this rank computes (gather style); all of them in reduce style.
    pub hidden: Range<usize>,
    /// Vocabulary ids whose embedding and logits it holds; starts at multiples of [`VOCAB_ALIGN`].
    pub vocab: Range<usize>,
}

/// Vocabulary ranges start at multiples of this, so that per-chunk statistics of the logits do not depend on the split.
pub const VOCAB_ALIGN: usize = 512;

#[derive(Clone, Debug, PartialEq)]
pub struct TensorParallelOptions {
    pub world_size: usize,
    pub style: TensorParallelStyle,
    /// Relative capacity per rank; none: all equal.
    pub rank_weights: Option<Vec<f32>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    pub style: TensorParallelStyle,
    /// In rank order.
    pub ranks: Vec<RankShard>,
}

/// A rank's part of one tensor `[rows = output features, cols = input features]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shard {
    Replicated,
    /// Output features.
    Columns(Range<usize>),
    /// Input features.
    Rows(Range<usize>),
    /// Output features that are whole KV heads.
    KvGroups(Range<usize>),
}
