//! Causal attention over paged K and V: flash attention's online softmax (Milakov & Gimelshein, 2018; Dao et al.,
//! 2022) over tiles of 64 positions.
//!
//! Tiles start at multiples of 64 positions of the sequence, segments at multiples of 512. A query row's scores, maxima
//! and sums are those of its own tiles in rising order within a segment, then those of its segments in rising order, and
//! positions outside its causal range or window add exactly nothing: a row's bits depend neither on the rows beside it,
//! nor on how the prompt was cut, nor on the block size, nor on the rank's other heads. Nor on the threads: where there
//! is less to do at once than there are threads, the segments of a long context are attended to side by side (Dao et
//! al., "Flash-Decoding", 2023) and put together in the same order.

mod kernel;
mod state;
mod tile;

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use phalanx_model::KvDtype;

use self::kernel::{Join, TileRows};
use self::state::State;
use super::batch::CpuBatch;
use super::buffer::{CpuBuffer, RowWriter};
use super::exec::{Exec, check};
use super::kv_cache::{CpuKvCache, KvElement};
use crate::{E4m3, Heads, Result};

/// Query vectors (rows times the heads that share a KV head) of one task: they share the loads of K and V.
const VECTORS_PER_TASK: usize = 48;
/// Positions that are summed by themselves before they are added to those before them.
const SEGMENT: usize = 512;
/// With fewer pieces of sequences per thread, every KV head is a task of its own.
const PIECES_PER_THREAD: usize = 8;
/// With fewer tasks per thread, long contexts are cut.
const TASKS_PER_THREAD: usize = 2;

/// What attention reads.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) qkv: &'a CpuBuffer,
    pub(crate) kv: &'a CpuKvCache,
    pub(crate) heads: &'a Heads,
    pub(crate) batch: &'a CpuBatch,
}

/// Some rows of one sequence, and the query heads of some KV heads.
#[derive(Clone, Debug)]
struct Task {
    sequence: usize,
    rows: Range<usize>,
    kv_heads: Range<usize>,
    /// Only these positions, of the sequence's segments.
    segment: Option<usize>,
    /// Where the result goes if it is not the row's whole.
    part: Option<usize>,
}

/// Results of tasks that are one segment each.
#[derive(Clone, Copy)]
struct Parts<'a>(&'a [Mutex<State>]);

impl Parts<'_> {
    fn get(&self, part: usize) -> MutexGuard<'_, State> {
        // A state is swapped whole or not at all.
        self.0[part].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, part: usize, state: &mut State) {
        std::mem::swap(&mut *self.get(part), state);
    }
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
    let tasks = tasks(exec, attention);
    let out = Output {
        rows: out.writer(),
        start,
    };
    match kv.spec().dtype {
        KvDtype::F32 => run::<f32>(exec, out, attention, tasks),
        KvDtype::F16 => run::<f16>(exec, out, attention, tasks),
        KvDtype::BF16 => run::<bf16>(exec, out, attention, tasks),
        KvDtype::E4M3 => run::<E4m3>(exec, out, attention, tasks),
        KvDtype::INT8 => run::<i8>(exec, out, attention, tasks),
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Output<'a> {
    rows: RowWriter<'a>,
    start: usize,
}

fn run<E: KvElement>(exec: Exec<'_>, out: Output<'_>, attention: Attention<'_>, tasks: Vec<Task>) {
    let elements = attention.kv.elements::<E>();
    let (tasks, joins) = cut(exec, attention, tasks);
    let parts: Vec<Mutex<State>> = joins
        .last()
        .map_or(0..0, |(_, parts)| 0..parts.end)
        .map(|_| Mutex::new(State::new()))
        .collect();
    let rows = |task| TileRows {
        task,
        kv_head: task.kv_heads.start,
        attention,
        elements,
        out,
        parts: Parts(&parts),
    };
    exec.pool.run(tasks.len(), |i| exec.isa.run(rows(&tasks[i])));
    exec.pool.run(joins.len(), |i| {
        let (task, parts) = &joins[i];
        exec.isa.run(Join(rows(task), parts.clone()));
    });
}

/// A task that was cut, and its parts.
type CutTask = (Task, Range<usize>);

/// Cuts tasks of several segments if there are too few tasks for the threads. The most expensive tasks come first, so
/// that no thread starts one when the others are done.
fn cut(exec: Exec<'_>, attention: Attention<'_>, whole: Vec<Task>) -> (Vec<Task>, Vec<CutTask>) {
    let (mut tasks, mut cut, mut parts) = (Vec::new(), Vec::new(), 0);
    let too_few = exec.pool.threads() > 1 && whole.len() < exec.pool.threads() * TASKS_PER_THREAD;
    for task in whole {
        let visible = visible(attention, &task);
        let segments = visible.start / SEGMENT..visible.end.div_ceil(SEGMENT);
        debug_assert!(!too_few || task.kv_heads.len() == 1, "a part is of one head");
        if !too_few || segments.len() < 2 {
            tasks.push(task);
            continue;
        }
        let first = parts;
        for segment in segments {
            tasks.push(Task {
                segment: Some(segment),
                part: Some(parts),
                ..task.clone()
            });
            parts += 1;
        }
        cut.push((task, first..parts));
    }
    let cost = |task: &Task| {
        let visible = visible(attention, task);
        let positions = task.segment.map_or(visible.len(), |segment| {
            visible.end.min((segment + 1) * SEGMENT) - visible.start.max(segment * SEGMENT)
        });
        task.rows.len() * positions
    };
    tasks.sort_by_key(|task| Reverse(cost(task)));
    (tasks, cut)
}

/// Positions that any row of a task sees.
fn visible(attention: Attention<'_>, task: &Task) -> Range<usize> {
    let positions = &attention.batch.input().positions;
    let window = attention.heads.sliding_window.map(|window| window.max(1));
    let first = positions[task.rows.start] as usize + 1;
    window.map_or(0, |window| first.saturating_sub(window))..positions[task.rows.end - 1] as usize + 1
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

/// The query heads that read a KV head, of those of this rank.
fn q_heads(heads: &Heads, kv_head: usize) -> Range<usize> {
    let first = ((kv_head + heads.kv_start) * heads.group_size).max(heads.q_start);
    let end = ((kv_head + heads.kv_start + 1) * heads.group_size).min(heads.q_start + heads.num_q);
    first - heads.q_start..end.max(first) - heads.q_start
}

fn tasks(exec: Exec<'_>, attention: Attention<'_>) -> Vec<Task> {
    let heads = attention.heads;
    if heads.num_q == 0 {
        return Vec::new();
    }
    let input = attention.batch.input();
    let per_task = (VECTORS_PER_TASK / heads.group_size).max(1);
    let sequences = || {
        (0..input.num_sequences()).map(|i| input.cu_seqlens_q[i] as usize..input.cu_seqlens_q[i + 1] as usize)
    };
    let pieces: usize = sequences().map(|rows| rows.len().div_ceil(per_task)).sum();
    // In a block, K of all heads lies together, and V: one after the other they are a longer run of memory.
    let heads_per_task = if pieces < exec.pool.threads() * PIECES_PER_THREAD {
        1
    } else {
        heads.num_kv
    };
    let mut tasks = Vec::with_capacity(pieces * heads.num_kv / heads_per_task);
    for (sequence, rows) in sequences().enumerate() {
        for first in (0..heads.num_kv).step_by(heads_per_task) {
            tasks.extend(rows.clone().step_by(per_task).map(|row| Task {
                sequence,
                rows: row..rows.end.min(row + per_task),
                kv_heads: first..heads.num_kv.min(first + heads_per_task),
                segment: None,
                part: None,
            }));
        }
    }
    tasks
}
