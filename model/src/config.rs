//! Hyper-parameters of the Llama architecture family, whatever file they came from.

mod gguf;
mod hugging_face;
mod rope;

use std::fmt::Display;

pub use rope::{RopeConfig, RopeLayout, RopeScaling, yarn_attention_factor};

pub(crate) use gguf::ROPE_FACTORS_TENSOR;
pub(crate) use hugging_face::{Fields, declared_dtype};

use crate::gguf::GgufError;

/// Everything the forward pass, the shard plan and the memory plan need to know of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// As the file names it: `llama`, `mistral`, …
    pub architecture: String,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope: RopeConfig,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub sliding_window: Option<usize>,
}

/// Architectures whose forward pass this is, as `general.architecture` and `model_type` name them.
pub const SUPPORTED_ARCHITECTURES: [&str; 2] = ["llama", "mistral"];

/// Largest values accepted. All are several times those of the largest models published, and small enough that no
/// product of two sizes overflows.
mod limits {
    pub(super) const HIDDEN_SIZE: usize = 1 << 17;
    pub(super) const INTERMEDIATE_SIZE: usize = 1 << 20;
    pub(super) const LAYERS: usize = 1024;
    pub(super) const HEADS: usize = 1024;
    pub(super) const HEAD_DIM: usize = 512;
    pub(super) const VOCAB_SIZE: usize = 1 << 22;
    pub(super) const CONTEXT: usize = 1 << 24;
}

/// Why a configuration cannot be served.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("architecture `{found}` is not supported; supported: {}", SUPPORTED_ARCHITECTURES.join(", "))]
    UnsupportedArchitecture { found: String },
    #[error("{key} is missing")]
    Missing { key: String },
    #[error("{key} is {value}, must be {limit}")]
    OutOfRange {
        key: String,
        value: String,
        limit: String,
    },
    /// Valid, but asks for something the forward pass does not do.
    #[error("{key} is {value}: {reason}")]
    Unsupported {
        key: String,
        value: String,
        reason: &'static str,
    },
    #[error("config.json: {0}")]
    Json(String),
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

impl ConfigError {
    pub(crate) fn missing(key: impl Into<String>) -> Self {
        Self::Missing { key: key.into() }
    }

    fn out_of_range(key: impl Into<String>, value: impl Display, limit: impl Into<String>) -> Self {
        Self::OutOfRange {
            key: key.into(),
            value: value.to_string(),
            limit: limit.into(),
        }
    }

    pub(crate) fn unsupported(key: impl Into<String>, value: impl Display, reason: &'static str) -> Self {
        Self::Unsupported {
            key: key.into(),
            value: value.to_string(),
            reason,
        }
    }
}

impl ModelConfig {
    /// Query heads that share one KV head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }
    /// Width of the concatenated query heads.
    pub fn q_dim(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }
    /// Width of the concatenated key heads, and of the value heads.
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Checks every value and their relations. Both parsers end with it; whoever gets a configuration from a peer calls
    /// it too.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`] or [`ConfigError::UnsupportedArchitecture`], naming the field, its value and limit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_architecture(&self.architecture)?;
        let sizes = [
            ("hidden_size", self.hidden_size, limits::HIDDEN_SIZE),
            (
                "intermediate_size",
                self.intermediate_size,
                limits::INTERMEDIATE_SIZE,
            ),
            ("num_hidden_layers", self.num_hidden_layers, limits::LAYERS),
            ("num_attention_heads", self.num_attention_heads, limits::HEADS),
            (
                "num_key_value_heads",
                self.num_key_value_heads,
                self.num_attention_heads,
            ),
            ("head_dim", self.head_dim, limits::HEAD_DIM),
            ("vocab_size", self.vocab_size, limits::VOCAB_SIZE),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                limits::CONTEXT,
            ),
            (
                "sliding_window",
                self.sliding_window.unwrap_or(1),
                limits::CONTEXT,
            ),
        ];
        for (field, value, limit) in sizes {
            if !(1..=limit).contains(&value) {
                return Err(ConfigError::out_of_range(field, value, format!("1 to {limit}")));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let limit = format!("a divisor of num_attention_heads, {}", self.num_attention_heads);
            return Err(ConfigError::out_of_range(
                "num_key_value_heads",
                self.num_key_value_heads,
                limit,
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::out_of_range("head_dim", self.head_dim, "even"));
        }
        let eps = self.rms_norm_eps;
        if !(eps > 0.0 && eps <= 1.0) {
            return Err(ConfigError::out_of_range(
                "rms_norm_eps",
                eps,
                "more than 0 and at most 1",
            ));
        }
        self.rope.validate(self.head_dim)
    }
}

fn check_architecture(name: &str) -> Result<(), ConfigError> {
    if SUPPORTED_ARCHITECTURES.contains(&name) {
        Ok(())
    } else {
        Err(ConfigError::UnsupportedArchitecture {
            found: name.to_owned(),
        })
    }
}

/// A count from a file as a usize; what does not fit is far beyond every limit.
fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
