//! The ops that are not matrix products, on one thread: `cargo bench -p phalanx-kernels --bench ops`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use phalanx_kernels::cpu::CpuBackend;
use phalanx_kernels::{Backend, BatchInput, CandidateRequest, Columns, Heads, KvSpec, Noise};
use phalanx_model::KvDtype;

/// SmolLM2-135M's heads.
const HEADS: Heads = Heads {
    num_q: 9,
    num_kv: 3,
    head_dim: 64,
    q_start: 0,
    kv_start: 0,
    group_size: 3,
    sliding_window: None,
};
const BLOCK_SIZE: usize = 16;

fn noise(n: usize) -> Vec<f32> {
    (0..n as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
        .collect()
}

/// One sequence, of which positions `first..end` are computed.
fn batch(first: u32, end: u32) -> BatchInput {
    BatchInput {
        token_ids: (first..end).collect(),
        positions: (first..end).collect(),
        slot_mapping: (first..end).collect(),
        cu_seqlens_q: vec![0, end - first],
        context_lens: vec![end],
        block_tables: (0..end.div_ceil(BLOCK_SIZE as u32)).collect(),
        cu_blocks: vec![0, end.div_ceil(BLOCK_SIZE as u32)],
    }
}

fn attention(c: &mut Criterion) {
    let backend = CpuBackend::new(1).unwrap();
    let mut group = c.benchmark_group("paged_attention");
    for (name, first, end) in [
        ("prefill 512", 0, 512),
        ("decode at 512", 511, 512),
        ("decode at 8192", 8191, 8192),
    ] {
        for dtype in [KvDtype::F32, KvDtype::F16] {
            let rows = (end - first) as usize;
            let spec = KvSpec {
                num_blocks: end as usize / BLOCK_SIZE,
                block_size: BLOCK_SIZE,
                num_kv_heads: HEADS.num_kv,
                head_dim: HEADS.head_dim,
                dtype,
            };
            let mut kv = backend.kv_cache(spec).unwrap();
            let mut all = backend.buffer(end as usize, HEADS.qkv_width()).unwrap();
            backend
                .write(&mut all, &noise(end as usize * HEADS.qkv_width()))
                .unwrap();
            backend
                .reshape_and_cache(&mut kv, &all, &HEADS, &backend.batch(&batch(0, end)).unwrap())
                .unwrap();

            let batch = backend.batch(&batch(first, end)).unwrap();
            let mut out = backend.buffer(rows, HEADS.num_q * HEADS.head_dim).unwrap();
            let pairs: u64 = (first..end).map(|position| u64::from(position) + 1).sum();
            group.throughput(Throughput::Elements(
                4 * pairs * (HEADS.num_q * HEADS.head_dim) as u64,
            ));
            group.bench_function(format!("{name}, {dtype:?} (operations)"), |b| {
                b.iter(|| {
                    let columns = Columns {
                        buffer: &mut out,
                        start: 0,
                    };
                    backend
                        .paged_attention(columns, black_box(&all), &kv, &HEADS, &batch)
                        .unwrap();
                });
            });
        }
    }
}

fn candidates(c: &mut Criterion) {
    let backend = CpuBackend::new(1).unwrap();
    let vocab = 49_152;
    let mut logits = backend.buffer(1, vocab).unwrap();
    let values: Vec<f32> = noise(vocab).iter().map(|x| x * 12.0).collect();
    backend.write(&mut logits, &values).unwrap();
    let greedy = CandidateRequest {
        row: 0,
        vocab: 0..vocab,
        edits: &[],
        allowed: None,
        inverse_temperature: 1.0,
        noise: None,
        top: 1,
        raw_top: 0,
        scaled_statistics: false,
        raw_statistics: false,
    };
    let top_k = CandidateRequest {
        top: 50,
        scaled_statistics: true,
        ..greedy.clone()
    };
    let sample = CandidateRequest {
        top: 0,
        noise: Some(Noise { seed: 1, position: 0 }),
        ..greedy.clone()
    };
    let mut group = c.benchmark_group("candidates");
    group.throughput(Throughput::Elements(vocab as u64));
    for (name, mut request) in [("greedy", greedy), ("top 50", top_k), ("sample", sample)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                if let Some(noise) = &mut request.noise {
                    noise.position += 1;
                }
                backend
                    .candidates(black_box(&logits), std::slice::from_ref(&request))
                    .unwrap()
            });
        });
    }
}

criterion_group!(benches, attention, candidates);
criterion_main!(benches);
