//! A model and its options, resolved: who holds what, how many KV blocks there are, and what every party is told.
//! Reads headers only. `phalanx plan` prints it, [`crate::Coordinator`] carries it out.

mod assign;
mod hardware;
mod host;

use std::{path::Path, sync::Arc};

use phalanx_model::{
    Checkpoint, CheckpointError, MemoryBudget, MemoryError, MemoryPlan, MemoryRequest, ShardError,
    TensorFormats, TensorParallelOptions, TensorParallelStyle, memory::RankBudget,
};
use phalanx_proto::{step::StepLimits, v1};
use phalanx_shm::{GroupShape, MappedFile};

use crate::{
    config::{KvCacheSize, ModelOptions},
    engine::{ConfigError, EngineConfig},
};
pub use hardware::{GpuMemory, Hardware, NoGpu};

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
    #[error("quantization is {asked}, the model's files say {found}")]
    Quantization { asked: String, found: &'static str },
    #[error("cannot read {what}: {source}")]
    Host { what: String, source: std::io::Error },
}

/// A model and what is asked of it, before it is known what it will run on.
pub struct Proposal {
    pub checkpoint: Arc<Checkpoint<MappedFile>>,
    pub options: ModelOptions,
    pub max_model_len: usize,
}

impl Proposal {
    /// Opens the model.
    ///
    /// # Errors
    /// A model that is damaged or not supported, or a length it does not have.
    pub fn open(options: ModelOptions) -> Result<Self, DeploymentError> {
        let checkpoint = Arc::new(Checkpoint::open(&options.path, MappedFile::open)?);
        let found = checkpoint.quantization_method();
        if let Some(asked) = options.quantization.as_ref().filter(|&asked| asked != found) {
            let asked = asked.clone();
            return Err(DeploymentError::Quantization { asked, found });
        }
        let max_model_len = max_model_len(&options, checkpoint.config().max_position_embeddings)?;
        Ok(Self {
            checkpoint,
            options,
            max_model_len,
        })
    }

    /// Decides everything that depends on the model and on the devices' and this machine's memory.
    ///
    /// # Errors
    /// Options that do not fit the model or the memory: before anything is loaded.
    pub fn resolve(&self, hardware: &Hardware, shm_dir: &Path) -> Result<Deployment, DeploymentError> {
        let options = &self.options;
        let formats = self.checkpoint.formats();
        let (style, memory) = self.memory(hardware, &formats)?;
        let budget = MemoryBudget {
            ranks: match hardware {
                Hardware::Cpu => RankBudget::Pooled(host::available_memory()?),
                Hardware::Cuda(gpus) => {
                    let budget = |gpu: &GpuMemory| gpu.budget(options.gpu_memory_utilization);
                    RankBudget::Each(gpus.iter().map(budget).collect())
                }
            },
            shared_memory: host::free_space(shm_dir)?,
        };
        memory.check(&self.request(style, &formats), &budget)?;
        let num_blocks = num_blocks(options, &memory, &budget)?;
        let deployment = Deployment {
            checkpoint: self.checkpoint.clone(),
            options: options.clone(),
            device: hardware.kind(),
            style,
            memory,
            num_blocks,
            max_model_len: self.max_model_len as u32,
            limits: self.limits(num_blocks),
        };
        deployment.engine_config().validate()?;
        Ok(deployment)
    }

    /// How the model is cut for these devices, and the bytes.
    fn memory(
        &self,
        hardware: &Hardware,
        formats: &TensorFormats,
    ) -> Result<(TensorParallelStyle, MemoryPlan), DeploymentError> {
        let plan = |style| MemoryPlan::new(&self.request(style, formats));
        let Hardware::Cuda(_) = hardware else {
            let style = self.options.style.unwrap_or(TensorParallelStyle::Gather);
            return Ok((style, plan(style)?));
        };
        let (style, mut memory) = match (self.options.style, plan(TensorParallelStyle::Reduce)) {
            (Some(style), _) => (style, plan(style)?),
            // Reduce style moves less, but may not cut a quantization block.
            (None, Err(MemoryError::Shard(ShardError::CutsBlock { .. }))) => {
                (TensorParallelStyle::Gather, plan(TensorParallelStyle::Gather)?)
            }
            (None, reduce) => (TensorParallelStyle::Reduce, reduce?),
        };
        hardware::place_on_gpus(&mut memory, self.checkpoint.config(), formats);
        memory.segment += ledger_bytes(self.options.tensor_parallel_size);
        Ok((style, memory))
    }

    fn request<'a>(&'a self, style: TensorParallelStyle, formats: &'a TensorFormats) -> MemoryRequest<'a> {
        let options = &self.options;
        MemoryRequest {
            config: self.checkpoint.config(),
            formats,
            parallel: TensorParallelOptions {
                world_size: options.tensor_parallel_size,
                style,
                rank_weights: options.rank_weights.clone(),
            },
            kv_dtype: options.kv_dtype,
            block_size: options.block_size,
            max_tokens: options.max_num_batched_tokens,
            max_rows: options.max_num_seqs,
            max_model_len: self.max_model_len,
            control_bytes: control_shape(options, &self.limits(u32::MAX), 0).total_bytes(),
        }
    }

    /// Of plans and outputs, with so many KV blocks.
    pub fn limits(&self, num_blocks: u32) -> StepLimits {
        let vocab_size = self.checkpoint.config().vocab_size as u32;
        let options = &self.options;
        EngineConfig {
            block_size: options.block_size.max(1) as u32,
            max_num_seqs: options.max_num_seqs as u32,
            max_num_batched_tokens: options.max_num_batched_tokens as u32,
            ..EngineConfig::new(num_blocks, self.max_model_len as u32, vocab_size)
        }
        .step_limits()
    }
}

/// Everything about a deployment but its processes.
pub struct Deployment {
    pub checkpoint: Arc<Checkpoint<MappedFile>>,
    pub options: ModelOptions,
    pub device: v1::DeviceKind,
    pub style: TensorParallelStyle,
    pub memory: MemoryPlan,
    pub num_blocks: u32,
    pub max_model_len: u32,
    pub limits: StepLimits,
}

impl Deployment {
    /// The shared segment of the group of `epoch`.
    pub fn shape(&self, epoch: u32) -> GroupShape {
        let arena = match self.device {
            v1::DeviceKind::Cuda => ledger_bytes(self.options.tensor_parallel_size),
            _ => self.arena_bytes(),
        };
        GroupShape {
            epoch,
            ..control_shape(&self.options, &self.limits, arena)
        }
    }

    /// The two buffers that gathers alternate between; in reduce style the communicator uses messages instead.
    fn arena_bytes(&self) -> u64 {
        let config = self.checkpoint.config();
        let wide = config.q_dim().max(config.intermediate_size);
        let tokens = self.options.max_num_batched_tokens;
        let bytes = |width: usize| ((tokens * width * 4) as u64).next_multiple_of(ARENA_ALIGN);
        match self.style {
            TensorParallelStyle::Gather => bytes(config.hidden_size) + bytes(wide),
            TensorParallelStyle::Reduce => 0,
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

/// Where GPU ranks count their collectives.
fn ledger_bytes(ranks: usize) -> u64 {
    phalanx_shm::Progress::bytes(ranks as u32).next_multiple_of(ARENA_ALIGN)
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
        KvCacheSize::Auto => match budget.ranks {
            RankBudget::Pooled(free) => {
                let per_block: u64 = memory.ranks.iter().map(|rank| rank.kv_bytes_per_block).sum();
                let share = (free / AUTO_KV_SHARE).min(AUTO_KV_BYTES) / per_block.max(1);
                (share.max(needed), false)
            }
            RankBudget::Each(_) => (memory.num_blocks(budget)?, false),
        },
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
