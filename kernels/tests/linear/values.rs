//! The numbers: against candle, against f64.

use phalanx_kernels::cpu::linear::Isa;
use phalanx_kernels::cpu::quant::{dequantize_row, quantize_row};
use phalanx_model::TensorFormat;

use super::support::*;

#[test]
fn dequantization_is_candles_and_survives_packing() {
    let mut rng = Noise(1);
    for format in TensorFormat::ALL {
        for (rows, blocks) in [(1, 1), (8, 8), (11, 3), (13, 24)] {
            let matrix = Matrix::random(format, rows, cols(format, blocks), &mut rng);
            let scalar = matrix.dequantized();
            let context = format!("{format:?} {rows} x {}", matrix.cols);
            assert_eq!(bits(&scalar), bits(&matrix.dequantized_by_others()), "{context}");
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
    let mut rng = Noise(2);
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
        (TensorFormat::Int4, 0.14),
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
    let mut rng = Noise(3);
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
