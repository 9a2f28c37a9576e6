//! RMS normalization (Zhang & Sennrich, "Root mean square layer normalization", 2019).

use super::buffer::CpuBuffer;
use super::exec::{Exec, check};
use super::simd::{Kernel, LANES, Simd};
use crate::Result;

/// Independent partial sums, so that additions need not wait for each other.
const PARTIAL_SUMS: usize = 4;

/// Weight and epsilon of a norm, for `rows` rows.
#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) rows: usize,
}

/// `out = x / sqrt(mean(x²) + eps) * weight`
pub(crate) fn rms_norm(exec: Exec<'_>, out: &mut CpuBuffer, x: &CpuBuffer, norm: RmsNorm<'_>) -> Result<()> {
    const OP: &str = "rms_norm";
    let width = norm.weight.len();
    check_widths(OP, &[out, x], norm)?;
    let out = out.writer();
    exec.for_rows(norm.rows, width, |rows| {
        for row in rows {
            // SAFETY: each row is given to one task, and used once in it.
            let out = unsafe { out.row(row) };
            exec.isa.run(Normalize {
                out,
                x: x.row(row),
                norm,
            });
        }
    });
    Ok(())
}

/// `residual += delta; out = rms_norm(residual)`
pub(crate) fn fused_add_rms_norm(
    exec: Exec<'_>,
    out: &mut CpuBuffer,
    residual: &mut CpuBuffer,
    delta: &CpuBuffer,
    norm: RmsNorm<'_>,
) -> Result<()> {
    const OP: &str = "fused_add_rms_norm";
    let width = norm.weight.len();
    check_widths(OP, &[out, residual, delta], norm)?;
    let (out, residual) = (out.writer(), residual.writer());
    exec.for_rows(norm.rows, width, |rows| {
        for row in rows {
            // SAFETY: each row of the two buffers is given to one task, and used once in it.
            let (out, x) = unsafe { (out.row(row), residual.row(row)) };
            exec.isa.run(AddNormalize {
                out,
                x,
                delta: delta.row(row),
                norm,
            });
        }
    });
    Ok(())
}

fn check_widths(op: &'static str, buffers: &[&CpuBuffer], norm: RmsNorm<'_>) -> Result<()> {
    for buffer in buffers {
        buffer.check(op, norm.rows, norm.weight.len())?;
        check(op, buffer.width() == norm.weight.len(), || {
            format!("{} weights for rows of {}", norm.weight.len(), buffer.width())
        })?;
    }
    Ok(())
}

struct Normalize<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    norm: RmsNorm<'a>,
}

impl Kernel for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mean = sum_of_squares(simd, self.x) / self.x.len() as f32;
        let inverse = 1.0 / (mean + self.norm.eps).sqrt();
        for ((out, x), w) in self.out.iter_mut().zip(self.x).zip(self.norm.weight) {
            *out = x * inverse * w;
        }
    }
}

struct AddNormalize<'a> {
    out: &'a mut [f32],
    x: &'a mut [f32],
    delta: &'a [f32],
    norm: RmsNorm<'a>,
}

impl Kernel for AddNormalize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, d) in self.x.iter_mut().zip(self.delta) {
            *x += d;
        }
        let Self { out, x, norm, .. } = self;
        Normalize { out, x, norm }.run(simd);
    }
}

/// Lane `l` of partial sum `p` adds the squares of elements `32 i + 8 p + l` in rising `i`.
#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (vectors, tail) = x.as_chunks::<LANES>();
    let (whole, rest) = vectors.as_chunks::<PARTIAL_SUMS>();
    let mut sums = [simd.splat(0.0); PARTIAL_SUMS];
    for vectors in whole {
        for (sum, x) in sums.iter_mut().zip(vectors) {
            let x = simd.load(x);
            *sum = simd.fma(x, x, *sum);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        let x = simd.load(x);
        *sum = simd.fma(x, x, *sum);
    }
    let tail = simd.load_partial(tail);
    sums[PARTIAL_SUMS - 1] = simd.fma(tail, tail, sums[PARTIAL_SUMS - 1]);
    simd.sum(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])))
}
