//! The kernels for AVX2 + FMA + F16C, and those that also use AVX-512 VNNI on vectors of the same width.
//!
//! A register tile is R activation rows times G groups of 8 outputs; one vector of weights holds 4 consecutive K of 8
//! outputs, one broadcast 4 int8 activations.

// Tiles index several arrays with the same two numbers; iterators over one of them hide that.
#![allow(clippy::needless_range_loop)]

mod bytes;
mod codes;
mod dense;
mod pairs;
mod quantize;
mod sixes;
mod vnni;

pub(super) use quantize::{quantize_narrow, quantize_wide};

use std::arch::x86_64::*;
use std::ops::Range;

use phalanx_model::TensorFormat;

use super::{Isa, Job};
use crate::cpu::pack::GROUP;

/// Software prefetch distance in bytes. For one row from memory, on Sapphire Rapids: 1,024 is up to 10 % slower, 1,536 up
/// to 7 %; 5,120 is faster for some widths and 17 % slower for others.
const PREFETCH: usize = 2560;

/// Activation rows of a register tile that 16 registers hold.
const TILE_ROWS: usize = 4;

/// Everything a register tile reads.
#[derive(Clone, Copy)]
struct Tile {
    /// First byte of the first group.
    weights: *const u8,
    group_bytes: usize,
    chunks: usize,
    /// First byte of the first activation row.
    activations: *const u8,
    row_bytes: usize,
}

impl Tile {
    /// Asks for what will be read [`PREFETCH`] bytes after the `bytes` at `w`, in the first of `G` groups, and for the
    /// like in the others: of the same groups, and beyond their end of those that the next tile begins with.
    #[inline(always)]
    fn prefetch<const G: usize>(&self, w: *const u8, bytes: usize) {
        let at = w.addr() - self.weights.addr() + PREFETCH;
        let passed = if at < self.group_bytes { 0 } else { G - 1 };
        for g in 0..G {
            prefetch(w.wrapping_add((passed + g) * self.group_bytes + PREFETCH), bytes);
        }
    }
}

/// Sums of a tile: R activation rows x G groups.
type Sums<const R: usize, const G: usize> = [[__m256; G]; R];

/// A format's tile. Implementors are markers; `tile` is inlined into code compiled for the features.
trait Kernel {
    /// Activation rows of the largest tile, 4 or 8.
    const ROWS: usize = TILE_ROWS;
    /// Activation rows from which on tiles take two groups instead of one.
    const PAIRS_FROM: usize;

    /// # Safety
    /// AVX2, FMA and F16C, and AVX-512 for the kernels that use it; `t` describes `R` rows and `G` groups of the format in readable memory.
    unsafe fn tile<const R: usize, const G: usize, const PF: bool>(t: Tile) -> Sums<R, G>;
}

/// Computes the outputs of `groups` for all activation rows.
///
/// # Safety
/// `isa` has AVX2 at least and was detected, `job.out` is as promised, and no other task has one of `groups`.
pub(super) unsafe fn run(isa: Isa, job: &Job<'_>, groups: Range<usize>) {
    use TensorFormat::*;
    // SAFETY: the caller's promise.
    unsafe {
        match (job.format, isa.has_vnni()) {
            (F32, _) => run_format::<dense::F32>(job, groups),
            (F16, _) => run_format::<dense::F16>(job, groups),
            (BF16 | F8_E4M3, _) => run_format::<dense::Bf16>(job, groups),
            (Q4_0, false) => run_format::<codes::Q4_0>(job, groups),
            (Q4_1, false) => run_format::<codes::Q4_1>(job, groups),
            (Int4, false) => run_format::<codes::Int4>(job, groups),
            (Q5_0, false) => run_format::<codes::Q5_0>(job, groups),
            (Q5_1, false) => run_format::<codes::Q5_1>(job, groups),
            (Q8_0, false) => run_format::<bytes::Q8_0>(job, groups),
            (Q4_K, false) => run_format::<codes::Q4K>(job, groups),
            (Q5_K, false) => run_format::<codes::Q5K>(job, groups),
            (Q6_K, false) => run_format::<sixes::Q6K>(job, groups),
            (Q4_0, true) => run_format::<vnni::Vnni<codes::Q4_0>>(job, groups),
            (Q4_1, true) => run_format::<vnni::Vnni<codes::Q4_1>>(job, groups),
            (Int4, true) => run_format::<vnni::Vnni<codes::Int4>>(job, groups),
            (Q5_0, true) => run_format::<vnni::Vnni<codes::Q5_0>>(job, groups),
            (Q5_1, true) => run_format::<vnni::Vnni<codes::Q5_1>>(job, groups),
            (Q8_0, true) => run_format::<vnni::Vnni<bytes::Q8_0>>(job, groups),
            (Q4_K, true) => run_format::<vnni::Vnni<codes::Q4K>>(job, groups),
            (Q5_K, true) => run_format::<vnni::Vnni<codes::Q5K>>(job, groups),
            (Q6_K, true) => run_format::<vnni::Vnni<sixes::Q6K>>(job, groups),
        }
    }
}

/// # Safety
/// As [`run`], for the kernel of the job's format.
unsafe fn run_format<K: Kernel>(job: &Job<'_>, groups: Range<usize>) {
    let wide = job.batch >= K::PAIRS_FROM;
    // A single row gets through a group so fast that the hardware's prefetcher does as well.
    if job.batch >= TILE_ROWS {
        prefetch_start(job, groups.clone(), wide);
    }
    for first in (0..job.batch).step_by(job.row_block()) {
        let rows = first..(first + job.row_block()).min(job.batch);
        let mut group = groups.start;
        while group < groups.end {
            let pair = wide && group + 2 <= groups.end;
            // SAFETY: the caller's promise; `group` (and the next, if `pair`) lies in `groups`.
            unsafe {
                if pair {
                    run_groups::<K, 2>(job, rows.clone(), group);
                } else {
                    run_groups::<K, 1>(job, rows.clone(), group);
                }
            }
            group += 1 + usize::from(pair);
        }
    }
}

/// Asks at once for what a task's first tile reads before its own prefetches are ahead of it.
fn prefetch_start(job: &Job<'_>, groups: Range<usize>, wide: bool) {
    let bytes = job.group_bytes();
    for group in groups.take(1 + usize::from(wide)) {
        prefetch(job.panels[group * bytes..].as_ptr(), bytes.min(PREFETCH));
    }
}

/// Groups `group .. group + G` for activation rows `rows`.
///
/// # Safety
/// As [`run`]; the groups exist.
unsafe fn run_groups<K: Kernel, const G: usize>(job: &Job<'_>, rows: Range<usize>, group: usize) {
    let group_bytes = job.group_bytes();
    let (activations, row_bytes) = job.activations.raw();
    let mut row = rows.start;
    while row < rows.end {
        // SAFETY: row and groups exist, so the addresses lie in the activations, the panels and the output.
        unsafe {
            let tile = Tile {
                weights: job.panels.as_ptr().add(group * group_bytes),
                group_bytes,
                chunks: job.chunks(),
                activations: activations.add(row * row_bytes),
                row_bytes,
            };
            let left = rows.end - row;
            // Only the first tile of a group meets cold weights.
            let cold = row == rows.start;
            row += if K::ROWS == 8 && left >= 8 {
                run_rows::<K, 8, G>(job, tile, (row, group), cold)
            } else {
                match left {
                    1 => run_rows::<K, 1, G>(job, tile, (row, group), cold),
                    2 => run_rows::<K, 2, G>(job, tile, (row, group), cold),
                    3 => run_rows::<K, 3, G>(job, tile, (row, group), cold),
                    _ => run_rows::<K, TILE_ROWS, G>(job, tile, (row, group), cold),
                }
            };
        }
    }
}

/// Returns how many rows there were.
///
/// # Safety
/// As [`run_tile`].
unsafe fn run_rows<K: Kernel, const R: usize, const G: usize>(
    job: &Job<'_>,
    tile: Tile,
    (row, group): (usize, usize),
    cold: bool,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        if cold {
            run_tile::<K, R, G, true>(job, tile, row, group);
        } else {
            run_tile::<K, R, G, false>(job, tile, row, group);
        }
    }
    R
}

/// # Safety
/// As [`run`]; `tile` describes `R` rows from `row` and `G` groups from `group`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_tile<K: Kernel, const R: usize, const G: usize, const PF: bool>(
    job: &Job<'_>,
    tile: Tile,
    row: usize,
    group: usize,
) {
    // SAFETY: the caller's promise.
    let sums = unsafe { K::tile::<R, G, PF>(tile) };
    for (r, sums) in sums.iter().enumerate() {
        for (g, &sum) in sums.iter().enumerate() {
            let n = (group + g) * GROUP;
            // SAFETY: row and column lie in the output, which has `job.rows - n` columns left here; the bias has as
            // many values as columns.
            unsafe {
                let out = job.out.start.add((row + r) * job.out.stride + n);
                if job.rows - n >= GROUP {
                    let bias = job.bias.map(|b| _mm256_loadu_ps(b.as_ptr().add(n)));
                    _mm256_storeu_ps(out, bias.map_or(sum, |b| _mm256_add_ps(sum, b)));
                } else {
                    let mut values = [0.0; GROUP];
                    _mm256_storeu_ps(values.as_mut_ptr(), sum);
                    for (lane, &value) in values[..job.rows - n].iter().enumerate() {
                        out.add(lane)
                            .write(job.bias.map_or(value, |b| value + b[n + lane]));
                    }
                }
            }
        }
    }
}

/// Repeats a body with a constant step.
macro_rules! unroll {
    ($step:ident in [$($at:literal),*] $body:block) => { $({ const $step: usize = $at; $body })* };
}
use unroll;

/// Four bytes from anywhere, in all 8 lanes.
///
/// # Safety
/// AVX; 4 bytes at `p` are readable.
#[inline(always)]
unsafe fn broadcast(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
}

/// An f32 from anywhere, in all 8 lanes.
///
/// # Safety
/// AVX; 4 bytes at `p` are readable.
#[inline(always)]
unsafe fn broadcast_f32(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_set1_ps(p.cast::<f32>().read_unaligned()) }
}

/// Eight f16, widened.
///
/// # Safety
/// AVX and F16C; 16 bytes at `p` are readable.
#[inline(always)]
unsafe fn half8(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
}

/// Asks for the cache lines of `bytes` from `start` on.
#[inline(always)]
fn prefetch(start: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        // SAFETY: a prefetch of an unmapped address does nothing, and SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line).cast()) };
    }
}

/// Keeps LLVM's reassociation pass from rewriting the chain of integer adds as one tree per row, which needs all
/// unpacked weights and all broadcasts at once and spills them: 10 to 60 % slower.
///
/// # Safety
/// AVX2.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn keep_order<const R: usize, const G: usize>(mut sums: [[__m256i; G]; R]) -> [[__m256i; G]; R] {
    for row in &mut sums {
        for sum in row {
            // SAFETY: no instruction at all; the value passes through a register.
            unsafe {
                std::arch::asm!(
                    "/* {0} */",
                    inout(ymm_reg) * sum,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
        }
    }
    sums
}
