//! One task of attention, in vectors.

use std::cell::Cell;
use std::ops::Range;

use super::super::kv_cache::{Elements, KvElement, KvGroup};
use super::super::simd::{Kernel, LANES, Simd};
use super::state::State;
use super::tile::{Queries, TILE, TILE_GROUPS, Tile};
use super::{Attention, Output, Parts, SEGMENT, Task, q_heads};

thread_local! {
    /// Memory of the last task, for the next one.
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// Query vectors of a task, and what was found out of them. They are numbered row by row, and head by head within a row.
struct Scratch {
    /// By blocks of [`block_of`] vectors: `[head_dim][vectors of the block]`, scaled.
    queries: Vec<f32>,
    /// Positions that a vector sees.
    visible: Vec<Range<usize>>,
    /// Of the segment.
    state: State,
    /// Of the segments before it.
    total: State,
}

impl Scratch {
    const fn new() -> Self {
        Self {
            queries: Vec::new(),
            visible: Vec::new(),
            state: State::new(),
            total: State::new(),
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Attention of one task's rows.
#[derive(Clone, Copy)]
pub(super) struct TileRows<'a, E> {
    pub(super) task: &'a Task,
    /// One of the task's, the first to begin with.
    pub(super) kv_head: usize,
    pub(super) attention: Attention<'a>,
    pub(super) elements: Elements<'a, E>,
    pub(super) out: Output<'a>,
    pub(super) parts: Parts<'a>,
}

/// How many of `left` query vectors are multiplied at once. Every size is code for every instruction set and element type.
#[inline(always)]
fn block_of<S: Simd>(left: usize) -> usize {
    [12, 6, 4, 3, 2]
        .into_iter()
        .find(|&size| size <= left && size <= S::PAIRS)
        .unwrap_or(1)
}

impl<E: KvElement> Kernel for TileRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // Taken out and put back, not borrowed by a closure, whose code would not be compiled for the instruction set.
        let mut scratch = SCRATCH.take();
        for kv_head in self.task.kv_heads.clone() {
            Self { kv_head, ..self }.attend_head(simd, &mut scratch);
        }
        SCRATCH.set(scratch);
    }
}

/// Puts the segments of a task together that were attended to one by one.
pub(super) struct Join<'a, E>(pub(super) TileRows<'a, E>, pub(super) Range<usize>);

impl<E: KvElement> Kernel for Join<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(rows, parts) = self;
        let mut total = State::new();
        for part in parts.clone() {
            let mut state = rows.parts.get(part);
            if part == parts.start {
                std::mem::swap(&mut total, &mut state);
            } else {
                total.merge(simd, &state);
            }
        }
        rows.finish(&total);
    }
}

impl<'a, E: KvElement> TileRows<'a, E> {
    /// The rows of one KV head's queries.
    #[inline(always)]
    fn attend_head<S: Simd>(&self, simd: S, scratch: &mut Scratch) {
        self.start::<S>(scratch);
        let vectors = scratch.visible.len();
        if vectors == 0 {
            // Nobody on this rank reads it.
            return;
        }
        let (first, end) = (scratch.visible[0].start, scratch.visible[vectors - 1].end);
        let segments = first / SEGMENT..end.div_ceil(SEGMENT);
        for segment in self.task.segment.map_or(segments.clone(), |one| one..one + 1) {
            scratch.state.reset(vectors, self.elements.layout.v_vectors());
            let start = first.max(segment * SEGMENT) / TILE * TILE;
            self.attend(simd, scratch, start..end.min((segment + 1) * SEGMENT));
            if segments.len() > 1 && self.task.segment.is_none() {
                if segment == segments.start {
                    std::mem::swap(&mut scratch.total, &mut scratch.state);
                } else {
                    scratch.total.merge(simd, &scratch.state);
                }
            }
        }
        match self.task.part {
            Some(part) => self.parts.put(part, &mut scratch.state),
            None => self.finish(if segments.len() > 1 {
                &scratch.total
            } else {
                &scratch.state
            }),
        }
    }

    /// Adds the tiles of `positions`, which begin where a tile does, to the state.
    #[inline(always)]
    fn attend<S: Simd>(&self, simd: S, scratch: &mut Scratch, positions: Range<usize>) {
        let Range { start, end } = positions;
        let mut next = Some(self.tile(start, end));
        if self.kv_head == self.task.kv_heads.start {
            next.iter().for_each(|tile| tile.prefetch_keys(simd));
        }
        for tile_start in (start..end).step_by(TILE) {
            let Some(tile) = next else { break };
            next = (tile_start + TILE < end).then(|| self.tile(tile_start + TILE, end));
            if next.is_none() {
                self.prefetch_next_head(simd, start, end);
            }
            // Blocks lie anywhere: without these, every one begins with a wait for memory. V is used after the first
            // block of vectors has its scores, the next tile after all of this.
            tile.prefetch_values(simd);
            next.iter().for_each(|tile| tile.prefetch_keys(simd));
            let queries = Queries {
                packed: &scratch.queries,
                visible: &scratch.visible,
            };
            let (state, mut vector) = (&mut scratch.state, 0);
            while vector < queries.visible.len() {
                let block = block_of::<S>(queries.visible.len() - vector);
                if S::PAIRS >= 12 && block == 12 {
                    tile.attend::<S, 12>(simd, queries, state, vector);
                } else if S::PAIRS >= 6 && block == 6 {
                    tile.attend::<S, 6>(simd, queries, state, vector);
                } else if S::PAIRS >= 4 && block == 4 {
                    tile.attend::<S, 4>(simd, queries, state, vector);
                } else if block == 3 {
                    tile.attend::<S, 3>(simd, queries, state, vector);
                } else if block == 2 {
                    tile.attend::<S, 2>(simd, queries, state, vector);
                } else {
                    tile.attend::<S, 1>(simd, queries, state, vector);
                }
                vector += block;
            }
        }
    }

    /// Asks for the first K of the head that is attended to after this one.
    #[inline(always)]
    fn prefetch_next_head<S: Simd>(&self, simd: S, start: usize, end: usize) {
        let kv_head = self.kv_head + 1;
        if kv_head < self.task.kv_heads.end {
            Self { kv_head, ..*self }.tile(start, end).prefetch_keys(simd);
        }
    }

    /// The query heads that read the KV head.
    fn q_heads(&self) -> Range<usize> {
        q_heads(self.attention.heads, self.kv_head)
    }

    /// Loads the queries.
    fn start<S: Simd>(&self, scratch: &mut Scratch) {
        let Attention {
            qkv, heads, batch, ..
        } = self.attention;
        let head_dim = heads.head_dim;
        let group = self.q_heads().len();
        let vectors = self.task.rows.len() * group;
        let scale = 1.0 / (head_dim as f32).sqrt();

        scratch.queries.resize(vectors * head_dim, 0.0);
        scratch.visible.clear();
        for (i, row) in self.task.rows.clone().enumerate() {
            let end = batch.input().positions[row] as usize + 1;
            let start = heads
                .sliding_window
                .map_or(0, |window| end.saturating_sub(window.max(1)));
            for (j, head) in self.q_heads().enumerate() {
                scratch.visible.push(start..end);
                let vector = i * group + j;
                let (first, block) = place::<S>(vector, vectors);
                let query = &qkv.row(row)[head * head_dim..][..head_dim];
                let packed = scratch.queries[first * head_dim..].chunks_exact_mut(block);
                for (packed, q) in packed.zip(query) {
                    packed[vector - first] = q * scale;
                }
            }
        }
    }

    /// K and V of the positions from `start`, up to `end` or the end of the tile.
    #[inline(always)]
    fn tile(&self, start: usize, end: usize) -> Tile<'a, E> {
        let table = self.attention.batch.checked().block_table(self.task.sequence);
        let groups_per_block = self.attention.kv.spec().block_size / LANES;
        let first = start / LANES;
        let (mut index, mut within) = (first / groups_per_block, first % groups_per_block);
        let mut groups = [KvGroup::EMPTY; TILE_GROUPS];
        for group in groups.iter_mut().take((end - start).div_ceil(LANES)) {
            *group = self.elements.group(table[index] as usize, self.kv_head, within);
            within += 1;
            if within == groups_per_block {
                (index, within) = (index + 1, 0);
            }
        }
        Tile {
            start,
            groups,
            head_dim: self.attention.heads.head_dim,
            v_vectors: self.elements.layout.v_vectors(),
        }
    }

    /// Divides by the sums of weights and writes the rows.
    #[inline(always)]
    fn finish(&self, state: &State) {
        let head_dim = self.attention.heads.head_dim;
        let first = self.out.start + self.q_heads().start * head_dim;
        let width = self.q_heads().len() * head_dim;
        let sums = state.sums.chunks_exact(self.elements.layout.v_vectors());
        let mut heads = sums.zip(&state.weight);
        for row in self.task.rows.clone() {
            // SAFETY: no other task has these rows and heads.
            let out = unsafe { self.out.rows.part(row, first..first + width) };
            for (out, (sums, weight)) in out.chunks_exact_mut(head_dim).zip(&mut heads) {
                for (out, sum) in out.iter_mut().zip(sums.as_flattened()) {
                    *out = sum / weight;
                }
            }
        }
    }
}

/// First vector and size of the block that vector `vector` of `vectors` is in.
#[inline(always)]
fn place<S: Simd>(vector: usize, vectors: usize) -> (usize, usize) {
    let mut first = 0;
    loop {
        let block = block_of::<S>(vectors - first);
        if vector < first + block {
            return (first, block);
        }
        first += block;
    }
}
