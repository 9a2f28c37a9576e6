//! Causal attention over paged K and V: flash attention's online softmax (Milakov & Gimelshein, 2018; Dao et al.,
//! 2022) over tiles of 64 positions.
//!
//! Tiles start at multiples of 64 positions of the sequence. A query row's scores, maxima and sums are those of its own
//! tiles in rising order, and positions outside its causal range or window add exactly nothing: a row's bits depend
//! neither on the rows beside it, nor on how the prompt was cut, nor on the block size, nor on the rank's other heads.

mod kernel;
mod tile;

use std::cmp::Reverse;
use std::ops::Range;

use half::{bf16, f16};
use phalanx_model::KvDtype;

use self::kernel::TileRows;
use super::batch::CpuBatch;
use super::buffer::{CpuBuffer, RowWriter};
use super::exec::{Exec, check};
use super::kv_cache::{CpuKvCache, KvElement};
use crate::{E4m3, Heads, Result};

/// Query vectors (rows times the heads that share a KV head) of one task: they share the loads of K and V.
const VECTORS_PER_TASK: usize = 48;

/// What attention reads.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) qkv: &'a CpuBuffer,
    pub(crate) kv: &'a CpuKvCache,
    pub(crate) heads: &'a Heads,
    pub(crate) batch: &'a CpuBatch,
}

/// Some rows of one sequence, and the query heads of one KV head.
#[derive(Clone, Debug)]
struct Task {
    sequence: usize,
    rows: Range<usize>,
    kv_head: usize,
    q_heads: Range<usize>,
}

/// Writes columns `start..` of `out`, `[q heads][head_dim]`.
pub(crate) fn paged_attention(
    exec: Exec<'_>,
    out: &mut CpuBuffer,
    start: usize,
    attention: Attention<'_>,
) -> Result<()> {
    const OP: &str = "paged_attention";
    let Attention {
        qkv,
        kv,
        heads,
        batch,
    } = attention;
    let rows = batch.input().num_rows();
    qkv.check(OP, rows, heads.qkv_width())?;
    out.check(OP, rows, start.saturating_add(heads.num_q * heads.head_dim))?;
    kv.check_heads(OP, heads)?;
    batch
        .checked()
        .check_blocks(OP, kv.spec().num_blocks, kv.spec().block_size)?;
    check_mapping(OP, heads)?;
    let tasks = tasks(attention);
    let out = Output {
        rows: out.writer(),
        start,
    };
    match kv.spec().dtype {
        KvDtype::F32 => run::<f32>(exec, out, attention, &tasks),
        KvDtype::F16 => run::<f16>(exec, out, attention, &tasks),
        KvDtype::BF16 => run::<bf16>(exec, out, attention, &tasks),
        KvDtype::E4M3 => run::<E4m3>(exec, out, attention, &tasks),
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Output<'a> {
    rows: RowWriter<'a>,
    start: usize,
}

fn run<E: KvElement>(exec: Exec<'_>, out: Output<'_>, attention: Attention<'_>, tasks: &[Task]) {
    let elements = attention.kv.elements::<E>();
    exec.pool.run(tasks.len(), |i| {
        exec.isa.run(TileRows {
            task: &tasks[i],
            attention,
            elements,
            out,
        })
    });
}

/// An error unless every q head of the rank reads one of its KV heads.
fn check_mapping(op: &'static str, heads: &Heads) -> Result<()> {
    let first = heads.q_start.checked_div(heads.group_size);
    let last = (heads.q_start + heads.num_q.max(1) - 1).checked_div(heads.group_size);
    let within = first >= Some(heads.kv_start) && last < Some(heads.kv_start + heads.num_kv);
    check(op, heads.num_q == 0 || within, || {
        format!("{heads:?} has q heads without a KV head")
    })
}

/// The most expensive tasks come first, so that no thread starts one when the others are done.
fn tasks(attention: Attention<'_>) -> Vec<Task> {
    let heads = attention.heads;
    let input = attention.batch.input();
    let q_heads: Vec<Range<usize>> = (0..heads.num_kv)
        .map(|kv_head| {
            let readers = |q: &usize| heads.kv_of(*q) == kv_head;
            let first = (0..heads.num_q).find(readers).unwrap_or(0);
            first..first + (0..heads.num_q).filter(readers).count()
        })
        .collect();
    let mut tasks = Vec::new();
    for sequence in 0..input.num_sequences() {
        let rows = input.cu_seqlens_q[sequence] as usize..input.cu_seqlens_q[sequence + 1] as usize;
        for (kv_head, q_heads) in q_heads.iter().enumerate().filter(|(_, q)| !q.is_empty()) {
            let per_task = (VECTORS_PER_TASK / q_heads.len()).max(1);
            tasks.extend(rows.clone().step_by(per_task).map(|first| Task {
                sequence,
                rows: first..rows.end.min(first + per_task),
                kv_head,
                q_heads: q_heads.clone(),
            }));
        }
    }
    let cost = |task: &Task| task.rows.len() * (1 + input.positions[task.rows.end - 1] as usize);
    tasks.sort_by_key(|task| Reverse(cost(task)));
    tasks
}
