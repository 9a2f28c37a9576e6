//! Attention and its cache: `cargo bench -p phalanx-kernels --bench attention [-- FILTER]`.
//!
//! Names are `SHAPE/WHAT/DTYPE`, shapes those of SmolLM2-135M (9 query heads on 3) and of a Llama of 1B (32 on 8).
//! Decoding goes round so many layers that K and V come from memory, as they do in a model; prompts find them in cache.

mod support;

use std::hint::black_box;
use std::ops::Range;

use criterion::{Criterion, criterion_group, criterion_main};
use phalanx_kernels::cpu::{CpuBackend, CpuBatch, CpuBuffer, CpuKvCache};
use phalanx_kernels::{Backend, BatchInput, Columns, Heads, KvSpec};
use phalanx_model::KvDtype;
use support::{Group, STREAM_BYTES, Work, noise, threads};

const BLOCK_SIZE: usize = 16;
const SHAPES: [(&str, Heads); 2] = [("9q3kv", heads(9, 3)), ("32q8kv", heads(32, 8))];
const DTYPES: [KvDtype; 5] = [
    KvDtype::F32,
    KvDtype::F16,
    KvDtype::BF16,
    KvDtype::E4M3,
    KvDtype::INT8,
];

const fn heads(num_q: usize, num_kv: usize) -> Heads {
    Heads {
        num_q,
        num_kv,
        head_dim: 64,
        q_start: 0,
        kv_start: 0,
        group_size: num_q / num_kv,
        sliding_window: None,
    }
}

/// `sequences` sequences with blocks for `capacity` tokens each, of which those of `computed` are in this step.
fn batch(sequences: usize, capacity: usize, computed: Range<usize>) -> BatchInput {
    let blocks = capacity.div_ceil(BLOCK_SIZE);
    let mut input = BatchInput {
        cu_seqlens_q: vec![0],
        cu_blocks: vec![0],
        ..BatchInput::default()
    };
    for sequence in 0..sequences {
        let first_block = sequence * blocks;
        for position in computed.clone() {
            input.token_ids.push(0);
            input.positions.push(position as u32);
            input
                .slot_mapping
                .push((first_block * BLOCK_SIZE + position) as u32);
        }
        let own_blocks = first_block..first_block + computed.end.div_ceil(BLOCK_SIZE);
        input.block_tables.extend(own_blocks.map(|block| block as u32));
        input.context_lens.push(computed.end as u32);
        input.cu_seqlens_q.push(input.token_ids.len() as u32);
        input.cu_blocks.push(input.block_tables.len() as u32);
    }
    input
}

/// Bytes of K and V of so many tokens.
fn kv_bytes(heads: &Heads, tokens: usize, dtype: KvDtype) -> usize {
    2 * tokens * heads.num_kv * (heads.head_dim * dtype.bytes() + dtype.scale_bytes())
}

fn kv_cache(backend: &CpuBackend, heads: &Heads, tokens: usize, dtype: KvDtype) -> CpuKvCache {
    let spec = KvSpec {
        num_blocks: tokens.div_ceil(BLOCK_SIZE),
        block_size: BLOCK_SIZE,
        num_kv_heads: heads.num_kv,
        head_dim: heads.head_dim,
        dtype,
    };
    backend.kv_cache(spec).expect("memory")
}

fn filled(backend: &CpuBackend, rows: usize, width: usize) -> CpuBuffer {
    let mut buffer = backend.buffer(rows, width).expect("memory");
    backend
        .write(&mut buffer, &noise(rows * width))
        .expect("whole rows");
    buffer
}

/// A cache with something in every position of `sequences` sequences of `tokens` tokens.
fn filled_cache(
    backend: &CpuBackend,
    heads: &Heads,
    (sequences, tokens): (usize, usize),
    dtype: KvDtype,
) -> CpuKvCache {
    /// Rows at a time: q, k and v of all positions at once would be much larger than the cache.
    const ROWS: usize = 1024;
    let mut layer = kv_cache(
        backend,
        heads,
        sequences * tokens.next_multiple_of(BLOCK_SIZE),
        dtype,
    );
    let qkv = filled(backend, ROWS, heads.qkv_width());
    let piece = ROWS / sequences;
    for first in (0..tokens).step_by(piece) {
        let input = batch(sequences, tokens, first..tokens.min(first + piece));
        let input = backend.batch(&input).expect("parts that fit");
        backend
            .reshape_and_cache(&mut layer, &qkv, heads, &input)
            .expect("slots within");
    }
    layer
}

/// One call of attention.
struct Call {
    backend: CpuBackend,
    heads: Heads,
    qkv: CpuBuffer,
    out: CpuBuffer,
    batch: CpuBatch,
}

impl Call {
    fn new(heads: Heads, input: &BatchInput) -> Self {
        let backend = CpuBackend::new(threads()).expect("threads");
        let rows = input.num_rows();
        Self {
            qkv: filled(&backend, rows, heads.qkv_width()),
            out: backend
                .buffer(rows, heads.num_q * heads.head_dim)
                .expect("memory"),
            batch: backend.batch(input).expect("parts that fit"),
            backend,
            heads,
        }
    }

    fn run(&mut self, kv: &CpuKvCache) {
        let columns = Columns {
            buffer: &mut self.out,
            start: 0,
        };
        self.backend
            .paged_attention(columns, black_box(&self.qkv), kv, &self.heads, &self.batch)
            .expect("blocks within");
    }
}

/// Operations of attention: a query and a key are multiplied, and a weight and a value.
fn operations(heads: &Heads, input: &BatchInput) -> usize {
    let pairs: usize = input
        .positions
        .iter()
        .map(|&position| position as usize + 1)
        .sum();
    4 * pairs * heads.num_q * heads.head_dim
}

fn decode(c: &mut Criterion) {
    let mut group = Group::new(c, "decode_attention");
    for (shape, heads) in SHAPES {
        for (sequences, context) in [(1, 512), (1, 8192), (1, 32_768), (16, 512), (16, 4096)] {
            for dtype in DTYPES {
                let input = batch(sequences, context, context - 1..context);
                let mut call = Call::new(heads, &input);
                let bytes = kv_bytes(&heads, sequences * context, dtype);
                let work = Work::F32 {
                    bytes,
                    operations: operations(&heads, &input),
                };
                let count = STREAM_BYTES.div_ceil(bytes);
                let (mut layers, mut next) = (Vec::new(), 0);
                let name = format!("{shape}/{sequences}x{context}/{dtype:?}");
                group.measure(&name, work, || {
                    // Built on demand: a filter that leaves it out should not pay for it.
                    while layers.len() < count {
                        layers.push(filled_cache(&call.backend, &heads, (sequences, context), dtype));
                    }
                    next = (next + 1) % count;
                    call.run(&layers[next]);
                });
            }
        }
    }
}

fn prompt(c: &mut Criterion) {
    let mut group = Group::new(c, "prompt_attention");
    for (shape, heads) in SHAPES {
        // A whole prompt, and the last chunk of a long one.
        for computed in [0..512, 7680..8192] {
            for dtype in DTYPES {
                let input = batch(1, computed.end, computed.clone());
                let mut call = Call::new(heads, &input);
                let work = Work::F32 {
                    bytes: kv_bytes(&heads, computed.end, dtype),
                    operations: operations(&heads, &input),
                };
                let mut layer = None;
                let name = format!("{shape}/{}..{}/{dtype:?}", computed.start, computed.end);
                group.measure(&name, work, || {
                    let layer = layer
                        .get_or_insert_with(|| filled_cache(&call.backend, &heads, (1, computed.end), dtype));
                    call.run(layer);
                });
            }
        }
    }
}

fn cache(c: &mut Criterion) {
    let mut group = Group::new(c, "reshape_and_cache");
    for (shape, heads) in SHAPES {
        for (sequences, computed) in [(16, 511..512), (1, 0..512)] {
            for dtype in DTYPES {
                let input = batch(sequences, computed.end, computed.clone());
                let call = Call::new(heads, &input);
                let mut layer = kv_cache(&call.backend, &heads, sequences * computed.end, dtype);
                let work = Work::Pass {
                    read: kv_bytes(&heads, input.num_rows(), KvDtype::F32),
                    written: kv_bytes(&heads, input.num_rows(), dtype),
                };
                let name = format!("{shape}/{} rows/{dtype:?}", input.num_rows());
                group.measure(&name, work, || {
                    call.backend
                        .reshape_and_cache(&mut layer, black_box(&call.qkv), &heads, &call.batch)
                        .expect("slots within");
                });
            }
        }
    }
}

criterion_group!(benches, decode, prompt, cache);
criterion_main!(benches);
