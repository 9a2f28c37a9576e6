//! The linear layer: `y[M, N] = x[M, K] · W[N, K]ᵀ (+ bias)` on repacked weights.
//!
//! Quantized weights meet int8 activations with one scale per 32 inputs; dense ones meet f32. The result is within
//! `2e-6 * sum|w x|` of the exact product of the weights with those activations, and the activations are within half a
//! step, `max|x| / 254` of their 32, of the given ones. Output bits depend on the weight row, the activation row and
//! nothing else: see [`super::gemm`].

use phalanx_model::TensorFormat;

use super::gemm::activations::Kind;
use super::gemm::{self, Job, OutPtr};
use super::memory::{Arena, Region};
use super::pack::{self, GROUP};
use super::pool::Pool;
use crate::{KernelError, Result, WeightSource};

pub use super::gemm::Isa;
pub use super::gemm::activations::Scratch;
pub use super::pack::resident_bytes;

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

/// Matrices of equal `cols`, stacked; each keeps its format.
pub struct PackedWeight {
    rows: usize,
    cols: usize,
    parts: Vec<Part>,
}

struct Part {
    format: TensorFormat,
    rows: usize,
    /// Whole groups.
    panels: Region,
}

fn shape(op: &'static str, message: String) -> KernelError {
    KernelError::Shape { op, message }
}

impl PackedWeight {
    /// Repacks `parts`, in parallel, into memory of `arena`. The order of the parts is that of the output columns.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if there is no part, the parts differ in `cols`, `cols` cuts a block, or `data` is too
    /// short; [`KernelError::OutOfMemory`].
    pub fn pack(parts: &[WeightSource<'_>], pool: &Pool, arena: &Arena) -> Result<Self> {
        let cols = parts
            .first()
            .ok_or_else(|| shape("pack", "a weight without parts".to_owned()))?
            .cols;
        let mut packed = Self {
            rows: 0,
            cols,
            parts: Vec::with_capacity(parts.len()),
        };
        for source in parts {
            let bytes = packed_bytes(source, cols)?;
            let mut panels = arena.alloc(bytes, "weights")?;
            pack_parallel(source, panels.as_mut_slice(), pool);
            packed.rows = packed
                .rows
                .checked_add(source.rows)
                .ok_or_else(|| shape("pack", "the rows of all parts overflow".to_owned()))?;
            packed.parts.push(Part {
                format: pack::resident_format(source.format),
                rows: source.rows,
                panels,
            });
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

    /// Bytes of memory held: the sum of [`resident_bytes`] over the parts.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.panels.as_slice().len()).sum()
    }

    /// Decodes row `row` into `out`, which is `cols` long: the embedding lookup of tied tables. Exactly what
    /// [`super::quant::dequantize_row`] gives for the row as it was in the file.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if there is no such row or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        if row >= self.rows || out.len() != self.cols {
            let message = format!(
                "row {row} into {} values of a {} x {} weight",
                out.len(),
                self.rows,
                self.cols
            );
            return Err(shape("dequantize_row", message));
        }
        let mut row = row;
        for part in &self.parts {
            if row < part.rows {
                let group_bytes = part.panels.as_slice().len() / part.rows.div_ceil(GROUP);
                let group = &part.panels.as_slice()[row / GROUP * group_bytes..][..group_bytes];
                pack::dequantize_row(part.format, group, row % GROUP, out);
                return Ok(());
            }
            row -= part.rows;
        }
        Ok(())
    }

    /// `out = x · selfᵀ (+ bias)`, for `x.rows` rows. Activations are quantized once for all parts.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a slice is too short for its rows, stride and columns;
    /// [`KernelError::OutOfMemory`] if `scratch` cannot grow.
    pub fn matmul(&self, pool: &Pool, scratch: &mut Scratch, x: Rows<'_>, out: Output<'_>) -> Result<()> {
        self.check(&x, &out)?;
        if x.rows == 0 || self.rows == 0 {
            return Ok(());
        }
        for kind in [Kind::Narrow, Kind::Wide] {
            if self
                .parts
                .iter()
                .any(|part| part.rows > 0 && Kind::of(part.format, scratch.isa) == kind)
            {
                scratch.quantize(kind, x, self.cols, pool)?;
            }
        }
        let mut start = 0;
        let mut jobs = Vec::with_capacity(self.parts.len());
        let data = out.data.as_mut_ptr();
        for part in self.parts.iter().filter(|part| part.rows > 0) {
            jobs.push(Job {
                format: part.format,
                panels: part.panels.as_slice(),
                rows: part.rows,
                cols: self.cols,
                activations: scratch.view(Kind::of(part.format, scratch.isa), x, self.cols),
                batch: x.rows,
                out: OutPtr {
                    start: data.wrapping_add(out.column + start),
                    stride: out.stride,
                },
                bias: out.bias.map(|bias| &bias[start..start + part.rows]),
            });
            start += part.rows;
        }
        gemm::run(scratch.isa, pool, &jobs);
        Ok(())
    }

    fn check(&self, x: &Rows<'_>, out: &Output<'_>) -> Result<()> {
        let fits = |len: usize, rows: usize, stride: usize, end: usize| {
            let last = rows
                .saturating_sub(1)
                .checked_mul(stride)
                .and_then(|at| at.checked_add(end));
            (rows <= 1 || stride >= end) && (rows == 0 || last.is_some_and(|last| last <= len))
        };
        if !fits(x.data.len(), x.rows, x.stride, self.cols) {
            let message = format!(
                "{} values hold no {} rows of {} with stride {}",
                x.data.len(),
                x.rows,
                self.cols,
                x.stride
            );
            return Err(shape("linear input", message));
        }
        let end = out.column.saturating_add(self.rows);
        if !fits(out.data.len(), x.rows, out.stride, end) {
            let message = format!(
                "{} values hold no {} rows up to column {end} with stride {}",
                out.data.len(),
                x.rows,
                out.stride
            );
            return Err(shape("linear output", message));
        }
        match out.bias {
            Some(bias) if bias.len() != self.rows => Err(shape(
                "linear bias",
                format!("{} values for {} rows", bias.len(), self.rows),
            )),
            _ => Ok(()),
        }
    }
}

/// Checks a source against the stack's `cols` and returns its packed size.
fn packed_bytes(source: &WeightSource<'_>, cols: usize) -> Result<usize> {
    let WeightSource {
        format,
        rows,
        row_stride,
        data,
        ..
    } = source;
    if source.cols != cols {
        return Err(shape(
            "pack",
            format!("parts of {cols} and of {} columns", source.cols),
        ));
    }
    source.check_scales("pack")?;
    let row_bytes = format.row_bytes(cols).ok_or_else(|| {
        shape(
            "pack",
            format!(
                "{cols} columns are not whole blocks of {} in {format:?}",
                format.block_len()
            ),
        )
    })?;
    let needed = match rows {
        0 => Some(0),
        _ => (rows - 1)
            .checked_mul(*row_stride)
            .and_then(|last| last.checked_add(row_bytes)),
    };
    if needed.is_none_or(|needed| needed > data.len()) || (*rows > 1 && *row_stride < row_bytes) {
        let message = format!(
            "{} bytes hold no {rows} rows of {row_bytes} bytes with stride {row_stride}",
            data.len()
        );
        return Err(shape("pack", message));
    }
    resident_bytes(*format, *rows, cols)
        .ok_or_else(|| shape("pack", format!("{rows} x {cols} {format:?} weights overflow")))
}

/// Groups packed by one task: a few hundred KiB at usual widths.
const GROUPS_PER_TASK: usize = 16;

/// Packs a source whose sizes were checked into zeroed `panels`.
fn pack_parallel(source: &WeightSource<'_>, panels: &mut [u8], pool: &Pool) {
    let groups = source.rows.div_ceil(GROUP);
    if panels.is_empty() {
        return;
    }
    let group_bytes = panels.len() / groups;
    let tasks: Vec<std::sync::Mutex<&mut [u8]>> = panels
        .chunks_mut(group_bytes * GROUPS_PER_TASK)
        .map(std::sync::Mutex::new)
        .collect();
    pool.run(tasks.len(), |task| {
        // Each task takes its own lock once: never contended, and it keeps the splitting safe.
        let mut panels = tasks[task]
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for (i, panel) in panels.chunks_mut(group_bytes).enumerate() {
            pack::pack_group(source, task * GROUPS_PER_TASK + i, panel);
        }
    });
}
