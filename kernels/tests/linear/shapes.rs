//! Strides, columns, reuse, sizes and refusals.

use phalanx_kernels::WeightSource;
use phalanx_kernels::cpu::linear::{Isa, Output, PackedWeight, Rows, Scratch, resident_bytes};
use phalanx_kernels::cpu::memory::Arena;
use phalanx_kernels::cpu::quant::{dequantize_row, quantize_row};
use phalanx_model::TensorFormat;

use super::support::*;

#[test]
fn strides_columns_and_bias() {
    let mut rng = Noise(9);
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
    let mut rng = Noise(13);
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
    let mut rng = Noise(10);
    for format in TensorFormat::ALL {
        let k = cols(format, 16);
        let matrix = Matrix::random(format, 10, k, &mut rng);
        // The second half of every row, as a rank that holds a shard of the inputs sees it.
        let half = k / 2;
        let skip = format.row_bytes(half).unwrap();
        let data = &matrix.data[skip..];
        let packed = pack(&[WeightSource {
            cols: half,
            data,
            ..matrix.source(0..10)
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
    let mut rng = Noise(11);
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
        let in_file = match format {
            TensorFormat::F8_E4M3 => TensorFormat::BF16,
            format => format,
        };
        let file = 576 * in_file.row_bytes(1536).unwrap();
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
    let matrix = Matrix::random(TensorFormat::Q8_0, 8, 64, &mut Noise(12));
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
