//! The noise of a single token, for those who draw from a few candidates.

use crate::{Noise, cpu::gumbel, philox::philox4x32};

/// Tokens that share a generator's four words are this far apart.
const STRIDE: u32 = 8;
/// Tokens of one block of counters.
const BLOCK: u32 = 4 * STRIDE;

impl Noise {
    /// Standard Gumbel noise of a token, bit for bit what [`Candidates::perturbed`](crate::Candidates::perturbed) adds.
    pub fn gumbel(self, token_id: u32) -> f32 {
        let counter = token_id / BLOCK * STRIDE + token_id % STRIDE;
        let word = (token_id % BLOCK / STRIDE) as usize;
        let position = [self.position as u32, (self.position >> 32) as u32];
        let seed = [self.seed as u32, (self.seed >> 32) as u32];
        gumbel(philox4x32([counter, 0, position[0], position[1]], seed)[word])
    }
}
