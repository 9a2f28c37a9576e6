//! Attention over the paged cache: `kernels/cuda/attention.cu`.
//!
//! A *vector* is one row's query head. A task is some vectors of one sequence that read the same KV head. Sequences of
//! few vectors over long contexts are cut into spans as well, so that there are enough blocks for the device; it
//! gives the same bits.
//!
//! The tasks lie in device memory and blocks stride over them, so a captured step finds other tasks at the same place
//! when it is replayed. Its grid is that of its number of rows, whatever their contexts are.

use super::backend::CudaBackend;
use super::batch::CudaBatch;
use super::buffer::CudaBuffer;
use super::kv_cache::CudaKvCache;
use super::launch::{
    Arg::{self, Attention, Pointer, U32},
    Grid,
};
use super::memory::Region;
use super::shape::u32_of;
use crate::error::check;
use crate::{BatchInput, Columns, DecodeShape, Heads, Result};

const OP: &str = "paged_attention";
/// As in the kernels' file.
const SPAN: usize = 512;
const CHUNK_VECTORS: usize = 64;
const SPLIT_VECTORS: usize = 16;
/// Entries of a chunk task, a split task and a combination.
const CHUNK_TASK: usize = 2;
const SPLIT_TASK: usize = 3;
const COMBINATION: usize = 3;
/// How many tasks of each kind there are comes first.
const COUNTS: usize = 3;
/// Blocks that fill any device, for kernels whose grid must not depend on the step.
const FILL: usize = 2048;
/// A partial result has a weight and a maximum beside its sums.
const PARTIAL_WEIGHTS: usize = 2;

/// `struct Attention` of the kernels' file.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionInput {
    qkv: u64,
    k_cache: u64,
    v_cache: u64,
    positions: u64,
    cu_seqlens_q: u64,
    block_tables: u64,
    cu_blocks: u64,
    qkv_stride: u32,
    block_size: u32,
    num_q: u32,
    num_kv: u32,
    q_start: u32,
    kv_start: u32,
    group_size: u32,
    /// 0: none.
    sliding_window: u32,
}

/// How a step's attention is divided into blocks.
pub(crate) struct AttentionPlan {
    division: Division,
    /// Counts, chunk tasks, combinations, and split tasks, of which there may be the most.
    region: Region,
    capacity: Counts,
    /// The first dimension of the kernels' grids.
    blocks: Counts,
    /// Of a plan that stays: spans of a row at most; one is not split.
    max_spans: usize,
}

/// Of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    chunk: usize,
    split: usize,
    combine: usize,
}

/// What of the heads decides a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Division {
    /// Vectors that a row has for one KV head.
    vectors_per_row: usize,
    num_q: usize,
    num_kv: usize,
    head_dim: usize,
}

impl Division {
    fn of(heads: &Heads) -> Self {
        Self {
            vectors_per_row: heads.group_size.min(heads.num_q).max(1),
            num_q: heads.num_q,
            num_kv: heads.num_kv,
            head_dim: heads.head_dim,
        }
    }

    /// Partial results that fit into `bytes`.
    fn max_partials(&self, bytes: usize) -> usize {
        let partial = self.num_q * (self.head_dim + PARTIAL_WEIGHTS) * size_of::<f32>();
        bytes.checked_div(partial).unwrap_or(0)
    }
}

/// The tasks of a plan, on the host.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tasks {
    chunk: Vec<[u32; CHUNK_TASK]>,
    split: Vec<[u32; SPLIT_TASK]>,
    combine: Vec<[u32; COMBINATION]>,
}

impl Tasks {
    /// There are at most `max_partials` partial results; sequences beyond that are not split.
    fn new(input: &BatchInput, division: Division, max_partials: usize) -> Self {
        let mut tasks = Self::default();
        let mut partials = 0;
        for sequence in 0..input.num_sequences() {
            let rows = input.cu_seqlens_q[sequence]..input.cu_seqlens_q[sequence + 1];
            let vectors = rows.len() * division.vectors_per_row;
            let spans = (input.context_lens[sequence] as usize).div_ceil(SPAN);
            let fits = partials + rows.len() * spans <= max_partials;
            let sequence = sequence as u32;
            if spans > 1 && vectors <= SPLIT_VECTORS && fits {
                let (first, stride) = (partials as u32, rows.len() as u32);
                let of_span = |span| [sequence, span, first + span * stride];
                tasks.split.extend((0..spans as u32).map(of_span));
                let of_row = |(index, row)| [row, first + index, stride];
                tasks.combine.extend((0..).zip(rows).map(of_row));
                partials += stride as usize * spans;
            } else {
                let tiles = vectors.div_ceil(CHUNK_VECTORS) as u32;
                tasks.chunk.extend((0..tiles).map(|tile| [sequence, tile]));
            }
        }
        tasks
    }

    fn counts(&self) -> Counts {
        Counts {
            chunk: self.chunk.len(),
            split: self.split.len(),
            combine: self.combine.len(),
        }
    }

    /// As they lie in a plan's memory.
    fn pack(&self, capacity: Counts) -> Vec<u32> {
        let counts = [self.chunk.len(), self.split.len(), self.combine.len()];
        let mut packed: Vec<u32> = counts.map(|count| count as u32).into();
        packed.extend(self.chunk.as_flattened());
        packed.resize(capacity.combine_start(), 0);
        packed.extend(self.combine.as_flattened());
        packed.resize(capacity.split_start(), 0);
        packed.extend(self.split.as_flattened());
        packed
    }
}

/// Where lists of so many entries lie, in words.
impl Counts {
    fn combine_start(&self) -> usize {
        COUNTS + self.chunk * CHUNK_TASK
    }
    fn split_start(&self) -> usize {
        self.combine_start() + self.combine * COMBINATION
    }
    fn words(&self) -> usize {
        self.split_start() + self.split * SPLIT_TASK
    }
}

impl AttentionPlan {
    /// Of one step.
    fn new(backend: &CudaBackend, input: &BatchInput, division: Division) -> Result<Self> {
        let tasks = Tasks::new(input, division, division.max_partials(backend.scratch.bytes()));
        let counts = tasks.counts();
        Ok(Self {
            division,
            region: backend.upload_step(&tasks.pack(counts))?,
            capacity: counts,
            blocks: counts,
            max_spans: 0,
        })
    }

    /// At an address that stays, with room for every step of `shape`.
    pub(crate) fn fixed(backend: &CudaBackend, shape: &DecodeShape) -> Result<Self> {
        let division = Division::of(&shape.heads);
        let max_spans = shape.max_context().div_ceil(SPAN);
        let capacity = division.of_rows(shape.rows, max_spans, backend);
        let bytes = capacity.words().saturating_mul(size_of::<u32>());
        Ok(Self {
            division,
            region: backend.fixed_region(bytes)?,
            capacity,
            blocks: Counts::default(),
            max_spans,
        })
    }

    /// Uploads the tasks of a step of single rows, and takes the grid of all steps of `rows` rows.
    pub(crate) fn refill(&mut self, backend: &CudaBackend, input: &BatchInput, rows: usize) -> Result<()> {
        let (division, capacity) = (self.division, self.capacity);
        let tasks = Tasks::new(input, division, division.max_partials(backend.scratch.bytes()));
        let counts = tasks.counts();
        let room = counts.chunk <= capacity.chunk
            && counts.split <= capacity.split
            && counts.combine <= capacity.combine;
        check(OP, room, || format!("{counts:?} in memory for {capacity:?}"))?;
        let most = division.of_rows(rows, self.max_spans, backend);
        self.blocks = Counts {
            chunk: most.chunk,
            split: most.split.min(FILL.div_ceil(division.num_kv.max(1))),
            combine: most.combine.min(FILL.div_ceil(division.num_q.max(1))),
        };
        backend.upload(&self.region, &tasks.pack(capacity))
    }

    /// Of device memory.
    pub(crate) fn bytes(&self) -> usize {
        self.region.bytes()
    }

    fn at(&self, word: usize) -> Arg<'_> {
        Pointer(self.region.ptr() + (word * size_of::<u32>()) as u64)
    }
}

impl Division {
    /// The most there can be in a step of single rows.
    fn of_rows(&self, rows: usize, max_spans: usize, backend: &CudaBackend) -> Counts {
        let tiles = self.vectors_per_row.div_ceil(CHUNK_VECTORS);
        let splits = max_spans > 1 && self.vectors_per_row <= SPLIT_VECTORS;
        let split_rows = if splits { rows } else { 0 };
        let partials = self.max_partials(backend.scratch.bytes());
        Counts {
            chunk: rows.saturating_mul(tiles),
            split: split_rows.saturating_mul(max_spans).min(partials),
            combine: split_rows,
        }
    }
}

pub(crate) fn paged_attention(
    backend: &CudaBackend,
    out: Columns<'_, CudaBackend>,
    qkv: &CudaBuffer,
    kv: &CudaKvCache,
    (heads, batch): (&Heads, &CudaBatch),
) -> Result<()> {
    let rows = batch.num_rows();
    qkv.check(OP, rows, heads.qkv_width())?;
    out.buffer
        .check(OP, rows, out.start.saturating_add(heads.num_q * heads.head_dim))?;
    kv.check_heads(OP, heads)?;
    batch
        .checked()
        .check_blocks(OP, kv.spec().num_blocks, kv.spec().block_size)?;
    check_mapping(heads)?;
    let division = Division::of(heads);
    let mut plan = batch.attention_plan.borrow_mut();
    let plan = match &mut *plan {
        Some(plan) if plan.division == division => plan,
        // Of a batch that stays, all attention has the heads it was made for: a capture refuses the upload.
        plan => plan.insert(AttentionPlan::new(backend, batch.checked().input(), division)?),
    };
    let input = input(qkv, kv, heads, batch)?;
    launch(backend, out, &input, (plan, kv))
}

fn input(qkv: &CudaBuffer, kv: &CudaKvCache, heads: &Heads, batch: &CudaBatch) -> Result<AttentionInput> {
    let [k_cache, v_cache] = kv.ptrs();
    let size = |size| u32_of(OP, size);
    Ok(AttentionInput {
        qkv: qkv.ptr(),
        k_cache,
        v_cache,
        positions: batch.positions(),
        cu_seqlens_q: batch.cu_seqlens_q(),
        block_tables: batch.block_tables(),
        cu_blocks: batch.cu_blocks(),
        qkv_stride: size(qkv.width())?,
        block_size: size(kv.spec().block_size)?,
        num_q: size(heads.num_q)?,
        num_kv: size(heads.num_kv)?,
        q_start: size(heads.q_start)?,
        kv_start: size(heads.kv_start)?,
        group_size: size(heads.group_size)?,
        // A window beyond every position is none.
        sliding_window: heads
            .sliding_window
            .map_or(0, |window| u32::try_from(window).unwrap_or(0)),
    })
}

fn launch(
    backend: &CudaBackend,
    out: Columns<'_, CudaBackend>,
    input: &AttentionInput,
    (plan, kv): (&AttentionPlan, &CudaKvCache),
) -> Result<()> {
    let (num_q, num_kv) = (input.num_q as usize, input.num_kv as usize);
    let out_column = Pointer(out.buffer.column(out.start));
    let out_stride = U32(u32_of(OP, out.buffer.width())?);
    let sums = backend.scratch.ptr();
    let partials = plan.division.max_partials(backend.scratch.bytes()) * num_q;
    let weights = sums + (partials * kv.spec().head_dim * size_of::<f32>()) as u64;
    let (blocks, lists) = (plan.blocks, plan.capacity);
    let launch = |name, grid, args: &[_]| {
        // SAFETY: the parameters of the three kernels. The heads lie within the rows of `qkv` and of `out`, the blocks
        // of the tables within the cache, and there are enough of them for every position: `paged_attention` checks it.
        // The tasks are of this batch, and their partial results fit into the scratch memory: `Tasks::new`.
        unsafe { kv.kernels().launch(&backend.device, name, grid, args) }
    };
    launch(
        "paged_attention_chunk",
        Grid::new([blocks.chunk, num_kv, 1], 128),
        &[
            out_column,
            out_stride,
            Attention(input),
            plan.at(COUNTS),
            plan.at(0),
        ],
    )?;
    launch(
        "paged_attention_split",
        Grid::new([blocks.split, num_kv, 1], 32),
        &[
            Pointer(sums),
            Pointer(weights),
            Attention(input),
            plan.at(lists.split_start()),
            plan.at(1),
        ],
    )?;
    launch(
        "paged_attention_combine",
        Grid::new([blocks.combine, num_q, 1], 64),
        &[
            out_column,
            out_stride,
            Attention(input),
            Pointer(sums),
            Pointer(weights),
            plan.at(lists.combine_start()),
            plan.at(2),
        ],
    )
}

/// An error unless every q head of the rank reads one of its KV heads.
fn check_mapping(heads: &Heads) -> Result<()> {
    let first = heads.q_start.checked_div(heads.group_size);
    let last = (heads.q_start + heads.num_q.max(1) - 1).checked_div(heads.group_size);
    let within = first >= Some(heads.kv_start) && last < Some(heads.kv_start + heads.num_kv);
    check(OP, heads.num_q == 0 || within, || {
        format!("{heads:?} has q heads without a KV head")
    })
}
