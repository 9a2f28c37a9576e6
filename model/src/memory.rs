//! How many bytes each rank needs, before anything is loaded.

mod table;

use crate::{
    ConfigError, KvDtype, ModelConfig, RowSplitBlocks, ShardError, ShardPlan, TensorFormat, TensorFormats,
    TensorParallelOptions, TensorParallelStyle, TensorRole,
};

pub use table::{HumanBytes, MemoryTable};

/// What a worker process takes beside weights, KV cache and workspace: its code, allocator, threads' stacks and the
/// runtime of its control connection. An estimate, rounded up.
pub const PROCESS_OVERHEAD_BYTES: u64 = 24 << 20;

/// Alignment of buffers in the shared segment, bytes.
const ARENA_ALIGN: u64 = 128;

/// What is to be served, and how.
#[derive(Clone, Debug)]
pub struct MemoryRequest<'a> {
    pub config: &'a ModelConfig,
    pub formats: &'a TensorFormats,
    pub parallel: TensorParallelOptions,
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

/// Bytes available to the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBudget {
    pub ranks: RankBudget,
    /// Free space for the shared segment: `/dev/shm`.
    pub shared_memory: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RankBudget {
    /// All ranks and the shared segment live in the same memory: CPU ranks on one host.
    Pooled(u64),
    /// Each rank has its own, in rank order: GPUs.
    Each(Vec<u64>),
}

/// One rank's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankMemory {
    /// As the CPU backend holds them.
    pub weights: u64,
    /// Activations and scratch of its own.
    pub workspace: u64,
    pub overhead: u64,
    /// K and V of all layers for one block of tokens.
    pub kv_bytes_per_block: u64,
}

impl RankMemory {
    /// Everything but the KV cache.
    pub fn fixed(&self) -> u64 {
        self.weights + self.workspace + self.overhead
    }
    pub fn total(&self, num_blocks: u64) -> u64 {
        self.fixed()
            .saturating_add(num_blocks.saturating_mul(self.kv_bytes_per_block))
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
    #[error("{holder} needs {needed}, {available} available; {nearest}", needed = HumanBytes(*needed), available = HumanBytes(*available))]
    DoesNotFit {
        holder: MemoryHolder,
        needed: u64,
        available: u64,
        nearest: Nearest,
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

/// The nearest configurations that would fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nearest {
    /// With everything else as asked.
    pub max_model_len: Option<usize>,
    /// Equal ranks, each with as much memory as the poorest has now.
    pub world_size: Option<usize>,
    /// Fewer tokens in one step make the segment smaller.
    pub max_tokens: Option<usize>,
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
        let [narrow, wide_scratch] = self.scratch(shards, rank);
        vec![
            per_token("hidden", config.hidden_size, gather),
            // Attention's output, then the MLP's inner activation.
            per_token("wide", wide, gather),
            per_token("residual", config.hidden_size, false),
            per_token("normed", config.hidden_size, false),
            per_token("qkv", qkv, false),
            per_token("gate_up", 2 * held.intermediate.len(), false),
            per_sample("sampled", config.hidden_size),
            per_sample("logits", held.vocab.len()),
            narrow,
            wide_scratch,
        ]
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
        let bytes = |role| {
            let slice = shards.slice(self.config, rank, role)?;
            let (rows, cols) = (slice.rows.len(), slice.cols.len());
            match role.is_vector() {
                true => self.formats.contains_key(&role).then_some(4 * rows * cols),
                false => self.formats.get(&role)?.resident_bytes(rows, cols),
            }
        };
        self.config
            .roles()
            .filter_map(bytes)
            .map(|bytes| bytes as u64)
            .sum()
    }

    /// Buffers that ranks share, each padded to a pair of cache lines. Reduce style shares none: its sums travel through
    /// the segment's message slots.
    fn arena_bytes(&self, shards: &ShardPlan) -> u64 {
        let shared = self
            .workspace(shards, 0)
            .into_iter()
            .filter(|buffer| buffer.shared);
        shared
            .map(|buffer| buffer.bytes().next_multiple_of(ARENA_ALIGN))
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
        let ranks = shards.ranks.iter().enumerate().map(|(rank, held)| {
            let own = request
                .workspace(&shards, rank)
                .into_iter()
                .filter(|buffer| !buffer.shared);
            let head_bytes = config.head_dim * request.kv_dtype.bytes();
            let layer_bytes = 2 * request.block_size * held.kv_heads.len() * head_bytes;
            RankMemory {
                weights: request.weight_bytes(&shards, rank),
                workspace: own.map(|buffer| buffer.bytes()).sum(),
                overhead: PROCESS_OVERHEAD_BYTES,
                kv_bytes_per_block: (config.num_hidden_layers * layer_bytes) as u64,
            }
        });
        let (ranks, arena) = (ranks.collect(), request.arena_bytes(&shards));
        let segment = arena.saturating_add(request.control_bytes);
        let (block_size, max_model_len) = (request.block_size, request.max_model_len);
        Ok(Self {
            shards,
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
            .map(|rank| bytes_per_rank / rank.kv_bytes_per_block)
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
            RankBudget::Each(sizes) => {
                self.check_count(sizes)?;
                let fitting = self
                    .ranks
                    .iter()
                    .zip(sizes)
                    .map(|(rank, bytes)| bytes.saturating_sub(rank.fixed()) / rank.kv_bytes_per_block);
                Ok(fitting.min().unwrap_or(0))
            }
        }
    }

    /// Whether the model, with a KV cache for at least one sequence of `max_model_len`, fits the budget.
    ///
    /// # Errors
    /// [`MemoryError::DoesNotFit`] names who is short, of how much, and the nearest configurations that fit.
    pub fn check(&self, request: &MemoryRequest<'_>, budget: &MemoryBudget) -> Result<(), MemoryError> {
        let Some((holder, needed, available)) = self.shortage(budget)? else {
            return Ok(());
        };
        let nearest = match holder {
            MemoryHolder::SharedSegment => Nearest {
                max_tokens: self.fitting_tokens(request, available),
                ..Nearest::default()
            },
            MemoryHolder::Rank(_) | MemoryHolder::Host { .. } => Nearest {
                max_model_len: self.fitting_length(budget)?,
                world_size: self.fitting_world_size(request, budget),
                max_tokens: None,
            },
        };
        Err(MemoryError::DoesNotFit {
            holder,
            needed,
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

    fn check_count(&self, sizes: &[u64]) -> Result<(), MemoryError> {
        let (found, expected) = (sizes.len(), self.ranks.len());
        if found == expected {
            Ok(())
        } else {
            Err(MemoryError::BudgetCount { found, expected })
        }
    }

    /// Who lacks most, what it needs and what it has.
    fn shortage(&self, budget: &MemoryBudget) -> Result<Option<(MemoryHolder, u64, u64)>, MemoryError> {
        if self.segment > budget.shared_memory {
            return Ok(Some((
                MemoryHolder::SharedSegment,
                self.segment,
                budget.shared_memory,
            )));
        }
        let blocks = self.blocks_per_sequence();
        match &budget.ranks {
            RankBudget::Pooled(available) => {
                let needed = self.host_total(blocks);
                let totals = self.ranks.iter().map(|rank| rank.total(blocks)).enumerate();
                let largest_rank = totals
                    .rev()
                    .max_by_key(|(_, total)| *total)
                    .map_or(0, |(rank, _)| rank);
                let short = needed > *available;
                Ok(short.then_some((MemoryHolder::Host { largest_rank }, needed, *available)))
            }
            RankBudget::Each(sizes) => {
                self.check_count(sizes)?;
                let needs = self
                    .ranks
                    .iter()
                    .map(|rank| rank.total(blocks))
                    .zip(sizes)
                    .enumerate();
                let short = needs.filter(|(_, (needed, available))| needed > available);
                let worst = short.max_by_key(|(_, (needed, available))| needed - *available);
                Ok(worst.map(|(rank, (needed, available))| (MemoryHolder::Rank(rank), needed, *available)))
            }
        }
    }

    fn fitting_length(&self, budget: &MemoryBudget) -> Result<Option<usize>, MemoryError> {
        // Fewer blocks than one sequence was asked to have, so the product is below max_model_len.
        let blocks = self.num_blocks(budget)?.min(self.blocks_per_sequence() - 1);
        Ok((blocks > 0).then_some(blocks as usize * self.block_size))
    }

    /// The fewest more ranks among a handful of candidates: the next few numbers, then doublings.
    fn fitting_world_size(&self, request: &MemoryRequest<'_>, budget: &MemoryBudget) -> Option<usize> {
        let (now, limit) = (self.ranks.len(), request.config.num_attention_heads);
        let doublings =
            std::iter::successors(Some(2 * now), |size| Some(2 * size)).filter(|&size| size > now + 8);
        (now + 1..=now + 8)
            .chain(doublings)
            .take_while(|&size| size <= limit)
            .find(|&world_size| {
                let mut wider = request.clone();
                wider.parallel = TensorParallelOptions::equal(world_size, request.parallel.style);
                let mut budget = budget.clone();
                if let RankBudget::Each(sizes) = &mut budget.ranks {
                    let poorest = sizes.iter().min().copied().unwrap_or(0);
                    *sizes = vec![poorest; world_size];
                }
                Self::new(&wider).is_ok_and(|plan| matches!(plan.shortage(&budget), Ok(None)))
            })
    }

    fn fitting_tokens(&self, request: &MemoryRequest<'_>, available: u64) -> Option<usize> {
        let per_token = self.arena.div_ceil(request.max_tokens as u64);
        // At most two buffers are shared, and each may be padded.
        let room = available
            .saturating_sub(request.control_bytes)
            .saturating_sub(2 * ARENA_ALIGN);
        room.checked_div(per_token)
            .filter(|&tokens| tokens > 0)
            .map(|tokens| tokens as usize)
    }
}
