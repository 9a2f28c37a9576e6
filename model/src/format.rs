//! Storage formats of tensors, as facts: block lengths and bytes. How to compute with them is the kernels' business.

use std::fmt;

/// Element format of a tensor (GGUF's names; the block layouts are those of the GGUF specification).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, reason = "the formats' own names")]
pub enum TensorFormat {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
    /// Not of GGUF: 32 weights `d * (code - z)` of AWQ and GPTQ checkpoints, brought into rows of blocks when they are
    /// read. A block is an f16 `d`, an f16 `z`, which is an integer of 0 to 16, and 16 bytes of codes as in Q4_0.
    Int4,
    /// Not of GGUF: 8-bit floats (OCP, E4M3), and one f32 scale for each row, which lies elsewhere.
    F8_E4M3,
}

impl TensorFormat {
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::Int4,
        Self::F8_E4M3,
    ];

    /// Elements of one block: a row's length must be a multiple of it.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 | Self::F8_E4M3 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Int4 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8_E4M3 => 1,
            Self::Q4_0 => 18,
            Self::Q4_1 | Self::Int4 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// GGUF's number for the format (`enum ggml_type`); of a format that is not of GGUF one that GGUF does not use.
    pub const fn gguf_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::BF16 => 30,
            Self::Int4 => INT4_TYPE,
            Self::F8_E4M3 => E4M3_TYPE,
        }
    }

    /// The format of a GGUF type number, if it is one we hold.
    pub fn from_gguf_type(id: u32) -> Option<Self> {
        let mut formats = Self::ALL.into_iter().filter(|format| format.is_gguf());
        formats.find(|format| format.gguf_type() == id)
    }

    /// Whether tensors of GGUF files may have it.
    pub const fn is_gguf(self) -> bool {
        !matches!(self, Self::Int4 | Self::F8_E4M3)
    }

    /// Whether elements are plain floats, readable one by one.
    pub const fn is_dense(self) -> bool {
        self.block_len() == 1
    }

    /// Bytes of a row of `cols` elements; none if `cols` cuts a block or the product overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if cols.is_multiple_of(self.block_len()) {
            (cols / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// Bytes of a `[rows, cols]` matrix in a file; none if `cols` cuts a block or the product overflows.
    pub const fn file_bytes(self, rows: usize, cols: usize) -> Option<usize> {
        match self.row_bytes(cols) {
            Some(row) => row.checked_mul(rows),
            None => None,
        }
    }

    /// Whether the CUDA backend multiplies with the blocks themselves. All other formats are bf16 on a GPU.
    pub const fn stays_quantized_on_gpus(self) -> bool {
        matches!(self, Self::Q4_0 | Self::Q4_1 | Self::Q8_0 | Self::Int4)
    }

    /// Bytes of a `[rows, cols]` matrix as the CUDA backend holds it: the file's blocks; F8_E4M3 padded to
    /// [`E4M3_ALIGN`] rows and elements, with its scales, on a device that multiplies it, and as BF16 on others; else rows
    /// of bf16 padded to [`BF16_ROW_ALIGN`] elements. None if `cols` cuts a block or the product overflows. The memory
    /// plan counts with this function and the kernels allocate by it.
    pub const fn gpu_bytes(self, rows: usize, cols: usize) -> Option<usize> {
        if self.stays_quantized_on_gpus() {
            return self.file_bytes(rows, cols);
        }
        if matches!(self, Self::F8_E4M3) {
            return e4m3_gpu_bytes(rows, cols);
        }
        match cols.checked_next_multiple_of(BF16_ROW_ALIGN) {
            Some(padded) => match padded.checked_mul(2) {
                Some(row) => row.checked_mul(rows),
                None => None,
            },
            None => None,
        }
    }

    /// Bytes of a `[rows, cols]` matrix as the CPU backend holds it: the file's blocks regrouped into tiles of
    /// [`TILE_ROWS`] rows, with an odd number of 32-element blocks padded to an even one, and the sub-block scales of the
    /// K formats unpacked to whole bytes. F8_E4M3 becomes BF16 there, its scales multiplied in. None if `cols` cuts a
    /// block or the product overflows. The memory plan counts with this function and the kernels assert it.
    pub const fn resident_bytes(self, rows: usize, cols: usize) -> Option<usize> {
        let block_bytes = match self {
            Self::Q4_K => 148,
            Self::Q5_K => 180,
            Self::Q6_K => 212,
            Self::F8_E4M3 => Self::BF16.block_bytes(),
            _ => self.block_bytes(),
        };
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        let blocks = match self.block_len() {
            32 => (cols / 32).checked_next_multiple_of(2),
            len => Some(cols / len),
        };
        match (rows.checked_next_multiple_of(TILE_ROWS), blocks) {
            (Some(rows), Some(blocks)) => match blocks.checked_mul(block_bytes) {
                Some(row) => row.checked_mul(rows),
                None => None,
            },
            _ => None,
        }
    }
}

impl fmt::Display for TensorFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// See [`TensorFormat::gguf_type`].
const INT4_TYPE: u32 = 256;
const E4M3_TYPE: u32 = 257;

/// Rows of bf16 matrices begin at multiples of so many elements on a GPU: 16 bytes, as cublasLt's fast kernels want it.
pub const BF16_ROW_ALIGN: usize = 8;

/// Rows and columns of E4M3 matrices on a GPU are multiples of it, as cublasLt wants them (cuBLAS documentation, "FP8").
pub const E4M3_ALIGN: usize = 16;

/// The codes of padded rows, and one f32 for each of them.
const fn e4m3_gpu_bytes(rows: usize, cols: usize) -> Option<usize> {
    let padded = (
        rows.checked_next_multiple_of(E4M3_ALIGN),
        cols.checked_next_multiple_of(E4M3_ALIGN),
    );
    match padded {
        (Some(rows), Some(cols)) => match cols.checked_add(size_of::<f32>()) {
            Some(row) => row.checked_mul(rows),
            None => None,
        },
        _ => None,
    }
}

/// Rows that the CPU backend's matrix kernels work on at a time.
pub const TILE_ROWS: usize = 8;

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    F32,
    F16,
    BF16,
    /// 8-bit floats of the OCP specification, with no infinity and no scale.
    E4M3,
    /// 8-bit integers, with a scale for each position and head. On CPUs only.
    INT8,
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl KvDtype {
    /// Of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::E4M3 | Self::INT8 => 1,
        }
    }

    /// Bytes of the scale of a position and head of K, or of V.
    pub const fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 | Self::E4M3 => 0,
            Self::INT8 => 4,
        }
    }

    /// Bytes of K, or of V, of a position and head.
    pub const fn row_bytes(self, head_dim: usize) -> usize {
        head_dim * self.bytes() + self.scale_bytes()
    }
}
