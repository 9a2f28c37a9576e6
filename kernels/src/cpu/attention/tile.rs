//! A tile of K and V against a block of query vectors.

// Sums index several arrays with the same number; iterators over one of them hide that.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::super::kv_cache::{KvElement, KvGroup};
use super::super::math::exp;
use super::super::simd::{Arithmetic, LANES, Simd};
use super::state::State;

/// Positions of a tile.
pub(super) const TILE: usize = 64;
pub(super) const TILE_GROUPS: usize = TILE / LANES;

/// A task's query vectors.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    /// By blocks of vectors: `[head_dim][vectors of the block]`, scaled.
    pub(super) packed: &'a [f32],
    /// Positions that a vector sees.
    pub(super) visible: &'a [Range<usize>],
}

/// K and V of up to 64 positions.
pub(super) struct Tile<'a, E> {
    pub(super) start: usize,
    pub(super) groups: [KvGroup<'a, E>; TILE_GROUPS],
    pub(super) head_dim: usize,
    pub(super) v_vectors: usize,
}

/// Scores, then weights, of a block of query vectors over a tile.
type Scores<const M: usize> = [[f32; TILE]; M];

impl<E: KvElement> Tile<'_, E> {
    #[inline(always)]
    pub(super) fn prefetch_keys<S: Simd>(&self, simd: S) {
        for group in &self.groups {
            simd.prefetch(group.k);
        }
    }

    #[inline(always)]
    pub(super) fn prefetch_values<S: Simd>(&self, simd: S) {
        for group in &self.groups {
            simd.prefetch(group.v);
        }
    }

    /// Adds the tile to the state of query vectors `vector..vector + M`.
    #[inline(always)]
    pub(super) fn attend<S: Simd, const M: usize>(
        &self,
        simd: S,
        queries: Queries<'_>,
        state: &mut State,
        vector: usize,
    ) {
        let mut seen = [(0, 0); M];
        let (mut first, mut last) = (TILE, 0);
        for (seen, visible) in seen.iter_mut().zip(&queries.visible[vector..]) {
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
        let queries = &queries.packed[vector * self.head_dim..][..M * self.head_dim];
        let queries = queries.as_chunks().0;
        match M {
            1 => self.scores::<S, M, 4>(simd, queries, groups.clone(), &mut scores),
            _ if M <= 3 || S::PAIRS >= 2 * M => {
                self.scores::<S, M, 2>(simd, queries, groups.clone(), &mut scores)
            }
            _ => self.scores::<S, M, 1>(simd, queries, groups.clone(), &mut scores),
        }

        if E::SCALED {
            self.scale(simd, &mut scores, groups.clone(), |group| group.k_scales);
        }
        let sums = &mut state.sums[vector * self.v_vectors..][..M * self.v_vectors];
        let factors = softmax(
            simd,
            &mut scores,
            (groups.clone(), &seen),
            &mut state.max[vector..vector + M],
            &mut state.weight[vector..vector + M],
        );
        for m in 0..M {
            if factors[m] != 1.0 {
                for sum in &mut sums[m * self.v_vectors..][..self.v_vectors] {
                    let scaled = simd.mul(simd.load(sum), simd.splat(factors[m]));
                    simd.store(sum, scaled);
                }
            }
        }
        if E::SCALED {
            self.scale(simd, &mut scores, groups, |group| group.v_scales);
        }
        self.accumulate_block(simd, sums, &scores, &seen);
    }

    /// Multiplies scores or weights with the positions' scales of K or V.
    #[inline(always)]
    fn scale<S: Simd, const M: usize>(
        &self,
        simd: S,
        scores: &mut Scores<M>,
        groups: Range<usize>,
        of_group: impl for<'b> Fn(&'b KvGroup<'_, E>) -> &'b [f32; LANES],
    ) {
        for group in groups {
            let scales = simd.load(of_group(&self.groups[group]));
            for scores in scores.iter_mut() {
                let scores = &mut scores.as_chunks_mut::<LANES>().0[group];
                simd.store(scores, simd.mul(simd.load(scores), scales));
            }
        }
    }

    /// Products of M queries with the K of `groups`, summed in rising dimension, for W pairs of groups at a time: few
    /// sums would be one chain of dependent instructions.
    #[inline(always)]
    fn scores<S: Simd, const M: usize, const W: usize>(
        &self,
        simd: S,
        queries: &[[f32; M]],
        groups: Range<usize>,
        scores: &mut Scores<M>,
    ) {
        let mut group = groups.start;
        while group + 2 * W <= groups.end {
            self.score_pairs::<S, M, W>(simd, queries, group, scores);
            group += 2 * W;
        }
        while group + 2 <= groups.end {
            self.score_pairs::<S, M, 1>(simd, queries, group, scores);
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

    #[inline(always)]
    fn score_pairs<S: Simd, const M: usize, const W: usize>(
        &self,
        simd: S,
        queries: &[[f32; M]],
        group: usize,
        scores: &mut Scores<M>,
    ) {
        let wide = simd.wide();
        let mut sums = [[wide.splat(0.0); W]; M];
        let mut keys = [[&[][..]; 2]; W];
        for (w, keys) in keys.iter_mut().enumerate() {
            let first = group + 2 * w;
            // Of equal length, as the compiler is to know.
            *keys = [
                &self.groups[first].k[..queries.len()],
                &self.groups[first + 1].k[..queries.len()],
            ];
        }
        for (d, query) in queries.iter().enumerate() {
            let mut k = [wide.splat(0.0); W];
            for w in 0..W {
                k[w] = E::load_pair(simd, &keys[w][0][d], &keys[w][1][d]);
            }
            for m in 0..M {
                let q = wide.splat(query[m]);
                for w in 0..W {
                    sums[m][w] = wide.fma(q, k[w], sums[m][w]);
                }
            }
        }
        for m in 0..M {
            let to = scores[m].as_chunks_mut::<LANES>().0;
            for w in 0..W {
                let [first, second] = simd.split(sums[m][w]);
                simd.store(&mut to[group + 2 * w], first);
                simd.store(&mut to[group + 2 * w + 1], second);
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
            self.accumulate_one(simd, own, &weights[m], seen[m].0..seen[m].1.min(start));
        }
        self.accumulate::<S, M>(simd, sums, weights, start..end);
        for m in 0..M {
            let own = &mut sums[m * self.v_vectors..][..self.v_vectors];
            self.accumulate_one(simd, own, &weights[m], end.max(seen[m].0)..seen[m].1);
        }
    }

    /// As [`Self::accumulate`] for one vector: short code for few positions.
    #[inline(always)]
    fn accumulate_one<S: Simd>(
        &self,
        simd: S,
        sums: &mut [[f32; LANES]],
        weights: &[f32; TILE],
        positions: Range<usize>,
    ) {
        for p in positions {
            let weight = simd.splat(weights[p]);
            let row = &self.groups[p / LANES].v[p % LANES * self.v_vectors..][..self.v_vectors];
            for (sum, v) in sums.iter_mut().zip(row) {
                simd.store(sum, simd.fma(weight, E::load(simd, v), simd.load(sum)));
            }
        }
    }

    /// `sums[m] += weights[m][p] * v[p]` for the positions `p` of the tile in `positions`, in rising order.
    #[inline(always)]
    fn accumulate<S: Simd, const M: usize>(
        &self,
        simd: S,
        sums: &mut [[f32; LANES]],
        weights: &Scores<M>,
        positions: Range<usize>,
    ) {
        if positions.is_empty() {
            return;
        }
        let n = self.v_vectors;
        let mut column = 0;
        match M {
            1 => self.accumulate_columns::<S, M, 4>(simd, sums, weights, (positions.clone(), &mut column)),
            _ if M <= 3 || S::PAIRS >= 2 * M => {
                self.accumulate_columns::<S, M, 2>(simd, sums, weights, (positions.clone(), &mut column))
            }
            _ => {}
        }
        self.accumulate_columns::<S, M, 1>(simd, sums, weights, (positions.clone(), &mut column));
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

    /// As [`Self::accumulate`], from column vector `column` on, W pairs of them at a time while there are so many.
    #[inline(always)]
    fn accumulate_columns<S: Simd, const M: usize, const W: usize>(
        &self,
        simd: S,
        sums: &mut [[f32; LANES]],
        weights: &Scores<M>,
        (positions, column): (Range<usize>, &mut usize),
    ) {
        let (n, wide) = (self.v_vectors, simd.wide());
        while *column + 2 * W <= n {
            let mut acc = [[wide.splat(0.0); W]; M];
            for m in 0..M {
                let from = &sums[m * n + *column..][..2 * W];
                for w in 0..W {
                    acc[m][w] = simd.join(simd.load(&from[2 * w]), simd.load(&from[2 * w + 1]));
                }
            }
            for group in positions.start / LANES..positions.end.div_ceil(LANES) {
                let (v, first) = (self.groups[group].v, group * LANES);
                // Counted by hand: the state of a chain of adapters would be kept in memory.
                let mut at = (positions.start.max(first) - first) * n + *column;
                for position in positions.start.max(first)..positions.end.min(first + LANES) {
                    let row = &v[at..at + 2 * W];
                    at += n;
                    let mut values = [wide.splat(0.0); W];
                    for w in 0..W {
                        values[w] = E::load_pair(simd, &row[2 * w], &row[2 * w + 1]);
                    }
                    for m in 0..M {
                        let weight = wide.splat(weights[m][position % TILE]);
                        for w in 0..W {
                            acc[m][w] = wide.fma(weight, values[w], acc[m][w]);
                        }
                    }
                }
            }
            for m in 0..M {
                let to = &mut sums[m * n + *column..][..2 * W];
                for w in 0..W {
                    let [first, second] = simd.split(acc[m][w]);
                    simd.store(&mut to[2 * w], first);
                    simd.store(&mut to[2 * w + 1], second);
                }
            }
            *column += 2 * W;
        }
    }
}

/// Turns the scores of M vectors into weights relative to their new maxima, and updates maxima and sums of weights.
/// Positions not seen get weight 0. Returns what multiplies that which was summed so far.
#[inline(always)]
fn softmax<S: Simd, const M: usize>(
    simd: S,
    scores: &mut Scores<M>,
    (groups, seen): (Range<usize>, &[(usize, usize); M]),
    max: &mut [f32],
    weight: &mut [f32],
) -> [f32; M] {
    let (first, end) = (groups.start * LANES, groups.end * LANES);
    // M is at most 12.
    let mut decline = [[0.0; LANES]; 2];
    for m in 0..M {
        scores[m][first..seen[m].0.max(first)].fill(f32::NEG_INFINITY);
        scores[m][seen[m].1.clamp(first, end)..end].fill(f32::NEG_INFINITY);
        let mut largest = simd.splat(max[m]);
        for s in &scores[m].as_chunks::<LANES>().0[groups.clone()] {
            largest = simd.max(largest, simd.load(s));
        }
        let largest = simd.max_lane(largest);
        decline[m / LANES][m % LANES] = max[m] - largest;
        max[m] = largest;
    }
    for decline in decline.iter_mut().take(M.div_ceil(LANES)) {
        let factor = exp(simd, simd.load(decline));
        simd.store(decline, factor);
    }
    let factors = std::array::from_fn(|m| decline[m / LANES][m % LANES]);
    let wide = simd.wide();
    for m in 0..M {
        let mut sum = simd.splat(0.0);
        let scores = &mut scores[m].as_chunks_mut::<LANES>().0[groups.clone()];
        let (pairs, last) = scores.as_chunks_mut::<2>();
        for s in pairs {
            let of_positions = exp(wide, wide.sub(simd.load_pair(s), wide.splat(max[m])));
            simd.store_pair(s, of_positions);
            // One after the other, for the same sum as without pairs.
            for of_positions in simd.split(of_positions) {
                sum = simd.add(sum, of_positions);
            }
        }
        for s in last {
            let of_positions = exp(simd, simd.sub(simd.load(s), simd.splat(max[m])));
            simd.store(s, of_positions);
            sum = simd.add(sum, of_positions);
        }
        weight[m] = weight[m] * decline[m / LANES][m % LANES] + simd.sum(sum);
    }
    factors
}
