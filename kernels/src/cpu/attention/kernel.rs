//! One task of attention, in vectors.

use std::cell::Cell;
use std::ops::Range;

use super::super::kv_cache::{Elements, KvElement, KvGroup};
use super::super::math::exp;
use super::super::simd::{Kernel, LANES, Simd};
use super::{Attention, Output, Task};

/// Positions of a tile.
const TILE: usize = 64;
const TILE_GROUPS: usize = TILE / LANES;
/// Query vectors multiplied at once: 6 x 2 accumulators leave 4 of AVX2's 16 registers for operands.
const BLOCK: usize = 6;

thread_local! {
    /// Memory of the last task, for the next one.
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// State of a task's query vectors. They are numbered row by row, and head by head within a row.
struct Scratch {
    /// By blocks of up to [`BLOCK`] vectors: `[head_dim][vectors of the block]`, scaled.
    queries: Vec<f32>,
    /// Weighted sums of V so far: `[vector][v_vectors]`.
    sums: Vec<[f32; LANES]>,
    /// Largest score so far, and the sum of weights relative to it.
    max: Vec<f32>,
    weight: Vec<f32>,
    /// Positions that a vector sees.
    visible: Vec<Range<usize>>,
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

impl<E: KvElement> Kernel for TileRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // Taken out and put back, not borrowed by a closure, whose code would not be compiled for the instruction set.
        let mut scratch = SCRATCH.take();
        self.start(&mut scratch);
        let first = scratch.visible[0].start / TILE * TILE;
        let end = scratch.visible[scratch.visible.len() - 1].end;
        for tile_start in (first..end).step_by(TILE) {
            let tile = self.tile(tile_start, end);
            let mut vector = 0;
            while vector < scratch.visible.len() {
                match scratch.visible.len() - vector {
                    1 => tile.attend::<S, 1>(simd, &mut scratch, vector),
                    2 => tile.attend::<S, 2>(simd, &mut scratch, vector),
                    3 => tile.attend::<S, 3>(simd, &mut scratch, vector),
                    4 => tile.attend::<S, 4>(simd, &mut scratch, vector),
                    5 => tile.attend::<S, 5>(simd, &mut scratch, vector),
                    _ => tile.attend::<S, BLOCK>(simd, &mut scratch, vector),
                }
                vector += BLOCK;
            }
        }
        self.finish(&scratch);
        SCRATCH.set(scratch);
    }
}

impl<'a, E: KvElement> TileRows<'a, E> {
    /// Loads the queries and resets the state.
    fn start(&self, scratch: &mut Scratch) {
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
                let first = vector / BLOCK * BLOCK;
                let block = (vectors - first).min(BLOCK);
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

/// K and V of up to 64 positions.
struct Tile<'a, E> {
    start: usize,
    groups: [KvGroup<'a, E>; TILE_GROUPS],
    head_dim: usize,
    v_vectors: usize,
}

/// Scores, then weights, of a block of query vectors over a tile.
type Scores<const M: usize> = [[f32; TILE]; M];

impl<E: KvElement> Tile<'_, E> {
    /// Adds the tile to the state of query vectors `vector..vector + M`.
    #[inline(always)]
    fn attend<S: Simd, const M: usize>(&self, simd: S, scratch: &mut Scratch, vector: usize) {
        let mut seen = [(0, 0); M];
        let (mut first, mut last) = (TILE, 0);
        for (seen, visible) in seen.iter_mut().zip(&scratch.visible[vector..]) {
            *seen = (
                visible.start.saturating_sub(self.start).min(TILE),
                visible.end.saturating_sub(self.start).min(TILE),
            );
            if seen.0 < seen.1 {
                first = first.min(seen.0);
                last = last.max(seen.1);
            }
        }
        if first >= last {
            return;
        }
        let groups = first / LANES..last.div_ceil(LANES);

        let mut scores: Scores<M> = [[0.0; TILE]; M];
        let queries = &scratch.queries[vector * self.head_dim..][..M * self.head_dim];
        self.scores(simd, queries.as_chunks().0, groups.clone(), &mut scores);

        let sums = &mut scratch.sums[vector * self.v_vectors..][..M * self.v_vectors];
        for m in 0..M {
            let (max, weight) = (&mut scratch.max[vector + m], &mut scratch.weight[vector + m]);
            let correction = softmax(simd, &mut scores[m], groups.clone(), seen[m], max);
            *weight = *weight * correction.factor + correction.weight;
            if correction.factor != 1.0 {
                for sum in &mut sums[m * self.v_vectors..][..self.v_vectors] {
                    let scaled = simd.mul(simd.load(sum), simd.splat(correction.factor));
                    simd.store(sum, scaled);
                }
            }
        }
        self.accumulate_block(simd, sums, &scores, &seen);
    }

    /// Products of M queries with the K of `groups`, summed in rising dimension.
    #[inline(always)]
    fn scores<S: Simd, const M: usize>(
        &self,
        simd: S,
        queries: &[[f32; M]],
        groups: Range<usize>,
        scores: &mut Scores<M>,
    ) {
        let mut group = groups.start;
        while group + 2 <= groups.end {
            let mut sums = [[simd.splat(0.0); 2]; M];
            let (k0, k1) = (self.groups[group].k, self.groups[group + 1].k);
            for ((query, k0), k1) in queries.iter().zip(k0).zip(k1) {
                let (k0, k1) = (E::load(simd, k0), E::load(simd, k1));
                for m in 0..M {
                    let q = simd.splat(query[m]);
                    sums[m][0] = simd.fma(q, k0, sums[m][0]);
                    sums[m][1] = simd.fma(q, k1, sums[m][1]);
                }
            }
            for m in 0..M {
                let to = scores[m].as_chunks_mut::<LANES>().0;
                simd.store(&mut to[group], sums[m][0]);
                simd.store(&mut to[group + 1], sums[m][1]);
            }
            group += 2;
        }
        if group < groups.end {
            let mut sums = [simd.splat(0.0); M];
            for (query, k) in queries.iter().zip(self.groups[group].k) {
                let k = E::load(simd, k);
                for m in 0..M {
                    sums[m] = simd.fma(simd.splat(query[m]), k, sums[m]);
                }
            }
            for m in 0..M {
                simd.store(&mut scores[m].as_chunks_mut::<LANES>().0[group], sums[m]);
            }
        }
    }

    /// Adds V, weighted, to the sums of M vectors: together where all of them see, one by one elsewhere. Each vector
    /// adds the positions that it sees in rising order.
    #[inline(always)]
    fn accumulate_block<S: Simd, const M: usize>(
        &self,
        simd: S,
        sums: &mut [[f32; LANES]],
        weights: &Scores<M>,
        seen: &[(usize, usize); M],
    ) {
        let (mut start, mut end) = (0, TILE);
        for s in seen {
            start = start.max(s.0);
            end = end.min(s.1);
        }
        if start >= end {
            // Nothing in common: each vector's whole range is "before".
            (start, end) = (TILE, TILE);
        }
        for m in 0..M {
            let own = &mut sums[m * self.v_vectors..][..self.v_vectors];
            self.accumulate::<S, 1>(simd, own, &weights[m..], seen[m].0..seen[m].1.min(start));
        }
        self.accumulate::<S, M>(simd, sums, weights, start..end);
        for m in 0..M {
            let own = &mut sums[m * self.v_vectors..][..self.v_vectors];
            self.accumulate::<S, 1>(simd, own, &weights[m..], end.max(seen[m].0)..seen[m].1);
        }
    }

    /// `sums[m] += weights[m][p] * v[p]` for the positions `p` of the tile in `positions`, in rising order.
    #[inline(always)]
    fn accumulate<S: Simd, const M: usize>(
        &self,
        simd: S,
        sums: &mut [[f32; LANES]],
        weights: &[[f32; TILE]],
        positions: Range<usize>,
    ) {
        if positions.is_empty() {
            return;
        }
        let n = self.v_vectors;
        let mut column = 0;
        while column + 2 <= n {
            let mut acc = [[simd.splat(0.0); 2]; M];
            for m in 0..M {
                let from = &sums[m * n + column..][..2];
                acc[m] = [simd.load(&from[0]), simd.load(&from[1])];
            }
            for group in positions.start / LANES..positions.end.div_ceil(LANES) {
                let first = group * LANES;
                let within = positions.start.max(first) - first..positions.end.min(first + LANES) - first;
                let mut of_group = [[0.0; LANES]; M];
                for m in 0..M {
                    of_group[m] = weights[m].as_chunks::<LANES>().0[group];
                }
                let rows = self.groups[group].v.chunks_exact(n);
                for (p, row) in rows.enumerate().take(within.end).skip(within.start) {
                    let (v0, v1) = (E::load(simd, &row[column]), E::load(simd, &row[column + 1]));
                    for m in 0..M {
                        let weight = simd.splat(of_group[m][p]);
                        acc[m][0] = simd.fma(weight, v0, acc[m][0]);
                        acc[m][1] = simd.fma(weight, v1, acc[m][1]);
                    }
                }
            }
            for m in 0..M {
                let to = &mut sums[m * n + column..][..2];
                simd.store(&mut to[0], acc[m][0]);
                simd.store(&mut to[1], acc[m][1]);
            }
            column += 2;
        }
        if column < n {
            for m in 0..M {
                let mut acc = simd.load(&sums[m * n + column]);
                for p in positions.clone() {
                    let v = E::load(simd, &self.groups[p / LANES].v[p % LANES * n + column]);
                    acc = simd.fma(simd.splat(weights[m][p]), v, acc);
                }
                simd.store(&mut sums[m * n + column], acc);
            }
        }
    }
}

/// How a tile changes a vector's state.
struct Correction {
    /// Multiplies what was summed so far.
    factor: f32,
    /// The tile's sum of weights.
    weight: f32,
}

/// Turns the scores of one vector into weights relative to the new maximum. Positions not seen get weight 0.
#[inline(always)]
fn softmax<S: Simd>(
    simd: S,
    scores: &mut [f32; TILE],
    groups: Range<usize>,
    seen: (usize, usize),
    max: &mut f32,
) -> Correction {
    for score in &mut scores[groups.start * LANES..seen.0.max(groups.start * LANES)] {
        *score = f32::NEG_INFINITY;
    }
    for score in &mut scores[seen.1.max(groups.start * LANES).min(groups.end * LANES)..groups.end * LANES] {
        *score = f32::NEG_INFINITY;
    }
    let scores = &mut scores.as_chunks_mut::<LANES>().0[groups];
    let mut tile_max = simd.splat(*max);
    for s in scores.iter() {
        tile_max = simd.max(tile_max, simd.load(s));
    }
    let new_max = simd.max_lane(tile_max);

    let mut sum = simd.splat(0.0);
    for s in scores {
        let weight = exp(simd, simd.sub(simd.load(s), simd.splat(new_max)));
        sum = simd.add(sum, weight);
        simd.store(s, weight);
    }
    let factor = simd.to_array(exp(simd, simd.splat(*max - new_max)))[0];
    *max = new_max;
    Correction {
        factor,
        weight: simd.sum(sum),
    }
}
