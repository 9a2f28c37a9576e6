//! Rotary position embedding (Su et al., "RoFormer", 2021).

use phalanx_model::RopeLayout;

use super::batch::CpuBatch;
use super::buffer::{CpuBuffer, RowWriter};
use super::exec::{Exec, check};
use super::math::sin_cos;
use super::simd::{Kernel, Simd};
use crate::{Heads, Result};

/// A model has one or two sets of frequencies; a caller that keeps changing them must not fill the memory.
const MAX_TABLES: usize = 4;

/// Which pairs rotate, and how fast.
#[derive(Clone, Copy)]
pub(crate) struct Rotary<'a> {
    /// Radians per position of each pair.
    pub(crate) inverse_frequencies: &'a [f32],
    pub(crate) attention_factor: f32,
    pub(crate) layout: RopeLayout,
}

/// Cosines and sines of every row of a batch, times the attention factor.
pub(crate) struct RopeTable {
    inverse_frequencies: Vec<f32>,
    attention_factor: f32,
    /// `[rows, cosines | sines]`
    values: Vec<f32>,
}

impl RopeTable {
    /// Angles are products in f64, exact for every u32 position: position 131,071 is as accurate as position 1.
    fn new(exec: Exec<'_>, rotary: Rotary<'_>, positions: &[u32]) -> Self {
        let pairs = rotary.inverse_frequencies.len();
        let factor = f64::from(rotary.attention_factor);
        let mut values = vec![0.0; positions.len() * 2 * pairs];
        let rows = RowWriter::new(&mut values, 2 * pairs);
        exec.for_rows(positions.len(), 64 * pairs, |range| {
            for i in range {
                // SAFETY: each row is given to one task, and used once in it.
                let (cos, sin) = unsafe { rows.row(i) }.split_at_mut(pairs);
                for ((cos, sin), &frequency) in cos.iter_mut().zip(sin).zip(rotary.inverse_frequencies) {
                    let (s, c) = sin_cos(f64::from(positions[i]) * f64::from(frequency));
                    (*cos, *sin) = ((c * factor) as f32, (s * factor) as f32);
                }
            }
        });
        Self {
            inverse_frequencies: rotary.inverse_frequencies.to_vec(),
            attention_factor: rotary.attention_factor,
            values,
        }
    }

    fn is_of(&self, rotary: Rotary<'_>) -> bool {
        self.inverse_frequencies == rotary.inverse_frequencies
            && self.attention_factor.to_bits() == rotary.attention_factor.to_bits()
    }
}

/// Rotates the q and k heads of `qkv` in place.
pub(crate) fn rotary_embedding(
    exec: Exec<'_>,
    qkv: &mut CpuBuffer,
    rotary: Rotary<'_>,
    heads: &Heads,
    batch: &CpuBatch,
) -> Result<()> {
    const OP: &str = "rotary_embedding";
    let positions = &batch.input().positions;
    let pairs = rotary.inverse_frequencies.len();
    qkv.check(OP, positions.len(), heads.qkv_width())?;
    check(OP, 2 * pairs <= heads.head_dim, || {
        format!("{pairs} pairs in heads of {}", heads.head_dim)
    })?;
    if pairs == 0 {
        return Ok(());
    }

    let mut tables = batch.rope_tables();
    let table = match tables.iter().position(|t| t.is_of(rotary)) {
        Some(index) => &tables[index],
        None => {
            if tables.len() == MAX_TABLES {
                tables.clear();
            }
            tables.push(RopeTable::new(exec, rotary, positions));
            &tables[tables.len() - 1]
        }
    };
    let values = &table.values;

    let rotated = (heads.num_q + heads.num_kv) * heads.head_dim;
    let qkv = qkv.writer();
    exec.for_rows(positions.len(), rotated, |rows| {
        for row in rows {
            // SAFETY: each row is given to one task, and used once in it.
            let heads_of_row = unsafe { qkv.part(row, 0..rotated) };
            let (cos, sin) = values[row * 2 * pairs..][..2 * pairs].split_at(pairs);
            let layout = rotary.layout;
            exec.isa.run(Rotate {
                heads: heads_of_row,
                head_dim: heads.head_dim,
                cos,
                sin,
                layout,
            });
        }
    });
    Ok(())
}

struct Rotate<'a> {
    /// Heads of one row, one after another.
    heads: &'a mut [f32],
    head_dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    layout: RopeLayout,
}

impl Kernel for Rotate<'_> {
    type Output = ();

    /// Plain loops, which the compiler turns into vectors of this instruction set; the bits are the same on all.
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let pairs = self.cos.len();
        for head in self.heads.chunks_exact_mut(self.head_dim) {
            let rotations = self.cos.iter().zip(self.sin);
            match self.layout {
                RopeLayout::Half => {
                    let (first, second) = head[..2 * pairs].split_at_mut(pairs);
                    for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(rotations) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
                RopeLayout::Interleaved => {
                    for ([a, b], (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(rotations) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
            }
        }
    }
}
