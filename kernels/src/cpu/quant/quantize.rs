//! Reference quantizers: simple, deterministic, good enough for tests and benchmarks. Models come quantized.

use half::{bf16, f16};
use phalanx_model::TensorFormat;

use super::BLOCK;
use crate::{E4m3, KernelError, Result};

/// Encodes a row of finite weights in `format`.
///
/// # Errors
/// [`KernelError::Shape`] if the row is not a whole number of blocks.
pub fn quantize_row(format: TensorFormat, weights: &[f32]) -> Result<Vec<u8>> {
    let Some(bytes) = format.row_bytes(weights.len()) else {
        let message = format!("a row of {} weights cuts a {format:?} block", weights.len());
        return Err(KernelError::Shape {
            op: "quantize_row",
            message,
        });
    };
    let mut out = Vec::with_capacity(bytes);
    for block in weights.chunks_exact(format.block_len()) {
        match format {
            TensorFormat::F32 => out.extend_from_slice(&block[0].to_le_bytes()),
            TensorFormat::F16 => out.extend_from_slice(&f16::from_f32(block[0]).to_le_bytes()),
            TensorFormat::BF16 => out.extend_from_slice(&bf16::from_f32(block[0]).to_le_bytes()),
            TensorFormat::F8_E4M3 => out.push(E4m3::from_f32(block[0]).to_bits()),
            TensorFormat::Q4_0 => symmetric(block, 8, &mut out),
            TensorFormat::Q5_0 => symmetric(block, 16, &mut out),
            TensorFormat::Q4_1 => with_min(block, 15, &mut out),
            TensorFormat::Q5_1 => with_min(block, 31, &mut out),
            TensorFormat::Int4 => with_zero_point(block, &mut out),
            TensorFormat::Q8_0 => q8_0(block, &mut out),
            TensorFormat::Q4_K | TensorFormat::Q5_K => k_with_min(format, block, &mut out),
            TensorFormat::Q6_K => q6_k(block, &mut out),
        }
    }
    Ok(out)
}

/// The value of largest magnitude, with its sign.
fn extreme(block: &[f32]) -> f32 {
    block
        .iter()
        .copied()
        .fold(0.0, |a: f32, b| if b.abs() > a.abs() { b } else { a })
}

/// Rounds to f16 and returns the f32 a decoder will see.
fn push_half(out: &mut Vec<u8>, value: f32) -> f32 {
    let half = f16::from_f32(value);
    out.extend_from_slice(&half.to_le_bytes());
    half.to_f32()
}

fn code(value: f32, scale: f32, max: f32) -> u8 {
    if scale == 0.0 {
        0
    } else {
        (value / scale).round_ties_even().clamp(0.0, max) as u8
    }
}

/// Fifth bits (if any code has one to store) and nibbles of 32 codes.
fn push_codes(out: &mut Vec<u8>, codes: &[u8; BLOCK], five_bits: bool) {
    if five_bits {
        let high = (0..BLOCK).fold(0u32, |high, k| high | u32::from(codes[k] >> 4) << k);
        out.extend_from_slice(&high.to_le_bytes());
    }
    out.extend((0..16).map(|k| codes[k] & 15 | codes[k + 16] << 4));
}

/// Q4_0 and Q5_0: the extreme value maps to code 0, that is to `-offset`.
fn symmetric(block: &[f32], offset: u8, out: &mut Vec<u8>) {
    let scale = push_half(out, extreme(block) / -f32::from(offset));
    let low = -scale * f32::from(offset);
    let codes = std::array::from_fn(|k| match scale {
        0.0 => offset,
        _ => code(block[k] - low, scale, f32::from(2 * offset - 1)),
    });
    push_codes(out, &codes, offset == 16);
}

fn range(block: &[f32]) -> (f32, f32) {
    block
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &w| {
            (lo.min(w), hi.max(w))
        })
}

/// Q4_1 and Q5_1.
fn with_min(block: &[f32], max: u8, out: &mut Vec<u8>) {
    let (lo, hi) = range(block);
    let scale = push_half(out, (hi - lo) / f32::from(max));
    let min = push_half(out, lo);
    let codes = std::array::from_fn(|k| code(block[k] - min, scale, f32::from(max)));
    push_codes(out, &codes, max == 31);
}

/// The range from min(0, lowest) to max(0, highest), so that 0 has a code.
fn with_zero_point(block: &[f32], out: &mut Vec<u8>) {
    let (lo, hi) = range(block);
    let (lo, hi) = (lo.min(0.0), hi.max(0.0));
    let scale = push_half(out, (hi - lo) / 15.0);
    let zero_point = push_half(out, f32::from(code(-lo, scale, 15.0)));
    let codes = std::array::from_fn(|k| match scale {
        0.0 => 0,
        _ => (block[k] / scale + zero_point).round_ties_even().clamp(0.0, 15.0) as u8,
    });
    push_codes(out, &codes, false);
}

fn q8_0(block: &[f32], out: &mut Vec<u8>) {
    let scale = push_half(out, extreme(block).abs() / 127.0);
    out.extend(block.iter().map(|&w| match scale {
        0.0 => 0,
        _ => (w / scale).round_ties_even().clamp(-127.0, 127.0) as i8 as u8,
    }));
}

/// Q4_K and Q5_K: per block the range from min(0, lowest) to the highest, both ends in 63rds of the largest.
fn k_with_min(format: TensorFormat, block: &[f32], out: &mut Vec<u8>) {
    let max = if format == TensorFormat::Q5_K { 31.0 } else { 15.0 };
    let ranges: [(f32, f32); 8] = std::array::from_fn(|j| {
        let (lo, hi) = range(&block[j * BLOCK..][..BLOCK]);
        let lo = lo.min(0.0);
        ((hi.max(lo) - lo) / max, -lo)
    });
    let d = push_half(out, ranges.iter().fold(0.0, |a: f32, r| a.max(r.0)) / 63.0);
    let dmin = push_half(out, ranges.iter().fold(0.0, |a: f32, r| a.max(r.1)) / 63.0);
    let scales: [(u8, u8); 8] = ranges.map(|(scale, min)| (code(scale, d, 63.0), code(min, dmin, 63.0)));
    let mut packed = [0u8; 12];
    for (j, &(scale, min)) in scales.iter().enumerate() {
        if j < 4 {
            packed[j] |= scale;
            packed[j + 4] |= min;
        } else {
            packed[j + 4] = scale & 15 | (min & 15) << 4;
            packed[j - 4] |= scale >> 4 << 6;
            packed[j] |= min >> 4 << 6;
        }
    }
    out.extend_from_slice(&packed);
    let codes: [u8; 256] = std::array::from_fn(|k| {
        let (scale, min) = scales[k / BLOCK];
        code(block[k] + dmin * f32::from(min), d * f32::from(scale), max)
    });
    if format == TensorFormat::Q5_K {
        out.extend((0..BLOCK).map(|k| (0..8).fold(0, |h, j| h | (codes[j * BLOCK + k] >> 4) << j)));
    }
    for pair in codes.chunks_exact(2 * BLOCK) {
        out.extend((0..BLOCK).map(|k| pair[k] & 15 | pair[BLOCK + k] << 4));
    }
}

fn q6_k(block: &[f32], out: &mut Vec<u8>) {
    let extremes: [f32; 16] = std::array::from_fn(|i| extreme(&block[i * 16..][..16]) / -32.0);
    let d = f16::from_f32(extreme(&extremes) / -128.0);
    let scales = extremes.map(|e| match d.to_f32() {
        0.0 => 0,
        d => (e / d).round_ties_even().clamp(-128.0, 127.0) as i8,
    });
    let codes: [u8; 256] = std::array::from_fn(|k| match d.to_f32() * f32::from(scales[k / 16]) {
        0.0 => 32,
        scale => ((block[k] / scale).round_ties_even().clamp(-32.0, 31.0) as i32 + 32) as u8,
    });
    for half in codes.chunks_exact(128) {
        out.extend((0..64).map(|k| half[k] & 15 | half[k + 64] << 4));
    }
    for half in codes.chunks_exact(128) {
        out.extend((0..32).map(|k| (0..4).fold(0, |h, t| h | (half[t * 32 + k] >> 4) << (2 * t))));
    }
    out.extend(scales.map(|s| s as u8));
    out.extend_from_slice(&d.to_le_bytes());
}
