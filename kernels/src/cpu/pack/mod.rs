//! Weights as the kernels read them: 8 rows interleaved.
//!
//! Eight weight rows form a group. Their weights are interleaved 4 at a time along K, so that one 256-bit vector holds 4
//! consecutive K of 8 outputs, and one broadcast of 4 int8 activations serves all 8. A group is a sequence of chunks
//! and the groups follow each other: a thread reads one sequential stream. Rows past the last and blocks past the end of
//! an odd K are zeros, whose scale 0 adds nothing.
//!
//! | format           | chunk                        | bytes of a chunk, in order                                  |
//! |------------------|------------------------------|-------------------------------------------------------------|
//! | Q4_0             | 2 blocks of 32               | 16 f16 d, 2 x 128 nibbles                                   |
//! | Q4_1             | 2 blocks of 32               | 16 f16 d, 16 f16 m, 2 x 128 nibbles                         |
//! | Int4             | 2 blocks of 32               | 16 f16 d, 16 f16 z, 2 x 128 nibbles                         |
//! | Q5_0, Q5_1       | as Q4_0, Q4_1                | a block has 128 nibbles and 32 bytes of fifth bits          |
//! | Q8_0             | 2 blocks of 32               | 16 f16 d, 2 x 256 bytes (even K in offset binary)           |
//! | Q4_K, Q5_K       | 1 super-block of 256         | 8 f16 d, 8 f16 -dmin, 8 x (8 u8 scales, 8 u8 mins), blocks  |
//! | Q6_K             | 1 super-block of 256         | 8 f16 d, 8 x 8 pairs of i8 scales, 16 unused, 8 x (128 nibbles, 64 of bit pairs) |
//! | F32, F16, BF16   | one K                        | 8 numbers                                                   |
//! | F8_E4M3          | one K                        | 8 bf16, each the code times the scale of its row            |
//!
//! Byte `step * 32 + lane * 4 + i` of a block's nibbles holds K `4 * step + i` of row `lane` in its low and K
//! `16 + 4 * step + i` in its high half: the halves of a block stay as in GGUF.

mod codes;
mod dense;
pub(crate) mod headers;

use phalanx_model::TensorFormat;

use super::quant::{BLOCK, Block, is_dense};
use crate::WeightSource;

/// Rows interleaved in a group.
pub(crate) const GROUP: usize = 8;

/// How a format's chunk of [`GROUP`] rows lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Blocks of 32 along K; 0 for dense formats, whose chunk is one K.
    pub(crate) blocks: usize,
    /// Bytes before the first block's codes.
    pub(crate) header: usize,
    /// Bytes of one block's codes.
    pub(crate) block_bytes: usize,
    /// Bytes of the chunk.
    pub(crate) bytes: usize,
}

impl Layout {
    pub(crate) const fn of(format: TensorFormat) -> Self {
        match format {
            TensorFormat::F32 => Self {
                blocks: 0,
                header: 0,
                block_bytes: 0,
                bytes: 4 * GROUP,
            },
            TensorFormat::F16 | TensorFormat::BF16 | TensorFormat::F8_E4M3 => Self {
                blocks: 0,
                header: 0,
                block_bytes: 0,
                bytes: 2 * GROUP,
            },
            TensorFormat::Q4_0 => Self::coded(2, 32, 128),
            TensorFormat::Q4_1 | TensorFormat::Int4 => Self::coded(2, 64, 128),
            TensorFormat::Q5_0 => Self::coded(2, 32, 160),
            TensorFormat::Q5_1 => Self::coded(2, 64, 160),
            TensorFormat::Q8_0 => Self::coded(2, 32, 256),
            TensorFormat::Q4_K => Self::coded(8, 160, 128),
            TensorFormat::Q5_K => Self::coded(8, 160, 160),
            TensorFormat::Q6_K => Self::coded(8, 160, 192),
        }
    }

    const fn coded(blocks: usize, header: usize, block_bytes: usize) -> Self {
        Self {
            blocks,
            header,
            block_bytes,
            bytes: header + blocks * block_bytes,
        }
    }

    /// K of a chunk.
    pub(crate) const fn chunk_cols(&self) -> usize {
        if self.blocks == 0 { 1 } else { self.blocks * BLOCK }
    }
}

/// What weights of a format are once they are packed.
pub(crate) const fn resident_format(format: TensorFormat) -> TensorFormat {
    match format {
        TensorFormat::F8_E4M3 => TensorFormat::BF16,
        format => format,
    }
}

/// Bytes `rows` x `cols` weights of `format` take when packed: those of the file, but for rows padded to a multiple of
/// 8, an odd number of 32-blocks padded to an even one, and 1 to 3 % more for Q4_K, Q5_K and Q6_K. None if `cols` cuts a
/// block of the format or the size overflows.
pub fn resident_bytes(format: TensorFormat, rows: usize, cols: usize) -> Option<usize> {
    format.row_bytes(cols)?;
    let layout = Layout::of(format);
    let chunks = cols.div_ceil(layout.chunk_cols());
    chunks
        .checked_mul(layout.bytes)?
        .checked_mul(rows.div_ceil(GROUP))
}

/// Whether a block adds a min to its weights.
pub(crate) const fn has_min(format: TensorFormat) -> bool {
    matches!(
        format,
        TensorFormat::Q4_1
            | TensorFormat::Q5_1
            | TensorFormat::Q4_K
            | TensorFormat::Q5_K
            | TensorFormat::Int4
    )
}

/// Whether block scales are small integers scaled once per chunk.
pub(crate) const fn is_super(format: TensorFormat) -> bool {
    matches!(
        format,
        TensorFormat::Q4_K | TensorFormat::Q5_K | TensorFormat::Q6_K
    )
}

/// Bits of a code.
pub(crate) const fn bits(format: TensorFormat) -> usize {
    match format {
        TensorFormat::Q4_0 | TensorFormat::Q4_1 | TensorFormat::Q4_K | TensorFormat::Int4 => 4,
        TensorFormat::Q5_0 | TensorFormat::Q5_1 | TensorFormat::Q5_K => 5,
        TensorFormat::Q6_K => 6,
        TensorFormat::Q8_0 => 8,
        TensorFormat::F16 | TensorFormat::BF16 | TensorFormat::F8_E4M3 => 16,
        TensorFormat::F32 => 32,
    }
}

/// What is subtracted from a code.
pub(crate) const fn offset(format: TensorFormat) -> i32 {
    match format {
        TensorFormat::Q4_0 => 8,
        TensorFormat::Q5_0 => 16,
        TensorFormat::Q6_K => 32,
        TensorFormat::Q8_0 => 128,
        _ => 0,
    }
}

/// Packs the rows `group * 8 ..` of `source` into `out`, which is zeroed and as long as a group.
pub(crate) fn pack_group(source: &WeightSource<'_>, group: usize, out: &mut [u8]) {
    let layout = Layout::of(source.format);
    let row_bytes = source.cols / source.format.block_len() * source.format.block_bytes();
    for (lane, row) in (group * GROUP..source.rows.min((group + 1) * GROUP)).enumerate() {
        let scale = source.row_scales.and_then(|scales| scales.get(row));
        let row = &source.data[row * source.row_stride..][..row_bytes];
        if let Some(scale) = scale {
            dense::pack_scaled_row(row, *scale, lane, out);
            continue;
        }
        if is_dense(source.format) {
            dense::pack_row(source.format, row, lane, out);
            continue;
        }
        for index in 0..source.cols / BLOCK {
            let block = Block::of_row(source.format, row, index);
            let chunk = &mut out[index / layout.blocks * layout.bytes..][..layout.bytes];
            let at = index % layout.blocks;
            headers::put(source.format, row, index, (lane, &mut *chunk));
            let vectors = &mut chunk[layout.header + at * layout.block_bytes..][..layout.block_bytes];
            codes::put(source.format, vectors, lane, &block.codes);
        }
    }
}

/// Block `at` of row `lane` of a chunk.
pub(crate) fn block(format: TensorFormat, chunk: &[u8], lane: usize, at: usize) -> Block {
    let layout = Layout::of(format);
    let vectors = &chunk[layout.header + at * layout.block_bytes..][..layout.block_bytes];
    let (scale, min) = headers::get(format, chunk, lane, at);
    Block {
        codes: codes::get(format, vectors, lane),
        offset: offset(format),
        scale,
        min,
    }
}

/// Decodes row `lane` of a group into `out`, which is `cols` long.
pub(crate) fn dequantize_row(format: TensorFormat, group: &[u8], lane: usize, out: &mut [f32]) {
    if is_dense(format) {
        dense::unpack_row(format, group, lane, out);
        return;
    }
    let layout = Layout::of(format);
    for (index, out) in out.chunks_exact_mut(BLOCK).enumerate() {
        let chunk = &group[index / layout.blocks * layout.bytes..][..layout.bytes];
        block(format, chunk, lane, index % layout.blocks).dequantize(out);
    }
}
