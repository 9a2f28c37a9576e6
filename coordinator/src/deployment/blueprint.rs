//! Sizes and options alone: enough to say who would hold what, on devices that need not be there.

use std::{fs, path::Path};

use phalanx_model::{
    Checkpoint, CheckpointError, Geometry, GpuBudget, GpuPlacement, KvDtype, MemoryBudget, MemoryError,
    MemoryPlan, MemoryRequest, Placement, QuantizationMethod, RankBudget, ShardError, TensorParallelOptions,
    TensorParallelStyle, memory::HumanBytes,
};
use phalanx_proto::{step::StepLimits, v1::DeviceKind};
use phalanx_shm::{MAX_WORLD_SIZE, MappedFile};

use super::{DeploymentError, Hardware, control_shape, graphs, host, ledger_bytes};
use crate::{
    config::{KvCacheSize, MaxModelLen, ModelOptions},
    engine::EngineConfig,
};

/// The KV cache's share of the free memory, and its most, when nothing was asked for.
const AUTO_KV_SHARE: u64 = 10;
const AUTO_KV_BYTES: u64 = 4 << 30;
/// Longest `config.json` that is read, bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// A model's geometry and what is asked of it.
#[derive(Clone, Debug)]
pub struct Blueprint {
    pub geometry: Geometry,
    pub options: ModelOptions,
    pub max_model_len: usize,
}

/// Who would hold what, whether or not there is room for it.
#[derive(Clone, Debug)]
pub struct Draft {
    pub style: TensorParallelStyle,
    pub memory: MemoryPlan,
    pub budget: MemoryBudget,
}

/// Who holds what, and how many KV blocks there are.
#[derive(Clone, Debug)]
pub struct Plan {
    pub style: TensorParallelStyle,
    pub memory: MemoryPlan,
    pub budget: MemoryBudget,
    pub num_blocks: u32,
}

impl Blueprint {
    /// Of a model, or of a `config.json` alone: its file, or a directory that has no weights.
    ///
    /// # Errors
    /// A model that is damaged or not supported, or a length it does not have.
    pub fn open(options: ModelOptions) -> Result<Self, DeploymentError> {
        let path = &options.path;
        let geometry = match lone_config(path) {
            Some(config) => geometry_of(&config, options.quantization)?,
            None => Geometry::of_checkpoint(&open_checkpoint(&options)?),
        };
        Self::new(geometry, options)
    }

    pub(super) fn new(geometry: Geometry, options: ModelOptions) -> Result<Self, DeploymentError> {
        if options.tensor_parallel_size > MAX_WORLD_SIZE as usize {
            return Err(DeploymentError::OverLimit {
                field: "tensor_parallel_size",
                value: options.tensor_parallel_size,
                limit: MAX_WORLD_SIZE as usize,
            });
        }
        let limit = geometry.config.max_position_embeddings;
        let max_model_len = match options.max_model_len {
            MaxModelLen::Tokens(asked) if asked > limit => {
                return Err(DeploymentError::MaxModelLen { asked, limit });
            }
            MaxModelLen::Tokens(asked) => asked,
            MaxModelLen::Model | MaxModelLen::Auto => limit,
        };
        Ok(Self {
            geometry,
            options,
            max_model_len,
        })
    }

    /// With the longest sequences that fit these devices, if that is what was asked for; else as it is.
    ///
    /// # Errors
    /// Not even a sequence of one block fits.
    pub fn fitted(&self, hardware: &Hardware, shared_memory: u64) -> Result<Self, DeploymentError> {
        let fits = |blueprint: &Self| {
            let draft = blueprint.draft(hardware, shared_memory)?;
            blueprint.accept(draft).map(drop)
        };
        self.with_longest(fits)
    }

    /// With the largest `max_model_len`, in whole blocks, for which `fits` has no objection.
    pub(super) fn with_longest(
        &self,
        fits: impl Fn(&Self) -> Result<(), DeploymentError>,
    ) -> Result<Self, DeploymentError> {
        if self.options.max_model_len != MaxModelLen::Auto || fits(self).is_ok() {
            return Ok(self.clone());
        }
        let block_size = self.options.block_size.max(1);
        let with = |blocks: usize| Self {
            max_model_len: blocks * block_size,
            ..self.clone()
        };
        // One block fits, `too_many` do not. A sequence has at least two tokens.
        let (mut fitting, mut too_many) = (
            2_usize.div_ceil(block_size),
            self.max_model_len.div_ceil(block_size),
        );
        fits(&with(fitting))?;
        while fitting + 1 < too_many {
            let middle = fitting.midpoint(too_many);
            match fits(&with(middle)) {
                Ok(()) => fitting = middle,
                Err(_) => too_many = middle,
            }
        }
        let fitted = with(fitting);
        tracing::info!(
            max_model_len = fitted.max_model_len,
            model = self.max_model_len,
            "the longest sequence was made to fit the memory"
        );
        Ok(fitted)
    }

    /// Cuts the model for these devices and counts. `shared_memory` is what the segment may take, bytes.
    ///
    /// # Errors
    /// Options that do not fit the model, or a host that does not tell its memory.
    pub fn draft(&self, hardware: &Hardware, shared_memory: u64) -> Result<Draft, DeploymentError> {
        if matches!(hardware, Hardware::Cuda(_)) && self.options.kv_dtype == KvDtype::INT8 {
            return Err(DeploymentError::Int8OnGpus);
        }
        let (style, memory) = self.memory(hardware)?;
        let ranks = match hardware {
            Hardware::Cpu => RankBudget::Pooled(host::available_memory()?),
            Hardware::Cuda(gpus) => RankBudget::Gpus(GpuBudget {
                gpus: gpus.clone(),
                utilization: match self.options.kv_cache {
                    // As in vLLM, bytes take the place of a share.
                    KvCacheSize::BytesPerRank(_) => 1.0,
                    KvCacheSize::Blocks(_) | KvCacheSize::Auto => self.options.gpu_memory_utilization,
                },
            }),
        };
        let budget = MemoryBudget { ranks, shared_memory };
        Ok(Draft {
            style,
            memory,
            budget,
        })
    }

    /// Gives the KV cache what a draft leaves.
    ///
    /// # Errors
    /// A draft that does not fit the memory, with what would.
    pub fn accept(&self, draft: Draft) -> Result<Plan, DeploymentError> {
        let Draft {
            style,
            memory,
            budget,
        } = draft;
        memory.check(&self.request(style, memory.placement), &budget)?;
        let num_blocks = num_blocks(&self.options, &memory, &budget)?;
        Ok(Plan {
            style,
            memory,
            budget,
            num_blocks,
        })
    }

    /// `plan` with what the ranks have measured in place of what was predicted; `taken` is in rank order.
    pub(super) fn settle(&self, plan: &Plan, taken: &[u64]) -> Result<Plan, DeploymentError> {
        let memory = MemoryPlan {
            max_model_len: self.max_model_len,
            ..plan.memory.measured(taken)?
        };
        let placement = match memory.placement {
            Placement::Host => Placement::Host,
            Placement::Gpus(gpus) => Placement::Gpus(GpuPlacement {
                overhead: memory
                    .ranks
                    .iter()
                    .map(|rank| rank.overhead)
                    .max()
                    .unwrap_or(gpus.overhead),
                ..gpus
            }),
        };
        let predicted = plan
            .memory
            .ranks
            .iter()
            .map(|rank| HumanBytes(rank.fixed()).to_string());
        let predicted: Vec<String> = predicted.collect();
        let measured = memory
            .ranks
            .iter()
            .map(|rank| HumanBytes(rank.fixed()).to_string());
        let measured: Vec<String> = measured.collect();
        memory.check(&self.request(plan.style, placement), &plan.budget)?;
        let num_blocks = num_blocks(&self.options, &memory, &plan.budget)?;
        let planned_blocks = plan.num_blocks;
        tracing::info!(
            ?predicted,
            ?measured,
            planned_blocks,
            num_blocks,
            "memory measured"
        );
        Ok(Plan {
            memory,
            num_blocks,
            ..plan.clone()
        })
    }

    /// How the model is cut for these devices, and the bytes.
    fn memory(&self, hardware: &Hardware) -> Result<(TensorParallelStyle, MemoryPlan), DeploymentError> {
        let placement = match hardware {
            Hardware::Cpu => Placement::Host,
            Hardware::Cuda(gpus) => Placement::Gpus(GpuPlacement {
                multiplies_e4m3: gpus.iter().all(|gpu| gpu.multiplies_e4m3),
                num_graphs: graphs::sizes(&self.options, &self.limits(u32::MAX)).len(),
                ..GpuPlacement::default()
            }),
        };
        let plan = |style| MemoryPlan::new(&self.request(style, placement));
        let (gather, reduce) = (TensorParallelStyle::Gather, TensorParallelStyle::Reduce);
        Ok(match (self.options.style, hardware) {
            (Some(style), _) => (style, plan(style)?),
            (None, Hardware::Cpu) => (gather, plan(gather)?),
            (None, Hardware::Cuda(_)) => match plan(reduce) {
                // Reduce style moves less, but may not cut a quantization block.
                Err(MemoryError::Shard(ShardError::CutsBlock { .. })) => (gather, plan(gather)?),
                planned => (reduce, planned?),
            },
        })
    }

    fn request(&self, style: TensorParallelStyle, placement: Placement) -> MemoryRequest<'_> {
        let options = &self.options;
        let device = match placement {
            Placement::Host => DeviceKind::Cpu,
            Placement::Gpus(_) => DeviceKind::Cuda,
        };
        let ledger = ledger_bytes(device, options.tensor_parallel_size);
        MemoryRequest {
            config: &self.geometry.config,
            formats: &self.geometry.formats,
            parallel: TensorParallelOptions {
                world_size: options.tensor_parallel_size,
                style,
                rank_weights: options.rank_weights.clone(),
            },
            placement,
            most_ranks: MAX_WORLD_SIZE as usize,
            kv_dtype: options.kv_dtype,
            block_size: options.block_size,
            max_tokens: options.max_num_batched_tokens,
            max_rows: self.limits(u32::MAX).max_rows as usize,
            max_model_len: self.max_model_len,
            control_bytes: control_shape(options, &self.limits(u32::MAX), ledger).total_bytes(),
        }
    }

    /// Of plans and outputs, with so many KV blocks.
    pub fn limits(&self, num_blocks: u32) -> StepLimits {
        let vocab_size = self.geometry.config.vocab_size as u32;
        let options = &self.options;
        EngineConfig {
            block_size: options.block_size.max(1) as u32,
            max_num_seqs: options.max_num_seqs as u32,
            max_num_batched_tokens: options.max_num_batched_tokens as u32,
            speculative: options.speculative,
            max_logprobs: options.max_logprobs as u32,
            ..EngineConfig::new(num_blocks, self.max_model_len as u32, vocab_size)
        }
        .step_limits()
    }
}

/// The `config.json` that is all there is of a model.
fn lone_config(path: &Path) -> Option<std::path::PathBuf> {
    if path.is_file() {
        return path
            .extension()
            .is_some_and(|ext| ext == "json")
            .then(|| path.to_owned());
    }
    let weights = |name: &Path| name.extension().is_some_and(|ext| ext == "safetensors");
    let config = path.join("config.json");
    let mut entries = fs::read_dir(path).ok()?.flatten();
    let has_weights = entries.any(|entry| weights(Path::new(&entry.file_name())));
    (config.is_file() && !has_weights).then_some(config)
}

/// The model's files, to be loaded as the options say.
pub(super) fn open_checkpoint(options: &ModelOptions) -> Result<Checkpoint<MappedFile>, DeploymentError> {
    let checkpoint = Checkpoint::open(&options.path, MappedFile::open)?;
    Ok(match options.quantization {
        Some(method) => checkpoint.quantized(method)?,
        None => checkpoint,
    })
}

fn geometry_of(config: &Path, quantization: Option<QuantizationMethod>) -> Result<Geometry, DeploymentError> {
    let failed = |source| DeploymentError::Host {
        what: config.display().to_string(),
        source,
    };
    let length = fs::metadata(config).map_err(failed)?.len();
    if length > MAX_CONFIG_BYTES {
        return Err(DeploymentError::OverLimit {
            field: "bytes of config.json",
            value: length as usize,
            limit: MAX_CONFIG_BYTES as usize,
        });
    }
    let json = fs::read(config).map_err(failed)?;
    let geometry = Geometry::from_config_json(&json).map_err(|source| DeploymentError::Geometry {
        path: config.to_owned(),
        source,
    })?;
    match quantization {
        None => Ok(geometry),
        Some(QuantizationMethod::Fp8) => Ok(geometry.quantized_online()),
        Some(asked) => Err(DeploymentError::Checkpoint(CheckpointError::Quantization {
            asked,
            found: "is a configuration without weights, which can only be planned as it is or with fp8"
                .to_owned(),
        })),
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
        KvCacheSize::Auto => match &budget.ranks {
            RankBudget::Pooled(free) => {
                let per_block: u64 = memory.ranks.iter().map(|rank| rank.kv_bytes_per_block).sum();
                let share = (free / AUTO_KV_SHARE).min(AUTO_KV_BYTES) / per_block.max(1);
                (share.max(needed), false)
            }
            RankBudget::Gpus(_) => (memory.num_blocks(budget)?, false),
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
