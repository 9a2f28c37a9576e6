//! The gated activation: `kernels/cuda/activation.cu`.

use super::backend::CudaBackend;
use super::buffer::CudaBuffer;
use super::launch::{
    Arg::{Pointer, U32},
    Grid,
};
use super::shape::u32_of;
use crate::error::check;
use crate::{Columns, Result};

const THREADS: u32 = 256;
/// Columns that one block works on, at least.
const COLUMNS_PER_BLOCK: usize = 4 * THREADS as usize;

pub(crate) fn silu_and_mul(
    backend: &CudaBackend,
    out: Columns<'_, CudaBackend>,
    gate_up: &CudaBuffer,
    rows: usize,
) -> Result<()> {
    const OP: &str = "silu_and_mul";
    let width = gate_up.width() / 2;
    check(OP, gate_up.width() == 2 * width, || {
        format!("a row of {} values has no halves", gate_up.width())
    })?;
    gate_up.check(OP, rows, 2 * width)?;
    out.buffer.check(OP, rows, out.start.saturating_add(width))?;
    let args = [
        Pointer(out.buffer.column(out.start)),
        U32(u32_of(OP, out.buffer.width())?),
        Pointer(gate_up.ptr()),
        U32(u32_of(OP, width)?),
    ];
    let grid = Grid::new([rows, width.div_ceil(COLUMNS_PER_BLOCK), 1], THREADS);
    // SAFETY: the parameters of `silu_and_mul`; the columns lie within the rows of `out`, checked above.
    unsafe { backend.launch(OP, grid, &args) }
}
