//! The ops that are neither matrix products nor attention, at SmolLM2-135M's widths, beside a plain copy of as many
//! bytes: `cargo bench -p phalanx-kernels --bench ops [-- FILTER]`.

mod support;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use phalanx_kernels::cpu::quant::quantize_row;
use phalanx_kernels::cpu::{CpuBackend, CpuBuffer};
use phalanx_kernels::{
    Backend, BatchInput, CandidateRequest, Columns, Heads, Linear, Noise, Norm, Rope, WeightSource,
};
use phalanx_model::{RopeLayout, TensorFormat};
use support::{Group, Work, noise, threads};

const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCAB: usize = 49_152;
const HEADS: Heads = Heads {
    num_q: 9,
    num_kv: 3,
    head_dim: 64,
    q_start: 0,
    kv_start: 0,
    group_size: 3,
    sliding_window: None,
};
/// Rows of a step: one stream, many streams, a chunk of a prompt.
const ROWS: [usize; 3] = [1, 16, 512];

fn backend() -> CpuBackend {
    CpuBackend::new(threads()).expect("threads")
}

fn filled(backend: &CpuBackend, rows: usize, width: usize) -> CpuBuffer {
    let mut buffer = backend.buffer(rows, width).expect("memory");
    backend
        .write(&mut buffer, &noise(rows * width))
        .expect("whole rows");
    buffer
}

/// One sequence of `rows` tokens spread over the vocabulary.
fn batch(rows: usize) -> BatchInput {
    let positions: Vec<u32> = (0..rows as u32).collect();
    BatchInput {
        token_ids: (0..rows).map(|row| (row * 7919 % VOCAB) as u32).collect(),
        slot_mapping: positions.clone(),
        positions,
        cu_seqlens_q: vec![0, rows as u32],
        context_lens: vec![rows as u32],
        block_tables: (0..rows.div_ceil(16) as u32).collect(),
        cu_blocks: vec![0, rows.div_ceil(16) as u32],
    }
}

/// A pass that reads and writes so many values per row.
fn pass(rows: usize, read: usize, written: usize) -> Work {
    Work::Pass {
        read: 4 * rows * read,
        written: 4 * rows * written,
    }
}

fn norms(c: &mut Criterion) {
    let backend = backend();
    let weight = backend.vector(&noise(HIDDEN)).expect("memory");
    let norm = Norm {
        weight: &weight,
        eps: 1e-5,
    };
    let mut group = Group::new(c, "norm");
    for rows in ROWS {
        let (x, mut out) = (filled(&backend, rows, HIDDEN), filled(&backend, rows, HIDDEN));
        group.measure(&format!("rms_norm/M{rows}"), pass(rows, HIDDEN, HIDDEN), || {
            backend
                .rms_norm(&mut out, black_box(&x), &norm, rows)
                .expect("rows that fit");
        });
        let mut residual = filled(&backend, rows, HIDDEN);
        // Added again and again, zeros keep the sum as it is.
        let delta = backend.buffer(rows, HIDDEN).expect("memory");
        let work = pass(rows, 2 * HIDDEN, 2 * HIDDEN);
        group.measure(&format!("fused_add_rms_norm/M{rows}"), work, || {
            backend
                .fused_add_rms_norm(&mut out, &mut residual, black_box(&delta), &norm, rows)
                .expect("rows that fit");
        });
    }
}

fn rotary(c: &mut Criterion) {
    let backend = backend();
    let frequencies: Vec<f32> = (0..HEADS.head_dim / 2)
        .map(|i| 10_000f32.powf(-(2.0 * i as f32) / HEADS.head_dim as f32))
        .collect();
    let inverse_frequencies = backend.vector(&frequencies).expect("memory");
    let mut group = Group::new(c, "rotary_embedding");
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        let rope = Rope {
            inverse_frequencies: &inverse_frequencies,
            attention_factor: 1.0,
            layout,
        };
        for rows in ROWS {
            let mut qkv = filled(&backend, rows, HEADS.qkv_width());
            let batch = backend.batch(&batch(rows)).expect("parts that fit");
            let rotated = (HEADS.num_q + HEADS.num_kv) * HEADS.head_dim;
            group.measure(
                &format!("{layout:?}/M{rows}"),
                pass(rows, rotated, rotated),
                || {
                    backend
                        .rotary_embedding(black_box(&mut qkv), &rope, &HEADS, &batch)
                        .expect("rows that fit");
                },
            );
        }
    }
}

fn activation(c: &mut Criterion) {
    let backend = backend();
    let mut group = Group::new(c, "silu_and_mul");
    for rows in ROWS {
        let gate_up = filled(&backend, rows, 2 * INTERMEDIATE);
        let mut out = backend.buffer(rows, INTERMEDIATE).expect("memory");
        let work = pass(rows, 2 * INTERMEDIATE, INTERMEDIATE);
        group.measure(&format!("M{rows}"), work, || {
            let columns = Columns {
                buffer: &mut out,
                start: 0,
            };
            backend
                .silu_and_mul(columns, black_box(&gate_up), rows)
                .expect("rows that fit");
        });
    }
}

/// The bytes of a table of embeddings, all rows alike.
fn table(format: TensorFormat) -> Vec<u8> {
    quantize_row(format, &noise(HIDDEN))
        .expect("whole blocks")
        .repeat(VOCAB)
}

fn table_source(format: TensorFormat, data: &[u8]) -> WeightSource<'_> {
    WeightSource {
        format,
        rows: VOCAB,
        cols: HIDDEN,
        data,
        row_stride: data.len() / VOCAB,
        row_scales: None,
    }
}

fn rows_of_tables(c: &mut Criterion) {
    let backend = backend();
    let mut group = Group::new(c, "embedding");
    for format in [TensorFormat::Q4_1, TensorFormat::Q8_0, TensorFormat::F16] {
        let data = table(format);
        let weight = backend.weight(&[table_source(format, &data)]).expect("memory");
        for rows in ROWS {
            let mut out = backend.buffer(rows, HIDDEN).expect("memory");
            let batch = backend.batch(&batch(rows)).expect("parts that fit");
            let work = Work::Pass {
                read: rows * data.len() / VOCAB,
                written: 4 * rows * HIDDEN,
            };
            group.measure(&format!("{format:?}/M{rows}"), work, || {
                backend
                    .embedding(&mut out, black_box(&weight), 0..VOCAB, &batch)
                    .expect("rows that fit");
            });
        }
    }
    let x = filled(&backend, 512, HIDDEN);
    let mut out = backend.buffer(16, HIDDEN).expect("memory");
    let picked: Vec<u32> = (0..16).map(|row| row * 32).collect();
    group.measure("select_rows/16 of 512", pass(16, HIDDEN, HIDDEN), || {
        backend
            .select_rows(&mut out, black_box(&x), &picked)
            .expect("rows that fit");
    });
}

/// The LM head and the greedy candidate of each row: all that leaves it.
fn lm_head(c: &mut Criterion) {
    let backend = backend();
    let mut group = Group::new(c, "lm_head");
    for format in [TensorFormat::Q4_1, TensorFormat::Q8_0] {
        let data = table(format);
        let weight = backend.weight(&[table_source(format, &data)]).expect("memory");
        for rows in [1, 16] {
            let x = filled(&backend, rows, HIDDEN);
            let mut logits = backend.buffer(rows, VOCAB).expect("memory");
            let requests: Vec<_> = (0..rows).map(greedy).collect();
            let work = Work::Int8 {
                bytes: backend.weight_bytes(&weight),
                operations: 2 * rows * VOCAB * HIDDEN,
            };
            group.measure(&format!("{format:?}/M{rows}"), work, || {
                let out = Columns {
                    buffer: &mut logits,
                    start: 0,
                };
                let linear = Linear {
                    weight: &weight,
                    bias: None,
                };
                backend
                    .linear(out, black_box(&x), &linear, rows)
                    .expect("rows that fit");
                black_box(backend.candidates(&logits, &requests).expect("rows that fit"));
            });
        }
    }
}

fn greedy(row: usize) -> CandidateRequest<'static> {
    CandidateRequest {
        row,
        vocab: 0..VOCAB,
        edits: &[],
        allowed: None,
        inverse_temperature: 1.0,
        noise: None,
        top: 1,
        raw_top: 0,
        scaled_statistics: false,
        raw_statistics: false,
    }
}

fn candidates(c: &mut Criterion) {
    let backend = backend();
    let mut group = Group::new(c, "candidates");
    let requests = [
        ("greedy", greedy(0)),
        (
            "top 50",
            CandidateRequest {
                top: 50,
                scaled_statistics: true,
                ..greedy(0)
            },
        ),
        (
            "sample",
            CandidateRequest {
                top: 0,
                noise: Some(Noise { seed: 1, position: 0 }),
                ..greedy(0)
            },
        ),
    ];
    for rows in [1, 16] {
        let mut logits = backend.buffer(rows, VOCAB).expect("memory");
        let values: Vec<f32> = noise(rows * VOCAB).iter().map(|x| x * 12.0).collect();
        backend.write(&mut logits, &values).expect("whole rows");
        for (name, request) in &requests {
            let mut requests: Vec<_> = (0..rows)
                .map(|row| CandidateRequest {
                    row,
                    ..request.clone()
                })
                .collect();
            group.measure(&format!("{name}/{rows} rows"), pass(rows, VOCAB, 0), || {
                for request in &mut requests {
                    if let Some(noise) = &mut request.noise {
                        noise.position += 1;
                    }
                }
                black_box(
                    backend
                        .candidates(black_box(&logits), &requests)
                        .expect("rows that fit"),
                );
            });
        }
    }
}

criterion_group!(
    benches,
    norms,
    rotary,
    activation,
    rows_of_tables,
    lm_head,
    candidates
);
criterion_main!(benches);
