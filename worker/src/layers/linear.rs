//! Matrix multiplications, split by output column or by input row.

use phalanx_kernels::{Backend, Columns, Communicator, GatherLayout, Heads, Linear, Result};
use phalanx_model::TensorParallelStyle;

use super::{Split, Step};

/// A weight and the bias added to its product.
pub struct Dense<B: Backend> {
    pub weight: B::Weight,
    pub bias: Option<B::Vector>,
}

impl<B: Backend> Dense<B> {
    fn view(&self) -> Linear<'_, B> {
        Linear {
            weight: &self.weight,
            bias: self.bias.as_ref(),
        }
    }
}

/// Holds some of the output features; its output stays on the rank, from column 0 on.
pub struct ColumnParallelLinear<B: Backend> {
    dense: Dense<B>,
}

impl<B: Backend> ColumnParallelLinear<B> {
    pub fn new(dense: Dense<B>) -> Self {
        Self { dense }
    }
    /// `out[:, ..shard] = x · weightᵀ (+ bias)`.
    pub fn forward(&self, backend: &B, out: &mut B::Buffer, x: &B::Buffer, rows: usize) -> Result<()> {
        let out = Columns {
            buffer: out,
            start: 0,
        };
        backend.linear(out, x, &self.dense.view(), rows)
    }
}

/// Query, key and value projections of this rank's heads, stacked.
pub struct QkvParallelLinear<B: Backend> {
    linear: ColumnParallelLinear<B>,
    pub heads: Heads,
}

impl<B: Backend> QkvParallelLinear<B> {
    pub fn new(dense: Dense<B>, heads: Heads) -> Self {
        Self {
            linear: ColumnParallelLinear::new(dense),
            heads,
        }
    }
    /// A row of `out` becomes `[q heads | k heads | v heads]`.
    pub fn forward(&self, backend: &B, out: &mut B::Buffer, x: &B::Buffer, rows: usize) -> Result<()> {
        self.linear.forward(backend, out, x, rows)
    }
}

/// Gate and up projections of this rank's inner columns, stacked.
pub struct MergedColumnParallelLinear<B: Backend> {
    linear: ColumnParallelLinear<B>,
}

impl<B: Backend> MergedColumnParallelLinear<B> {
    pub fn new(dense: Dense<B>) -> Self {
        Self {
            linear: ColumnParallelLinear::new(dense),
        }
    }
    /// A row of `out` becomes `[gate | up]`.
    pub fn forward(&self, backend: &B, out: &mut B::Buffer, x: &B::Buffer, rows: usize) -> Result<()> {
        self.linear.forward(backend, out, x, rows)
    }
}

/// Takes an activation that the ranks hold in parts and gives all of them the whole output.
///
/// Reduce style is Megatron's: each rank multiplies its input features, then the products are summed. Gather style
/// completes the input first, so that every output element is summed whole, by one rank, in one order.
pub struct RowParallelLinear<B: Backend> {
    dense: Dense<B>,
    input: Split,
    output: Split,
}

impl<B: Backend> RowParallelLinear<B> {
    /// `dense` holds the output features `output.own()` in gather style, the input features `input.own()` in reduce
    /// style, where only one rank may have the bias.
    pub fn new(dense: Dense<B>, input: Split, output: Split) -> Self {
        Self { dense, input, output }
    }

    /// The column of the input buffer from which on this rank writes its part.
    pub fn input_start(&self) -> usize {
        self.input.start()
    }

    /// `out = x · weightᵀ (+ bias)`, whole on every rank. In gather style `x` and `out` are communicator buffers, in
    /// reduce style `out` is.
    pub fn forward<C: Communicator<B>>(
        &self,
        step: &mut Step<'_, B, C>,
        out: &mut B::Buffer,
        x: &mut B::Buffer,
    ) -> Result<()> {
        let gather = self.input.style == TensorParallelStyle::Gather;
        let (comm, rows, trace) = (&mut *step.comm, step.rows, step.trace);
        if gather {
            let columns = GatherLayout::Columns(&self.input.columns);
            trace.op("all_gather", || comm.all_gather(x, rows, columns))?;
        }
        let part = Columns {
            buffer: &mut *out,
            start: if gather { self.output.start() } else { 0 },
        };
        trace.op("linear", || {
            step.backend.linear(part, x, &self.dense.view(), rows)
        })?;
        if gather {
            let columns = GatherLayout::Columns(&self.output.columns);
            trace.op("all_gather", || comm.all_gather(out, rows, columns))
        } else {
            trace.op("all_reduce", || comm.all_reduce(out, rows))
        }
    }
}
