//! AWQ's and GPTQ's matrices, brought into rows of blocks as the backends take them: no weight changes its value.
//!
//! Layouts: AutoAWQ's GEMM version and GPTQModel's (AutoGPTQ's) formats 1 and 2. Weight `(n, k)` is
//! `scales[k / group][n] * (code[n][k] - zero[k / group][n])`. Eight codes share a little-endian word, four bits each from
//! the lowest on: GPTQ's are of eight inputs in rising order, AWQ's of eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7.
//! Words of zero points are of eight outputs, AWQ's in that same order.

use std::ops::Range;

use phalanx_model::TensorFormat;
use phalanx_model::quantization::{GptqZeros, Int4Packing, Int4Quantization};

use crate::error::check;
use crate::{KernelError, Result};

const OP: &str = "int4 weights";
const BLOCK: usize = 32;
/// Codes in a word.
const CODES: usize = 8;
const WORD_BYTES: usize = 4;
/// The zero point of symmetric quantization, which Q4_0 implies.
const SYMMETRIC_ZERO: u32 = 8;
/// Where in its word AWQ has the code of output `n % 8`.
const AWQ_PLACES: [usize; CODES] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A whole matrix `[rows = outputs, cols = inputs]` as its checkpoint has it.
#[derive(Clone, Copy, Debug)]
pub struct Int4Source<'a> {
    pub quantization: Int4Quantization,
    pub rows: usize,
    pub cols: usize,
    /// Words: AWQ `[cols, rows / 8]`, GPTQ `[cols / 8, rows]`.
    pub qweight: &'a [u8],
    /// Words `[groups, rows / 8]`.
    pub qzeros: &'a [u8],
    /// f16 `[groups, rows]`.
    pub scales: &'a [u8],
    /// i32 `[cols]`: the group of each column. Empty: they follow each other.
    pub g_idx: &'a [u8],
}

impl Int4Source<'_> {
    /// What the rows become: Q4_0 where every zero point is 8, else Int4.
    pub fn format(&self) -> TensorFormat {
        if self.quantization.symmetric {
            TensorFormat::Q4_0
        } else {
            TensorFormat::Int4
        }
    }

    /// The columns `cols` of the rows `rows`, one row of blocks after another.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a tensor is of another size than the matrix needs, `cols` cuts a block or either range is
    /// not of this matrix; if a zero point is not 8 in a matrix that is said to be symmetric, or groups do not follow each
    /// other. [`KernelError::OutOfMemory`].
    pub fn blocks(&self, rows: Range<usize>, cols: Range<usize>) -> Result<Vec<u8>> {
        self.check(&rows, &cols)?;
        let format = self.format();
        let row_bytes = format.row_bytes(cols.len()).unwrap_or(usize::MAX);
        let bytes = row_bytes.saturating_mul(rows.len());
        let mut out = Vec::new();
        out.try_reserve_exact(bytes)
            .map_err(|_| KernelError::OutOfMemory {
                what: "weights that are loaded",
                requested: bytes,
                free: crate::cpu::memory::free_memory(),
            })?;
        out.resize(bytes, 0);
        // Rows whose codes share words are read together.
        for eight in (rows.start / CODES * CODES..rows.end).step_by(CODES) {
            for (index, first) in cols.clone().step_by(BLOCK).enumerate() {
                let codes = self.codes(eight, first);
                for (row, codes) in (eight..).zip(&codes).filter(|(row, _)| rows.contains(row)) {
                    let at = (row - rows.start) * row_bytes + index * format.block_bytes();
                    self.write_block((row, first), codes, &mut out[at..at + format.block_bytes()])?;
                }
            }
        }
        Ok(out)
    }

    /// The block of row `row` that begins at column `first`.
    fn write_block(&self, (row, first): (usize, usize), codes: &[u8; BLOCK], out: &mut [u8]) -> Result<()> {
        let group = first / self.group_size();
        let at = (group * self.rows + row) * 2;
        let (head, nibbles) = out.split_at_mut(out.len() - BLOCK / 2);
        head[..2].copy_from_slice(&self.scales[at..at + 2]);
        let zero = self.zero_point(group, row);
        if self.quantization.symmetric {
            check(OP, zero == SYMMETRIC_ZERO, || {
                format!(
                    "the zero point of row {row} in group {group} is {zero}, {SYMMETRIC_ZERO} in symmetric quantization"
                )
            })?;
        } else {
            // At most 16, which f16 holds.
            head[2..].copy_from_slice(&half::f16::from_f32(zero as f32).to_le_bytes());
        }
        for (k, nibbles) in nibbles.iter_mut().enumerate() {
            *nibbles = codes[k] | codes[k + BLOCK / 2] << 4;
        }
        Ok(())
    }

    /// The codes of the rows `eight..eight + 8` and the columns `first..first + 32`.
    fn codes(&self, eight: usize, first: usize) -> [[u8; BLOCK]; CODES] {
        let mut codes = [[0; BLOCK]; CODES];
        match self.quantization.packing {
            Int4Packing::Awq => {
                for k in 0..BLOCK {
                    let word = word(self.qweight, (first + k) * (self.rows / CODES) + eight / CODES);
                    for (codes, place) in codes.iter_mut().zip(AWQ_PLACES) {
                        codes[k] = code(word, place) as u8;
                    }
                }
            }
            Int4Packing::Gptq { .. } => {
                for step in 0..BLOCK / CODES {
                    for (lane, codes) in codes.iter_mut().enumerate() {
                        let word = word(self.qweight, (first / CODES + step) * self.rows + eight + lane);
                        for k in 0..CODES {
                            codes[step * CODES + k] = code(word, k) as u8;
                        }
                    }
                }
            }
        }
        codes
    }

    fn zero_point(&self, group: usize, row: usize) -> u32 {
        let word = word(self.qzeros, group * (self.rows / CODES) + row / CODES);
        match self.quantization.packing {
            Int4Packing::Awq => code(word, AWQ_PLACES[row % CODES]),
            Int4Packing::Gptq { zeros } => {
                let stored = code(word, row % CODES);
                match zeros {
                    GptqZeros::LessOne => stored + 1,
                    GptqZeros::Plain => stored,
                }
            }
        }
    }

    /// A multiple of the block length, or all columns.
    fn group_size(&self) -> usize {
        self.quantization.group_size.unwrap_or(self.cols).max(1)
    }

    fn check(&self, rows: &Range<usize>, cols: &Range<usize>) -> Result<()> {
        let Self { rows: n, cols: k, .. } = *self;
        let whole = |value: usize, unit: usize| value.is_multiple_of(unit);
        check(
            OP,
            whole(n, CODES) && whole(k, BLOCK) && self.grouped_by_blocks(),
            || format!("{n} x {k} in groups of {}", self.group_size()),
        )?;
        let groups = k.div_ceil(self.group_size());
        let words = n.checked_mul(k).map(|codes| codes / CODES);
        let sizes = [
            (
                "qweight",
                self.qweight.len(),
                words.and_then(|n| n.checked_mul(WORD_BYTES)),
            ),
            (
                "qzeros",
                self.qzeros.len(),
                groups.checked_mul(n / CODES * WORD_BYTES),
            ),
            (
                "scales",
                self.scales.len(),
                groups.checked_mul(n).and_then(|n| n.checked_mul(2)),
            ),
        ];
        for (tensor, found, needed) in sizes {
            check(OP, needed == Some(found), || {
                format!("{tensor} has {found} bytes for a matrix of {n} x {k}")
            })?;
        }
        let inside = rows.start <= rows.end && rows.end <= n && cols.start <= cols.end && cols.end <= k;
        check(
            OP,
            inside && whole(cols.start, BLOCK) && whole(cols.len(), BLOCK),
            || format!("rows {rows:?}, columns {cols:?} of {n} x {k}, cut at multiples of {BLOCK}"),
        )?;
        let odd = |(k, group): (usize, &[u8; WORD_BYTES])| {
            u32::from_le_bytes(*group) as usize != k / self.group_size()
        };
        let groups_follow = !self.g_idx.as_chunks().0.iter().enumerate().any(odd);
        check(
            OP,
            groups_follow && [0, k * WORD_BYTES].contains(&self.g_idx.len()),
            || {
                "g_idx: groups of columns that do not follow each other (desc_act) are not supported"
                    .to_owned()
            },
        )
    }

    fn grouped_by_blocks(&self) -> bool {
        self.quantization
            .group_size
            .is_none_or(|size| size > 0 && size.is_multiple_of(BLOCK))
    }
}

/// Word `index`.
fn word(words: &[u8], index: usize) -> u32 {
    let at = index * WORD_BYTES;
    u32::from_le_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]])
}

/// The code at place `place` of a word.
fn code(word: u32, place: usize) -> u32 {
    word >> (4 * place) & 15
}
