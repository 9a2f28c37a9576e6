//! The linear layer: `y[M, N] = x[M, K] · W[N, K]ᵀ (+ bias)` on repacked weights.

use phalanx_model::TensorFormat;

use super::memory::Arena;
use super::pool::Pool;
use super::quant;
use crate::{KernelError, Result, WeightSource};

/// Activations `[rows, cols]`: row `r` is the `cols` values at `data[r * stride..]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    /// Values from one row to the next, at least `cols`.
    pub stride: usize,
}

/// Where a product goes: row `r` to `data[r * stride + column..]`, as many values as the weight has rows.
#[derive(Debug)]
pub struct Output<'a> {
    pub data: &'a mut [f32],
    /// Values from one row to the next.
    pub stride: usize,
    /// First column written.
    pub column: usize,
    /// Added to every row; as many values as the weight has rows.
    pub bias: Option<&'a [f32]>,
}

/// Which kernels run. Both give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(bool);

impl Isa {
    /// Scalar code for any machine.
    pub const PORTABLE: Self = Self(false);

    /// The best this machine has.
    pub fn detect() -> Self {
        Self::PORTABLE
    }
}

/// Quantized activations of a call; keeps its memory for the next one.
pub struct Scratch {
    _isa: Isa,
}

impl Scratch {
    pub fn new(isa: Isa) -> Self {
        Self { _isa: isa }
    }
}

/// Bytes a matrix of `rows` x `cols` weights takes when packed; none if `cols` cuts a block or the size overflows.
pub fn resident_bytes(format: TensorFormat, rows: usize, cols: usize) -> Option<usize> {
    rows.checked_mul(format.row_bytes(cols)?)
}

/// Matrices of equal `cols`, stacked; each keeps its format.
pub struct PackedWeight {
    rows: usize,
    cols: usize,
    parts: Vec<(TensorFormat, Vec<u8>)>,
}

impl PackedWeight {
    /// Repacks `parts`, in parallel, into memory of `arena`. The order of the parts is that of the output columns.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the parts differ in `cols`, `cols` cuts a block, or `data` is too short;
    /// [`KernelError::OutOfMemory`].
    pub fn pack(parts: &[WeightSource<'_>], _pool: &Pool, _arena: &Arena) -> Result<Self> {
        let cols = parts.first().map_or(0, |p| p.cols);
        let mut packed = Self {
            rows: 0,
            cols,
            parts: Vec::new(),
        };
        for p in parts {
            let bytes = p
                .format
                .row_bytes(cols)
                .filter(|_| p.cols == cols)
                .ok_or_else(|| KernelError::Shape {
                    op: "pack",
                    message: format!("{} columns of {:?}", p.cols, p.format),
                })?;
            let mut data = Vec::new();
            for row in 0..p.rows {
                data.extend_from_slice(&p.data[row * p.row_stride..][..bytes]);
            }
            packed.rows += p.rows;
            packed.parts.push((p.format, data));
        }
        Ok(packed)
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|p| p.1.len()).sum()
    }

    /// Decodes row `row` into `out`, which is `cols` long: the embedding lookup of tied tables.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if there is no such row or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let mut row = row;
        for (format, data) in &self.parts {
            let bytes = format.row_bytes(self.cols).unwrap_or(0);
            if (row + 1) * bytes <= data.len() {
                return quant::dequantize_row(*format, &data[row * bytes..][..bytes], out);
            }
            row -= data.len() / bytes.max(1);
        }
        Err(KernelError::Shape {
            op: "dequantize_row",
            message: format!("no row {row}"),
        })
    }

    /// `out = x · selfᵀ (+ bias)`, for `x.rows` rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a slice is too short for its rows, stride and columns.
    pub fn matmul(&self, _pool: &Pool, _scratch: &mut Scratch, x: Rows<'_>, out: Output<'_>) -> Result<()> {
        let mut weights = vec![0.0; self.cols];
        for n in 0..self.rows {
            self.dequantize_row(n, &mut weights)?;
            for m in 0..x.rows {
                let x = &x.data[m * x.stride..][..self.cols];
                let dot: f32 = x.iter().zip(&weights).map(|(x, w)| x * w).sum();
                out.data[m * out.stride + out.column + n] = dot + out.bias.map_or(0.0, |b| b[n]);
            }
        }
        Ok(())
    }
}
