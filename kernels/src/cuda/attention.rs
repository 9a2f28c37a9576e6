//! Attention over the paged cache: `kernels/cuda/attention.cu`.
//!
//! A *vector* is one row's query head. A task is some vectors of one sequence that read the same KV head. Sequences of
//! few vectors over long contexts are cut into spans as well, so that there are enough blocks for the device; it
//! gives the same bits.

use super::backend::CudaBackend;
use super::batch::CudaBatch;
use super::buffer::CudaBuffer;
use super::kv_cache::CudaKvCache;
use super::launch::{
    Arg::{Attention, Pointer, U32},
    Grid,
};
use super::memory::Region;
use super::shape::u32_of;
use crate::error::check;
use crate::{BatchInput, Columns, Heads, Result};

const OP: &str = "paged_attention";
/// As in the kernels' file.
const SPAN: usize = 512;
const CHUNK_VECTORS: usize = 64;
const SPLIT_VECTORS: usize = 16;
/// Entries of a task: sequence, tile, partial row.
const TASK: usize = 3;
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
    /// Chunk tasks, split tasks, and the rows with partial results, one after another.
    region: Region,
    chunk_tasks: usize,
    split_tasks: usize,
    partial_rows: usize,
    max_spans: usize,
}

/// What of the heads decides a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Division {
    /// Vectors that a row has for one KV head.
    vectors_per_row: usize,
    /// Bytes of a row's partial results per span.
    partial_bytes: usize,
}

impl Division {
    fn of(heads: &Heads) -> Self {
        Self {
            vectors_per_row: heads.group_size.min(heads.num_q).max(1),
            partial_bytes: heads.num_q * (heads.head_dim + PARTIAL_WEIGHTS) * size_of::<f32>(),
        }
    }
}

/// The tasks of a plan, on the host.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tasks {
    chunk: Vec<[u32; TASK]>,
    split: Vec<[u32; TASK]>,
    partial_rows: Vec<u32>,
    max_spans: usize,
}

impl Tasks {
    /// Partial results take at most `partial_bytes`; sequences beyond that are not split.
    fn new(input: &BatchInput, division: Division, partial_bytes: usize) -> Self {
        let mut tasks = Self::default();
        for sequence in 0..input.num_sequences() {
            let rows = input.cu_seqlens_q[sequence]..input.cu_seqlens_q[sequence + 1];
            let vectors = rows.len() * division.vectors_per_row;
            let spans = (input.context_lens[sequence] as usize).div_ceil(SPAN);
            let max_spans = tasks.max_spans.max(spans);
            let all_rows = tasks.partial_rows.len() + rows.len();
            let fits = all_rows * max_spans * division.partial_bytes <= partial_bytes;
            let sequence = sequence as u32;
            if spans > 1 && vectors <= SPLIT_VECTORS && fits {
                let partial_row = tasks.partial_rows.len() as u32;
                let tiles = vectors.div_ceil(SPLIT_VECTORS) as u32;
                tasks
                    .split
                    .extend((0..tiles).map(|tile| [sequence, tile, partial_row]));
                tasks.partial_rows.extend(rows);
                tasks.max_spans = max_spans;
            } else {
                let tiles = vectors.div_ceil(CHUNK_VECTORS) as u32;
                tasks.chunk.extend((0..tiles).map(|tile| [sequence, tile, 0]));
            }
        }
        tasks
    }
}

impl AttentionPlan {
    fn new(backend: &CudaBackend, input: &BatchInput, division: Division) -> Result<Self> {
        let tasks = Tasks::new(input, division, backend.scratch.bytes());
        let mut packed = [tasks.chunk.as_flattened(), tasks.split.as_flattened()].concat();
        packed.extend(&tasks.partial_rows);
        Ok(Self {
            division,
            region: backend.upload_step(&packed)?,
            chunk_tasks: tasks.chunk.len(),
            split_tasks: tasks.split.len(),
            partial_rows: tasks.partial_rows.len(),
            max_spans: tasks.max_spans,
        })
    }

    fn chunk_tasks_at(&self) -> u64 {
        self.region.ptr()
    }
    fn split_tasks_at(&self) -> u64 {
        self.chunk_tasks_at() + (self.chunk_tasks * TASK * size_of::<u32>()) as u64
    }
    fn partial_rows_at(&self) -> u64 {
        self.split_tasks_at() + (self.split_tasks * TASK * size_of::<u32>()) as u64
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
    let partials = plan.partial_rows * num_q * plan.max_spans;
    let weights = sums + (partials * kv.spec().head_dim * size_of::<f32>()) as u64;
    let launch = |name, grid, args: &[_]| {
        // SAFETY: the parameters of the three kernels. The heads lie within the rows of `qkv` and of `out`, the blocks
        // of the tables within the cache, and there are enough of them for every position: `paged_attention` checks it.
        // The tasks are of this batch, and their partial results fit into the scratch memory: `Tasks::new`.
        unsafe { kv.kernels().launch(&backend.device, name, grid, args) }
    };
    launch(
        "paged_attention_chunk",
        Grid::new([plan.chunk_tasks, num_kv, 1], 128),
        &[
            out_column,
            out_stride,
            Attention(input),
            Pointer(plan.chunk_tasks_at()),
        ],
    )?;
    launch(
        "paged_attention_split",
        Grid::new([plan.split_tasks, num_kv, plan.max_spans], 32),
        &[
            Pointer(sums),
            Pointer(weights),
            Attention(input),
            Pointer(plan.split_tasks_at()),
        ],
    )?;
    launch(
        "paged_attention_combine",
        Grid::new([plan.partial_rows, num_q, 1], 64),
        &[
            out_column,
            out_stride,
            Attention(input),
            Pointer(sums),
            Pointer(weights),
            Pointer(plan.partial_rows_at()),
            U32(u32_of(OP, plan.max_spans)?),
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
