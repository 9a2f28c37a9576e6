//! How many bytes each rank needs, before anything is loaded.

mod budget;
mod cards;
mod gpu;
mod nearest;
mod table;

use crate::{
    ConfigError, KvDtype, ModelConfig, RowSplitBlocks, ShardError, ShardPlan, TensorFormat, TensorFormats,
    TensorParallelOptions, TensorParallelStyle, TensorRole,
};

pub use budget::{CONTEXT_BYTES, GpuBudget, GpuMemory, MemoryBudget, RankBudget};
pub use cards::{GpuCard, LEAST_COMPUTE_CAPABILITY};
pub use gpu::{GPU_OVERHEAD_BYTES, GpuPlacement, NCCL_BYTES};
pub use nearest::Nearest;
pub use table::{HumanBytes, MemoryTable};

/// What a worker process takes beside weights, KV cache and workspace: its code, allocator, threads' stacks and the
/// runtime of its control connection. An estimate, rounded up.
pub const PROCESS_OVERHEAD_BYTES: u64 = 24 << 20;

/// Buffers in the shared segment start on cache-line pairs, which the adjacent-line prefetcher moves together.
pub const ARENA_ALIGN: usize = 128;
/// The segment is made of pages.
const PAGE: u64 = 4096;

/// Bytes that a buffer of `rows` rows of `width` f32 takes in the shared segment; none if they cannot be counted. The
/// plan, the segment and the communicator all count with this.
pub fn arena_bytes(rows: usize, width: usize) -> Option<usize> {
    rows.checked_mul(width)?
        .checked_mul(size_of::<f32>())?
        .checked_next_multiple_of(ARENA_ALIGN)
}

/// Where weights, KV cache and activations lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In the host's memory, weights as the CPU backend holds them.
    Host,
    /// Each rank on a GPU of its own.
    Gpus(GpuPlacement),
}

/// What is to be served, and how.
#[derive(Clone, Debug)]
pub struct MemoryRequest<'a> {
    pub config: &'a ModelConfig,
    pub formats: &'a TensorFormats,
    pub parallel: TensorParallelOptions,
    pub placement: Placement,
    /// Of a group; more are not suggested.
    pub most_ranks: usize,
    pub kv_dtype: KvDtype,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Most tokens in one step.
    pub max_tokens: usize,
    /// Most rows that are sampled in one step.
    pub max_rows: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Rings and barriers in the shared segment, bytes.
    pub control_bytes: u64,
}

/// One rank's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankMemory {
    /// As the backend holds them.
    pub weights: u64,
    /// Activations and scratch of its own.
    pub workspace: u64,
    /// The process on a CPU, the kernels' memory on a GPU.
    pub overhead: u64,
    /// Buffers of NCCL.
    pub communicator: u64,
    /// CUDA graphs.
    pub graphs: u64,
    /// K and V of all layers for one block of tokens.
    pub kv_bytes_per_block: u64,
    /// The KV cache takes memory in multiples of so many bytes.
    pub kv_granule: u64,
}

impl RankMemory {
    /// Everything but the KV cache.
    pub fn fixed(&self) -> u64 {
        self.weights + self.workspace + self.overhead + self.communicator + self.graphs
    }
    pub fn total(&self, num_blocks: u64) -> u64 {
        self.fixed().saturating_add(self.kv_bytes(num_blocks))
    }
    /// What the KV cache takes.
    pub fn kv_bytes(&self, num_blocks: u64) -> u64 {
        let bytes = num_blocks.saturating_mul(self.kv_bytes_per_block);
        bytes
            .checked_next_multiple_of(self.kv_granule)
            .unwrap_or(u64::MAX)
    }
    /// Blocks of a KV cache that may take so many bytes.
    pub fn blocks_in(&self, bytes: u64) -> u64 {
        bytes / self.kv_granule * self.kv_granule / self.kv_bytes_per_block
    }
}

/// A buffer of f32 that a rank's forward pass needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkspaceBuffer {
    pub name: &'static str,
    pub rows: usize,
    /// In f32.
    pub width: usize,
    /// Lies in the segment that the ranks share, because a collective works on it.
    pub shared: bool,
}

impl WorkspaceBuffer {
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * self.width as u64 * 4
    }
}

/// Who holds what, in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    pub shards: ShardPlan,
    pub placement: Placement,
    /// In rank order.
    pub ranks: Vec<RankMemory>,
    /// Activations in the shared segment that all ranks see.
    pub arena: u64,
    /// The whole shared segment, once per host.
    pub segment: u64,
    pub block_size: usize,
    pub max_model_len: usize,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MemoryError {
    #[error("{field} is {value}, must be 1 to {limit}")]
    Request {
        field: &'static str,
        value: usize,
        limit: usize,
    },
    #[error("{found} memory sizes for {expected} ranks")]
    BudgetCount { found: usize, expected: usize },
    #[error(transparent)]
    Shard(#[from] ShardError),
    #[error(
        "{holder} needs {needed}, {available} available; {lengths}{nearest}",
        needed = HumanBytes(*needed),
        available = HumanBytes(*available),
        lengths = nearest::NoLength { fixed: *fixed, available: *available },
    )]
    DoesNotFit {
        holder: MemoryHolder,
        /// With the KV cache of one longest sequence.
        needed: u64,
        /// Without any KV cache.
        fixed: u64,
        available: u64,
        nearest: Box<Nearest>,
    },
}

impl From<ConfigError> for MemoryError {
    fn from(error: ConfigError) -> Self {
        Self::Shard(error.into())
    }
}

/// Whose bytes do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryHolder {
    Rank(usize),
    /// All ranks of the host and their segment, of which this rank needs most.
    Host {
        largest_rank: usize,
    },
    SharedSegment,
}

impl MemoryRequest<'_> {
    /// Checks that no product below can overflow.
    fn validate(&self) -> Result<(), MemoryError> {
        self.config.validate()?;
        let fields = [
            ("block_size", self.block_size, 4096),
            ("max_tokens", self.max_tokens, 1 << 20),
            ("max_rows", self.max_rows, 1 << 20),
            (
                "max_model_len",
                self.max_model_len,
                self.config.max_position_embeddings,
            ),
        ];
        for (field, value, limit) in fields {
            if !(1..=limit).contains(&value) {
                return Err(MemoryError::Request { field, value, limit });
            }
        }
        Ok(())
    }

    /// The buffers that `rank` needs for a step, largest step assumed.
    pub fn workspace(&self, shards: &ShardPlan, rank: usize) -> Vec<WorkspaceBuffer> {
        let Some(held) = shards.ranks.get(rank) else {
            return Vec::new();
        };
        let config = self.config;
        let q_held = held.q_heads.len() * config.head_dim;
        let qkv = q_held + 2 * held.kv_heads.len() * config.head_dim;
        let gather = shards.style == TensorParallelStyle::Gather;
        let in_segment = gather && self.placement == Placement::Host;
        let wide = match shards.style {
            TensorParallelStyle::Gather => config.q_dim().max(config.intermediate_size),
            TensorParallelStyle::Reduce => q_held.max(held.intermediate.len()),
        };
        let per_token = |name, width, shared| WorkspaceBuffer {
            name,
            rows: self.max_tokens,
            width,
            shared,
        };
        let per_sample = |name, width| WorkspaceBuffer {
            name,
            rows: self.max_rows,
            width,
            shared: false,
        };
        let mut buffers = vec![
            per_token("hidden", config.hidden_size, in_segment),
            // Attention's output, then the MLP's inner activation.
            per_token("wide", wide, in_segment),
            per_token("residual", config.hidden_size, false),
            per_token("normed", config.hidden_size, false),
            per_token("qkv", qkv, false),
            per_token("gate_up", 2 * held.intermediate.len(), false),
            per_sample("sampled", config.hidden_size),
            per_sample("logits", held.vocab.len()),
        ];
        match self.placement {
            Placement::Host => buffers.extend(self.scratch(shards, rank)),
            Placement::Gpus(_) if gather && shards.ranks.len() > 1 => {
                // Where NCCL puts the ranks' parts before they are put in their columns.
                buffers.push(per_token("gathered", config.hidden_size.max(wide), false));
            }
            Placement::Gpus(_) => {}
        }
        buffers
    }

    /// Inputs of linear layers as the CPU backend's integer kernels read them, in blocks of 32 with their scales and
    /// sums: 48 bytes for 4 to 6-bit weights, 72 for 8-bit ones. Dense weights need none.
    fn scratch(&self, shards: &ShardPlan, rank: usize) -> [WorkspaceBuffer; 2] {
        let blocks_for = |wanted: fn(TensorFormat) -> bool| {
            let needs = self.config.roles().filter_map(|role| {
                let rows = match role {
                    TensorRole::LmHead => self.max_rows,
                    TensorRole::TokenEmbedding if self.config.tie_word_embeddings => self.max_rows,
                    TensorRole::Layer { .. } => self.max_tokens,
                    TensorRole::TokenEmbedding | TensorRole::OutputNorm => return None,
                };
                self.formats
                    .get(&role)
                    .filter(|format| !format.is_dense() && wanted(**format))?;
                let cols = shards.slice(self.config, rank, role)?.cols.len();
                Some(rows * (cols / 32).next_multiple_of(2))
            });
            needs.max().unwrap_or(0)
        };
        let buffer = |name, rows, width| WorkspaceBuffer {
            name,
            rows,
            width,
            shared: false,
        };
        [
            buffer(
                "narrow_input_blocks",
                blocks_for(|format| format != TensorFormat::Q8_0),
                48 / 4,
            ),
            buffer(
                "wide_input_blocks",
                blocks_for(|format| format == TensorFormat::Q8_0),
                72 / 4,
            ),
        ]
    }

    fn weight_bytes(&self, shards: &ShardPlan, rank: usize) -> u64 {
        let bytes = |role: TensorRole| {
            let format = self.formats.get(&role)?;
            let slice = shards.slice(self.config, rank, role)?;
            let (rows, cols) = (slice.rows.len(), slice.cols.len());
            match (role.is_vector(), self.placement) {
                (true, _) => Some(size_of::<f32>() * rows * cols),
                (false, Placement::Host) => format.resident_bytes(rows, cols),
                (false, Placement::Gpus(gpus)) => gpus.matrix_bytes(*format, rows, cols),
            }
        };
        self.config
            .roles()
            .filter_map(bytes)
            .map(|bytes| bytes as u64)
            .sum()
    }

    fn rank_memory(&self, shards: &ShardPlan, rank: usize) -> RankMemory {
        let config = self.config;
        let own = self
            .workspace(shards, rank)
            .into_iter()
            .filter(|buffer| !buffer.shared);
        let kv_heads = shards.ranks.get(rank).map_or(0, |held| held.kv_heads.len());
        let layer_bytes = 2 * self.block_size * kv_heads * self.kv_dtype.row_bytes(config.head_dim);
        let layers = config.num_hidden_layers;
        let (overhead, communicator, graphs) = match self.placement {
            Placement::Host => (PROCESS_OVERHEAD_BYTES, 0, 0),
            Placement::Gpus(gpus) => {
                let connected = shards.ranks.len() > 1;
                let nccl = if connected { NCCL_BYTES } else { 0 };
                (gpus.overhead, nccl, gpus.graph_bytes(layers))
            }
        };
        let kv_granule = match self.placement {
            Placement::Host => 1,
            Placement::Gpus(_) => layers as u64 * gpu::ALLOCATION_GRANULE,
        };
        RankMemory {
            weights: self.weight_bytes(shards, rank),
            workspace: own.map(|buffer| buffer.bytes()).sum(),
            overhead,
            communicator,
            graphs,
            kv_bytes_per_block: (layers * layer_bytes) as u64,
            kv_granule,
        }
    }

    /// Buffers that ranks share. Reduce style shares none: its sums travel through the segment's message slots.
    fn arena(&self, shards: &ShardPlan) -> u64 {
        let shared = self.workspace(shards, 0).into_iter();
        shared
            .filter(|buffer| buffer.shared)
            .filter_map(|buffer| arena_bytes(buffer.rows, buffer.width))
            .map(|bytes| bytes as u64)
            .sum()
    }
}

impl MemoryPlan {
    /// Splits the model and counts.
    ///
    /// # Errors
    /// A size out of range, or a model that cannot be split as asked.
    pub fn new(request: &MemoryRequest<'_>) -> Result<Self, MemoryError> {
        request.validate()?;
        let config = request.config;
        let blocks = RowSplitBlocks::of(request.formats.iter().map(|(&role, &format)| (role, format)));
        let shards = ShardPlan::new(config, &request.parallel, blocks)?;
        let ranks = (0..shards.ranks.len()).map(|rank| request.rank_memory(&shards, rank));
        let (ranks, arena) = (ranks.collect(), request.arena(&shards));
        let segment = arena.next_multiple_of(PAGE).saturating_add(request.control_bytes);
        let (block_size, max_model_len) = (request.block_size, request.max_model_len);
        Ok(Self {
            shards,
            placement: request.placement,
            ranks,
            arena,
            segment,
            block_size,
            max_model_len,
        })
    }

    /// Bytes of K and V of one block on `rank`; none if there is no such rank.
    pub fn bytes_per_block(&self, rank: usize) -> Option<u64> {
        self.ranks.get(rank).map(|rank| rank.kv_bytes_per_block)
    }

    /// Blocks that one sequence of `max_model_len` needs.
    pub fn blocks_per_sequence(&self) -> u64 {
        self.max_model_len.div_ceil(self.block_size) as u64
    }

    /// Blocks that fit where every rank has so many bytes for its KV cache.
    pub fn num_blocks_for_kv(&self, bytes_per_rank: u64) -> u64 {
        self.ranks
            .iter()
            .map(|rank| rank.blocks_in(bytes_per_rank))
            .min()
            .unwrap_or(0)
    }

    /// Blocks that fit in what the budget leaves beside weights and workspace; the same for all ranks.
    ///
    /// # Errors
    /// [`MemoryError::BudgetCount`] if the budget is for another number of ranks.
    pub fn num_blocks(&self, budget: &MemoryBudget) -> Result<u64, MemoryError> {
        match &budget.ranks {
            RankBudget::Pooled(bytes) => {
                let per_block: u64 = self.ranks.iter().map(|rank| rank.kv_bytes_per_block).sum();
                Ok(bytes
                    .saturating_sub(self.host_total(0))
                    .checked_div(per_block)
                    .unwrap_or(0))
            }
            RankBudget::Gpus(gpus) => {
                let sizes = self.sizes(gpus)?;
                let ranks = self.ranks.iter().zip(sizes);
                let fitting = ranks.map(|(rank, bytes)| rank.blocks_in(bytes.saturating_sub(rank.fixed())));
                Ok(fitting.min().unwrap_or(0))
            }
        }
    }

    /// The plan with what each GPU rank was found to take without its KV cache, NCCL and graphs, in rank order, in
    /// place of what was predicted.
    ///
    /// # Errors
    /// [`MemoryError::BudgetCount`] if it is for another number of ranks.
    pub fn measured(&self, taken: &[u64]) -> Result<Self, MemoryError> {
        self.check_count(taken.len())?;
        let mut measured = self.clone();
        for (rank, taken) in measured.ranks.iter_mut().zip(taken) {
            rank.overhead = taken.saturating_sub(rank.weights + rank.workspace);
        }
        Ok(measured)
    }

    /// Whether the model, with a KV cache for at least one sequence of `max_model_len`, fits the budget.
    ///
    /// # Errors
    /// [`MemoryError::DoesNotFit`] names who is short, of how much, and the nearest configurations that fit.
    pub fn check(&self, request: &MemoryRequest<'_>, budget: &MemoryBudget) -> Result<(), MemoryError> {
        let Some(shortage) = self.shortage(budget)? else {
            return Ok(());
        };
        let nearest = Box::new(nearest::find(self, (request, budget), &shortage)?);
        let Shortage {
            holder,
            needed,
            fixed,
            available,
        } = shortage;
        Err(MemoryError::DoesNotFit {
            holder,
            needed,
            fixed,
            available,
            nearest,
        })
    }

    /// The shards and bytes as text, with a KV cache of `num_blocks`.
    pub fn table(&self, num_blocks: u64) -> MemoryTable<'_> {
        MemoryTable {
            plan: self,
            num_blocks,
        }
    }

    /// All ranks and the segment, with a KV cache of `num_blocks`.
    pub fn host_total(&self, num_blocks: u64) -> u64 {
        self.ranks.iter().fold(self.segment, |sum, rank| {
            sum.saturating_add(rank.total(num_blocks))
        })
    }

    fn check_count(&self, found: usize) -> Result<(), MemoryError> {
        let expected = self.ranks.len();
        if found == expected {
            Ok(())
        } else {
            Err(MemoryError::BudgetCount { found, expected })
        }
    }

    /// What each rank may take of its GPU.
    fn sizes(&self, gpus: &GpuBudget) -> Result<Vec<u64>, MemoryError> {
        self.check_count(gpus.gpus.len())?;
        Ok(gpus.bytes())
    }

    /// Who lacks most.
    fn shortage(&self, budget: &MemoryBudget) -> Result<Option<Shortage>, MemoryError> {
        if self.segment > budget.shared_memory {
            return Ok(Some(Shortage {
                holder: MemoryHolder::SharedSegment,
                needed: self.segment,
                fixed: 0,
                available: budget.shared_memory,
            }));
        }
        let blocks = self.blocks_per_sequence();
        match &budget.ranks {
            RankBudget::Pooled(available) => {
                let totals = self.ranks.iter().map(|rank| rank.total(blocks)).enumerate();
                let largest_rank = totals
                    .rev()
                    .max_by_key(|(_, total)| *total)
                    .map_or(0, |(rank, _)| rank);
                let shortage = Shortage {
                    holder: MemoryHolder::Host { largest_rank },
                    needed: self.host_total(blocks),
                    fixed: self.host_total(0),
                    available: *available,
                };
                Ok((shortage.needed > *available).then_some(shortage))
            }
            RankBudget::Gpus(gpus) => {
                let sizes = self.sizes(gpus)?;
                let needs = self.ranks.iter().zip(sizes).enumerate();
                let short = needs.filter_map(|(rank, (memory, available))| {
                    let shortage = Shortage {
                        holder: MemoryHolder::Rank(rank),
                        needed: memory.total(blocks),
                        fixed: memory.fixed(),
                        available,
                    };
                    (shortage.needed > available).then_some(shortage)
                });
                Ok(short.max_by_key(|shortage| shortage.needed - shortage.available))
            }
        }
    }
}

/// Who lacks memory, and how much.
struct Shortage {
    holder: MemoryHolder,
    needed: u64,
    fixed: u64,
    available: u64,
}
