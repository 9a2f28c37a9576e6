//! The linear layer on shapes of small Llama models: GOP/s, GB/s of weights, and their ratio to the floors below.
//!
//! `cargo bench -p phalanx-kernels --bench linear [-- FILTER]`; a filter is part of a name such as `Q4_1/576x1536/M16`.
//! Times are of the whole call: activation quantization, hand-out to two threads, product. The matrices stay in cache;
//! `stream` repeats one of 2048 x 2048 over more than 200 MB, so that every weight comes from memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use phalanx_kernels::WeightSource;
use phalanx_kernels::cpu::linear::{Isa, Output, PackedWeight, Rows, Scratch, resident_bytes};
use phalanx_kernels::cpu::memory::Arena;
use phalanx_kernels::cpu::pool::Pool;
use phalanx_kernels::cpu::quant::quantize_row;
use phalanx_model::TensorFormat;

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// What two cores of the reference machine read from memory, and what they reach in `vpmaddubsw + vpmaddwd + vpaddd`.
const FLOOR_GB_PER_S: f64 = 38.8;
const FLOOR_GOP_PER_S: f64 = 395.0;

const THREADS: usize = 2;
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
/// Bytes of weights that no cache holds.
const STREAM_BYTES: usize = 300 << 20;

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
            pool: Pool::new(THREADS).expect("threads"),
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

/// Measures `call`, which reads `bytes` of weights and does `operations`, and prints the median against the floors.
fn measure(group: &mut Group<'_>, name: &str, (bytes, operations): (usize, usize), mut call: impl FnMut()) {
    let mut times = Vec::new();
    group.throughput(Throughput::Elements(operations as u64));
    group.bench_function(BenchmarkId::from_parameter(name), |b| {
        b.iter_custom(|iterations| {
            let start = Instant::now();
            (0..iterations).for_each(|_| call());
            let elapsed = start.elapsed();
            times.push(elapsed.as_secs_f64() / iterations as f64);
            elapsed
        });
    });
    if times.is_empty() {
        return; // left out by the filter
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let (gb, gop) = (bytes as f64 / median / 1e9, operations as f64 / median / 1e9);
    // A benchmark's result is its output.
    #[allow(clippy::print_stdout)]
    {
        println!(
            "{name}: {:.1} us, {gop:.1} GOP/s ({:.2} of the floor), {gb:.1} GB/s ({:.2} of the floor)",
            median * 1e6,
            gop / FLOOR_GOP_PER_S,
            gb / FLOOR_GB_PER_S
        );
    }
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> Group<'a> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(100));
    group.measurement_time(Duration::from_millis(300));
    group
}

fn cached(c: &mut Criterion) {
    let mut group = group(c, "linear");
    let arena = Arena::new();
    for format in FORMATS {
        for (rows, cols) in SHAPES {
            let cols = cols.next_multiple_of(format.block_len());
            for batch in BATCHES {
                let mut call = Call::new(batch, rows, cols);
                let weight = weight(format, rows, cols, &call.pool, &arena);
                let work = (weight.bytes(), 2 * batch * rows * cols);
                let name = format!("{format:?}/{rows}x{cols}/M{batch}");
                measure(&mut group, &name, work, || call.run(&weight, batch));
            }
        }
    }
    group.finish();
}

fn stream(c: &mut Criterion) {
    let mut group = group(c, "stream");
    let (rows, cols) = (2048, 2048);
    for format in FORMATS {
        let arena = Arena::new();
        let mut call = Call::new(1, rows, cols);
        // Built on demand: a filter that leaves it out should not pay for it.
        let mut weights = Vec::new();
        let count = STREAM_BYTES / resident_bytes(format, rows, cols).expect("whole blocks");
        let work = (STREAM_BYTES, 2 * count * rows * cols);
        measure(&mut group, &format!("{format:?}/{rows}x{cols}/M1"), work, || {
            while weights.len() < count {
                weights.push(weight(format, rows, cols, &call.pool, &arena));
            }
            weights.iter().for_each(|weight| call.run(weight, 1));
        });
    }
    group.finish();
}

criterion_group!(benches, cached, stream);
criterion_main!(benches);
