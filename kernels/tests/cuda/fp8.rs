//! E4M3 weights: multiplied as they are by devices of compute capability 8.9 on, brought to bf16 for others.

use phalanx_kernels::cuda::devices;
use phalanx_kernels::{Backend, Columns, E4m3, Fp8Matrix, Linear, WeightSource};
use phalanx_model::TensorFormat;

use crate::support::open;

fn source<'a>(bytes: &'a [u8], [rows, cols]: [usize; 2]) -> WeightSource<'a> {
    WeightSource {
        format: TensorFormat::F32,
        rows,
        cols,
        data: bytes,
        row_stride: cols * size_of::<f32>(),
        row_scales: None,
    }
}

/// `[rows, cols]` numbers, each row of another size.
fn numbers([rows, cols]: [usize; 2]) -> Vec<f32> {
    (0..rows * cols)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) * 10f32.powi((i / cols % 5) as i32 - 3))
        .collect()
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
#[ignore = "needs a device"]
fn a_weight_takes_a_byte_where_the_device_multiplies_it() {
    let native = devices().unwrap()[0].compute_capability >= (8, 9);
    let backend = open();
    let shape = [50, 70];
    let bytes = bytes_of(&numbers(shape));
    let matrix = Fp8Matrix::quantize(&source(&bytes, shape)).unwrap();
    let weight = backend.weight(&[matrix.source()]).unwrap();
    // Rows and columns in 16s and a scale for each row, or rows of bf16 in 8s.
    let expected = if native { 64 * (80 + 4) } else { 50 * 72 * 2 };
    assert_eq!(backend.weight_bytes(&weight), expected);
    // One part that is no E4M3 makes bf16 of both.
    let mixed = backend.weight(&[matrix.source(), source(&bytes, shape)]).unwrap();
    assert_eq!(backend.weight_bytes(&mixed), 100 * 72 * 2);
}

/// The scale of a row of activations is its own: rows of very different sizes stand side by side.
#[test]
#[ignore = "needs a device"]
fn rows_of_any_size_keep_their_precision() {
    let backend = open();
    let (shape, x_shape) = ([33, 70], [5, 70]);
    let (values, x) = (numbers(shape), numbers(x_shape));
    let bytes = bytes_of(&values);
    let matrix = Fp8Matrix::quantize(&source(&bytes, shape)).unwrap();
    let weight = backend.weight(&[matrix.source()]).unwrap();
    let mut input = backend.buffer(5, 70).unwrap();
    backend.write(&mut input, &x).unwrap();
    let mut out = backend.buffer(5, 33).unwrap();
    let columns = Columns {
        buffer: &mut out,
        start: 0,
    };
    let layer = Linear {
        weight: &weight,
        bias: None,
    };
    backend.linear(columns, &input, &layer, 5).unwrap();
    let found = backend.read(&out, 5).unwrap();
    for (x, found) in x.chunks(70).zip(found.chunks(33)) {
        for (weights, &found) in values.chunks(70).zip(found) {
            let products = || x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let (exact, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
            // Half a step of E4M3, a sixteenth, on either side; most of it averages out.
            assert!(
                (f64::from(found) - exact).abs() < size / 16.0,
                "{found} for {exact}"
            );
        }
    }
}
