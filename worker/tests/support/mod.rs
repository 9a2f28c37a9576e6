//! What the worker's tests share: the demo model, assignments, and groups of ranks as threads over a real segment.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    cell::RefCell,
    ops::Range,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use phalanx_kernels::{Backend, BatchInput, WeightSource, comm::ShmCommunicator, cpu::CpuBackend};
use phalanx_model::{
    Checkpoint, ModelConfig, RopeLayout, RopeScaling, ShardPlan, TensorFormat, TensorParallelOptions,
    TensorParallelStyle,
};
use phalanx_proto::{
    step::{BlockId, RowSampling, SequenceId, StepMasks, StepPlan, StepRow},
    v1,
};
use phalanx_shm::{GroupShape, MappedFile, RankPort, Segment, Wait};
use phalanx_worker::{Assignment, LoadedModel, ModelRunner, RunError};

pub(crate) const BLOCK_SIZE: usize = 16;
pub(crate) const NUM_BLOCKS: usize = 128;
pub(crate) const MAX_TOKENS: usize = 256;
pub(crate) const MAX_ROWS: usize = 32;

/// The demo model's file.
pub(crate) fn demo_model() -> PathBuf {
    let path = std::env::var_os("PHALANX_DEMO_MODEL").map_or_else(
        || {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"))
                .parent()
                .expect("the workspace");
            root.join(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "{} is absent: run ./scripts/fetch-demo-model",
        path.display()
    );
    path
}

/// Token ids of words that are one token each.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    let path = demo_model();
    let checkpoint = Checkpoint::open(&path, MappedFile::open).unwrap();
    let gguf = checkpoint.gguf().unwrap();
    let vocab: Vec<&str> = gguf.strings("tokenizer.ggml.tokens").unwrap().unwrap().collect();
    let id = |piece: String| {
        let found = vocab.iter().position(|token| *token == piece);
        found.unwrap_or_else(|| panic!("{piece:?} is not one token")) as u32
    };
    let words = text.split(' ').enumerate();
    words
        .map(|(i, word)| {
            id(if i == 0 {
                word.to_owned()
            } else {
                format!("Ġ{word}")
            })
        })
        .collect()
}

/// The wire form of an assignment of the model at `path`.
pub(crate) fn assign(path: &Path, rank: usize, options: &TensorParallelOptions) -> v1::Assign {
    let checkpoint = Checkpoint::open(path, MappedFile::open).unwrap();
    let config = checkpoint.config();
    let plan = ShardPlan::new(config, options, checkpoint.row_split_blocks()).unwrap();
    let range = |range: &Range<usize>| {
        Some(v1::Range {
            start: range.start as u32,
            end: range.end as u32,
        })
    };
    let shards = plan.ranks.iter().map(|shard| v1::RankShard {
        q_heads: range(&shard.q_heads),
        kv_heads: range(&shard.kv_heads),
        intermediate: range(&shard.intermediate),
        hidden: range(&shard.hidden),
        vocab: range(&shard.vocab),
    });
    v1::Assign {
        rank: rank as u32,
        world_size: options.world_size as u32,
        model_path: path.to_str().unwrap().to_owned(),
        model: Some(model_spec(config)),
        shards: shards.collect(),
        style: match options.style {
            TensorParallelStyle::Gather => v1::TensorParallelStyle::Gather,
            TensorParallelStyle::Reduce => v1::TensorParallelStyle::Reduce,
        }
        .into(),
        block_size: BLOCK_SIZE as u32,
        num_blocks: NUM_BLOCKS as u32,
        max_tokens: MAX_TOKENS as u32,
        max_rows: MAX_ROWS as u32,
        max_blocks_per_row: NUM_BLOCKS as u32,
        kv_dtype: v1::KvDtype::F32.into(),
        quantize_to_fp8: false,
        trace: None,
        threads: 1,
        step_timeout_ms: 30_000,
        max_edits_per_row: 1024,
        max_logprobs: 20,
        device: v1::DeviceKind::Cpu.into(),
        disable_custom_all_reduce: false,
        cudagraph_capture_sizes: Vec::new(),
    }
}

fn model_spec(config: &ModelConfig) -> v1::ModelSpec {
    assert!(matches!(
        config.rope.scaling,
        RopeScaling::None | RopeScaling::FrequencyFactors { .. }
    ));
    v1::ModelSpec {
        architecture: config.architecture.clone(),
        hidden_size: config.hidden_size as u32,
        intermediate_size: config.intermediate_size as u32,
        num_hidden_layers: config.num_hidden_layers as u32,
        num_attention_heads: config.num_attention_heads as u32,
        num_key_value_heads: config.num_key_value_heads as u32,
        head_dim: config.head_dim as u32,
        vocab_size: config.vocab_size as u32,
        max_position_embeddings: config.max_position_embeddings as u32,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope.theta,
        rotary_dim: config.rope.rotary_dim as u32,
        rope_layout: match config.rope.layout {
            RopeLayout::Half => v1::RopeLayout::Half,
            RopeLayout::Interleaved => v1::RopeLayout::Interleaved,
        }
        .into(),
        rope_scaling: None,
        tie_word_embeddings: config.tie_word_embeddings,
        attention_bias: config.attention_bias,
        mlp_bias: config.mlp_bias,
        sliding_window: config.sliding_window.map(|window| window as u32),
    }
}

pub(crate) fn load(assign: &v1::Assign) -> LoadedModel<CpuBackend> {
    let assignment = Assignment::try_from(assign).unwrap();
    let backend = CpuBackend::new(assignment.threads).unwrap();
    phalanx_worker::load(backend, assignment, &mut |_| {}).unwrap()
}

/// A segment for `world_size` ranks, in a directory that goes with it.
pub(crate) struct Ranks {
    pub(crate) segment: Arc<Segment>,
    world_size: usize,
    style: TensorParallelStyle,
    _dir: tempfile::TempDir,
}

impl Ranks {
    pub(crate) fn new(world_size: usize, style: TensorParallelStyle) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shape = group_shape(world_size, 1);
        let segment = Segment::create(dir.path(), "test", shape).unwrap();
        Self {
            segment: Arc::new(segment),
            world_size,
            style,
            _dir: dir,
        }
    }

    /// Runs `body(rank, communicator)` on a thread per rank; the results are in rank order.
    pub(crate) fn run<T: Send>(&self, body: impl Fn(usize, ShmCommunicator) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..self.world_size)
                .map(|rank| {
                    let body = &body;
                    let segment = Arc::clone(&self.segment);
                    scope.spawn(move || {
                        let limit = Duration::from_secs(60);
                        let port = RankPort::join(segment, rank as u32, Wait::default(), limit).unwrap();
                        let port = Rc::new(RefCell::new(port));
                        body(rank, ShmCommunicator::new(port, self.style))
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }
}

pub(crate) fn group_shape(world_size: usize, epoch: u32) -> GroupShape {
    GroupShape {
        world_size: world_size as u32,
        epoch,
        plan_slots: 2,
        plan_slot_bytes: 1 << 20,
        output_slots: 2,
        output_slot_bytes: 1 << 16,
        message_bytes: 1 << 16,
        arena_bytes: 8 << 20,
    }
}

/// What all ranks' logits are together: `[rows, vocab]`, one row after another.
pub(crate) fn join_logits(parts: &[Vec<f32>], rows: usize) -> Vec<f32> {
    let widths: Vec<usize> = parts.iter().map(|part| part.len() / rows.max(1)).collect();
    (0..rows)
        .flat_map(|row| {
            parts
                .iter()
                .zip(&widths)
                .flat_map(move |(part, width)| &part[row * width..][..*width])
        })
        .copied()
        .collect()
}

/// Loads `options.world_size` ranks of a model, has each run `body`, and returns the results in rank order.
pub(crate) fn on_model<T: Send>(
    path: &Path,
    options: &TensorParallelOptions,
    body: impl Fn(&mut ModelRunner<'_, CpuBackend, ShmCommunicator>) -> T + Sync,
) -> Vec<T> {
    Ranks::new(options.world_size, options.style).run(|rank, comm| {
        let mut model = load(&assign(path, rank, options));
        let mut runner = ModelRunner::new(&mut model, comm).unwrap();
        body(&mut runner)
    })
}

/// A sequence whose blocks start at `first_block`: the tokens of one step.
pub(crate) fn row(
    first_block: usize,
    num_computed_tokens: usize,
    token_ids: &[u32],
    sampled: bool,
) -> StepRow {
    let blocks = (num_computed_tokens + token_ids.len()).div_ceil(BLOCK_SIZE);
    StepRow {
        sequence: SequenceId(first_block as u64),
        token_ids: token_ids.to_vec(),
        num_computed_tokens: num_computed_tokens as u32,
        block_table: (first_block..first_block + blocks)
            .map(|block| BlockId(block as u32))
            .collect(),
        sampling: sampled.then_some(RowSampling::GREEDY),
        prompt_logprobs: None,
    }
}

pub(crate) fn plan(step: u64, rows: Vec<StepRow>) -> StepPlan {
    StepPlan {
        epoch: 1,
        step,
        rows,
        masks_follow: false,
    }
}

/// What plans that announce no masks never ask for.
pub(crate) fn no_masks() -> Result<StepMasks, RunError> {
    panic!("the plan announces no masks")
}

/// A buffer that holds `rows` of logits. They get there as embeddings of tokens 0, 1, ….
pub(crate) fn logits_buffer(backend: &CpuBackend, rows: &[Vec<f32>]) -> <CpuBackend as Backend>::Buffer {
    let width = rows.first().map_or(1, Vec::len);
    let mut buffer = backend.buffer(rows.len().max(1), width).unwrap();
    if rows.is_empty() {
        return buffer;
    }
    let data: Vec<u8> = rows
        .iter()
        .flatten()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let table = WeightSource {
        format: TensorFormat::F32,
        rows: rows.len(),
        cols: width,
        data: &data,
        row_stride: 4 * width,
        row_scales: None,
    };
    let table = backend.weight(&[table]).unwrap();
    let ids: Vec<u32> = (0..rows.len() as u32).collect();
    let input = BatchInput {
        positions: vec![0; ids.len()],
        slot_mapping: ids.clone(),
        cu_seqlens_q: (0..=ids.len() as u32).collect(),
        context_lens: vec![1; ids.len()],
        block_tables: ids.clone(),
        cu_blocks: (0..=ids.len() as u32).collect(),
        token_ids: ids,
    };
    let batch = backend.batch(&input).unwrap();
    backend
        .embedding(&mut buffer, &table, 0..rows.len(), &batch)
        .unwrap();
    buffer
}
