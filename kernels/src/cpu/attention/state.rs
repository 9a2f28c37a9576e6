//! What is known of query vectors after some of their positions.

use super::super::math::exp;
use super::super::simd::{LANES, Simd};

/// Of a number of vectors.
pub(super) struct State {
    /// Weighted sums of V: `[vector][v_vectors]`.
    pub(super) sums: Vec<[f32; LANES]>,
    /// Largest score, and the sum of weights relative to it.
    pub(super) max: Vec<f32>,
    pub(super) weight: Vec<f32>,
}

impl State {
    pub(super) const fn new() -> Self {
        Self {
            sums: Vec::new(),
            max: Vec::new(),
            weight: Vec::new(),
        }
    }

    /// Forgets all positions.
    pub(super) fn reset(&mut self, vectors: usize, v_vectors: usize) {
        self.sums.clear();
        self.sums.resize(vectors * v_vectors, [0.0; LANES]);
        self.max.clear();
        // Finite, so that a tile of which a vector sees nothing changes nothing: exp(max - max) is 1.
        self.max.resize(vectors, f32::MIN);
        self.weight.clear();
        self.weight.resize(vectors, 0.0);
    }

    /// Adds the positions of `later`, which follow.
    #[inline(always)]
    pub(super) fn merge<S: Simd>(&mut self, simd: S, later: &Self) {
        let v_vectors = self.sums.len() / self.max.len().max(1);
        for vector in 0..self.max.len() {
            let max = self.max[vector].max(later.max[vector]);
            let factors = exp(
                simd,
                simd.load_partial(&[self.max[vector] - max, later.max[vector] - max]),
            );
            let [own, other, ..] = simd.to_array(factors);
            self.max[vector] = max;
            self.weight[vector] = self.weight[vector] * own + later.weight[vector] * other;
            let columns = vector * v_vectors..(vector + 1) * v_vectors;
            for (sum, add) in self.sums[columns.clone()].iter_mut().zip(&later.sums[columns]) {
                let scaled = simd.mul(simd.load(sum), simd.splat(own));
                simd.store(sum, simd.fma(simd.load(add), simd.splat(other), scaled));
            }
        }
    }
}
