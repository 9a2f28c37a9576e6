//! Test data that is the same in every run.

use crate::philox::philox4x32;

pub(super) struct Random {
    seed: u32,
    count: u32,
}

impl Random {
    pub(super) fn new(seed: u32) -> Self {
        Self { seed, count: 0 }
    }

    pub(super) fn word(&mut self) -> u32 {
        self.count += 1;
        philox4x32([self.count, 0, 0, 0], [self.seed, 0])[0]
    }

    /// In `0..n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.word()) * n as u64) >> 32) as usize
    }

    /// Bell-shaped, with mean 0 and variance 1.
    pub(super) fn normal(&mut self) -> f32 {
        let sum: f64 = (0..4)
            .map(|_| f64::from(self.word()) * 2f64.powi(-32) - 0.5)
            .sum();
        (sum * 3f64.sqrt()) as f32
    }

    pub(super) fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    pub(super) fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.below(i + 1));
        }
    }
}
