//! A model and its options, resolved: who holds what, how many KV blocks there are, and what every party is told.
//! Reads headers only. `phalanx plan` prints it, [`crate::Coordinator`] carries it out.

mod assign;
mod blueprint;
mod graphs;
mod hardware;
mod host;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use phalanx_model::{Checkpoint, CheckpointError, Geometry, MemoryError};
use phalanx_proto::{step::StepLimits, v1};
use phalanx_shm::{GroupShape, MappedFile};

use crate::{
    config::ModelOptions,
    engine::{ConfigError, EngineConfig},
};
pub use blueprint::{Blueprint, Draft, Plan};
pub use hardware::{Hardware, NoGpu};
pub use host::free_space;

/// Plans and outputs in flight: one is computed while the next is written.
const RING_SLOTS: u32 = 2;
/// Of a rank's message in an exchange, and of a slice of an all-reduce.
const MESSAGE_BYTES: u64 = 128 << 10;
#[derive(Debug, thiserror::Error)]
pub enum DeploymentError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("{}: {source}", path.display())]
    Geometry {
        path: PathBuf,
        source: phalanx_model::ConfigError,
    },
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
    #[error("--kv-cache-dtype int8 is offered on CPUs only; fp8 takes as many bytes")]
    Int8OnGpus,
    #[error("cannot read {what}: {source}")]
    Host { what: String, source: std::io::Error },
}

/// A model whose weights are at hand and what is asked of it, before it is known what it will run on.
pub struct Proposal {
    pub checkpoint: Arc<Checkpoint<MappedFile>>,
    pub blueprint: Blueprint,
}

impl Proposal {
    /// Opens the model.
    ///
    /// # Errors
    /// A model that is damaged or not supported, or a length it does not have.
    pub fn open(options: ModelOptions) -> Result<Self, DeploymentError> {
        graphs::check(&options)?;
        let checkpoint = Arc::new(blueprint::open_checkpoint(&options)?);
        let blueprint = Blueprint::new(Geometry::of_checkpoint(&checkpoint), options)?;
        Ok(Self {
            checkpoint,
            blueprint,
        })
    }

    /// Decides everything that depends on the model and on the devices' and this machine's memory.
    ///
    /// # Errors
    /// Options that do not fit the model or the memory: before anything is loaded.
    pub fn resolve(&self, hardware: &Hardware, shm_dir: &Path) -> Result<Deployment, DeploymentError> {
        let shared_memory = free_space(shm_dir)?;
        let blueprint = self.blueprint.fitted(hardware, shared_memory)?;
        let plan = blueprint.accept(blueprint.draft(hardware, shared_memory)?)?;
        let deployment = Deployment {
            checkpoint: self.checkpoint.clone(),
            device: hardware.kind(),
            limits: blueprint.limits(plan.num_blocks),
            plan,
            blueprint,
        };
        deployment.engine_config().validate()?;
        Ok(deployment)
    }
}

/// Everything about a deployment but its processes.
#[derive(Clone)]
pub struct Deployment {
    pub checkpoint: Arc<Checkpoint<MappedFile>>,
    pub blueprint: Blueprint,
    pub device: v1::DeviceKind,
    pub plan: Plan,
    pub limits: StepLimits,
}

impl Deployment {
    /// With the number of KV blocks that the ranks have room for now that their weights are loaded. `taken` is what
    /// each found its GPU to hold without a KV cache; none for CPU ranks, whose plan is exact.
    ///
    /// # Errors
    /// [`DeploymentError::Memory`] or [`DeploymentError::KvCacheTooSmall`] if the longest sequence does not fit.
    pub fn settle(&self, taken: &[Option<u64>]) -> Result<Self, DeploymentError> {
        let taken: Option<Vec<u64>> = taken.iter().copied().collect();
        let Some(taken) = taken else {
            return Ok(self.clone());
        };
        let settle = |blueprint: &Blueprint| blueprint.settle(&self.plan, &taken);
        let blueprint = self
            .blueprint
            .with_longest(|blueprint| settle(blueprint).map(drop))?;
        let plan = settle(&blueprint)?;
        Ok(Self {
            limits: blueprint.limits(plan.num_blocks),
            plan,
            blueprint,
            ..self.clone()
        })
    }

    /// The shared segment of the group of `epoch`.
    pub fn shape(&self, epoch: u32) -> GroupShape {
        let ledger = ledger_bytes(self.device, self.blueprint.options.tensor_parallel_size);
        GroupShape {
            epoch,
            ..control_shape(
                &self.blueprint.options,
                &self.limits,
                self.plan.memory.arena + ledger,
            )
        }
    }

    /// Whether the ranks count their collectives in the segment's arena ([`phalanx_shm::Progress`]), which CPUs use for
    /// activations.
    pub fn counts_collectives(&self) -> bool {
        self.device == v1::DeviceKind::Cuda
    }

    /// The engine's view of it, with everything else at its default.
    pub fn engine_config(&self) -> EngineConfig {
        let max_model_len = self.blueprint.max_model_len as u32;
        EngineConfig {
            block_size: self.blueprint.options.block_size as u32,
            max_num_seqs: self.blueprint.options.max_num_seqs as u32,
            speculative: self.blueprint.options.speculative,
            max_num_batched_tokens: self.limits.max_tokens,
            max_logprobs: self.limits.max_logprobs,
            max_edits_per_row: self.limits.max_edits_per_row,
            ..EngineConfig::new(self.plan.num_blocks, max_model_len, self.limits.vocab_size)
        }
    }
}

fn control_shape(options: &ModelOptions, limits: &StepLimits, arena_bytes: u64) -> GroupShape {
    GroupShape {
        world_size: options.tensor_parallel_size as u32,
        epoch: 0,
        plan_slots: RING_SLOTS,
        plan_slot_bytes: limits.plan_slot_bytes() as u64,
        output_slots: RING_SLOTS,
        output_slot_bytes: limits.output_bytes() as u64,
        message_bytes: MESSAGE_BYTES,
        arena_bytes,
    }
}

/// Where GPU ranks count their collectives.
fn ledger_bytes(device: v1::DeviceKind, ranks: usize) -> u64 {
    match device {
        v1::DeviceKind::Cuda => phalanx_shm::Progress::bytes(ranks as u32),
        v1::DeviceKind::Cpu | v1::DeviceKind::Unspecified => 0,
    }
}
