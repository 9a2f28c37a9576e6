//! A model and its options, resolved: who holds what, how many KV blocks there are, and what every party is told.
//! Reads headers only. `phalanx plan` prints it, [`crate::Coordinator`] carries it out.

mod assign;
mod host;

use std::path::Path;

use phalanx_model::{
    Checkpoint, CheckpointError, MemoryBudget, MemoryError, MemoryPlan, MemoryRequest, TensorFormats,
    TensorParallelOptions, TensorParallelStyle, memory::RankBudget,
};
use phalanx_proto::step::StepLimits;
use phalanx_shm::{GroupShape, MappedFile};

use crate::{
    config::{KvCacheSize, ModelOptions},
    engine::{ConfigError, EngineConfig},
};

/// Plans and outputs in flight: one is computed while the next is written.
const RING_SLOTS: u32 = 2;
/// Of a rank's message in an exchange, and of a slice of an all-reduce.
const MESSAGE_BYTES: u64 = 128 << 10;
/// Buffers in the arena begin at multiples of this at most.
const ARENA_ALIGN: u64 = 4096;
/// The KV cache's share of the free memory, and its most, when nothing was asked for.
const AUTO_KV_SHARE: u64 = 10;
const AUTO_KV_BYTES: u64 = 4 << 30;

#[derive(Debug, thiserror::Error)]
pub enum DeploymentError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Engine(#[from] ConfigError),
    #[error("max_model_len is {asked}, the model's own limit is {limit}")]
    MaxModelLen { asked: usize, limit: usize },
    #[error(
        "KV cache: {blocks} blocks of {block_size} tokens, but one sequence of max_model_len {max_model_len} needs \
         {needed}; give it more memory or lower --max-model-len to {fitting}"
    )]
    KvCacheTooSmall {
        blocks: u64,
        block_size: usize,
        max_model_len: usize,
        needed: u64,
        fitting: u64,
    },
    #[error("{field} is {value}, limit {limit}")]
    OverLimit {
        field: &'static str,
        value: usize,
        limit: usize,
    },
    #[error("cannot read {what}: {source}")]
    Host { what: String, source: std::io::Error },
}

/// Everything about a deployment but its processes.
pub struct Deployment {
    pub checkpoint: Checkpoint<MappedFile>,
    pub options: ModelOptions,
    pub memory: MemoryPlan,
    pub num_blocks: u32,
    pub max_model_len: u32,
    pub limits: StepLimits,
}

impl Deployment {
    /// Opens the model and decides everything that depends on it and on this machine's memory.
    ///
    /// # Errors
    /// A model that is damaged or not supported, or options that do not fit it or the memory: before anything is loaded.
    pub fn resolve(options: ModelOptions, shm_dir: &Path) -> Result<Self, DeploymentError> {
        let checkpoint = Checkpoint::open(&options.path, MappedFile::open)?;
        let max_model_len = max_model_len(&options, checkpoint.config().max_position_embeddings)?;
        let formats = checkpoint.formats();
        let request = request(&options, &checkpoint, &formats, max_model_len);
        let memory = MemoryPlan::new(&request)?;
        let budget = MemoryBudget {
            ranks: RankBudget::Pooled(host::available_memory()?),
            shared_memory: host::free_space(shm_dir)?,
        };
        memory.check(&request, &budget)?;
        let num_blocks = num_blocks(&options, &memory, &budget)?;
        let limits = limits(
            &options,
            max_model_len,
            num_blocks,
            checkpoint.config().vocab_size,
        );
        let deployment = Self {
            options,
            memory,
            num_blocks,
            max_model_len: max_model_len as u32,
            limits,
            checkpoint,
        };
        deployment.engine_config().validate()?;
        Ok(deployment)
    }

    /// The shared segment of the group of `epoch`.
    pub fn shape(&self, epoch: u32) -> GroupShape {
        let arena = arena_bytes(&self.options, &self.checkpoint);
        GroupShape {
            epoch,
            ..control_shape(&self.options, &self.limits, arena)
        }
    }

    /// The engine's view of it, with everything else at its default.
    pub fn engine_config(&self) -> EngineConfig {
        EngineConfig {
            block_size: self.options.block_size as u32,
            max_num_seqs: self.limits.max_rows,
            max_num_batched_tokens: self.limits.max_tokens,
            max_logprobs: self.limits.max_logprobs,
            max_edits_per_row: self.limits.max_edits_per_row,
            ..EngineConfig::new(self.num_blocks, self.max_model_len, self.limits.vocab_size)
        }
    }
}

fn max_model_len(options: &ModelOptions, limit: usize) -> Result<usize, DeploymentError> {
    match options.max_model_len {
        Some(asked) if asked > limit => Err(DeploymentError::MaxModelLen { asked, limit }),
        Some(asked) => Ok(asked),
        None => Ok(limit),
    }
}

fn request<'a>(
    options: &ModelOptions,
    checkpoint: &'a Checkpoint<MappedFile>,
    formats: &'a TensorFormats,
    max_model_len: usize,
) -> MemoryRequest<'a> {
    let limits = limits(options, max_model_len, u32::MAX, checkpoint.config().vocab_size);
    MemoryRequest {
        config: checkpoint.config(),
        formats,
        parallel: TensorParallelOptions {
            world_size: options.tensor_parallel_size,
            style: options.style,
            rank_weights: options.rank_weights.clone(),
        },
        kv_dtype: options.kv_dtype,
        block_size: options.block_size,
        max_tokens: options.max_num_batched_tokens,
        max_rows: options.max_num_seqs,
        max_model_len,
        control_bytes: control_shape(options, &limits, 0).total_bytes(),
    }
}

fn limits(options: &ModelOptions, max_model_len: usize, num_blocks: u32, vocab_size: usize) -> StepLimits {
    let defaults = EngineConfig::new(num_blocks, max_model_len as u32, vocab_size as u32);
    EngineConfig {
        block_size: options.block_size.max(1) as u32,
        max_num_seqs: options.max_num_seqs as u32,
        max_num_batched_tokens: options.max_num_batched_tokens as u32,
        ..defaults
    }
    .step_limits()
}

fn control_shape(options: &ModelOptions, limits: &StepLimits, arena_bytes: u64) -> GroupShape {
    GroupShape {
        world_size: options.tensor_parallel_size as u32,
        epoch: 0,
        plan_slots: RING_SLOTS,
        plan_slot_bytes: limits.plan_bytes() as u64,
        output_slots: RING_SLOTS,
        output_slot_bytes: limits.output_bytes() as u64,
        message_bytes: MESSAGE_BYTES,
        arena_bytes,
    }
}

/// The two buffers that gathers alternate between; in reduce style the communicator uses messages instead.
fn arena_bytes(options: &ModelOptions, checkpoint: &Checkpoint<MappedFile>) -> u64 {
    let config = checkpoint.config();
    let wide = config.q_dim().max(config.intermediate_size);
    let bytes =
        |width: usize| ((options.max_num_batched_tokens * width * 4) as u64).next_multiple_of(ARENA_ALIGN);
    match options.style {
        TensorParallelStyle::Gather => bytes(config.hidden_size) + bytes(wide),
        TensorParallelStyle::Reduce => 0,
    }
}

fn num_blocks(
    options: &ModelOptions,
    memory: &MemoryPlan,
    budget: &MemoryBudget,
) -> Result<u32, DeploymentError> {
    let needed = memory.blocks_per_sequence();
    let (blocks, asked) = match options.kv_cache {
        KvCacheSize::Blocks(blocks) => (blocks as u64, true),
        KvCacheSize::BytesPerRank(bytes) => (memory.num_blocks_for_kv(bytes), true),
        KvCacheSize::Auto => {
            let RankBudget::Pooled(free) = budget.ranks else {
                unreachable!("ranks of one host share its memory")
            };
            let per_block: u64 = memory.ranks.iter().map(|rank| rank.kv_bytes_per_block).sum();
            let share = (free / AUTO_KV_SHARE).min(AUTO_KV_BYTES) / per_block.max(1);
            (share.max(needed), false)
        }
    };
    if blocks < needed {
        let (block_size, max_model_len) = (memory.block_size, memory.max_model_len);
        let fitting = blocks * block_size as u64;
        return Err(DeploymentError::KvCacheTooSmall {
            blocks,
            block_size,
            max_model_len,
            needed,
            fitting,
        });
    }
    // Slots are numbered in u32 on the ranks.
    let most = u64::from(u32::MAX) / memory.block_size as u64;
    let available = memory.num_blocks(budget)?;
    if asked && (blocks > most || blocks > available) {
        let limit = most.min(available) as usize;
        return Err(DeploymentError::OverLimit {
            field: "number of KV blocks",
            value: blocks as usize,
            limit,
        });
    }
    Ok(blocks.min(most) as u32)
}
