//! Activations as the integer kernels read them: int8 with one f32 scale per 32, and the sums a format's offset needs.
//!
//! `scale = max|x| / 127`, codes rounded to nearest even: an activation is off by at most half a step, `max|x| / 254` of
//! its block. A block with a NaN or an infinity gets the scale NaN, so that every output that reads it is NaN.

use phalanx_model::TensorFormat;

use super::Isa;
use crate::cpu::linear::Rows;
use crate::cpu::memory::free_memory;
use crate::cpu::pool::Pool;
use crate::cpu::quant::{BLOCK, is_dense};
use crate::{KernelError, Result};

/// Below this a block counts as zeros: `127 / max` would overflow.
const TINY: f32 = 1e-36;
/// Fewer activations than this are quantized by the caller alone.
const PARALLEL_MIN: usize = 16 << 10;

/// A block for kernels that multiply unsigned codes with i8: of up to 6 bits by `vpmaddubsw`, of any by `vpdpbusd`.
///
/// A 16-bit lane of such a product sums K with `k % 4` in {0, 1} (first) or {2, 3} (second); the sums below start the
/// lanes at minus offset times their activations.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct NarrowBlock {
    pub(crate) codes: [i8; BLOCK],
    /// -8 times the sum of each lane's activations.
    pub(crate) start_8: [i16; 2],
    pub(crate) scale: f32,
    /// `scale * sum(codes)`: what a min is multiplied with.
    pub(crate) scaled_sum: f32,
    /// -32 times the sum of each lane's activations in the first half of the block.
    pub(crate) start_32_first: [i16; 2],
    /// -8 times the sum of all activations: where the only sum of `vpdpbusd` starts.
    pub(crate) start: i32,
}
const _: () = assert!(size_of::<NarrowBlock>() == 52);

/// A block for Q8_0 without VNNI: the kernel multiplies pairs of i16 (`vpmaddwd`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct WideBlock {
    pub(crate) even: [i16; BLOCK / 2],
    /// `odd - 256 * even`.
    pub(crate) odd: [i16; BLOCK / 2],
    /// `-128 * sum(even)`.
    pub(crate) start: i32,
    pub(crate) scale: f32,
}
const _: () = assert!(size_of::<WideBlock>() == 72);

/// What a weight format wants to be multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Narrow,
    Wide,
    /// f32 as they are.
    Plain,
}

impl Kind {
    /// Codes of 8 bits overflow `vpmaddubsw`; VNNI's sums of 32 bits do not.
    pub(crate) fn of(format: TensorFormat, isa: Isa) -> Self {
        match format {
            TensorFormat::Q8_0 if !isa.has_vnni() => Self::Wide,
            _ if is_dense(format) => Self::Plain,
            _ => Self::Narrow,
        }
    }
}

/// A call's activations of one kind.
#[derive(Clone, Copy)]
pub(crate) enum View<'a> {
    /// Blocks, and blocks per row.
    Narrow(&'a [NarrowBlock], usize),
    Wide(&'a [WideBlock], usize),
    /// Values, and the stride of rows.
    Plain(&'a [f32], usize),
}

impl View<'_> {
    /// First byte, and bytes from row to row.
    pub(crate) fn raw(&self) -> (*const u8, usize) {
        match *self {
            Self::Narrow(blocks, per_row) => (blocks.as_ptr().cast(), per_row * size_of::<NarrowBlock>()),
            Self::Wide(blocks, per_row) => (blocks.as_ptr().cast(), per_row * size_of::<WideBlock>()),
            Self::Plain(values, stride) => (values.as_ptr().cast(), stride * 4),
        }
    }
}

/// Quantized activations of a call; keeps its memory for the next one.
pub struct Scratch {
    pub(crate) isa: Isa,
    narrow: Vec<NarrowBlock>,
    wide: Vec<WideBlock>,
}

impl Scratch {
    /// Scratch memory for products computed with the kernels of `isa`.
    pub fn new(isa: Isa) -> Self {
        Self {
            isa,
            narrow: Vec::new(),
            wide: Vec::new(),
        }
    }

    /// Blocks of a row: an even number, since chunks of weights hold 2 or 8.
    fn blocks_per_row(cols: usize) -> usize {
        (cols / BLOCK).next_multiple_of(2)
    }

    /// Quantizes `cols` columns of `x` in parallel over rows.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub(crate) fn quantize(&mut self, kind: Kind, x: Rows<'_>, cols: usize, pool: &Pool) -> Result<()> {
        let isa = self.isa;
        let per_row = Self::blocks_per_row(cols);
        let row = |r: usize| &x.data[r * x.stride..][..cols];
        match kind {
            Kind::Narrow => {
                let out = grow(&mut self.narrow, x.rows * per_row)?;
                for_rows(pool, out, (per_row, cols), |r, out| narrow_row(isa, row(r), out));
            }
            Kind::Wide => {
                let out = grow(&mut self.wide, x.rows * per_row)?;
                for_rows(pool, out, (per_row, cols), |r, out| wide_row(isa, row(r), out));
            }
            Kind::Plain => {}
        }
        Ok(())
    }

    /// What the last `quantize` of this kind has left.
    pub(crate) fn view<'a>(&'a self, kind: Kind, x: Rows<'a>, cols: usize) -> View<'a> {
        let per_row = Self::blocks_per_row(cols);
        match kind {
            Kind::Narrow => View::Narrow(&self.narrow[..x.rows * per_row], per_row),
            Kind::Wide => View::Wide(&self.wide[..x.rows * per_row], per_row),
            Kind::Plain => View::Plain(x.data, x.stride),
        }
    }
}

fn grow<T: Default + Clone>(blocks: &mut Vec<T>, len: usize) -> Result<&mut [T]> {
    if blocks.len() < len {
        let more = len - blocks.len();
        blocks
            .try_reserve_exact(more)
            .map_err(|_| KernelError::OutOfMemory {
                what: "quantized activations",
                requested: more.saturating_mul(size_of::<T>()),
                free: free_memory(),
            })?;
        blocks.resize(len, T::default());
    }
    Ok(&mut blocks[..len])
}

/// A pointer that tasks write disjoint rows through.
struct RowsPtr<T>(*mut T);
// SAFETY: the tasks of `for_rows` write disjoint rows.
unsafe impl<T: Send> Sync for RowsPtr<T> {}

impl<T> RowsPtr<T> {
    /// # Safety
    /// `len` elements from `at` lie in the slice, and nobody else uses them.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, at: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}

/// Calls `f(row, its blocks)` for every row of `out`.
fn for_rows<T: Send>(
    pool: &Pool,
    out: &mut [T],
    (per_row, cols): (usize, usize),
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    let rows = out.len().checked_div(per_row).unwrap_or(0);
    let parallel = pool.threads() > 1 && rows * cols >= PARALLEL_MIN;
    let per_task = if parallel {
        rows.div_ceil(pool.threads() * 2)
    } else {
        rows.max(1)
    };
    let out = RowsPtr(out.as_mut_ptr());
    pool.run(rows.div_ceil(per_task), |task| {
        for row in task * per_task..((task + 1) * per_task).min(rows) {
            // SAFETY: rows are disjoint parts of `out`, and each is visited by one task once.
            f(row, unsafe { out.row(row * per_row, per_row) });
        }
    });
}

fn narrow_row(isa: Isa, x: &[f32], out: &mut [NarrowBlock]) {
    let blocks = x.len() / BLOCK;
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: AVX2 was detected; `out` has room for all blocks of `x`.
        unsafe { super::x86::quantize_narrow(x, out) };
        out[blocks..].fill(NarrowBlock::default());
        return;
    }
    let _ = isa;
    for (x, out) in x.chunks_exact(BLOCK).zip(out.iter_mut()) {
        let (codes, scale) = codes(x);
        let sum = |of: &dyn Fn(usize) -> bool| -> i16 {
            codes
                .iter()
                .enumerate()
                .filter(|(k, _)| of(*k))
                .map(|(_, &c)| i16::from(c))
                .sum()
        };
        let lanes = [sum(&|k| k % 4 < 2), sum(&|k| k % 4 >= 2)];
        let first = [sum(&|k| k < 16 && k % 4 < 2), sum(&|k| k < 16 && k % 4 >= 2)];
        *out = NarrowBlock {
            codes,
            start_8: lanes.map(|s| -8 * s),
            scale,
            scaled_sum: scale * f32::from(lanes[0] + lanes[1]),
            start_32_first: first.map(|s| -32 * s),
            start: -8 * i32::from(lanes[0] + lanes[1]),
        };
    }
    out[blocks..].fill(NarrowBlock::default());
}

fn wide_row(isa: Isa, x: &[f32], out: &mut [WideBlock]) {
    let blocks = x.len() / BLOCK;
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        // SAFETY: AVX2 was detected; `out` has room for all blocks of `x`.
        unsafe { super::x86::quantize_wide(x, out) };
        out[blocks..].fill(WideBlock::default());
        return;
    }
    let _ = isa;
    for (x, out) in x.chunks_exact(BLOCK).zip(out.iter_mut()) {
        let (codes, scale) = codes(x);
        let even: [i16; BLOCK / 2] = std::array::from_fn(|i| i16::from(codes[2 * i]));
        let odd = std::array::from_fn(|i| i16::from(codes[2 * i + 1]) - 256 * even[i]);
        let start = -128 * even.iter().map(|&e| i32::from(e)).sum::<i32>();
        *out = WideBlock {
            even,
            odd,
            start,
            scale,
        };
    }
    out[blocks..].fill(WideBlock::default());
}

/// Scale of a block and the factor that turns its values into codes, from the bits of its largest magnitude (whose
/// order as integers is that of the magnitudes, with infinity and NaN above all numbers).
pub(super) fn scale_and_inverse(magnitude_bits: u32) -> (f32, f32) {
    let max = f32::from_bits(magnitude_bits);
    if !max.is_finite() {
        return (f32::NAN, 0.0);
    }
    (max / 127.0, if max < TINY { 0.0 } else { 127.0 / max })
}

/// Codes and scale of one block.
fn codes(x: &[f32]) -> ([i8; BLOCK], f32) {
    let max = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let (scale, inverse) = scale_and_inverse(max);
    if scale.is_nan() {
        return ([0; BLOCK], scale);
    }
    (
        std::array::from_fn(|k| (x[k] * inverse).round_ties_even() as i8),
        scale,
    )
}
