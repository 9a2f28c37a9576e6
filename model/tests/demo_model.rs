//! The demo model, SmolLM2-135M-Instruct in Q4_1, as it lies on disk.

mod support;

use std::{collections::BTreeMap, fs};

use phalanx_model::{
    Checkpoint, KvDtype, LayerTensor, MemoryPlan, MemoryRequest, Placement, RopeLayout, RopeScaling,
    TensorFormat, TensorParallelOptions, TensorParallelStyle, TensorRole,
};
use support::demo_model;

fn open() -> Checkpoint<Vec<u8>> {
    Checkpoint::open(&demo_model(), |path| fs::read(path)).expect("the demo model is sound")
}

#[test]
fn its_configuration_is_that_of_smollm2_135m() {
    let checkpoint = open();
    let config = checkpoint.config();
    assert_eq!(
        (
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size
        ),
        (30, 576, 1536)
    );
    assert_eq!(
        (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim
        ),
        (9, 3, 64)
    );
    assert_eq!(
        (config.vocab_size, config.max_position_embeddings),
        (49_152, 8192)
    );
    assert_eq!(config.rms_norm_eps, 1e-5);
    assert_eq!((config.rope.theta, config.rope.rotary_dim), (100_000.0, 64));
    assert_eq!(
        (config.rope.layout, &config.rope.scaling),
        (RopeLayout::Interleaved, &RopeScaling::None)
    );
    assert!(config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
    assert_eq!(config.sliding_window, None);
}

#[test]
fn its_matrices_are_q4_1_but_the_embedding_is_q8_0() {
    let checkpoint = open();
    let mut formats: BTreeMap<TensorFormat, usize> = BTreeMap::new();
    for (role, info) in checkpoint.tensors().filter(|(role, _)| !role.is_vector()) {
        *formats.entry(info.format).or_default() += 1;
        assert_eq!(
            info.format == TensorFormat::Q8_0,
            role == TensorRole::TokenEmbedding,
            "{role:?}"
        );
    }
    assert_eq!(
        formats,
        BTreeMap::from([(TensorFormat::Q4_1, 7 * 30), (TensorFormat::Q8_0, 1)])
    );
    let vectors: Vec<_> = checkpoint
        .tensors()
        .filter(|(role, _)| role.is_vector())
        .collect();
    assert!(vectors.iter().all(|(_, info)| info.format == TensorFormat::F32));
    assert_eq!(vectors.len(), 61);
    let blocks = checkpoint.row_split_blocks();
    assert_eq!((blocks.o, blocks.down), (32, 32));
}

#[test]
fn its_norms_are_plausible_numbers() {
    let checkpoint = open();
    let role = TensorRole::Layer {
        layer: 29,
        tensor: LayerTensor::InputNorm,
    };
    let (values, rest) = checkpoint.tensor_bytes(role).unwrap().as_chunks::<4>();
    assert_eq!((values.len(), rest.len()), (576, 0));
    assert!(
        values
            .iter()
            .all(|&value| (0.0..100.0).contains(&f32::from_le_bytes(value).abs()))
    );
}

#[test]
fn its_tokenizer_is_within_reach() {
    let checkpoint = open();
    let gguf = checkpoint.gguf().unwrap();
    let mut tokens = gguf.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens.next(), Some("<|endoftext|>"));
    assert_eq!(tokens.count(), 49_151);
    assert_eq!(
        gguf.strings("tokenizer.ggml.merges").unwrap().unwrap().next(),
        Some("Ġ t")
    );
    assert_eq!(
        gguf.integers("tokenizer.ggml.token_type")
            .unwrap()
            .unwrap()
            .next(),
        Some(3)
    );
    assert!(
        gguf.str("tokenizer.chat_template")
            .unwrap()
            .unwrap()
            .contains("<|im_start|>")
    );
}

#[test]
fn its_memory_plan_adds_up_at_two_ranks() {
    let checkpoint = open();
    let formats = checkpoint.formats();
    let request = MemoryRequest {
        config: checkpoint.config(),
        formats: &formats,
        parallel: TensorParallelOptions::equal(2, TensorParallelStyle::Gather),
        placement: Placement::Host,
        most_ranks: 30,
        kv_dtype: KvDtype::F16,
        block_size: 16,
        max_tokens: 512,
        max_rows: 64,
        max_model_len: 2048,
        control_bytes: 0,
    };
    let plan = MemoryPlan::new(&request).unwrap();
    let weights: u64 = plan.ranks.iter().map(|rank| rank.weights).sum();
    // No dimension needs padding here, and each rank holds all norms: 61 vectors of 576 f32.
    let tensors: usize = checkpoint.tensors().map(|(_, info)| info.bytes).sum();
    assert_eq!(weights, tensors as u64 + 61 * 576 * 4);
    assert_eq!(plan.bytes_per_block(0), Some(16 * 2 * 30 * 2 * 64 * 2));
    assert_eq!(plan.bytes_per_block(1), Some(16 * 2 * 30 * 64 * 2));
}
