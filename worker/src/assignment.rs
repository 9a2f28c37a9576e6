//! What the coordinator assigned to this rank, checked: nothing in it is trusted as a length, an index or a divisor.

use std::{ops::Range, path::PathBuf, time::Duration};

use phalanx_model::{
    KvDtype, ModelConfig, RankShard, RopeConfig, RopeLayout, RopeScaling, ShardPlan, TensorParallelStyle,
    shard::VOCAB_ALIGN,
};
use phalanx_proto::{step::StepLimits, v1};

/// Log-probabilities that a row may ask for at most; the coordinator derives the same limit.
pub const MAX_LOGPROBS: u32 = 20;

const MAX_WORLD_SIZE: u64 = 30;
const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 4096;
const MAX_HEADS: u64 = 1 << 14;
const MAX_VOCAB: u64 = 1 << 22;
const MAX_POSITIONS: u64 = 1 << 28;
const MAX_BLOCK_SIZE: u64 = 1 << 12;
const MAX_TOKENS: u64 = 1 << 20;
const MAX_THREADS: u64 = 1 << 12;
const MAX_TIMEOUT_MS: u64 = 3_600_000;

/// Why an assignment cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignmentError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{field} is {value}, must be between {min} and {max}")]
    OutOfRange {
        field: &'static str,
        value: u64,
        min: u64,
        max: u64,
    },
    #[error("{field}: {message}")]
    Invalid { field: &'static str, message: String },
}

type Result<T> = std::result::Result<T, AssignmentError>;

/// A checked [`v1::Assign`].
#[derive(Clone, Debug)]
pub struct Assignment {
    pub rank: usize,
    /// GGUF file, or directory of safetensors files.
    pub model_path: PathBuf,
    pub config: ModelConfig,
    /// Who holds what; `plan.ranks[rank]` is this rank's share.
    pub plan: ShardPlan,
    /// Token positions per KV block.
    pub block_size: usize,
    pub kv_dtype: KvDtype,
    pub threads: usize,
    /// A collective that takes longer ends the group.
    pub step_timeout: Duration,
    pub limits: StepLimits,
}

impl Assignment {
    pub fn shard(&self) -> &RankShard {
        &self.plan.ranks[self.rank]
    }
    pub fn world_size(&self) -> usize {
        self.plan.ranks.len()
    }
}

impl TryFrom<&v1::Assign> for Assignment {
    type Error = AssignmentError;

    fn try_from(assign: &v1::Assign) -> Result<Self> {
        let world_size = within("world_size", assign.world_size, 1, MAX_WORLD_SIZE)?;
        let rank = within("rank", assign.rank, 0, world_size as u64 - 1)?;
        if assign.model_path.is_empty() {
            return Err(AssignmentError::Missing("model_path"));
        }
        let config = model_config(assign.model.as_ref().ok_or(AssignmentError::Missing("model"))?)?;
        let plan = shard_plan(assign, &config)?;
        let limits = step_limits(assign)?;
        let kv_dtype = match assign.kv_dtype() {
            v1::KvDtype::F32 => KvDtype::F32,
            v1::KvDtype::F16 => KvDtype::F16,
            v1::KvDtype::Bf16 => KvDtype::BF16,
            v1::KvDtype::Unspecified => return Err(AssignmentError::Missing("kv_dtype")),
        };
        let timeout_ms = within_u64("step_timeout_ms", assign.step_timeout_ms, 1, MAX_TIMEOUT_MS)?;
        Ok(Self {
            rank,
            model_path: PathBuf::from(&assign.model_path),
            config,
            plan,
            block_size: assign.block_size as usize,
            kv_dtype,
            threads: within("threads", assign.threads, 1, MAX_THREADS)?,
            step_timeout: Duration::from_millis(timeout_ms),
            limits,
        })
    }
}

/// The limits of plans and outputs that follow from an assignment. Coordinator and ranks must derive the same ones:
/// rows, tokens, blocks and vocabulary are the assignment's own; a row's edits are bounded by the tokens its blocks can
/// hold; log-probabilities by [`MAX_LOGPROBS`].
pub fn step_limits(assign: &v1::Assign) -> Result<StepLimits> {
    let vocab_size = assign.model.as_ref().map_or(0, |model| model.vocab_size);
    within("block_size", assign.block_size, 1, MAX_BLOCK_SIZE)?;
    // Slots are numbered in u32.
    let most_blocks = u64::from(u32::MAX) / u64::from(assign.block_size);
    within("num_blocks", assign.num_blocks, 1, most_blocks)?;
    within("max_blocks_per_row", assign.max_blocks_per_row, 1, most_blocks)?;
    within("max_tokens", assign.max_tokens, 1, MAX_TOKENS)?;
    within("max_rows", assign.max_rows, 1, MAX_TOKENS)?;
    Ok(StepLimits {
        max_rows: assign.max_rows,
        max_tokens: assign.max_tokens,
        max_blocks_per_row: assign.max_blocks_per_row,
        num_blocks: assign.num_blocks,
        vocab_size,
        max_edits_per_row: assign.max_blocks_per_row * assign.block_size,
        max_logprobs: MAX_LOGPROBS,
    })
}

fn model_config(spec: &v1::ModelSpec) -> Result<ModelConfig> {
    let head_dim = within("head_dim", spec.head_dim, 2, MAX_WIDTH)?;
    let num_attention_heads = within("num_attention_heads", spec.num_attention_heads, 1, MAX_HEADS)?;
    let num_key_value_heads = within(
        "num_key_value_heads",
        spec.num_key_value_heads,
        1,
        num_attention_heads as u64,
    )?;
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let message = format!("{num_attention_heads} query heads cannot share {num_key_value_heads}");
        return Err(invalid("num_key_value_heads", message));
    }
    let sliding_window = spec
        .sliding_window
        .map(|window| within("sliding_window", window, 1, u32::MAX.into()))
        .transpose()?;
    Ok(ModelConfig {
        architecture: spec.architecture.clone(),
        hidden_size: within("hidden_size", spec.hidden_size, 1, MAX_WIDTH)?,
        intermediate_size: within("intermediate_size", spec.intermediate_size, 1, MAX_WIDTH)?,
        num_hidden_layers: within("num_hidden_layers", spec.num_hidden_layers, 1, MAX_LAYERS)?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size: within("vocab_size", spec.vocab_size, 1, MAX_VOCAB)?,
        max_position_embeddings: within(
            "max_position_embeddings",
            spec.max_position_embeddings,
            1,
            MAX_POSITIONS,
        )?,
        rms_norm_eps: positive("rms_norm_eps", spec.rms_norm_eps)?,
        rope: rope_config(spec, head_dim)?,
        tie_word_embeddings: spec.tie_word_embeddings,
        attention_bias: spec.attention_bias,
        mlp_bias: spec.mlp_bias,
        sliding_window,
    })
}

fn rope_config(spec: &v1::ModelSpec, head_dim: usize) -> Result<RopeConfig> {
    use v1::model_spec::RopeScaling as Wire;
    let rotary_dim = within("rotary_dim", spec.rotary_dim, 2, head_dim as u64)?;
    if !rotary_dim.is_multiple_of(2) {
        return Err(invalid("rotary_dim", format!("{rotary_dim} is odd")));
    }
    let layout = match spec.rope_layout() {
        v1::RopeLayout::Half => RopeLayout::Half,
        v1::RopeLayout::Interleaved => RopeLayout::Interleaved,
        v1::RopeLayout::Unspecified => return Err(AssignmentError::Missing("rope_layout")),
    };
    let original = |positions| {
        within(
            "original_max_position_embeddings",
            positions,
            1,
            MAX_POSITIONS,
        )
    };
    let scaling = match &spec.rope_scaling {
        None => RopeScaling::None,
        Some(Wire::Linear(linear)) => RopeScaling::Linear {
            factor: positive("rope_scaling.factor", linear.factor)?,
        },
        Some(Wire::Llama3(llama3)) => RopeScaling::Llama3 {
            factor: positive("rope_scaling.factor", llama3.factor)?,
            low_freq_factor: positive("low_freq_factor", llama3.low_freq_factor)?,
            high_freq_factor: positive("high_freq_factor", llama3.high_freq_factor)?,
            original_max_position_embeddings: original(llama3.original_max_position_embeddings)?,
        },
        Some(Wire::Yarn(yarn)) => RopeScaling::Yarn {
            factor: positive("rope_scaling.factor", yarn.factor)?,
            original_max_position_embeddings: original(yarn.original_max_position_embeddings)?,
            beta_fast: positive("beta_fast", yarn.beta_fast)?,
            beta_slow: positive("beta_slow", yarn.beta_slow)?,
            attention_factor: positive("attention_factor", yarn.attention_factor)?,
        },
    };
    Ok(RopeConfig {
        theta: positive("rope_theta", spec.rope_theta)?,
        rotary_dim,
        layout,
        scaling,
    })
}

fn shard_plan(assign: &v1::Assign, config: &ModelConfig) -> Result<ShardPlan> {
    let style = match assign.style() {
        v1::TensorParallelStyle::Gather => TensorParallelStyle::Gather,
        v1::TensorParallelStyle::Reduce => TensorParallelStyle::Reduce,
        v1::TensorParallelStyle::Unspecified => return Err(AssignmentError::Missing("style")),
    };
    if assign.shards.len() != assign.world_size as usize {
        let message = format!("{} given for {} ranks", assign.shards.len(), assign.world_size);
        return Err(invalid("shards", message));
    }
    let ranks = assign
        .shards
        .iter()
        .map(|shard| rank_shard(shard, config))
        .collect::<Result<Vec<_>>>()?;
    tiles("shards.q_heads", &ranks, |r| &r.q_heads, config.num_attention_heads)?;
    tiles("shards.intermediate", &ranks, |r| &r.intermediate, config.intermediate_size)?;
    tiles("shards.vocab", &ranks, |r| &r.vocab, config.vocab_size)?;
    match style {
        TensorParallelStyle::Gather => {
            tiles("shards.hidden", &ranks, |r| &r.hidden, config.hidden_size)?;
        }
        TensorParallelStyle::Reduce => {
            if ranks.iter().any(|r| r.hidden != (0..config.hidden_size)) {
                return Err(invalid("shards.hidden", "must be all of it in reduce style"));
            }
        }
    }
    Ok(ShardPlan { style, ranks })
}

fn rank_shard(shard: &v1::RankShard, config: &ModelConfig) -> Result<RankShard> {
    let q_heads = range("shards.q_heads", shard.q_heads.as_ref(), config.num_attention_heads)?;
    let kv_heads = range("shards.kv_heads", shard.kv_heads.as_ref(), config.num_key_value_heads)?;
    let read = q_heads.start / config.group_size()..(q_heads.end - 1) / config.group_size() + 1;
    if read != kv_heads {
        let message = format!("{kv_heads:?} given, query heads {q_heads:?} read {read:?}");
        return Err(invalid("shards.kv_heads", message));
    }
    let vocab = range("shards.vocab", shard.vocab.as_ref(), config.vocab_size)?;
    if !vocab.start.is_multiple_of(VOCAB_ALIGN) {
        let message = format!("starts at {}, not a multiple of {VOCAB_ALIGN}", vocab.start);
        return Err(invalid("shards.vocab", message));
    }
    Ok(RankShard {
        q_heads,
        kv_heads,
        intermediate: range(
            "shards.intermediate",
            shard.intermediate.as_ref(),
            config.intermediate_size,
        )?,
        hidden: range("shards.hidden", shard.hidden.as_ref(), config.hidden_size)?,
        vocab,
    })
}

/// A range that holds something and ends within `whole`.
fn range(field: &'static str, range: Option<&v1::Range>, whole: usize) -> Result<Range<usize>> {
    let range = range.ok_or(AssignmentError::Missing(field))?;
    let (start, end) = (range.start as usize, range.end as usize);
    if start < end && end <= whole {
        Ok(start..end)
    } else {
        Err(invalid(field, format!("{start}..{end} is not a part of 0..{whole}")))
    }
}

/// The ranks' ranges follow one another from 0 to `whole`.
fn tiles(
    field: &'static str,
    ranks: &[RankShard],
    part: impl Fn(&RankShard) -> &Range<usize>,
    whole: usize,
) -> Result<()> {
    let mut at = 0;
    for (rank, shard) in ranks.iter().enumerate() {
        if part(shard).start != at {
            let message = format!("rank {rank} starts at {}, not at {at}", part(shard).start);
            return Err(invalid(field, message));
        }
        at = part(shard).end;
    }
    if at == whole {
        Ok(())
    } else {
        Err(invalid(field, format!("the ranks end at {at}, not at {whole}")))
    }
}

fn within(field: &'static str, value: u32, min: u64, max: u64) -> Result<usize> {
    within_u64(field, value.into(), min, max).map(|value| value as usize)
}

fn within_u64(field: &'static str, value: u64, min: u64, max: u64) -> Result<u64> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(AssignmentError::OutOfRange {
            field,
            value,
            min,
            max,
        })
    }
}

fn positive(field: &'static str, value: f32) -> Result<f32> {
    if value.is_finite() && value > 0.0 {
        Ok(value)
    } else {
        Err(invalid(field, format!("{value} is not a positive number")))
    }
}

fn invalid(field: &'static str, message: impl Into<String>) -> AssignmentError {
    AssignmentError::Invalid {
        field,
        message: message.into(),
    }
}
