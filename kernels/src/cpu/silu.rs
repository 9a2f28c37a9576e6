//! The gated activation of Llama's MLP (Shazeer, "GLU variants improve transformer", 2020).

use super::buffer::{CpuBuffer, RowWriter};
use super::exec::{Exec, check};
use super::math::exp;
use super::simd::{Arithmetic, Kernel, LANES, Simd};
use crate::Result;

/// `out[:, start..] = silu(gate) * up` where a row of `gate_up` is `[gate | up]`.
pub(crate) fn silu_and_mul(
    exec: Exec<'_>,
    out: &mut CpuBuffer,
    start: usize,
    gate_up: &CpuBuffer,
    rows: usize,
) -> Result<()> {
    const OP: &str = "silu_and_mul";
    let width = gate_up.width() / 2;
    check(OP, gate_up.width() == 2 * width, || {
        format!("a row of {} values has no halves", gate_up.width())
    })?;
    gate_up.check(OP, rows, 2 * width)?;
    out.check(OP, rows, start.saturating_add(width))?;
    let out: RowWriter<'_> = out.writer();
    exec.for_rows(rows, width, |rows| {
        for row in rows {
            let (gate, up) = gate_up.row(row).split_at(width);
            // SAFETY: each row is given to one task, and used once in it.
            let out = unsafe { out.part(row, start..start + width) };
            exec.isa.run(SiluAndMul { out, gate, up });
        }
    });
    Ok(())
}

/// Three slices of equal length.
struct SiluAndMul<'a> {
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
}

impl Kernel for SiluAndMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (gates, gate_tail) = self.gate.as_chunks::<LANES>();
        let (ups, up_tail) = self.up.as_chunks::<LANES>();
        let (outs, out_tail) = self.out.as_chunks_mut::<LANES>();
        let (gate_pairs, gates) = gates.as_chunks::<2>();
        let (up_pairs, ups) = ups.as_chunks::<2>();
        let (out_pairs, outs) = outs.as_chunks_mut::<2>();
        for ((out, gate), up) in out_pairs.iter_mut().zip(gate_pairs).zip(up_pairs) {
            let product = silu_mul(simd.wide(), simd.load_pair(gate), simd.load_pair(up));
            simd.store_pair(out, product);
        }
        for ((out, gate), up) in outs.iter_mut().zip(gates).zip(ups) {
            simd.store(out, silu_mul(simd, simd.load(gate), simd.load(up)));
        }
        let last = silu_mul(simd, simd.load_partial(gate_tail), simd.load_partial(up_tail));
        out_tail.copy_from_slice(&simd.to_array(last)[..out_tail.len()]);
    }
}

#[inline(always)]
fn silu_mul<A: Arithmetic>(simd: A, gate: A::F32, up: A::F32) -> A::F32 {
    let one = simd.splat(1.0);
    let denominator = simd.add(one, exp(simd, simd.sub(simd.splat(0.0), gate)));
    simd.mul(simd.div(gate, denominator), up)
}
