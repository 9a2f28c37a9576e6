//! The linear layer, as far as a backend adds to its formats' own tests.

use phalanx_model::TensorFormat;

use super::random::Random;
use super::{Tolerances, assert_close, assert_row_wise, assert_same, filled, poisoned, written};
use crate::cpu::quant::{dequantize_row, quantize_row};
use crate::{Backend, Columns, Linear, WeightSource};

/// A random matrix in a file's layout, and what it means.
struct Matrix {
    format: TensorFormat,
    cols: usize,
    bytes: Vec<u8>,
    /// Of the rows, in formats that have them.
    scales: Option<Vec<f32>>,
    values: Vec<f32>,
}

impl Matrix {
    fn new(random: &mut Random, format: TensorFormat, rows: usize, cols: usize) -> Self {
        let (mut bytes, mut values) = (Vec::new(), vec![0.0; rows * cols]);
        // Far from 1, and of like size: the largest output is not one row's alone.
        let scaled = format == TensorFormat::F8_E4M3;
        let scales = scaled.then(|| (0..rows).map(|_| (random.normal() / 8.0).exp() / 4.0).collect());
        for (row, values) in values.chunks_mut(cols).enumerate() {
            let bytes_of_row = quantize_row(format, &random.normals(cols)).unwrap();
            dequantize_row(format, &bytes_of_row, values).unwrap();
            bytes.extend(bytes_of_row);
            if let Some(scales) = &scales {
                let scales: &Vec<f32> = scales;
                values.iter_mut().for_each(|value| *value *= scales[row]);
            }
        }
        Self {
            format,
            cols,
            bytes,
            scales,
            values,
        }
    }

    fn source(&self, rows: std::ops::Range<usize>) -> WeightSource<'_> {
        let row_stride = self.format.row_bytes(self.cols).unwrap();
        let row_scales = self.scales.as_ref().map(|scales| &scales[rows.clone()]);
        WeightSource {
            format: self.format,
            rows: rows.len(),
            cols: self.cols,
            data: &self.bytes[rows.start * row_stride..rows.end * row_stride],
            row_stride,
            row_scales,
        }
    }
}

fn dot(x: &[f32], w: &[f32]) -> f64 {
    x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
}

pub fn linear<B: Backend>(make: &impl Fn(usize) -> B, tolerances: &Tolerances) {
    let mut random = Random::new(7);
    for format in TensorFormat::ALL {
        let (rows, cols) = (6, 256);
        // Two matrices, stacked.
        let matrices = [
            Matrix::new(&mut random, format, 37, cols),
            Matrix::new(&mut random, format, 12, cols),
        ];
        let (x, bias) = (random.normals(rows * cols), random.normals(49));
        let got = assert_row_wise(make, rows, |backend, rows| {
            let weight = backend
                .weight(&[matrices[0].source(0..37), matrices[1].source(0..12)])
                .unwrap();
            let bias = backend.vector(&bias).unwrap();
            let input = filled(backend, &x[rows.start * cols..rows.end * cols], cols, 1);
            let mut out = poisoned(backend, rows.len() + 1, 60);
            let columns = Columns {
                buffer: &mut out,
                start: 4,
            };
            let layer = Linear {
                weight: &weight,
                bias: Some(&bias),
            };
            backend.linear(columns, &input, &layer, rows.len()).unwrap();
            written(backend, &out, [rows.len() + 1, 60], rows.len(), 4..53)
        });
        let weights = matrices.iter().flat_map(|m| m.values.chunks(cols));
        let outputs: Vec<(&[f32], f32)> = weights.zip(bias.iter().copied()).collect();
        let want: Vec<f64> = x
            .chunks(cols)
            .flat_map(|x| outputs.iter().map(move |&(w, b)| dot(x, w) + f64::from(b)))
            .collect();
        let tolerance = match format {
            TensorFormat::F8_E4M3 => tolerances.linear_fp8,
            dense if dense.is_dense() => tolerances.linear_dense,
            _ => tolerances.linear_quantized,
        };
        assert_close(&format!("linear {format:?}"), &got, &want, 49, tolerance);
    }
}

pub fn linear_is_the_same_on_any_rank<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    let mut random = Random::new(8);
    let backend = make(2);
    for format in TensorFormat::ALL {
        let (rows, cols, outputs) = (5, 256, 75);
        let matrix = Matrix::new(&mut random, format, outputs, cols);
        let x = random.normals(rows * cols);
        let input = filled(&backend, &x, cols, 0);
        let product = |ranges: &[std::ops::Range<usize>]| {
            let mut out = poisoned(&backend, rows, outputs);
            for range in ranges {
                let weight = backend.weight(&[matrix.source(range.clone())]).unwrap();
                let columns = Columns {
                    buffer: &mut out,
                    start: range.start,
                };
                backend
                    .linear(
                        columns,
                        &input,
                        &Linear {
                            weight: &weight,
                            bias: None,
                        },
                        rows,
                    )
                    .unwrap();
            }
            backend.read(&out, rows).unwrap()
        };
        let all = 0..outputs;
        let whole = product(std::slice::from_ref(&all));
        for cuts in [&[0..40, 40..75][..], &[0..11, 11..12, 12..75]] {
            assert_same(&format!("{format:?}, cut at {cuts:?}"), &product(cuts), &whole);
        }
    }
}

/// Parts of different formats, as a file may have them for queries, keys and values, and more rows than a kernel's tile.
pub fn linear_of_mixed_formats<B: Backend>(make: &impl Fn(usize) -> B, tolerances: &Tolerances) {
    use TensorFormat::{BF16, F16, Int4, Q4_0, Q6_K, Q8_0};
    let mut random = Random::new(9);
    let (rows, cols) = (70, 256);
    let parts = [
        (Q4_0, 33),
        (Q4_0, 7),
        (Q6_K, 10),
        (F16, 1),
        (Int4, 40),
        (Q8_0, 0),
        (BF16, 9),
    ];
    let matrices = parts.map(|(format, outputs)| Matrix::new(&mut random, format, outputs, cols));
    let (x, biases) = (random.normals(rows * cols), random.normals(100));
    let backend = make(2);
    let sources: Vec<_> = matrices
        .iter()
        .zip(parts)
        .map(|(m, (_, n))| m.source(0..n))
        .collect();
    let stacked = backend.weight(&sources).unwrap();
    let apart: usize = sources
        .iter()
        .map(|source| backend.weight_bytes(&backend.weight(std::slice::from_ref(source)).unwrap()))
        .sum();
    assert_eq!(backend.weight_bytes(&stacked), apart);
    let bias = backend.vector(&biases).unwrap();
    let input = filled(&backend, &x, cols, 0);
    let mut out = poisoned(&backend, rows, 101);
    let columns = Columns {
        buffer: &mut out,
        start: 1,
    };
    let layer = Linear {
        weight: &stacked,
        bias: Some(&bias),
    };
    backend.linear(columns, &input, &layer, rows).unwrap();
    let got = written(&backend, &out, [rows, 101], rows, 1..101);
    let weights: Vec<&[f32]> = matrices.iter().flat_map(|m| m.values.chunks(cols)).collect();
    let want: Vec<f64> = x
        .chunks(cols)
        .flat_map(|x| {
            weights
                .iter()
                .zip(&biases)
                .map(move |(w, &b)| dot(x, w) + f64::from(b))
        })
        .collect();
    assert_close("mixed formats", &got, &want, 100, tolerances.linear_quantized);
}
