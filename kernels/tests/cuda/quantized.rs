//! Weights that stay quantized: their bytes, and steps so large that they are decoded first.

use phalanx_kernels::cpu::quant::{dequantize_row, quantize_row};
use phalanx_kernels::{Backend, Columns, Linear, WeightSource};
use phalanx_model::TensorFormat;

use crate::support::{WORKSPACE_BYTES, open};

/// Whole numbers that every format holds exactly.
fn weights(rows: usize, cols: usize) -> Vec<f32> {
    let value = |i: usize| match i % 32 {
        // Ends of the range, so that every format finds a scale of one.
        0 => -8.0,
        1 => 7.0,
        _ => (i * 7 % 16) as f32 - 8.0,
    };
    (0..rows * cols).map(value).collect()
}

#[test]
#[ignore = "needs a device"]
fn weights_take_the_bytes_that_are_planned() {
    let backend = open();
    let (rows, cols) = (37, 768);
    // What E4M3 takes depends on the device.
    for format in TensorFormat::ALL
        .into_iter()
        .filter(|&format| format != TensorFormat::F8_E4M3)
    {
        let data = quantize_row(format, &weights(rows, cols)).unwrap();
        let source = WeightSource {
            format,
            rows,
            cols,
            data: &data,
            row_stride: format.row_bytes(cols).unwrap(),
            row_scales: None,
        };
        for parts in [&[source][..], &[source, source]] {
            let weight = backend.weight(parts).unwrap();
            let planned = format.gpu_bytes(rows, cols).unwrap() * parts.len();
            assert_eq!(backend.weight_bytes(&weight), planned, "{format}");
        }
    }
}

/// More rows than the kernels for quantized weights are taken for, more outputs than the workspace holds decoded, and
/// an input that stands for single weights: exact.
#[test]
#[ignore = "needs a device"]
fn large_steps_see_the_same_weights() {
    let backend = open();
    let (rows, cols) = (600, 1024);
    let outputs = WORKSPACE_BYTES / 2 / (2 * cols) + 76;
    for format in [
        TensorFormat::Q4_0,
        TensorFormat::Q4_1,
        TensorFormat::Q8_0,
        TensorFormat::Int4,
    ] {
        let data = quantize_row(format, &weights(outputs, cols)).unwrap();
        let row_stride = format.row_bytes(cols).unwrap();
        let source = WeightSource {
            format,
            rows: outputs,
            cols,
            data: &data,
            row_stride,
            row_scales: None,
        };
        let weight = backend.weight(&[source]).unwrap();
        let mut x = vec![0.0; rows * cols];
        for (row, x) in x.chunks_mut(cols).enumerate() {
            x[row % cols] = 1.0;
        }
        let mut input = backend.buffer(rows, cols).unwrap();
        backend.write(&mut input, &x).unwrap();
        let bias: Vec<f32> = (0..outputs).map(|i| (i % 5) as f32).collect();
        let layer = Linear {
            weight: &weight,
            bias: Some(&backend.vector(&bias).unwrap()),
        };
        let product = |rows: usize| {
            let mut out = backend.buffer(rows, outputs).unwrap();
            let columns = Columns {
                buffer: &mut out,
                start: 0,
            };
            backend.linear(columns, &input, &layer, rows).unwrap();
            backend.read(&out, rows).unwrap()
        };
        let got = product(rows);
        let mut decoded = vec![0.0; cols];
        for (output, row) in data.chunks(row_stride).enumerate() {
            dequantize_row(format, row, &mut decoded).unwrap();
            for r in 0..rows {
                // As bf16, which Q8_0's scales are not.
                let weight = half::bf16::from_f32(decoded[r % cols]).to_f32();
                let want = weight + bias[output];
                assert_eq!(
                    got[r * outputs + output],
                    want,
                    "{format}: row {r}, output {output}"
                );
            }
        }
        // The kernel for few rows, where nothing is rounded, agrees.
        assert_eq!(product(3)[..], got[..3 * outputs], "{format}");
    }
}
