//! E4M3 against its definition, over all codes and what lies between them, and matrices of it.

use phalanx_kernels::{E4m3, Fp8Matrix, WeightSource};
use phalanx_model::TensorFormat;
use proptest::prelude::*;

/// The value of a code, from the specification's formula.
fn value(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa * 2f64.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

fn is_nan(code: u8) -> bool {
    code & 0x7f == 0x7f
}

fn round(value: f32) -> u8 {
    E4m3::from_f32(value).to_bits()
}

#[test]
fn every_code_has_its_value_and_comes_back() {
    for code in 0..=u8::MAX {
        let found = E4m3::from_bits(code).to_f32();
        if is_nan(code) {
            assert!(found.is_nan(), "{code:#x}");
            assert_eq!(round(found), 0x7f);
        } else {
            assert_eq!(f64::from(found), value(code), "{code:#x}");
            assert_eq!(found.is_sign_negative(), code & 0x80 != 0, "{code:#x}");
            assert_eq!(round(found), code, "{code:#x}");
        }
    }
}

/// Between neighbours the midpoint goes to the even code, and the floats beside it to the nearer one.
#[test]
fn midpoints_go_to_the_even_code() {
    for sign in [0, 0x80] {
        for low in 0..0x7e_u8 {
            let (low, high) = (sign | low, sign | (low + 1));
            let middle = ((value(low) + value(high)) / 2.0) as f32;
            let even = if low & 1 == 0 { low } else { high };
            assert_eq!(round(middle), even, "{middle}");
            // One float closer to zero, and one further away.
            assert_eq!(round(f32::from_bits(middle.to_bits() - 1)), low, "below {middle}");
            assert_eq!(
                round(f32::from_bits(middle.to_bits() + 1)),
                high,
                "above {middle}"
            );
        }
    }
}

#[test]
fn what_is_too_large_becomes_the_largest() {
    for (value, code) in [
        (448.0, 0x7e),
        (464.0, 0x7e),
        (480.0, 0x7e),
        (f32::MAX, 0x7e),
        (f32::INFINITY, 0x7e),
    ] {
        assert_eq!((round(value), round(-value)), (code, code | 0x80), "{value}");
    }
    assert_eq!(round(f32::NAN), 0x7f);
    assert_eq!(round(-f32::NAN), 0x7f);
    assert_eq!(round(-0.0), 0x80);
    assert_eq!(round(f32::from_bits(1)), 0, "a float's smallest number");
}

#[test]
fn online_quantization_brings_each_row_to_the_full_range() {
    let values: Vec<f32> = (0..24)
        .map(|i| (i as f32 - 5.5) * 10f32.powi(i / 8 - 9))
        .collect();
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let matrix = Fp8Matrix::quantize(&WeightSource {
        format: TensorFormat::F32,
        rows: 3,
        cols: 8,
        data: &bytes,
        row_stride: 32,
        row_scales: None,
    })
    .unwrap();
    let quantized = matrix.source();
    let scales = quantized.row_scales.unwrap();
    for (row, values) in values.chunks(8).enumerate() {
        let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert_eq!(scales[row], largest / E4m3::MAX);
        let codes = &quantized.data[row * 8..][..8];
        assert!(
            codes.iter().any(|&code| code & 0x7f == 0x7e),
            "the largest is 448"
        );
        for (&code, value) in codes.iter().zip(values) {
            let found = E4m3::from_bits(code).to_f32() * scales[row];
            assert!(
                (found - value).abs() <= value.abs() / 16.0 + scales[row] / 1024.0,
                "{found} for {value}"
            );
        }
    }
}

proptest! {
    /// No finite code is closer.
    #[test]
    fn rounding_finds_the_nearest(bits in any::<u32>()) {
        let number = f32::from_bits(bits);
        prop_assume!(!number.is_nan());
        let found = value(round(number));
        let number = f64::from(number).clamp(-448.0, 448.0);
        let nearest = (0..=u8::MAX)
            .filter(|&code| !is_nan(code))
            .map(|code| (value(code) - number).abs())
            .fold(f64::INFINITY, f64::min);
        prop_assert_eq!((found - number).abs(), nearest);
    }
}
