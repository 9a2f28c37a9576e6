//! The linear layer on shapes of small Llama models: GOP/s and GB/s of weights beside the machine's limits.
//!
//! `cargo bench -p phalanx-kernels --bench linear [-- FILTER]`; a filter is part of a name such as `Q4_1/576x1536/M16`.
//! Times are of the whole call: activation quantization, hand-out to all threads, product. The matrices stay in cache;
//! `stream` repeats one of 2048 x 2048 over more than 200 MB, so that every weight comes from memory.

mod support;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use phalanx_kernels::WeightSource;
use phalanx_kernels::cpu::linear::{Isa, Output, PackedWeight, Rows, Scratch, resident_bytes};
use phalanx_kernels::cpu::memory::Arena;
use phalanx_kernels::cpu::pool::Pool;
use phalanx_kernels::cpu::quant::quantize_row;
use phalanx_model::TensorFormat;
use support::{Group, STREAM_BYTES, Work, threads};

const FORMATS: [TensorFormat; 5] = [
    TensorFormat::Q4_0,
    TensorFormat::Q4_1,
    TensorFormat::Q8_0,
    TensorFormat::Q4_K,
    TensorFormat::Q6_K,
];
/// Outputs x inputs. K-quants round the inputs up to their super-blocks.
const SHAPES: [(usize, usize); 4] = [(576, 576), (3072, 576), (576, 1536), (2048, 2048)];
const BATCHES: [usize; 4] = [1, 4, 16, 128];

/// Packed weights that follow no pattern the hardware could use.
fn weight(format: TensorFormat, rows: usize, cols: usize, pool: &Pool, arena: &Arena) -> PackedWeight {
    let row: Vec<f32> = (0..cols)
        .map(|k| ((k * 7919 + 13) % 257) as f32 / 128.0 - 1.0)
        .collect();
    let data = quantize_row(format, &row).expect("whole blocks").repeat(rows);
    let row_stride = data.len() / rows;
    let source = WeightSource {
        format,
        rows,
        cols,
        data: &data,
        row_stride,
        row_scales: None,
    };
    PackedWeight::pack(&[source], pool, arena).expect("memory")
}

/// A call's buffers.
struct Call {
    pool: Pool,
    scratch: Scratch,
    x: Vec<f32>,
    y: Vec<f32>,
}

impl Call {
    fn new(batch: usize, rows: usize, cols: usize) -> Self {
        Self {
            pool: Pool::new(threads()).expect("threads"),
            scratch: Scratch::new(Isa::detect()),
            x: (0..batch * cols).map(|i| (i % 17) as f32 - 8.0).collect(),
            y: vec![0.0; batch * rows],
        }
    }

    fn run(&mut self, weight: &PackedWeight, batch: usize) {
        let x = Rows {
            data: &self.x,
            rows: batch,
            stride: weight.cols(),
        };
        let out = Output {
            data: &mut self.y,
            stride: weight.rows(),
            column: 0,
            bias: None,
        };
        weight
            .matmul(&self.pool, &mut self.scratch, x, out)
            .expect("shapes fit");
        black_box(&self.y);
    }
}

fn cached(c: &mut Criterion) {
    let mut group = Group::new(c, "linear");
    let arena = Arena::new();
    for format in FORMATS {
        for (rows, cols) in SHAPES {
            let cols = cols.next_multiple_of(format.block_len());
            for batch in BATCHES {
                let mut call = Call::new(batch, rows, cols);
                let weight = weight(format, rows, cols, &call.pool, &arena);
                let work = Work::Int8 {
                    bytes: weight.bytes(),
                    operations: 2 * batch * rows * cols,
                };
                let name = format!("{format:?}/{rows}x{cols}/M{batch}");
                group.measure(&name, work, || call.run(&weight, batch));
            }
        }
    }
}

/// Weights that are not quantized: f32 arithmetic on whatever is loaded.
fn dense(c: &mut Criterion) {
    let mut group = Group::new(c, "dense");
    let (rows, cols) = (2048, 2048);
    for format in [TensorFormat::F32, TensorFormat::F16, TensorFormat::BF16] {
        for batch in BATCHES {
            let arena = Arena::new();
            let mut call = Call::new(batch, rows, cols);
            let weight = weight(format, rows, cols, &call.pool, &arena);
            let work = Work::F32 {
                bytes: weight.bytes(),
                operations: 2 * batch * rows * cols,
            };
            let name = format!("{format:?}/{rows}x{cols}/M{batch}");
            group.measure(&name, work, || call.run(&weight, batch));
        }
    }
}

fn stream(c: &mut Criterion) {
    let mut group = Group::new(c, "stream");
    let (rows, cols) = (2048, 2048);
    for format in FORMATS {
        let arena = Arena::new();
        let mut call = Call::new(1, rows, cols);
        // Built on demand: a filter that leaves it out should not pay for it.
        let mut weights = Vec::new();
        let count = STREAM_BYTES / resident_bytes(format, rows, cols).expect("whole blocks");
        let work = Work::Int8 {
            bytes: STREAM_BYTES,
            operations: 2 * count * rows * cols,
        };
        group.measure(&format!("{format:?}/{rows}x{cols}/M1"), work, || {
            while weights.len() < count {
                weights.push(weight(format, rows, cols, &call.pool, &arena));
            }
            weights.iter().for_each(|weight| call.run(weight, 1));
        });
    }
}

/// Activations to 8 bits, together with the product of eight outputs, which no call of the layer is without.
fn quantize(c: &mut Criterion) {
    let mut group = Group::new(c, "quantize");
    let arena = Arena::new();
    for (batch, cols) in [(1, 576), (16, 576), (512, 576), (512, 2048)] {
        let mut call = Call::new(batch, 8, cols);
        let weight = weight(TensorFormat::Q4_0, 8, cols, &call.pool, &arena);
        // A block of 32 values becomes 48 bytes: codes, scale and sums.
        let work = Work::Pass {
            read: batch * cols * 4,
            written: batch * cols / 32 * 48,
        };
        group.measure(&format!("{cols}/M{batch}"), work, || call.run(&weight, batch));
    }
}

criterion_group!(benches, cached, dense, stream, quantize);
criterion_main!(benches);
