//! Small models for tests, and the demo model.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::{Path, PathBuf};

use phalanx_model::{
    ModelConfig, RopeConfig, RopeLayout, RopeScaling, TensorFormat, TensorRole,
    gguf::{GgufWriter, RandomWeights},
};

/// Two layers, 4 query heads over 2 KV heads.
pub(crate) fn tiny_config() -> ModelConfig {
    ModelConfig {
        architecture: "llama".to_owned(),
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        vocab_size: 70,
        max_position_embeddings: 128,
        rms_norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 10_000.0,
            rotary_dim: 16,
            layout: RopeLayout::Interleaved,
            scaling: RopeScaling::None,
        },
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        sliding_window: None,
    }
}

/// The geometry of Llama 3 70B.
pub(crate) fn llama_70b() -> ModelConfig {
    ModelConfig {
        hidden_size: 8192,
        intermediate_size: 28_672,
        num_hidden_layers: 80,
        num_attention_heads: 64,
        num_key_value_heads: 8,
        head_dim: 128,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        rope: RopeConfig {
            theta: 500_000.0,
            rotary_dim: 128,
            ..tiny_config().rope
        },
        tie_word_embeddings: false,
        ..tiny_config()
    }
}

pub(crate) fn random_gguf(config: &ModelConfig, format: impl Fn(TensorRole) -> TensorFormat) -> Vec<u8> {
    let mut writer = GgufWriter::llama(config, format).expect("shapes hold whole blocks");
    writer.metadata(
        "tokenizer.ggml.tokens",
        vec!["<s>".to_owned(), "é".to_owned(), String::new()],
    );
    writer.metadata("tokenizer.ggml.token_type", vec![3, 1, 1]);
    writer.metadata("tokenizer.ggml.scores", vec![0.0_f32, -1.0, -2.5]);
    writer.metadata("tokenizer.ggml.add_bos_token", true);
    let weights = RandomWeights::new(7);
    writer
        .to_bytes(|tensor, out| weights.fill(tensor, out))
        .expect("data fits its shapes")
}

/// Path of SmolLM2-135M-Instruct, which the tests need.
pub(crate) fn demo_model() -> PathBuf {
    let path = std::env::var_os("PHALANX_DEMO_MODEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "the demo model is not at {}: run ./scripts/fetch-demo-model, or set PHALANX_DEMO_MODEL",
        path.display()
    );
    path
}
