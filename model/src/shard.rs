//! Who holds what: ranges of whole units per rank, never a division.

mod apportion;

use std::ops::Range;

use crate::{ConfigError, LayerTensor, ModelConfig, TensorFormat, TensorRole};
use apportion::{apportion, ranges};

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

/// A rank's part of one tensor `[rows = output features, cols = input features]`, in elements.
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

/// The part of a stored tensor that a rank reads, in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlice {
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

/// Elements of the longest quantization blocks of the matrices that reduce style splits by input feature. No rank's
/// range may cut a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowSplitBlocks {
    pub o: usize,
    pub down: usize,
}

impl RowSplitBlocks {
    /// Of a model whose tensors have these formats.
    pub fn of(formats: impl IntoIterator<Item = (TensorRole, TensorFormat)>) -> Self {
        let mut blocks = Self { o: 1, down: 1 };
        for (role, format) in formats {
            let TensorRole::Layer { tensor, .. } = role else {
                continue;
            };
            match tensor {
                LayerTensor::O => blocks.o = blocks.o.max(format.block_len()),
                LayerTensor::Down => blocks.down = blocks.down.max(format.block_len()),
                _ => {}
            }
        }
        blocks
    }
}

/// Why a model cannot be split, or a split is not one of this model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ShardError {
    #[error("{world_size} ranks; must be 1 to {limit}, the model's number of attention heads")]
    WorldSize { world_size: usize, limit: usize },
    #[error("{found} rank weights for {expected} ranks")]
    WeightCount { found: usize, expected: usize },
    #[error("rank weight {value} of rank {rank} must be positive and finite")]
    Weight { rank: usize, value: f32 },
    #[error("{dimension} of {size} cannot be split over {world_size} ranks")]
    TooNarrow {
        dimension: &'static str,
        size: usize,
        world_size: usize,
    },
    #[error(
        "reduce style cannot split {tensor}, quantized in blocks of {block}, over {world_size} ranks without cutting a \
         block: it has {parts} parts; use fewer ranks or gather style"
    )]
    CutsBlock {
        tensor: &'static str,
        block: usize,
        parts: usize,
        world_size: usize,
    },
    #[error("the ranks' ranges of {dimension} do not tile 0..{size}")]
    NotTiled { dimension: &'static str, size: usize },
    #[error("rank {rank} holds KV heads {found:?}, its query heads read {expected:?}")]
    KvHeads {
        rank: usize,
        found: Range<usize>,
        expected: Range<usize>,
    },
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Hidden and intermediate columns are dealt in units of this where there are enough of them: two tiles of rows of the
/// CPU kernels, and a cache line of f32.
const COLUMN_UNIT: usize = 16;

type Ranges = Vec<Range<usize>>;

impl ShardPlan {
    /// Splits a model over the ranks of `options`, in proportion to their weights and in whole units.
    ///
    /// Up to as many ranks as KV heads, a rank holds whole KV groups, and no KV head is replicated. With more ranks than
    /// that, groups are split: every rank serves query heads of one group, whose KV head all its ranks hold.
    ///
    /// # Errors
    /// More ranks than query heads, unusable weights, or (reduce style) quantization blocks too long to split.
    pub fn new(
        config: &ModelConfig,
        options: &TensorParallelOptions,
        blocks: RowSplitBlocks,
    ) -> Result<Self, ShardError> {
        config.validate()?;
        let weights = options.checked_weights(config.num_attention_heads)?;
        let blocks = match options.style {
            TensorParallelStyle::Gather => RowSplitBlocks { o: 1, down: 1 },
            TensorParallelStyle::Reduce => blocks,
        };
        let (q_heads, kv_heads) = split_heads(config, &weights, blocks.o.max(1))?;
        let intermediate = split_intermediate(config, &weights, blocks.down.max(1))?;
        let hidden = match options.style {
            TensorParallelStyle::Gather => split_columns("hidden_size", config.hidden_size, &weights)?,
            TensorParallelStyle::Reduce => vec![0..config.hidden_size; weights.len()],
        };
        let vocab_units = config.vocab_size.div_ceil(VOCAB_ALIGN);
        let vocab = ranges(
            &apportion(vocab_units, &weights, 0),
            VOCAB_ALIGN,
            config.vocab_size,
        );
        let ranks = q_heads
            .into_iter()
            .zip(kv_heads)
            .zip(intermediate)
            .zip(hidden)
            .zip(vocab);
        let ranks = ranks.map(
            |((((q_heads, kv_heads), intermediate), hidden), vocab)| RankShard {
                q_heads,
                kv_heads,
                intermediate,
                hidden,
                vocab,
            },
        );
        Ok(Self {
            style: options.style,
            ranks: ranks.collect(),
        })
    }

    pub fn world_size(&self) -> usize {
        self.ranks.len()
    }

    /// Checks that the ranks' ranges make up the whole model: for plans that came from a peer.
    ///
    /// # Errors
    /// The dimension whose ranges leave a gap, overlap or end elsewhere, or the rank that lacks a KV head it reads.
    pub fn validate(&self, config: &ModelConfig) -> Result<(), ShardError> {
        config.validate()?;
        let (world_size, limit) = (self.world_size(), config.num_attention_heads);
        if !(1..=limit).contains(&world_size) {
            return Err(ShardError::WorldSize { world_size, limit });
        }
        self.check_tiles("num_attention_heads", config.num_attention_heads, |rank| {
            &rank.q_heads
        })?;
        self.check_tiles("intermediate_size", config.intermediate_size, |rank| {
            &rank.intermediate
        })?;
        self.check_tiles("vocab_size", config.vocab_size, |rank| &rank.vocab)?;
        if let Some(rank) = self
            .ranks
            .iter()
            .find(|rank| rank.vocab.start % VOCAB_ALIGN != 0 && !rank.vocab.is_empty())
        {
            let size = rank.vocab.start;
            return Err(ShardError::NotTiled {
                dimension: "vocab_size in aligned chunks",
                size,
            });
        }
        match self.style {
            TensorParallelStyle::Gather => {
                self.check_tiles("hidden_size", config.hidden_size, |rank| &rank.hidden)?;
            }
            TensorParallelStyle::Reduce
                if self
                    .ranks
                    .iter()
                    .all(|rank| rank.hidden == (0..config.hidden_size)) => {}
            TensorParallelStyle::Reduce => {
                return Err(ShardError::NotTiled {
                    dimension: "hidden_size",
                    size: config.hidden_size,
                });
            }
        }
        for (rank, shard) in self.ranks.iter().enumerate() {
            let expected = kv_heads_of(&shard.q_heads, config.group_size());
            if shard.q_heads.is_empty() || shard.kv_heads != expected {
                return Err(ShardError::KvHeads {
                    rank,
                    found: shard.kv_heads.clone(),
                    expected,
                });
            }
        }
        Ok(())
    }

    fn check_tiles(
        &self,
        dimension: &'static str,
        size: usize,
        range: impl Fn(&RankShard) -> &Range<usize>,
    ) -> Result<(), ShardError> {
        let mut end = 0;
        for rank in &self.ranks {
            let range = range(rank);
            if range.start != end || range.end < range.start {
                return Err(ShardError::NotTiled { dimension, size });
            }
            end = range.end;
        }
        if end == size {
            Ok(())
        } else {
            Err(ShardError::NotTiled { dimension, size })
        }
    }

    /// What `rank` holds of a tensor of a plan that [`Self::new`] made or [`Self::validate`] accepted. None if there is no such rank or tensor. In reduce style the biases of `o` and
    /// `down` are replicated and to be added by rank 0 alone.
    pub fn shard(&self, config: &ModelConfig, rank: usize, role: TensorRole) -> Option<Shard> {
        let held = self.ranks.get(rank)?;
        config.shape(role)?;
        let heads = |heads: &Range<usize>| heads.start * config.head_dim..heads.end * config.head_dim;
        let tensor = match role {
            TensorRole::TokenEmbedding | TensorRole::LmHead => {
                return Some(Shard::Columns(held.vocab.clone()));
            }
            TensorRole::OutputNorm => return Some(Shard::Replicated),
            TensorRole::Layer { tensor, .. } => tensor,
        };
        Some(match (tensor, self.style) {
            (LayerTensor::InputNorm | LayerTensor::PostAttentionNorm, _) => Shard::Replicated,
            (LayerTensor::Q | LayerTensor::QBias, _) => Shard::Columns(heads(&held.q_heads)),
            (LayerTensor::K | LayerTensor::V | LayerTensor::KBias | LayerTensor::VBias, _) => {
                Shard::KvGroups(heads(&held.kv_heads))
            }
            (LayerTensor::Gate | LayerTensor::Up | LayerTensor::GateBias | LayerTensor::UpBias, _) => {
                Shard::Columns(held.intermediate.clone())
            }
            (
                LayerTensor::O | LayerTensor::Down | LayerTensor::OBias | LayerTensor::DownBias,
                TensorParallelStyle::Gather,
            ) => Shard::Columns(held.hidden.clone()),
            (LayerTensor::O, TensorParallelStyle::Reduce) => Shard::Rows(heads(&held.q_heads)),
            (LayerTensor::Down, TensorParallelStyle::Reduce) => Shard::Rows(held.intermediate.clone()),
            (LayerTensor::OBias | LayerTensor::DownBias, TensorParallelStyle::Reduce) => Shard::Replicated,
        })
    }

    /// The rows and columns of the stored tensor that `rank` holds. None if there is no such rank or tensor.
    pub fn slice(&self, config: &ModelConfig, rank: usize, role: TensorRole) -> Option<TensorSlice> {
        let (rows, cols) = config.shape(role)?;
        Some(match self.shard(config, rank, role)? {
            Shard::Replicated => TensorSlice {
                rows: 0..rows,
                cols: 0..cols,
            },
            Shard::Columns(range) | Shard::KvGroups(range) => TensorSlice {
                rows: range,
                cols: 0..cols,
            },
            Shard::Rows(range) => TensorSlice {
                rows: 0..rows,
                cols: range,
            },
        })
    }
}

impl TensorParallelOptions {
    /// Equal ranks.
    pub fn equal(world_size: usize, style: TensorParallelStyle) -> Self {
        Self {
            world_size,
            style,
            rank_weights: None,
        }
    }

    fn checked_weights(&self, limit: usize) -> Result<Vec<f64>, ShardError> {
        let world_size = self.world_size;
        if !(1..=limit).contains(&world_size) {
            return Err(ShardError::WorldSize { world_size, limit });
        }
        let Some(weights) = &self.rank_weights else {
            return Ok(vec![1.0; world_size]);
        };
        if weights.len() != world_size {
            return Err(ShardError::WeightCount {
                found: weights.len(),
                expected: world_size,
            });
        }
        match weights
            .iter()
            .position(|weight| !(weight.is_finite() && *weight > 0.0))
        {
            Some(rank) => Err(ShardError::Weight {
                rank,
                value: weights[rank],
            }),
            None => Ok(weights.iter().map(|&weight| f64::from(weight)).collect()),
        }
    }
}

/// The query and KV heads of each rank. `block` elements of the concatenated heads must stay together.
fn split_heads(config: &ModelConfig, weights: &[f64], block: usize) -> Result<(Ranges, Ranges), ShardError> {
    let (kv_heads, group, world_size) = (config.num_key_value_heads, config.group_size(), weights.len());
    let cuts_block = |parts| ShardError::CutsBlock {
        tensor: "o_proj",
        block,
        parts,
        world_size,
    };
    if world_size > kv_heads {
        // Heads that must stay together; groups are alike, so they must hold a whole number of them.
        let unit = least_common_multiple(block, config.head_dim) / config.head_dim;
        let units = group / unit;
        if !group.is_multiple_of(unit) || world_size.div_ceil(kv_heads) > units {
            return Err(cuts_block(if group.is_multiple_of(unit) {
                units * kv_heads
            } else {
                kv_heads
            }));
        }
        return Ok(split_groups(config, weights, unit));
    }
    let group_dim = group * config.head_dim;
    let unit = least_common_multiple(block, group_dim) / group_dim;
    let units = kv_heads.div_ceil(unit);
    if units < world_size {
        return Err(cuts_block(units));
    }
    let kv = ranges(&apportion(units, weights, 1), unit, kv_heads);
    let q = kv
        .iter()
        .map(|heads| heads.start * group..heads.end * group)
        .collect();
    Ok((q, kv))
}

/// More ranks than KV heads: the ranks are dealt to the groups evenly, and each group's query heads, in units of `unit`,
/// to its ranks by weight.
fn split_groups(config: &ModelConfig, weights: &[f64], unit: usize) -> (Ranges, Ranges) {
    let (kv_heads, group) = (config.num_key_value_heads, config.group_size());
    let (mut q, mut kv) = (Ranges::new(), Ranges::new());
    let ranks_of_group = apportion(weights.len(), &vec![1.0; kv_heads], 1);
    let mut rest = weights;
    for (head, ranks) in ranks_of_group.into_iter().enumerate() {
        let (mine, others) = rest.split_at(ranks);
        rest = others;
        let first = head * group;
        for range in ranges(&apportion(group / unit, mine, 1), unit, group) {
            q.push(first + range.start..first + range.end);
            kv.push(head..head + 1);
        }
    }
    (q, kv)
}

fn split_intermediate(config: &ModelConfig, weights: &[f64], block: usize) -> Result<Ranges, ShardError> {
    let (size, world_size) = (config.intermediate_size, weights.len());
    if block == 1 {
        return split_columns("intermediate_size", size, weights);
    }
    let unit = least_common_multiple(block, COLUMN_UNIT);
    let parts = size.div_ceil(unit);
    if parts < world_size {
        return Err(ShardError::CutsBlock {
            tensor: "down_proj",
            block,
            parts,
            world_size,
        });
    }
    Ok(ranges(&apportion(parts, weights, 1), unit, size))
}

/// Columns in units of [`COLUMN_UNIT`], or of less where there are fewer such units than ranks.
fn split_columns(dimension: &'static str, size: usize, weights: &[f64]) -> Result<Ranges, ShardError> {
    let world_size = weights.len();
    let mut unit = COLUMN_UNIT;
    while unit > 1 && size.div_ceil(unit) < world_size {
        unit /= 2;
    }
    let units = size.div_ceil(unit);
    if units < world_size {
        return Err(ShardError::TooNarrow {
            dimension,
            size,
            world_size,
        });
    }
    Ok(ranges(&apportion(units, weights, 1), unit, size))
}

/// The KV heads that these query heads read.
fn kv_heads_of(q_heads: &Range<usize>, group_size: usize) -> Range<usize> {
    q_heads.start / group_size..q_heads.end.div_ceil(group_size)
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}
