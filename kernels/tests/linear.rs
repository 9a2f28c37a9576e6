//! The CPU linear layer against scalar references: formats, accuracy, and bits that depend on nothing they should not.

use std::ops::Range;
use std::sync::LazyLock;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::f16;
use phalanx_kernels::WeightSource;
use phalanx_kernels::cpu::linear::{Isa, Output, PackedWeight, Rows, Scratch, resident_bytes};
use phalanx_kernels::cpu::memory::Arena;
use phalanx_kernels::cpu::pool::Pool;
use phalanx_kernels::cpu::quant::{dequantize_row, quantize_row};
use phalanx_model::TensorFormat;
use proptest::prelude::*;

static POOLS: LazyLock<[Pool; 3]> = LazyLock::new(|| [1, 2, 3].map(|n| Pool::new(n).unwrap()));

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// In -1..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Activations with an outlier here and there.
    fn activations(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|i| self.unit() * if i % 97 == 0 { 8.0 } else { 1.0 })
            .collect()
    }
}

fn is_dense(format: TensorFormat) -> bool {
    format.block_len() == 1
}

/// Byte offsets of a block's f16 scales.
fn scale_offsets(format: TensorFormat) -> &'static [usize] {
    match format {
        TensorFormat::Q4_0 | TensorFormat::Q5_0 | TensorFormat::Q8_0 => &[0],
        TensorFormat::Q4_1 | TensorFormat::Q5_1 | TensorFormat::Q4_K | TensorFormat::Q5_K => &[0, 2],
        TensorFormat::Q6_K => &[208],
        TensorFormat::F32 | TensorFormat::F16 | TensorFormat::BF16 => &[],
    }
}

/// Rows in a file's layout.
struct Matrix {
    format: TensorFormat,
    rows: usize,
    cols: usize,
    data: Vec<u8>,
}

impl Matrix {
    /// Any codes and integer scales; f16 scales of 2^-8 to 2^-5 with either sign.
    fn random(format: TensorFormat, rows: usize, cols: usize, rng: &mut Rng) -> Self {
        if is_dense(format) {
            let weights: Vec<f32> = (0..rows * cols).map(|_| rng.unit()).collect();
            return Self {
                format,
                rows,
                cols,
                data: quantize_row(format, &weights).unwrap(),
            };
        }
        let bytes = rows * format.row_bytes(cols).unwrap();
        let mut data: Vec<u8> = (0..bytes).map(|_| (rng.next() >> 32) as u8).collect();
        for block in data.chunks_exact_mut(format.block_bytes()) {
            for &at in scale_offsets(format) {
                let bits = (7 + rng.next() as u16 % 3) << 10 | rng.next() as u16 & 0x83ff;
                block[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            }
        }
        Self {
            format,
            rows,
            cols,
            data,
        }
    }

    fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.cols).unwrap()
    }

    /// Rows `range` of the matrix.
    fn source(&self, range: Range<usize>) -> WeightSource<'_> {
        let stride = self.row_bytes();
        WeightSource {
            format: self.format,
            rows: range.len(),
            cols: self.cols,
            data: &self.data[range.start * stride..range.end * stride],
            row_stride: stride,
        }
    }

    fn pack(&self) -> PackedWeight {
        pack(&[self.source(0..self.rows)])
    }

    fn dequantized(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in self
            .data
            .chunks_exact(self.row_bytes())
            .zip(out.chunks_exact_mut(self.cols))
        {
            dequantize_row(self.format, row, out).unwrap();
        }
        out
    }

    fn dequantized_by_candle(&self) -> Vec<f32> {
        let dtype = match self.format {
            TensorFormat::F32 => GgmlDType::F32,
            TensorFormat::F16 => GgmlDType::F16,
            TensorFormat::BF16 => GgmlDType::BF16,
            TensorFormat::Q4_0 => GgmlDType::Q4_0,
            TensorFormat::Q4_1 => GgmlDType::Q4_1,
            TensorFormat::Q5_0 => GgmlDType::Q5_0,
            TensorFormat::Q5_1 => GgmlDType::Q5_1,
            TensorFormat::Q8_0 => GgmlDType::Q8_0,
            TensorFormat::Q4_K => GgmlDType::Q4K,
            TensorFormat::Q5_K => GgmlDType::Q5K,
            TensorFormat::Q6_K => GgmlDType::Q6K,
        };
        let storage = QStorage::from_data((&self.data[..]).into(), &Device::Cpu, dtype).unwrap();
        let tensor = QTensor::new(storage, (self.rows, self.cols)).unwrap();
        tensor
            .dequantize(&Device::Cpu)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }
}

fn pack(parts: &[WeightSource<'_>]) -> PackedWeight {
    PackedWeight::pack(parts, &POOLS[1], &Arena::new()).unwrap()
}

/// `weight` times the rows of `x`, with `threads` threads.
fn multiply(weight: &PackedWeight, x: &[f32], isa: Isa, threads: usize) -> Vec<f32> {
    let rows = x.len() / weight.cols();
    let mut y = vec![f32::NAN; rows * weight.rows()];
    let x = Rows {
        data: x,
        rows,
        stride: weight.cols(),
    };
    let out = Output {
        data: &mut y,
        stride: weight.rows(),
        column: 0,
        bias: None,
    };
    weight
        .matmul(&POOLS[threads - 1], &mut Scratch::new(isa), x, out)
        .unwrap();
    y
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The columns of `blocks` 32-blocks, or the next number the format allows.
fn cols(format: TensorFormat, blocks: usize) -> usize {
    (blocks * 32).next_multiple_of(format.block_len())
}

#[test]
fn dequantization_is_candles_and_survives_packing() {
    let mut rng = Rng(1);
    for format in TensorFormat::ALL {
        for (rows, blocks) in [(1, 1), (8, 8), (11, 3), (13, 24)] {
            let matrix = Matrix::random(format, rows, cols(format, blocks), &mut rng);
            let scalar = matrix.dequantized();
            let context = format!("{format:?} {rows} x {}", matrix.cols);
            assert_eq!(bits(&scalar), bits(&matrix.dequantized_by_candle()), "{context}");
            let packed = matrix.pack();
            let mut out = vec![f32::NAN; matrix.cols];
            for (row, expected) in scalar.chunks_exact(matrix.cols).enumerate() {
                packed.dequantize_row(row, &mut out).unwrap();
                assert_eq!(bits(&out), bits(expected), "{context}, row {row}");
            }
        }
    }
}

#[test]
fn quantizers_round_trip_within_a_step() {
    let mut rng = Rng(2);
    // About one step of the format for weights in -1..1.
    for (format, bound) in [
        (TensorFormat::F32, 0.0),
        (TensorFormat::F16, 5e-4),
        (TensorFormat::BF16, 4e-3),
        (TensorFormat::Q4_0, 0.14),
        (TensorFormat::Q4_1, 0.07),
        (TensorFormat::Q5_0, 0.07),
        (TensorFormat::Q5_1, 0.035),
        (TensorFormat::Q8_0, 0.005),
        (TensorFormat::Q4_K, 0.15),
        (TensorFormat::Q5_K, 0.1),
        (TensorFormat::Q6_K, 0.04),
    ] {
        let weights: Vec<f32> = (0..1024).map(|_| rng.unit()).collect();
        let mut out = vec![0.0; 1024];
        dequantize_row(format, &quantize_row(format, &weights).unwrap(), &mut out).unwrap();
        let worst = weights
            .iter()
            .zip(&out)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst <= bound, "{format:?}: {worst} > {bound}");
        dequantize_row(
            format,
            &quantize_row(format, &[0.0; 256]).unwrap(),
            &mut out[..256],
        )
        .unwrap();
        assert!(out[..256].iter().all(|&w| w == 0.0), "{format:?} keeps zeros");
    }
}

/// The activations as the kernels see them: `scale = max / 127` per 32, codes to nearest even.
fn int8(x: &[f32]) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for block in x.chunks(32) {
        let max = block.iter().fold(0f32, |a, b| a.max(b.abs()));
        let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
        let scale = f64::from(max / 127.0);
        out.extend(
            block
                .iter()
                .map(|&x| f64::from((x * inverse).round_ties_even()) * scale),
        );
    }
    out
}

#[test]
fn products_agree_with_f64() {
    let mut rng = Rng(3);
    for format in TensorFormat::ALL {
        for (m, n, blocks) in [
            (1, 8, 1),
            (1, 48, 18),
            (3, 24, 3),
            (7, 37, 5),
            (33, 40, 64),
            (9, 16, 128),
        ] {
            let k = cols(format, blocks);
            let matrix = Matrix::random(format, n, k, &mut rng);
            let weights = matrix.dequantized();
            let x = rng.activations(m * k);
            let y = multiply(&matrix.pack(), &x, Isa::detect(), 2);
            for row in 0..m {
                let x = &x[row * k..][..k];
                let seen = if is_dense(format) {
                    x.iter().map(|&x| f64::from(x)).collect()
                } else {
                    int8(x)
                };
                let half_steps: Vec<f64> = x
                    .chunks(32)
                    .map(|block| f64::from(block.iter().fold(0f32, |a, b| a.max(b.abs()))) / 254.0 * 1.0002)
                    .collect();
                for col in 0..n {
                    let (mut product, mut exact, mut size, mut bound) = (0f64, 0f64, 0f64, 0f64);
                    for (j, &w) in weights[col * k..][..k].iter().enumerate() {
                        let w = f64::from(w);
                        product += w * seen[j];
                        exact += w * f64::from(x[j]);
                        size += (w * seen[j]).abs();
                        bound += w.abs() * half_steps[j / 32];
                    }
                    let got = f64::from(y[row * n + col]);
                    let context = format!("{format:?} {m} x {n} x {k} at ({row}, {col})");
                    assert!(
                        (got - product).abs() <= 2e-6 * size,
                        "{context}: {got} for {product}"
                    );
                    assert!(
                        (got - exact).abs() <= bound + 2e-6 * size,
                        "{context}: {got} for {exact}"
                    );
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_batch_or_the_threads() {
    let mut rng = Rng(4);
    for format in TensorFormat::ALL {
        for (n, blocks) in [(8, 3), (37, 5), (136, 18)] {
            let k = cols(format, blocks);
            let packed = Matrix::random(format, n, k, &mut rng).pack();
            let x = rng.activations(64 * k);
            let all = bits(&multiply(&packed, &x, Isa::detect(), 1));
            for threads in [1, 2, 3] {
                for m in [1, 2, 3, 5, 8, 13, 64] {
                    for start in (0..=64 - m).step_by(m.max(7)) {
                        let y = multiply(&packed, &x[start * k..(start + m) * k], Isa::detect(), threads);
                        let context = format!("{format:?} {n} x {k}: rows {start}..+{m}, {threads} threads");
                        assert!(bits(&y) == all[start * n..(start + m) * n], "{context}");
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_shard_or_the_stack() {
    let mut rng = Rng(5);
    for format in TensorFormat::ALL {
        let (n, k, m) = (43, cols(format, 5), 9);
        let matrix = Matrix::random(format, n, k, &mut rng);
        let x = rng.activations(m * k);
        let whole = multiply(&matrix.pack(), &x, Isa::detect(), 2);
        let other = Matrix::random(TensorFormat::F32, 5, k, &mut rng);
        for (start, end) in [(0, 1), (1, 2), (3, 20), (7, 43), (42, 43), (0, 43), (9, 9)] {
            let shard = pack(&[other.source(0..5), matrix.source(start..end), other.source(0..0)]);
            assert_eq!(shard.rows(), 5 + end - start);
            let y = multiply(&shard, &x, Isa::detect(), 2);
            for row in 0..m {
                let got = &y[row * shard.rows()..][5..shard.rows()];
                assert_eq!(
                    bits(got),
                    bits(&whole[row * n + start..row * n + end]),
                    "{format:?} {start}..{end}"
                );
            }
        }
    }
}

#[test]
fn portable_kernels_give_the_same_bits() {
    let mut rng = Rng(6);
    for format in TensorFormat::ALL {
        for (m, n, blocks) in [(1, 24, 3), (5, 37, 9), (19, 16, 40)] {
            let k = cols(format, blocks);
            let packed = Matrix::random(format, n, k, &mut rng).pack();
            let x = rng.activations(m * k);
            let portable = multiply(&packed, &x, Isa::PORTABLE, 2);
            for isa in Isa::available() {
                let fast = multiply(&packed, &x, isa, 2);
                assert_eq!(bits(&fast), bits(&portable), "{format:?} {m} x {n} x {k} {isa:?}");
            }
        }
    }
}

/// All code bytes and integer scales at an extreme, activations at plus or minus the maximum: the largest sums there are.
#[test]
fn extremes_do_not_saturate() {
    let signs: [fn(usize) -> bool; 5] = [
        |_| true,
        |_| false,
        |k| k % 2 == 0,
        |k| k % 4 < 2,
        |k| k % 32 < 16,
    ];
    for format in TensorFormat::ALL.into_iter().filter(|&f| !is_dense(f)) {
        let k = cols(format, 3);
        for fill in [0x00, 0xff, 0x80, 0x7f, 0x0f, 0xf0] {
            let mut matrix = Matrix {
                format,
                rows: 8,
                cols: k,
                data: vec![],
            };
            matrix.data = vec![fill; 8 * matrix.row_bytes()];
            for block in matrix.data.chunks_exact_mut(format.block_bytes()) {
                for &at in scale_offsets(format) {
                    block[at..at + 2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
                }
            }
            let weights = matrix.dequantized();
            let packed = matrix.pack();
            for positive in signs {
                let x: Vec<f32> = (0..k).map(|k| if positive(k) { 127.0 } else { -127.0 }).collect();
                let exact: f64 = x
                    .iter()
                    .zip(&weights)
                    .map(|(&x, &w)| f64::from(x) * f64::from(w))
                    .sum();
                let size: f64 = weights[..k].iter().map(|w| f64::from(w.abs()) * 127.0).sum();
                for isa in Isa::available() {
                    for got in multiply(&packed, &x, isa, 1) {
                        let error = (f64::from(got) - exact).abs();
                        assert!(
                            error <= 2e-6 * size,
                            "{format:?} {fill:#x} {isa:?}: {got} for {exact}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_shows_and_harms_no_other() {
    let mut rng = Rng(7);
    for format in TensorFormat::ALL {
        let k = cols(format, 2);
        let packed = Matrix::random(format, 16, k, &mut rng).pack();
        for isa in Isa::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = rng.activations(3 * k);
                let clean = multiply(&packed, &x, isa, 1);
                x[k + 5] = bad;
                let y = multiply(&packed, &x, isa, 1);
                assert!(
                    y[16..32].iter().all(|v| !v.is_finite()),
                    "{format:?} {isa:?} {bad}"
                );
                assert_eq!(bits(&y[..16]), bits(&clean[..16]));
                assert_eq!(bits(&y[32..]), bits(&clean[32..]));
            }
        }
    }
}

#[test]
fn tiny_and_zero_activations_are_harmless() {
    let mut rng = Rng(8);
    for format in TensorFormat::ALL {
        let k = cols(format, 2);
        let packed = Matrix::random(format, 8, k, &mut rng).pack();
        for magnitude in [0.0, f32::from_bits(1), 1e-38, 1e-30] {
            let x: Vec<f32> = (0..k).map(|_| rng.unit() * magnitude).collect();
            let y = multiply(&packed, &x, Isa::detect(), 1);
            assert_eq!(bits(&y), bits(&multiply(&packed, &x, Isa::PORTABLE, 1)));
            assert!(
                y.iter().all(|v| v.abs() <= magnitude * 1e5),
                "{format:?} {magnitude}: {y:?}"
            );
        }
    }
}

#[test]
fn strides_columns_and_bias() {
    let mut rng = Rng(9);
    let (m, n, k) = (6, 21, 96);
    for format in [TensorFormat::Q4_1, TensorFormat::Q8_0, TensorFormat::BF16] {
        let packed = Matrix::random(format, n, k, &mut rng).pack();
        let x = rng.activations(m * (k + 7));
        let dense: Vec<f32> = x.chunks_exact(k + 7).flat_map(|row| row[..k].to_vec()).collect();
        let plain = multiply(&packed, &dense, Isa::detect(), 1);
        let bias: Vec<f32> = (0..n).map(|_| rng.unit()).collect();
        for isa in Isa::available() {
            let mut y = vec![-1.0; m * 40];
            let out = Output {
                data: &mut y,
                stride: 40,
                column: 11,
                bias: Some(&bias),
            };
            // The last row needs no padding behind it.
            let rows = Rows {
                data: &x[..m * (k + 7) - 7],
                rows: m,
                stride: k + 7,
            };
            packed
                .matmul(&POOLS[2], &mut Scratch::new(isa), rows, out)
                .unwrap();
            for (row, y) in y.chunks_exact(40).enumerate() {
                let expected: Vec<f32> = (0..n).map(|c| plain[row * n + c] + bias[c]).collect();
                assert_eq!(bits(&y[11..11 + n]), bits(&expected), "{format:?} row {row}");
                let mut others = y[..11].iter().chain(&y[11 + n..]);
                assert!(
                    others.all(|&v| v == -1.0),
                    "{format:?} writes its own columns only"
                );
            }
        }
    }
}

#[test]
fn scratch_of_a_larger_call_does_not_leak_into_a_smaller_one() {
    let mut rng = Rng(13);
    for format in [TensorFormat::Q4_0, TensorFormat::Q4_1, TensorFormat::Q8_0] {
        let wide = Matrix::random(format, 8, 256, &mut rng).pack();
        let odd = Matrix::random(format, 8, 96, &mut rng).pack();
        for isa in Isa::available() {
            let x = rng.activations(5 * 256);
            let mut scratch = Scratch::new(isa);
            let mut y = [0.0; 5 * 8];
            let out = Output {
                data: &mut y,
                stride: 8,
                column: 0,
                bias: None,
            };
            wide.matmul(
                &POOLS[0],
                &mut scratch,
                Rows {
                    data: &x,
                    rows: 5,
                    stride: 256,
                },
                out,
            )
            .unwrap();
            let out = Output {
                data: &mut y,
                stride: 8,
                column: 0,
                bias: None,
            };
            odd.matmul(
                &POOLS[0],
                &mut scratch,
                Rows {
                    data: &x,
                    rows: 2,
                    stride: 96,
                },
                out,
            )
            .unwrap();
            assert_eq!(
                bits(&y[..16]),
                bits(&multiply(&odd, &x[..192], isa, 1)),
                "{format:?}"
            );
        }
    }
}

#[test]
fn strided_sources_pack_like_contiguous_ones() {
    let mut rng = Rng(10);
    for format in TensorFormat::ALL {
        let k = cols(format, 16);
        let matrix = Matrix::random(format, 10, k, &mut rng);
        // The second half of every row, as a rank that holds a shard of the inputs sees it.
        let half = k / 2;
        let skip = format.row_bytes(half).unwrap();
        let data = &matrix.data[skip..];
        let packed = pack(&[WeightSource {
            format,
            rows: 10,
            cols: half,
            data,
            row_stride: matrix.row_bytes(),
        }]);
        let whole = matrix.dequantized();
        let mut out = vec![0.0; half];
        for row in 0..10 {
            packed.dequantize_row(row, &mut out).unwrap();
            assert_eq!(
                bits(&out),
                bits(&whole[row * k + half..][..half]),
                "{format:?} row {row}"
            );
        }
    }
}

#[test]
fn resident_bytes_are_what_is_held_and_close_to_the_file() {
    let mut rng = Rng(11);
    for format in TensorFormat::ALL {
        for (rows, blocks) in [(0, 8), (1, 8), (8, 8), (40, 3), (576, 24)] {
            let k = cols(format, blocks);
            let matrix = Matrix::random(format, rows, k, &mut rng);
            assert_eq!(
                Some(matrix.pack().bytes()),
                resident_bytes(format, rows, k),
                "{format:?} {rows} x {k}"
            );
        }
        let file = 576 * format.row_bytes(1536).unwrap();
        let held = resident_bytes(format, 576, 1536).unwrap();
        assert!(
            held >= file && held <= file + file / 32,
            "{format:?}: {held} for {file}"
        );
        if !is_dense(format) {
            assert_eq!(resident_bytes(format, 8, 33), None);
        }
        assert_eq!(resident_bytes(format, usize::MAX, 1 << 20), None);
    }
}

#[test]
fn bad_shapes_are_errors() {
    let matrix = Matrix::random(TensorFormat::Q8_0, 8, 64, &mut Rng(12));
    let arena = Arena::new();
    let good = matrix.source(0..8);
    let refused = |parts: &[WeightSource<'_>]| PackedWeight::pack(parts, &POOLS[0], &arena).is_err();
    assert!(refused(&[]));
    assert!(refused(&[WeightSource { cols: 65, ..good }]));
    assert!(refused(&[WeightSource { rows: 9, ..good }]));
    assert!(refused(&[WeightSource {
        rows: usize::MAX,
        ..good
    }]));
    assert!(refused(&[WeightSource {
        row_stride: 67,
        ..good
    }]));
    assert!(refused(&[good, WeightSource { cols: 32, ..good }]));
    let weight = matrix.pack();
    let mut scratch = Scratch::new(Isa::detect());
    let mut multiply = |x: usize, rows: usize, y: usize, column: usize, bias: Option<&[f32]>| {
        let (x, mut y) = (vec![0.0; x], vec![0.0; y]);
        let out = Output {
            data: &mut y,
            stride: 8 + column,
            column,
            bias,
        };
        weight.matmul(
            &POOLS[0],
            &mut scratch,
            Rows {
                data: &x,
                rows,
                stride: 64,
            },
            out,
        )
    };
    assert!(multiply(128, 2, 16, 0, None).is_ok());
    assert!(multiply(0, 0, 0, 0, None).is_ok());
    assert!(multiply(127, 2, 16, 0, None).is_err());
    assert!(multiply(128, 2, 15, 0, None).is_err());
    assert!(multiply(128, 2, 17, 1, None).is_err());
    assert!(multiply(128, 2, 16, 0, Some(&[0.0; 7])).is_err());
    assert!(multiply(128, usize::MAX, 16, 0, None).is_err());
    let mut row = [0.0; 64];
    assert!(weight.dequantize_row(7, &mut row).is_ok());
    assert!(weight.dequantize_row(8, &mut row).is_err());
    assert!(weight.dequantize_row(0, &mut row[..63]).is_err());
    assert!(dequantize_row(TensorFormat::Q8_0, &[0; 33], &mut row[..32]).is_err());
    assert!(quantize_row(TensorFormat::Q6_K, &row).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any stack, any shape, any threads: the bits that the portable kernels give for each part and row alone.
    #[test]
    fn any_shape_has_the_bits_of_its_rows(
        formats in prop::collection::vec((0..TensorFormat::ALL.len(), 0..30usize), 1..4),
        blocks in 1..20usize,
        m in 1..20usize,
        threads in 1..4usize,
        seed in 1..u64::MAX,
    ) {
        let mut rng = Rng(seed);
        let parts: Vec<_> = formats.iter().map(|&(f, n)| (TensorFormat::ALL[f], n)).collect();
        let k = parts.iter().map(|p| cols(p.0, blocks)).max().unwrap();
        let matrices: Vec<_> = parts.iter().map(|&(f, n)| Matrix::random(f, n, k, &mut rng)).collect();
        let sources: Vec<_> = matrices.iter().map(|m| m.source(0..m.rows)).collect();
        let stack = pack(&sources);
        let x = rng.activations(m * k);
        let y = multiply(&stack, &x, Isa::detect(), threads);
        for row in 0..m {
            let mut start = row * stack.rows();
            for matrix in &matrices {
                let alone = multiply(&matrix.pack(), &x[row * k..][..k], Isa::PORTABLE, 1);
                prop_assert_eq!(bits(&alone), bits(&y[start..start + matrix.rows]));
                start += matrix.rows;
            }
        }
    }
}
