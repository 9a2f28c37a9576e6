//! Rotary position embedding, on the device.

use phalanx_kernels::{Backend, Result, Rope};
use phalanx_model::{RopeConfig, RopeLayout};

/// Frequencies and layout of a model's rotary embedding.
pub struct RotaryEmbedding<B: Backend> {
    inverse_frequencies: B::Vector,
    attention_factor: f32,
    layout: RopeLayout,
}

impl<B: Backend> RotaryEmbedding<B> {
    pub fn new(backend: &B, config: &RopeConfig) -> Result<Self> {
        let (frequencies, attention_factor) = config.inverse_frequencies();
        Ok(Self {
            inverse_frequencies: backend.vector(&frequencies)?,
            attention_factor,
            layout: config.layout,
        })
    }

    pub fn view(&self) -> Rope<'_, B> {
        Rope {
            inverse_frequencies: &self.inverse_frequencies,
            attention_factor: self.attention_factor,
            layout: self.layout,
        }
    }
}
