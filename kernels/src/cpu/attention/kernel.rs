//! One task of attention, in vectors.

use std::cell::Cell;
use std::ops::Range;

use super::super::kv_cache::{Elements, KvElement, KvGroup};
use super::super::simd::{Kernel, LANES, Simd};
use super::tile::{TILE, TILE_GROUPS, Tile};
use super::{Attention, Output, Task};

thread_local! {
    /// Memory of the last task, for the next one.
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// State of a task's query vectors. They are numbered row by row, and head by head within a row.
pub(super) struct Scratch {
    /// By blocks of [`block_of`] vectors: `[head_dim][vectors of the block]`, scaled.
    pub(super) queries: Vec<f32>,
    /// Weighted sums of V so far: `[vector][v_vectors]`.
    pub(super) sums: Vec<[f32; LANES]>,
    /// Largest score so far, and the sum of weights relative to it.
    pub(super) max: Vec<f32>,
    pub(super) weight: Vec<f32>,
    /// Positions that a vector sees.
    pub(super) visible: Vec<Range<usize>>,
}

impl Scratch {
    const fn new() -> Self {
        Self {
            queries: Vec::new(),
            sums: Vec::new(),
            max: Vec::new(),
            weight: Vec::new(),
            visible: Vec::new(),
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Attention of one task's rows and heads.
pub(super) struct TileRows<'a, E> {
    pub(super) task: &'a Task,
    pub(super) attention: Attention<'a>,
    pub(super) elements: Elements<'a, E>,
    pub(super) out: Output<'a>,
}

/// How many of `left` query vectors are multiplied at once: 12, 6 or fewer.
#[inline(always)]
fn block_of<S: Simd>(left: usize) -> usize {
    if S::PAIRS >= 12 && left >= 12 {
        12
    } else {
        left.min(6)
    }
}

impl<E: KvElement> Kernel for TileRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // Taken out and put back, not borrowed by a closure, whose code would not be compiled for the instruction set.
        let mut scratch = SCRATCH.take();
        self.start::<S>(&mut scratch);
        let first = scratch.visible[0].start / TILE * TILE;
        let end = scratch.visible[scratch.visible.len() - 1].end;
        let mut next = Some(self.tile(first, end));
        next.iter().for_each(|tile| tile.prefetch_keys(simd));
        for tile_start in (first..end).step_by(TILE) {
            let Some(tile) = next else { break };
            next = (tile_start + TILE < end).then(|| self.tile(tile_start + TILE, end));
            // Blocks lie anywhere: without these, every one begins with a wait for memory. V is used after the first
            // block of vectors has its scores, the next tile after all of this.
            tile.prefetch_values(simd);
            next.iter().for_each(|tile| tile.prefetch_keys(simd));
            let mut vector = 0;
            while vector < scratch.visible.len() {
                let block = block_of::<S>(scratch.visible.len() - vector);
                match block {
                    1 => tile.attend::<S, 1>(simd, &mut scratch, vector),
                    2 => tile.attend::<S, 2>(simd, &mut scratch, vector),
                    3 => tile.attend::<S, 3>(simd, &mut scratch, vector),
                    4 => tile.attend::<S, 4>(simd, &mut scratch, vector),
                    5 => tile.attend::<S, 5>(simd, &mut scratch, vector),
                    6 => tile.attend::<S, 6>(simd, &mut scratch, vector),
                    _ => tile.attend::<S, 12>(simd, &mut scratch, vector),
                }
                vector += block;
            }
        }
        self.finish(&scratch);
        SCRATCH.set(scratch);
    }
}

impl<'a, E: KvElement> TileRows<'a, E> {
    /// Loads the queries and resets the state.
    fn start<S: Simd>(&self, scratch: &mut Scratch) {
        let Attention {
            qkv, heads, batch, ..
        } = self.attention;
        let head_dim = heads.head_dim;
        let group = self.task.q_heads.len();
        let vectors = self.task.rows.len() * group;
        let scale = 1.0 / (head_dim as f32).sqrt();

        scratch.queries.resize(vectors * head_dim, 0.0);
        scratch.visible.clear();
        for (i, row) in self.task.rows.clone().enumerate() {
            let end = batch.input().positions[row] as usize + 1;
            let start = heads
                .sliding_window
                .map_or(0, |window| end.saturating_sub(window.max(1)));
            for (j, head) in self.task.q_heads.clone().enumerate() {
                scratch.visible.push(start..end);
                let vector = i * group + j;
                let (first, block) = place::<S>(vector, vectors);
                let query = &qkv.row(row)[head * head_dim..][..head_dim];
                let packed = scratch.queries[first * head_dim + vector - first..].iter_mut();
                for (packed, q) in packed.step_by(block).zip(query) {
                    *packed = q * scale;
                }
            }
        }
        scratch.sums.clear();
        scratch
            .sums
            .resize(vectors * self.elements.layout.v_vectors(), [0.0; LANES]);
        scratch.max.clear();
        // Finite, so that a tile of which a vector sees nothing changes nothing: exp(max - max) is 1.
        scratch.max.resize(vectors, f32::MIN);
        scratch.weight.clear();
        scratch.weight.resize(vectors, 0.0);
    }

    /// K and V of the positions from `start`, up to `end` or the end of the tile.
    #[inline(always)]
    fn tile(&self, start: usize, end: usize) -> Tile<'a, E> {
        let table = self.attention.batch.checked().block_table(self.task.sequence);
        let block_size = self.attention.kv.spec().block_size;
        let mut groups = [KvGroup { k: &[], v: &[] }; TILE_GROUPS];
        for (position, group) in (start..end).step_by(LANES).zip(&mut groups) {
            let block = table[position / block_size] as usize;
            *group = self
                .elements
                .group(block, self.task.kv_head, position % block_size / LANES);
        }
        Tile {
            start,
            groups,
            head_dim: self.attention.heads.head_dim,
            v_vectors: self.elements.layout.v_vectors(),
        }
    }

    /// Divides by the sums of weights and writes the rows.
    fn finish(&self, scratch: &Scratch) {
        let head_dim = self.attention.heads.head_dim;
        let first = self.out.start + self.task.q_heads.start * head_dim;
        let width = self.task.q_heads.len() * head_dim;
        let sums = scratch.sums.chunks_exact(self.elements.layout.v_vectors());
        let mut heads = sums.zip(&scratch.weight);
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
