//! Small models of every kind: what the demo model does not have, and what a rank refuses.

mod support;

use std::path::{Path, PathBuf};

use phalanx_kernels::cpu::CpuBackend;
use phalanx_model::{
    ModelConfig, RopeConfig, RopeLayout, RopeScaling, TensorFormat, TensorParallelOptions,
    TensorParallelStyle, TensorRole,
    gguf::{GgufWriter, RandomWeights},
};
use phalanx_proto::step::{BlockId, StepPlan};
use phalanx_worker::{Assignment, AssignmentError, LoadError, PlanError, runner::batch_input};
use support::*;

fn config() -> ModelConfig {
    ModelConfig {
        architecture: "llama".to_owned(),
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 2,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 32,
        vocab_size: 2100,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 10_000.0,
            rotary_dim: 32,
            layout: RopeLayout::Interleaved,
            scaling: RopeScaling::None,
        },
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        sliding_window: None,
    }
}

/// A model file with random weights.
fn write(dir: &Path, config: &ModelConfig, format: impl Fn(TensorRole) -> TensorFormat) -> PathBuf {
    let path = dir.join("model.gguf");
    let weights = RandomWeights::new(5);
    let writer = GgufWriter::llama(config, format).unwrap();
    let bytes = writer.to_bytes(|tensor, out| weights.fill(tensor, out)).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Logits of two sequences: one prompt whole, one in two chunks.
fn logits(path: &Path, options: &TensorParallelOptions) -> Vec<f32> {
    let prompt: Vec<u32> = (0..40).map(|i| i * 37 % 2100).collect();
    let parts = on_model(path, options, |runner| {
        let first = plan(
            0,
            vec![row(0, 0, &prompt[..23], false), row(10, 0, &prompt[..17], true)],
        );
        runner.logits(&first).unwrap();
        let second = plan(
            1,
            vec![
                row(0, 23, &prompt[23..], true),
                row(10, 17, &prompt[17..18], true),
            ],
        );
        runner.logits(&second).unwrap()
    });
    join_logits(&parts, 2)
}

fn equal(world_size: usize, style: TensorParallelStyle) -> TensorParallelOptions {
    TensorParallelOptions::equal(world_size, style)
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn every_kind_of_model_gives_the_same_bits_at_any_number_of_ranks() {
    let kinds = [
        ModelConfig {
            tie_word_embeddings: false,
            ..config()
        },
        ModelConfig {
            attention_bias: true,
            ..config()
        },
        ModelConfig {
            sliding_window: Some(9),
            ..config()
        },
        ModelConfig {
            rope: RopeConfig {
                scaling: RopeScaling::FrequencyFactors {
                    factors: (0..16).map(|i| 1.0 + i as f32).collect(),
                },
                ..config().rope
            },
            ..config()
        },
    ];
    let mut all = vec![];
    for (kind, format) in kinds.iter().zip([
        TensorFormat::Q4_K,
        TensorFormat::Q8_0,
        TensorFormat::F16,
        TensorFormat::Q5_1,
    ]) {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), kind, |_| format);
        let alone = logits(&path, &equal(1, TensorParallelStyle::Gather));
        assert!(alone.iter().all(|x| x.is_finite()));
        // Five ranks share two KV heads.
        for world_size in [2, 5] {
            let split = logits(&path, &equal(world_size, TensorParallelStyle::Gather));
            assert!(split == alone, "{world_size} ranks, {format}");
        }
        assert!(
            all.iter().all(|other| *other != alone),
            "{format}: the setting has no effect"
        );
        all.push(alone);
    }
}

#[test]
fn reduce_style_sums_to_the_same_logits() {
    let kind = ModelConfig {
        attention_bias: true,
        ..config()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &kind, |_| TensorFormat::F32);
    let whole = logits(&path, &equal(1, TensorParallelStyle::Gather));
    for world_size in [1, 2, 4] {
        let reduced = logits(&path, &equal(world_size, TensorParallelStyle::Reduce));
        let difference = largest_difference(&whole, &reduced);
        assert!(difference < 1e-3, "{world_size} ranks: {difference}");
    }
}

#[test]
fn a_file_that_is_not_the_assigned_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &config(), |_| TensorFormat::Q8_0);
    let mut assign = assign(&path, 0, &equal(1, TensorParallelStyle::Gather));
    let spec = assign.model.as_mut().unwrap();
    spec.num_hidden_layers = 3;
    let assignment = Assignment::try_from(&assign).unwrap();
    let backend = CpuBackend::new(1).unwrap();
    let error = phalanx_worker::load(backend, assignment, &mut |_| {})
        .err()
        .unwrap();
    assert!(
        matches!(
            error,
            LoadError::Differs {
                field: "num_hidden_layers",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn assignments_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &config(), |_| TensorFormat::Q8_0);
    let good = assign(&path, 1, &equal(2, TensorParallelStyle::Gather));
    assert!(Assignment::try_from(&good).is_ok());
    let error = |change: fn(&mut phalanx_proto::v1::Assign)| {
        let mut assign = good.clone();
        change(&mut assign);
        Assignment::try_from(&assign).unwrap_err()
    };
    assert!(matches!(
        error(|a| a.rank = 2),
        AssignmentError::OutOfRange { field: "rank", .. }
    ));
    assert!(matches!(
        error(|a| a.world_size = 0),
        AssignmentError::OutOfRange {
            field: "world_size",
            ..
        }
    ));
    assert!(matches!(
        error(|a| a.model = None),
        AssignmentError::Missing("model")
    ));
    assert!(matches!(
        error(|a| a.kv_dtype = 77),
        AssignmentError::Missing("kv_dtype")
    ));
    assert!(matches!(
        error(|a| a.num_blocks = u32::MAX),
        AssignmentError::OutOfRange {
            field: "num_blocks",
            ..
        }
    ));
    assert!(matches!(
        error(|a| a.shards.truncate(1)),
        AssignmentError::ShardCount {
            found: 1,
            expected: 2
        }
    ));
    let torn = error(|a| a.shards[1].hidden.as_mut().unwrap().start += 16);
    assert!(matches!(torn, AssignmentError::Shards(_)), "{torn}");
    let headless = error(|a| a.model.as_mut().unwrap().num_key_value_heads = 0);
    assert!(matches!(headless, AssignmentError::Model(_)), "{headless}");
}

#[test]
fn plans_are_checked_against_what_was_allocated() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &config(), |_| TensorFormat::Q8_0);
    let assign = assign(&path, 0, &equal(1, TensorParallelStyle::Gather));
    let assignment = Assignment::try_from(&assign).unwrap();
    let good = plan(0, vec![row(2, 30, &[5, 6, 7], true), row(9, 0, &[1], false)]);
    let (input, sampled) = batch_input(&good, &assignment).unwrap();
    assert_eq!(input.token_ids, [5, 6, 7, 1]);
    assert_eq!(input.positions, [30, 31, 32, 0]);
    assert_eq!(input.slot_mapping, [62, 63, 64, 144]);
    assert_eq!(input.cu_seqlens_q, [0, 3, 4]);
    assert_eq!(input.context_lens, [33, 1]);
    assert_eq!(input.block_tables, [2, 3, 4, 9]);
    assert_eq!(input.cu_blocks, [0, 3, 4]);
    assert_eq!(sampled, [2]);

    let error = |change: &dyn Fn(&mut StepPlan)| {
        let mut plan = good.clone();
        change(&mut plan);
        batch_input(&plan, &assignment).unwrap_err()
    };
    let over = |field, row, value, limit| PlanError::OverLimit {
        row,
        field,
        value,
        limit,
    };
    assert_eq!(
        error(&|p| p.rows[1].token_ids.clear()),
        PlanError::Empty { row: 1 }
    );
    assert_eq!(
        error(&|p| p.rows[0].token_ids[1] = 2100),
        over("token_ids", 0, 2100, 2099)
    );
    assert_eq!(
        error(&|p| p.rows[1].block_table[0] = BlockId(128)),
        over("block_table", 1, 128, 127)
    );
    assert_eq!(
        error(&|p| p.rows[0].token_ids = vec![0; 300])
            .to_string()
            .split(':')
            .next(),
        Some("row 0")
    );
    assert_eq!(
        error(&|p| p.rows[0].block_table.truncate(2)),
        PlanError::ShortBlockTable {
            row: 0,
            blocks: 2,
            capacity: 32,
            needed: 33
        }
    );
    assert_eq!(
        error(&|p| p.rows[0].num_computed_tokens = u32::MAX),
        PlanError::ShortBlockTable {
            row: 0,
            blocks: 3,
            capacity: 48,
            needed: u64::from(u32::MAX) + 3
        }
    );
}
