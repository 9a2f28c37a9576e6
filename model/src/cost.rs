//! What a token costs at least: the floors that a measurement is held against.

use serde::Serialize;

use crate::{Checkpoint, TensorRole};

/// Of one token, without attention, whose share depends on the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TokenCost {
    /// Bytes of weights that a step reads, however many tokens it computes: matrices as they are loaded.
    pub weight_bytes: u64,
    /// Multiplications and additions in the layers' matrices, which every token takes.
    pub layer_operations: u64,
    /// The same in the LM head, which only sampled tokens take.
    pub head_operations: u64,
}

/// What a machine can do, in the units of its data sheet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MachineLimits {
    /// 10⁹ bytes read from memory in a second.
    pub read_gb_s: f64,
    /// 10⁹ multiplications and additions of 8-bit integers in a second.
    pub int8_gop_s: f64,
}

/// Tokens per second that no implementation on the machine surpasses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floors {
    /// One stream: every token reads all weights.
    pub decode_tokens_per_s: f64,
    /// Prompts: every token takes the layers' operations.
    pub prefill_tokens_per_s: f64,
}

impl TokenCost {
    pub fn of<B: AsRef<[u8]>>(checkpoint: &Checkpoint<B>) -> Self {
        let mut cost = Self {
            weight_bytes: 0,
            layer_operations: 0,
            head_operations: 0,
        };
        // A row of the embedding is read for a token; all of it only where it is the head, too.
        let tied = checkpoint.config().tie_word_embeddings;
        for (role, info) in checkpoint.tensors().filter(|(role, _)| !role.is_vector()) {
            let operations = 2 * (info.rows as u64) * (info.cols as u64);
            match role {
                TensorRole::Layer { .. } => cost.layer_operations += operations,
                TensorRole::TokenEmbedding if !tied => continue,
                _ => cost.head_operations += operations,
            }
            let format = checkpoint.loaded_format(role).unwrap_or(info.format);
            cost.weight_bytes += format.file_bytes(info.rows, info.cols).unwrap_or(info.bytes) as u64;
        }
        cost
    }

    pub fn floors(&self, limits: &MachineLimits) -> Floors {
        Floors {
            decode_tokens_per_s: limits.read_gb_s * 1e9 / self.weight_bytes.max(1) as f64,
            prefill_tokens_per_s: limits.int8_gop_s * 1e9 / self.layer_operations.max(1) as f64,
        }
    }
}
