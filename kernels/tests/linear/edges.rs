//! Extremes, NaN, zeros.

use half::f16;
use phalanx_kernels::cpu::linear::Isa;
use phalanx_model::TensorFormat;

use super::support::*;

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
                if format == TensorFormat::Int4 {
                    block[2..4].copy_from_slice(&f16::from_f32(16.0).to_le_bytes());
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
    let mut rng = Noise(7);
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
    let mut rng = Noise(8);
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
