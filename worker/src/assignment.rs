//! What the coordinator assigned to this rank, checked: nothing in it is trusted as a length, an index or a divisor.

use std::{path::PathBuf, time::Duration};

use phalanx_model::{
    ConfigError, KvDtype, ModelConfig, RankShard, RopeConfig, RopeLayout, RopeScaling, ShardError, ShardPlan,
    TensorParallelStyle,
};
use phalanx_proto::{limits::MAX_LOGPROBS, step::StepLimits, v1};
use phalanx_shm::MAX_WORLD_SIZE;

use crate::trace::TraceOptions;

const MAX_RANKS: u64 = MAX_WORLD_SIZE as u64;
const MAX_BLOCK_SIZE: u64 = 1 << 12;
const MAX_TOKENS: u64 = 1 << 20;
const MAX_EDITS: u64 = 1 << 24;
const MAX_THREADS: u64 = 256;
const MAX_TIMEOUT_MS: u64 = 3_600_000;

/// Why an assignment cannot be carried out.
#[derive(Debug, thiserror::Error)]
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
    #[error("{found} shards for {expected} ranks")]
    ShardCount { found: usize, expected: u32 },
    #[error("model: {0}")]
    Model(#[from] ConfigError),
    #[error("shards: {0}")]
    Shards(#[from] ShardError),
}

type Result<T> = std::result::Result<T, AssignmentError>;

/// What a rank computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda,
}

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
    /// Matrices of layers are rounded to E4M3 when they are loaded.
    pub quantize_to_fp8: bool,
    /// On CPUs.
    pub threads: usize,
    pub device: Device,
    /// A collective that takes longer ends the group.
    pub step_timeout: Duration,
    /// GPUs sum short messages without NCCL where they reach each other's memory.
    pub custom_all_reduce: bool,
    pub limits: StepLimits,
    /// Rows of the decode steps that are captured as CUDA graphs, rising; empty on CPUs and for eager execution.
    pub cudagraph_capture_sizes: Vec<usize>,
    pub trace: Option<TraceOptions>,
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
        let world_size = within("world_size", assign.world_size, 1, MAX_RANKS)?;
        let rank = within("rank", assign.rank, 0, world_size - 1)? as usize;
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
            v1::KvDtype::E4m3 => KvDtype::E4M3,
            v1::KvDtype::Int8 => KvDtype::INT8,
            v1::KvDtype::Unspecified => return Err(AssignmentError::Missing("kv_dtype")),
        };
        let device = match assign.device() {
            v1::DeviceKind::Cpu => Device::Cpu,
            v1::DeviceKind::Cuda => Device::Cuda,
            v1::DeviceKind::Unspecified => return Err(AssignmentError::Missing("device")),
        };
        let timeout_ms = within("step_timeout_ms", assign.step_timeout_ms, 1, MAX_TIMEOUT_MS)?;
        Ok(Self {
            rank,
            model_path: PathBuf::from(&assign.model_path),
            config,
            plan,
            block_size: assign.block_size as usize,
            kv_dtype,
            quantize_to_fp8: assign.quantize_to_fp8,
            threads: within("threads", assign.threads, 1, MAX_THREADS)? as usize,
            device,
            step_timeout: Duration::from_millis(timeout_ms),
            custom_all_reduce: !assign.disable_custom_all_reduce,
            cudagraph_capture_sizes: capture_sizes(&assign.cudagraph_capture_sizes, &limits)?,
            limits,
            trace: trace_options(assign),
        })
    }
}

/// The limits of plans and outputs that follow from an assignment. Coordinator and ranks must derive the same ones:
/// they are the assignment's own, checked.
pub fn step_limits(assign: &v1::Assign) -> Result<StepLimits> {
    let vocab_size = assign.model.as_ref().map_or(0, |model| model.vocab_size);
    within("block_size", assign.block_size, 1, MAX_BLOCK_SIZE)?;
    let most_blocks = check_num_blocks(assign.block_size, assign.num_blocks)?;
    within("max_blocks_per_row", assign.max_blocks_per_row, 1, most_blocks)?;
    within("max_tokens", assign.max_tokens, 1, MAX_TOKENS)?;
    within("max_rows", assign.max_rows, 1, MAX_TOKENS)?;
    within("max_edits_per_row", assign.max_edits_per_row, 0, MAX_EDITS)?;
    within("max_logprobs", assign.max_logprobs, 0, MAX_LOGPROBS.into())?;
    Ok(StepLimits {
        max_rows: assign.max_rows,
        max_tokens: assign.max_tokens,
        max_blocks_per_row: assign.max_blocks_per_row,
        num_blocks: assign.num_blocks,
        vocab_size,
        max_edits_per_row: assign.max_edits_per_row,
        max_logprobs: assign.max_logprobs,
    })
}

/// Checks the size of a KV cache, whose blocks are of a checked size; returns the limit.
pub(crate) fn check_num_blocks(block_size: u32, num_blocks: u32) -> Result<u64> {
    // Slots are numbered in u32.
    let most = u64::from(u32::MAX) / u64::from(block_size);
    within("num_blocks", num_blocks, 1, most)?;
    Ok(most)
}

/// Of rising numbers, each that of a step's rows.
fn capture_sizes(sizes: &[u32], limits: &StepLimits) -> Result<Vec<usize>> {
    const FIELD: &str = "cudagraph_capture_sizes";
    let most = limits.max_rows.min(limits.max_tokens);
    let mut least = 1;
    let mut checked = Vec::with_capacity(sizes.len());
    for &size in sizes {
        let size = within(FIELD, size, least, most.into())?;
        least = size + 1;
        checked.push(size as usize);
    }
    Ok(checked)
}

fn model_config(spec: &v1::ModelSpec) -> Result<ModelConfig> {
    let config = ModelConfig {
        architecture: spec.architecture.clone(),
        hidden_size: spec.hidden_size as usize,
        intermediate_size: spec.intermediate_size as usize,
        num_hidden_layers: spec.num_hidden_layers as usize,
        num_attention_heads: spec.num_attention_heads as usize,
        num_key_value_heads: spec.num_key_value_heads as usize,
        head_dim: spec.head_dim as usize,
        vocab_size: spec.vocab_size as usize,
        max_position_embeddings: spec.max_position_embeddings as usize,
        rms_norm_eps: spec.rms_norm_eps,
        rope: rope_config(spec)?,
        tie_word_embeddings: spec.tie_word_embeddings,
        attention_bias: spec.attention_bias,
        mlp_bias: spec.mlp_bias,
        sliding_window: spec.sliding_window.map(|window| window as usize),
    };
    config.validate()?;
    Ok(config)
}

fn rope_config(spec: &v1::ModelSpec) -> Result<RopeConfig> {
    use v1::model_spec::RopeScaling as Wire;
    let layout = match spec.rope_layout() {
        v1::RopeLayout::Half => RopeLayout::Half,
        v1::RopeLayout::Interleaved => RopeLayout::Interleaved,
        v1::RopeLayout::Unspecified => return Err(AssignmentError::Missing("rope_layout")),
    };
    let scaling = match &spec.rope_scaling {
        None => RopeScaling::None,
        Some(Wire::Linear(linear)) => RopeScaling::Linear {
            factor: linear.factor,
        },
        Some(Wire::Llama3(llama3)) => RopeScaling::Llama3 {
            factor: llama3.factor,
            low_freq_factor: llama3.low_freq_factor,
            high_freq_factor: llama3.high_freq_factor,
            original_max_position_embeddings: llama3.original_max_position_embeddings as usize,
        },
        Some(Wire::Yarn(yarn)) => RopeScaling::Yarn {
            factor: yarn.factor,
            original_max_position_embeddings: yarn.original_max_position_embeddings as usize,
            beta_fast: yarn.beta_fast,
            beta_slow: yarn.beta_slow,
            attention_factor: yarn.attention_factor,
        },
        Some(Wire::FrequencyFactors(frequency)) => RopeScaling::FrequencyFactors {
            factors: frequency.factors.clone(),
        },
    };
    Ok(RopeConfig {
        theta: spec.rope_theta,
        rotary_dim: spec.rotary_dim as usize,
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
        return Err(AssignmentError::ShardCount {
            found: assign.shards.len(),
            expected: assign.world_size,
        });
    }
    let ranks = assign.shards.iter().map(rank_shard).collect::<Result<_>>()?;
    let plan = ShardPlan { style, ranks };
    plan.validate(config)?;
    Ok(plan)
}

fn rank_shard(shard: &v1::RankShard) -> Result<RankShard> {
    let range = |field, range: &Option<v1::Range>| match range {
        Some(range) => Ok(range.start as usize..range.end as usize),
        None => Err(AssignmentError::Missing(field)),
    };
    Ok(RankShard {
        q_heads: range("shards.q_heads", &shard.q_heads)?,
        kv_heads: range("shards.kv_heads", &shard.kv_heads)?,
        intermediate: range("shards.intermediate", &shard.intermediate)?,
        hidden: range("shards.hidden", &shard.hidden)?,
        vocab: range("shards.vocab", &shard.vocab)?,
    })
}

fn trace_options(assign: &v1::Assign) -> Option<TraceOptions> {
    let trace = assign.trace.as_ref().filter(|trace| trace.steps > 0)?;
    Some(TraceOptions {
        path: PathBuf::from(&trace.path),
        steps: trace.steps,
    })
}

fn within(field: &'static str, value: impl Into<u64>, min: u64, max: u64) -> Result<u64> {
    let value = value.into();
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
