//! Hyper-parameters of the Llama architecture family, whatever file they came from.

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

/// Rotary position embedding (Su et al., 2021) and its context-extension variants.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    pub theta: f32,
    /// Leading dimensions of a head that rotate; even, at most `head_dim`.
    pub rotary_dim: usize,
    pub layout: RopeLayout,
    pub scaling: RopeScaling,
}

/// How the dimensions of a head pair up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(i, i + rotary_dim / 2)`: Hugging Face checkpoints.
    Half,
    /// `(2 i, 2 i + 1)`: GGUF files of the llama architecture, whose q and k rows are permuted for it.
    Interleaved,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f32,
    },
    /// Llama 3.1: low frequencies scaled, high ones kept, a ramp between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al., 2023).
    Yarn {
        factor: f32,
        original_max_position_embeddings: usize,
        beta_fast: f32,
        beta_slow: f32,
        /// Multiplies cos and sin.
        attention_factor: f32,
    },
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
}
