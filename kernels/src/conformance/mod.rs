//! What every [`Backend`] must do, as tests generic over it: each op against its definition in f64, with outputs full of
//! NaN so that rows and columns that are not the op's own must stay as they are, and the batch invariance that the
//! crate promises, bit by bit.
//!
//! A backend calls [`conformance_suite!`](crate::conformance_suite) in a test file of its own.

mod activations;
mod attention;
mod candidates;
mod count;
mod graphs;
mod linear;
mod random;

pub use activations::{embedding, fused_add_rms_norm, rms_norm, rotary_embedding, select_rows, silu_and_mul};
pub use attention::{
    attention_is_of_its_definition, attention_is_the_same_however_prompts_are_cut,
    attention_is_the_same_on_any_rank, attention_over_long_contexts_is_the_same,
};
pub use candidates::{
    candidates_are_the_best, candidates_do_not_depend_on_the_split, noise_draws_from_the_softmax,
    not_finite_logits_are_reported,
};
pub use count::counts_are_exact;
pub use graphs::graphs_change_no_bit;
pub use linear::{linear, linear_is_the_same_on_any_rank, linear_of_mixed_formats};

use std::ops::Range;

use crate::{Backend, BatchInput};

/// Largest errors of an op's outputs, relative to the largest magnitude of the row.
#[derive(Clone, Copy, Debug)]
pub struct Tolerances {
    pub norm: f64,
    pub rotary: f64,
    pub silu: f64,
    /// Whatever the cache's element type: the reference rounds K and V as the cache does.
    pub attention: f64,
    pub linear_dense: f64,
    /// Activations are rounded to 8 bits.
    pub linear_quantized: f64,
    /// E4M3 weights: on CPUs they are rounded to bf16; GPUs that multiply E4M3 round the activations to it.
    pub linear_fp8: f64,
    /// Of `sum(exp(x - max))`.
    pub statistics: f64,
}

impl Tolerances {
    /// For arithmetic in f32.
    pub const F32: Self = Self {
        norm: 1e-6,
        rotary: 3e-7,
        silu: 1e-6,
        attention: 3e-6,
        linear_dense: 1e-5,
        linear_quantized: 2e-2,
        linear_fp8: 4e-3,
        statistics: 2e-6,
    };
    /// For products of bf16, summed in f32.
    pub const BF16: Self = Self {
        norm: 8e-3,
        rotary: 8e-3,
        silu: 1.6e-2,
        attention: 2e-2,
        linear_dense: 2e-2,
        linear_quantized: 2e-2,
        linear_fp8: 6e-2,
        statistics: 1e-5,
    };
}

/// Thread counts under which results must be the same.
const THREADS: [usize; 3] = [1, 2, 3];

/// Tests of `$make`, a `Fn(threads) -> Backend`, with the errors `$tolerances` allows. Attributes are those of each test,
/// e.g. `#[ignore = "needs a device"]`.
#[macro_export]
macro_rules! conformance_suite {
    ($(#[$attribute:meta])* $name:ident, $make:expr, $tolerances:expr) => {
        mod $name {
            use super::*;
            $crate::conformance_suite!(@tests [$(#[$attribute])*] $make, $tolerances;
                rms_norm fused_add_rms_norm silu_and_mul rotary_embedding embedding select_rows
                linear linear_is_the_same_on_any_rank linear_of_mixed_formats
                attention_is_of_its_definition attention_is_the_same_however_prompts_are_cut
                attention_is_the_same_on_any_rank
                candidates_are_the_best candidates_do_not_depend_on_the_split
                noise_draws_from_the_softmax not_finite_logits_are_reported
                counts_are_exact graphs_change_no_bit);
        }
    };
    (@tests $attributes:tt $make:expr, $tolerances:expr; $($test:ident)*) => {
        $($crate::conformance_suite!(@test $attributes $test, $make, $tolerances);)*
    };
    (@test [$(#[$attribute:meta])*] $test:ident, $make:expr, $tolerances:expr) => {
        #[test]
        $(#[$attribute])*
        fn $test() {
            $crate::conformance::$test(&$make, &$tolerances);
        }
    };
}

/// A buffer with `values` in its first rows and NaN in `spare` more.
fn filled<B: Backend>(backend: &B, values: &[f32], width: usize, spare: usize) -> B::Buffer {
    let rows = values.len() / width + spare;
    let mut all = values.to_vec();
    all.resize(rows * width, f32::NAN);
    let mut buffer = backend.buffer(rows, width).unwrap();
    backend.write(&mut buffer, &all).unwrap();
    buffer
}

/// A buffer full of NaN.
fn poisoned<B: Backend>(backend: &B, rows: usize, width: usize) -> B::Buffer {
    filled(backend, &[], width, rows)
}

/// The columns `columns` of the first `rows` rows of a buffer that was poisoned; all else must still be NaN.
fn written<B: Backend>(
    backend: &B,
    buffer: &B::Buffer,
    shape: [usize; 2],
    rows: usize,
    columns: Range<usize>,
) -> Vec<f32> {
    let all = backend.read(buffer, shape[0]).unwrap();
    let mut own = Vec::new();
    for (row, values) in all.chunks_exact(shape[1]).enumerate() {
        for (column, &value) in values.iter().enumerate() {
            if row < rows && columns.contains(&column) {
                own.push(value);
            } else {
                assert!(
                    value.is_nan(),
                    "row {row}, column {column} was overwritten with {value}"
                );
            }
        }
    }
    own
}

/// Asserts that rows of `width` are as close to `want` as the tolerance says.
fn assert_close(what: &str, got: &[f32], want: &[f64], width: usize, tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (row, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
        // f32 ends near 1e-38: what is that small counts as 0.
        let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs())).max(1e-25);
        for (column, (&got, &want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(got) - want).abs() / scale;
            assert!(
                error <= tolerance,
                "{what}: row {row}, column {column} is {got}, not {want}: error {error:.2e} of the row's largest"
            );
        }
    }
}

/// Asserts that two results are equal, bit by bit.
fn assert_same(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let differs = got.iter().zip(want).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(at) = differs {
        panic!("{what}: value {at} is {}, not {}", got[at], want[at]);
    }
}

/// Asserts that `op`, a function of a backend and of the rows it works on, gives a row the same bits alone as among
/// others, and with any number of threads. Returns the result for all rows.
fn assert_row_wise<B: Backend>(
    make: &impl Fn(usize) -> B,
    rows: usize,
    op: impl Fn(&B, Range<usize>) -> Vec<f32>,
) -> Vec<f32> {
    let all = op(&make(1), 0..rows);
    for threads in THREADS {
        let backend = make(threads);
        assert_same(&format!("{threads} threads"), &op(&backend, 0..rows), &all);
        let width = all.len() / rows;
        for first in 0..rows {
            let len = 1 + first % 3;
            let some = first..rows.min(first + len);
            let want = &all[some.start * width..some.end * width];
            assert_same(
                &format!("rows {some:?} of {rows} alone"),
                &op(&backend, some.clone()),
                want,
            );
        }
    }
    all
}

/// A step of one sequence whose rows are `tokens`, at positions from 0.
fn simple_batch(tokens: &[u32]) -> BatchInput {
    let rows = tokens.len() as u32;
    BatchInput {
        token_ids: tokens.to_vec(),
        positions: (0..rows).collect(),
        slot_mapping: (0..rows).collect(),
        cu_seqlens_q: vec![0, rows],
        context_lens: vec![rows],
        block_tables: (0..rows.div_ceil(16)).collect(),
        cu_blocks: vec![0, rows.div_ceil(16)],
    }
}
