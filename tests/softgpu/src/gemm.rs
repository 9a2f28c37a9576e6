//! Matrix products as cuBLAS defines them: column-major, summed in f32, rounded once to the output's format.
//!
//! The sum of an element runs over k in eight lanes and folds them in a fixed order, so it does not depend on how many
//! rows or columns the product has, nor on the threads. Four rows of A and two columns of B at a time keep the lanes
//! of eight sums in registers.

use std::sync::Arc;

use crate::{
    formats::Format,
    memory, pool,
    status::{SUCCESS, Status},
};

const LANES: usize = 8;
/// Rows of op(A) that are converted and multiplied together.
const ROWS: usize = 4;

#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) address: usize,
    pub(crate) format: Format,
    /// Elements between the starts of neighbouring columns.
    pub(crate) ld: usize,
    /// Elements between the matrices of a batch.
    pub(crate) stride: usize,
    /// The product uses the transpose.
    pub(crate) transposed: bool,
}

/// What is done to a sum before it is stored.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epilogue {
    /// Address of m numbers of the output's format, one per row; 0 for none.
    pub(crate) bias: usize,
    pub(crate) relu: bool,
    pub(crate) gelu: bool,
}

/// D = epilogue(alpha scale_a scale_b op(A) op(B) + beta C), op(A) m x k, op(B) k x n.
#[derive(Clone, Copy)]
pub(crate) struct Gemm {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) batch: usize,
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
    pub(crate) c: Matrix,
    pub(crate) d: Matrix,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    pub(crate) epilogue: Epilogue,
    /// Addresses of one f32 each, read when the product runs; 0 for none.
    pub(crate) scales: [usize; 2],
}

/// Why a product is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The numbers contradict each other.
    Shape,
    /// An operand does not lie in device memory.
    Memory,
}

impl Matrix {
    /// Elements from the first to one past the last of `batch` matrices.
    fn extent(&self, rows: usize, columns: usize, batch: usize) -> Option<usize> {
        if rows == 0 || columns == 0 || batch == 0 {
            return Some(0);
        }
        let one = self.ld.checked_mul(columns - 1)?.checked_add(rows)?;
        self.stride.checked_mul(batch - 1)?.checked_add(one)
    }

    fn check(&self, (rows, columns): (usize, usize), batch: usize, what: &str) -> Result<(), Refusal> {
        if self.ld < rows {
            return Err(Refusal::Shape);
        }
        let bytes = self
            .extent(rows, columns, batch)
            .and_then(|n| n.checked_mul(self.format.bytes()));
        memory::check(self.address, bytes.ok_or(Refusal::Shape)?, what).map_err(|_| Refusal::Memory)
    }

    fn of_batch(&self, index: usize) -> Self {
        Self {
            address: self.address + index * self.stride * self.format.bytes(),
            ..*self
        }
    }

    /// Rows and columns as stored, for an operand that is `rows` by `columns` in the product.
    fn stored(&self, rows: usize, columns: usize) -> (usize, usize) {
        if self.transposed {
            (columns, rows)
        } else {
            (rows, columns)
        }
    }

    /// Converts row `row` of the operand of the product.
    ///
    /// # Safety
    /// The row's elements lie in memory that nobody writes meanwhile.
    unsafe fn load_row(&self, row: usize, out: &mut [f32]) {
        let (start, step) = if self.transposed {
            (row * self.ld, 1)
        } else {
            (row, self.ld)
        };
        for (i, value) in out.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *value = unsafe { self.format.read(self.address, start + i * step) };
        }
    }

    /// The operand read the other way round: its rows are this one's columns.
    fn flipped(&self) -> Self {
        Self {
            transposed: !self.transposed,
            ..*self
        }
    }
}

impl Gemm {
    /// Whether all operands lie in device memory.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        let Self { m, n, k, batch, .. } = *self;
        self.a.check(self.a.stored(m, k), batch, "matrix product, A")?;
        self.b.check(self.b.stored(k, n), batch, "matrix product, B")?;
        self.d.check((m, n), batch, "matrix product, D")?;
        if self.beta != 0.0 {
            self.c.check((m, n), batch, "matrix product, C")?;
        }
        if self.epilogue.bias != 0 {
            let bytes = m.checked_mul(self.d.format.bytes()).ok_or(Refusal::Shape)?;
            memory::check(self.epilogue.bias, bytes, "matrix product, bias").map_err(|_| Refusal::Memory)?;
        }
        for scale in self.scales.into_iter().filter(|scale| *scale != 0) {
            memory::check(scale, size_of::<f32>(), "matrix product, scale").map_err(|_| Refusal::Memory)?;
        }
        Ok(())
    }

    /// Computes all matrices of the batch, on the pool.
    pub(crate) fn run(self) -> Status {
        // SAFETY: the scales lie in device memory (`check`); a stream's order protects them.
        let scale: f32 = self
            .scales
            .into_iter()
            .filter(|scale| *scale != 0)
            .map(|scale| unsafe { (scale as *const f32).read_unaligned() })
            .product();
        for index in 0..self.batch {
            let one = Self {
                a: self.a.of_batch(index),
                b: self.b.of_batch(index),
                c: self.c.of_batch(index),
                d: self.d.of_batch(index),
                alpha: self.alpha * scale,
                ..self
            };
            let status = one.run_one();
            if status != SUCCESS {
                return status;
            }
        }
        SUCCESS
    }

    fn run_one(self) -> Status {
        let k = self.k;
        let mut columns = vec![0f32; self.n * k];
        let by_column = self.b.flipped();
        for (j, column) in columns.chunks_exact_mut(k.max(1)).enumerate() {
            // SAFETY: the operand lies in device memory (`check`); a stream's order protects it.
            unsafe { by_column.load_row(j, column) };
        }
        let tiles = self.m.div_ceil(ROWS) as u64;
        // A quarter of a million multiplications are worth a hand-over to another thread.
        let chunk = (1 << 18) / (ROWS * (k + 1) * (self.n + 1)) as u64 + 1;
        let body = move |first: u64, last: u64| {
            let mut rows = vec![0f32; ROWS * k];
            for tile in first..last {
                self.run_tile(tile as usize * ROWS, &mut rows, &columns);
            }
            SUCCESS
        };
        pool::run(tiles, chunk, Arc::new(body))
    }

    /// The rows `[row, row + ROWS)`, as many as there are, times all columns.
    fn run_tile(&self, row: usize, rows: &mut [f32], columns: &[f32]) {
        let k = self.k;
        let count = ROWS.min(self.m - row);
        for i in 0..count {
            // SAFETY: the operand lies in device memory (`check`); a stream's order protects it.
            unsafe { self.a.load_row(row + i, &mut rows[i * k..(i + 1) * k]) };
        }
        let mut column = 0;
        while column < self.n {
            let pair = if column + 1 < self.n { 2 } else { 1 };
            let second = column + pair - 1; // the first again where there is no second
            let sums = dot_tile(rows, [&columns[column * k..][..k], &columns[second * k..][..k]]);
            for j in 0..pair {
                for (i, sums) in sums.iter().take(count).enumerate() {
                    self.store(row + i, column + j, sums[j]);
                }
            }
            column += pair;
        }
    }

    fn store(&self, row: usize, column: usize, sum: f32) {
        let mut value = sum * self.alpha;
        // SAFETY: all operands lie in device memory (`check`), a stream's order protects them, and no other tile has
        // this element.
        unsafe {
            if self.beta != 0.0 {
                value += self.beta * self.c.format.read(self.c.address, column * self.c.ld + row);
            }
            if self.epilogue.bias != 0 {
                value += self.d.format.read(self.epilogue.bias, row);
            }
            if self.epilogue.relu {
                value = value.max(0.0);
            }
            if self.epilogue.gelu {
                let inner = 0.797_884_6 * (value + 0.044_715 * value * value * value);
                value = 0.5 * value * (1.0 + inner.tanh());
            }
            self.d
                .format
                .write(self.d.address, column * self.d.ld + row, value);
        }
    }
}

/// Products of four rows with two columns.
fn dot_tile(rows: &[f32], columns: [&[f32]; 2]) -> [[f32; 2]; ROWS] {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the processor has what the function was compiled for.
        return unsafe { dot_tile_avx2(rows, columns) };
    }
    dot_tile_of(rows, columns, |a, b, sum| a * b + sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dot_tile_avx2(rows: &[f32], columns: [&[f32]; 2]) -> [[f32; 2]; ROWS] {
    dot_tile_of(rows, columns, f32::mul_add)
}

#[inline(always)]
fn dot_tile_of(
    rows: &[f32],
    columns: [&[f32]; 2],
    multiply_add: impl Fn(f32, f32, f32) -> f32,
) -> [[f32; 2]; ROWS] {
    let k = columns[0].len();
    let whole = k - k % LANES;
    let row = |i: usize| &rows[i * k..(i + 1) * k];
    let mut sums = [[[0f32; LANES]; 2]; ROWS];
    for at in (0..whole).step_by(LANES) {
        for (i, sums) in sums.iter_mut().enumerate() {
            let a = &row(i)[at..at + LANES];
            for (sum, column) in sums.iter_mut().zip(columns) {
                let b = &column[at..at + LANES];
                for lane in 0..LANES {
                    sum[lane] = multiply_add(a[lane], b[lane], sum[lane]);
                }
            }
        }
    }
    let mut out = [[0f32; 2]; ROWS];
    for (i, (out, sums)) in out.iter_mut().zip(&mut sums).enumerate() {
        for ((out, sum), column) in out.iter_mut().zip(sums).zip(columns) {
            for at in whole..k {
                sum[at - whole] = multiply_add(row(i)[at], column[at], sum[at - whole]);
            }
            *out = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
        }
    }
    out
}
