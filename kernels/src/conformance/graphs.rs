//! A decode step gives the same bits from a graph as from its ops one by one, whatever step the graph was captured on.

use std::ops::Range;

use half::bf16;
use phalanx_model::{KvDtype, RopeLayout, TensorFormat};

use super::random::Random;
use super::{Tolerances, assert_same};
use crate::{
    Backend, BatchInput, Columns, DecodeShape, GraphCache, Heads, KvSpec, Linear, Norm, Result, Rope,
    WeightSource,
};

const HEADS: Heads = Heads {
    num_q: 4,
    num_kv: 2,
    head_dim: 16,
    q_start: 0,
    kv_start: 0,
    group_size: 2,
    sliding_window: None,
};
const HIDDEN: usize = 64;
const VOCAB: usize = 50;
const BLOCK_SIZE: usize = 16;
/// Beyond two of the spans that a long context is cut into.
const MAX_CONTEXT: usize = 1200;
const SEQUENCES: usize = 5;
const BLOCKS: usize = MAX_CONTEXT.div_ceil(BLOCK_SIZE);
const SIZES: [usize; 3] = [1, 2, 4];

/// One layer, from tokens to logits.
struct Layer<B: Backend> {
    table: B::Weight,
    norm: B::Vector,
    qkv_proj: B::Weight,
    o_proj: B::Weight,
    frequencies: B::Vector,
    kv: B::KvCache,
}

/// What it computes in.
struct Workspace<B: Backend> {
    hidden: B::Buffer,
    residual: B::Buffer,
    normed: B::Buffer,
    qkv: B::Buffer,
    attended: B::Buffer,
    logits: B::Buffer,
}

fn matrix<B: Backend>(backend: &B, random: &mut Random, rows: usize, cols: usize) -> B::Weight {
    let values = random.normals(rows * cols);
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|&x| bf16::from_f32(x / 4.0).to_f32().to_le_bytes())
        .collect();
    let source = WeightSource {
        format: TensorFormat::F32,
        rows,
        cols,
        data: &bytes,
        row_stride: 4 * cols,
        row_scales: None,
    };
    backend.weight(&[source]).unwrap()
}

impl<B: Backend> Layer<B> {
    fn new(backend: &B) -> Self {
        let mut random = Random::new(20);
        let width = HEADS.qkv_width();
        let attended = HEADS.num_q * HEADS.head_dim;
        let frequencies: Vec<f32> = (0..HEADS.head_dim / 2)
            .map(|i| 100f32.powf(-(i as f32) / 8.0))
            .collect();
        let spec = KvSpec {
            num_blocks: SEQUENCES * BLOCKS,
            block_size: BLOCK_SIZE,
            num_kv_heads: HEADS.num_kv,
            head_dim: HEADS.head_dim,
            dtype: KvDtype::F16,
        };
        Self {
            table: matrix(backend, &mut random, VOCAB, HIDDEN),
            norm: backend.vector(&random.normals(HIDDEN)).unwrap(),
            qkv_proj: matrix(backend, &mut random, width, HIDDEN),
            o_proj: matrix(backend, &mut random, HIDDEN, attended),
            frequencies: backend.vector(&frequencies).unwrap(),
            kv: backend.kv_cache(spec).unwrap(),
        }
    }

    /// As a model does it, with every op there is but those of many ranks.
    fn forward(&mut self, backend: &B, ws: &mut Workspace<B>, batch: &B::Batch, rows: usize) -> Result<()> {
        let all: Vec<u32> = (0..rows as u32).collect();
        let norm = Norm {
            weight: &self.norm,
            eps: 1e-5,
        };
        let rope = Rope {
            inverse_frequencies: &self.frequencies,
            attention_factor: 1.0,
            layout: RopeLayout::Half,
        };
        let linear = |out: &mut B::Buffer, x: &B::Buffer, weight: &B::Weight| {
            let out = Columns {
                buffer: out,
                start: 0,
            };
            backend.linear(out, x, &Linear { weight, bias: None }, rows)
        };
        backend.embedding(&mut ws.hidden, &self.table, 0..VOCAB, batch)?;
        backend.select_rows(&mut ws.residual, &ws.hidden, &all)?;
        backend.rms_norm(&mut ws.normed, &ws.residual, &norm, rows)?;
        linear(&mut ws.qkv, &ws.normed, &self.qkv_proj)?;
        backend.rotary_embedding(&mut ws.qkv, &rope, &HEADS, batch)?;
        backend.reshape_and_cache(&mut self.kv, &ws.qkv, &HEADS, batch)?;
        let out = Columns {
            buffer: &mut ws.attended,
            start: 0,
        };
        backend.paged_attention(out, &ws.qkv, &self.kv, &HEADS, batch)?;
        linear(&mut ws.hidden, &ws.attended, &self.o_proj)?;
        backend.fused_add_rms_norm(&mut ws.normed, &mut ws.residual, &ws.hidden, &norm, rows)?;
        linear(&mut ws.logits, &ws.normed, &self.table)
    }
}

impl<B: Backend> Workspace<B> {
    fn new(backend: &B, rows: usize) -> Self {
        let buffer = |width| backend.buffer(rows, width).unwrap();
        Self {
            hidden: buffer(HIDDEN),
            residual: buffer(HIDDEN),
            normed: buffer(HIDDEN),
            qkv: buffer(HEADS.qkv_width()),
            attended: buffer(HEADS.num_q * HEADS.head_dim),
            logits: buffer(VOCAB),
        }
    }
}

/// Positions of some sequences, whose tokens follow from sequence and position.
fn step(parts: &[(usize, Range<usize>)]) -> BatchInput {
    let mut input = BatchInput {
        cu_seqlens_q: vec![0],
        cu_blocks: vec![0],
        ..BatchInput::default()
    };
    for (sequence, positions) in parts {
        // Blocks of the sequences alternate.
        let block = |position: usize| position / BLOCK_SIZE * SEQUENCES + sequence;
        for position in positions.clone() {
            input
                .token_ids
                .push(((sequence * 7 + position * 3) % VOCAB) as u32);
            input.positions.push(position as u32);
            let slot = block(position) * BLOCK_SIZE + position % BLOCK_SIZE;
            input.slot_mapping.push(slot as u32);
        }
        input.cu_seqlens_q.push(input.token_ids.len() as u32);
        input.context_lens.push(positions.end as u32);
        let blocks = (0..positions.end).step_by(BLOCK_SIZE);
        input
            .block_tables
            .extend(blocks.map(|position| block(position) as u32));
        input.cu_blocks.push(input.block_tables.len() as u32);
    }
    input
}

/// Lengths of the sequences before the first decode step: one to three spans.
const LENGTHS: [usize; SEQUENCES] = [3, 511, 700, 40, 1100];
/// Which sequences decode together, step after step.
const STEPS: [&[usize]; 8] = [
    &[0],
    &[4, 1],
    &[1, 2, 3],
    &[0, 1, 2, 4],
    &[3],
    &[2, 4, 0],
    &[1, 3],
    &[4],
];

/// The logits of every decode step, all sequences having been filled as prompts before.
fn decode<B: Backend>(
    backend: &B,
    mut run: impl FnMut(&mut Layer<B>, &BatchInput) -> Vec<f32>,
) -> Vec<Vec<f32>> {
    let mut layer = Layer::new(backend);
    let mut lens = LENGTHS;
    for (sequence, len) in lens.into_iter().enumerate() {
        let mut ws = Workspace::new(backend, len);
        let batch = backend.batch(&step(&[(sequence, 0..len)])).unwrap();
        layer.forward(backend, &mut ws, &batch, len).unwrap();
    }
    let mut results = Vec::new();
    for sequences in STEPS {
        let parts: Vec<_> = sequences
            .iter()
            .map(|&sequence| {
                lens[sequence] += 1;
                (sequence, lens[sequence] - 1..lens[sequence])
            })
            .collect();
        results.push(run(&mut layer, &step(&parts)));
    }
    results
}

pub fn graphs_change_no_bit<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    let backend = make(1);
    let shape = DecodeShape {
        rows: SIZES[2],
        blocks_per_row: BLOCKS,
        num_blocks: SEQUENCES * BLOCKS,
        block_size: BLOCK_SIZE,
        heads: HEADS,
    };
    let Some(mut cache) = backend.graph_cache(&shape).unwrap() else {
        return;
    };
    let mut ws = Workspace::new(&backend, shape.rows);
    let eager = decode(&backend, |layer, input| {
        let rows = input.num_rows();
        let batch = backend.batch(input).unwrap();
        layer.forward(&backend, &mut ws, &batch, rows).unwrap();
        backend.read(&ws.logits, rows).unwrap()
    });
    let mut captured = false;
    let replayed = decode(&backend, |layer, input| {
        if !captured {
            for rows in SIZES.into_iter().rev() {
                cache.load(&backend, &BatchInput::default(), rows).unwrap();
                layer.forward(&backend, &mut ws, cache.batch(), rows).unwrap();
                cache
                    .capture(&backend, |batch| layer.forward(&backend, &mut ws, batch, rows))
                    .unwrap();
            }
            captured = true;
        }
        let rows = input.num_rows();
        let padded = SIZES.into_iter().find(|&size| size >= rows).unwrap();
        cache.load(&backend, input, padded).unwrap();
        cache.replay(&backend).unwrap();
        backend.read(&ws.logits, rows).unwrap()
    });
    for (index, (got, want)) in replayed.iter().zip(&eager).enumerate() {
        assert!(want.iter().all(|x| x.is_finite()));
        assert_same(&format!("step {index} of {:?}", STEPS[index]), got, want);
    }
    assert!(cache.bytes() > 0);
}
