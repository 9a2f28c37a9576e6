//! The kernels in plain Rust, bit for bit those of the other levels.

use std::ops::Range;

use phalanx_model::TensorFormat;

use super::Job;
use super::activations::{NarrowBlock, View, WideBlock};
use crate::cpu::pack::{self, GROUP, Layout};
use crate::cpu::quant::{BLOCK, Block, dequantize_dense, is_dense};

/// Activation rows that share a decoded block.
const ROWS: usize = 8;

/// Sums of the 8 outputs of a group for up to [`ROWS`] activation rows.
type Sums = [[f32; GROUP]; ROWS];

/// Computes the outputs of `groups` for all activation rows.
pub(super) fn run(job: &Job<'_>, groups: Range<usize>) {
    for group in groups {
        let panel = &job.panels[group * job.group_bytes()..][..job.group_bytes()];
        for first in (0..job.batch).step_by(ROWS) {
            let rows = first..(first + ROWS).min(job.batch);
            let mut sums: Sums = [[0.0; GROUP]; ROWS];
            if is_dense(job.format) {
                dense(job, panel, rows.clone(), &mut sums);
            } else {
                coded(job, panel, rows.clone(), &mut sums);
            }
            store(job, group, rows, &sums);
        }
    }
}

fn store(job: &Job<'_>, group: usize, rows: Range<usize>, sums: &Sums) {
    let lanes = (job.rows - group * GROUP).min(GROUP);
    for (row, sums) in rows.zip(sums) {
        for (lane, &sum) in sums[..lanes].iter().enumerate() {
            let n = group * GROUP + lane;
            let value = job.bias.map_or(sum, |bias| sum + bias[n]);
            // SAFETY: `row < batch` and `n < rows`; the group is this task's alone.
            unsafe { job.out.start.add(row * job.out.stride + n).write(value) };
        }
    }
}

fn dense(job: &Job<'_>, panel: &[u8], rows: Range<usize>, sums: &mut Sums) {
    let View::Plain(x, stride) = job.activations else {
        unreachable!("dense weights take f32")
    };
    let bytes = Layout::of(job.format).bytes;
    let mut weights = [0.0; GROUP];
    for (k, numbers) in panel.chunks_exact(bytes).enumerate() {
        dequantize_dense(job.format, numbers, &mut weights);
        for (row, sums) in rows.clone().zip(sums.iter_mut()) {
            let x = x[row * stride + k];
            for (sum, &weight) in sums.iter_mut().zip(&weights) {
                *sum = weight.mul_add(x, *sum);
            }
        }
    }
}

fn coded(job: &Job<'_>, panel: &[u8], rows: Range<usize>, sums: &mut Sums) {
    let layout = Layout::of(job.format);
    for (index, chunk) in panel.chunks_exact(layout.bytes).enumerate() {
        for at in 0..layout.blocks {
            let blocks: [Block; GROUP] = std::array::from_fn(|lane| pack::block(job.format, chunk, lane, at));
            let integer_scales = (job.format == TensorFormat::Q6_K).then(|| integer_scales(chunk, at));
            for (row, sums) in rows.clone().zip(sums.iter_mut()) {
                let (codes, scale, scaled_sum) = activation(job, row, index * layout.blocks + at);
                for (lane, (sum, block)) in sums.iter_mut().zip(&blocks).enumerate() {
                    let halves = dot(block, &codes);
                    let (dot, weight_scale) = match &integer_scales {
                        Some(s) => (halves[0] * s[lane].0[0] + halves[1] * s[lane].0[1], s[lane].1),
                        None => (halves[0] + halves[1], block.scale[0]),
                    };
                    *sum = (dot as f32).mul_add(weight_scale * scale, *sum);
                    if let Some(min) = block.min {
                        *sum = min.mul_add(scaled_sum, *sum);
                    }
                }
            }
        }
    }
}

/// Q6_K's integer scales of the two halves, and the f16 they are scaled with, of every lane.
fn integer_scales(chunk: &[u8], at: usize) -> [([i32; 2], f32); GROUP] {
    std::array::from_fn(|lane| {
        let pair = &chunk[pack::headers::Q6_K_SCALES + at * 16 + lane * 2..][..2];
        let d = crate::cpu::quant::half(chunk, lane * 2);
        ([i32::from(pair[0] as i8), i32::from(pair[1] as i8)], d)
    })
}

/// Codes, scale and scaled sum of an activation block.
fn activation(job: &Job<'_>, row: usize, index: usize) -> ([i8; BLOCK], f32, f32) {
    match job.activations {
        View::Narrow(blocks, per_row) => {
            let NarrowBlock {
                codes,
                scale,
                scaled_sum,
                ..
            } = blocks[row * per_row + index];
            (codes, scale, scaled_sum)
        }
        View::Wide(blocks, per_row) => {
            let WideBlock { even, odd, scale, .. } = blocks[row * per_row + index];
            let code = |k: usize| {
                if k.is_multiple_of(2) {
                    even[k / 2]
                } else {
                    odd[k / 2] + 256 * even[k / 2]
                }
            };
            (std::array::from_fn(|k| code(k) as i8), scale, 0.0)
        }
        View::Plain(..) => unreachable!("quantized weights take quantized activations"),
    }
}

/// Exact dot products of the two halves.
fn dot(block: &Block, activations: &[i8; BLOCK]) -> [i32; 2] {
    let product = |k: usize| (i32::from(block.codes[k]) - block.offset) * i32::from(activations[k]);
    [
        (0..BLOCK / 2).map(product).sum(),
        (BLOCK / 2..BLOCK).map(product).sum(),
    ]
}
