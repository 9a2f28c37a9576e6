//! Matrices of AWQ and GPTQ checkpoints: three tensors each, in words of eight codes.

use safetensors::tensor::Dtype;

use crate::{
    TensorFormat, TensorInfo,
    checkpoint::{CheckpointError, TensorLayout},
    quantization::{Int4Packing, Int4Quantization},
    safetensors::{SafeTensorsDirectory, StoredTensor},
};

/// Codes in a word.
const CODES: usize = 8;

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index into [`crate::Checkpoint::maps`].
    pub file: usize,
    /// From the start of that file.
    pub offset: usize,
    pub bytes: usize,
}

/// Where the tensors of a matrix `[rows, cols]` lie. Weight `(n, k)` is `scales[k / group][n]` times its code less its
/// zero point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Int4Tensors {
    pub quantization: Int4Quantization,
    /// AWQ: `[cols, rows / 8]` words; GPTQ: `[cols / 8, rows]`.
    pub qweight: Span,
    /// `[groups, rows / 8]` words.
    pub qzeros: Span,
    /// `[groups, rows]` f16.
    pub scales: Span,
    /// GPTQ: the group of each column, `[cols]` i32, if it is stored.
    pub g_idx: Option<Span>,
}

/// Where a matrix whose `weight` would be called `name` lies, if it is quantized.
///
/// # Errors
/// A tensor that is missing or of another type or shape than its quantization says.
pub(crate) fn find<B>(
    directory: &SafeTensorsDirectory<B>,
    name: &str,
    quantization: Int4Quantization,
    [rows, cols]: [usize; 2],
) -> Result<Option<TensorInfo>, CheckpointError> {
    let Some(module) = name.strip_suffix(".weight") else {
        return Ok(None);
    };
    if !directory.tensors.contains_key(&format!("{module}.qweight")) {
        return Ok(None);
    }
    let module = Module { directory, module };
    let groups = cols.div_ceil(quantization.group_size.unwrap_or(cols).max(1));
    let words = match quantization.packing {
        Int4Packing::Awq => [cols, rows.div_ceil(CODES)],
        Int4Packing::Gptq { .. } => [cols.div_ceil(CODES), rows],
    };
    let format = if quantization.symmetric {
        TensorFormat::Q4_0
    } else {
        TensorFormat::Int4
    };
    if !rows.is_multiple_of(CODES) || !cols.is_multiple_of(format.block_len()) {
        return Err(CheckpointError::Format {
            tensor: format!("{}.qweight", module.module),
            expected: format!("rows in eights and columns in blocks of {}", format.block_len()),
            found: format!("of a matrix of {rows} x {cols}"),
        });
    }
    let qweight = module.tensor("qweight", Dtype::I32, &words)?;
    let tensors = Int4Tensors {
        quantization,
        qweight,
        qzeros: module.tensor("qzeros", Dtype::I32, &[groups, rows / CODES])?,
        scales: module.tensor("scales", Dtype::F16, &[groups, rows])?,
        g_idx: match quantization.packing {
            Int4Packing::Gptq { .. } if module.stored("g_idx").is_some() => {
                Some(module.tensor("g_idx", Dtype::I32, &[cols])?)
            }
            _ => None,
        },
    };
    Ok(Some(TensorInfo {
        format,
        rows,
        cols,
        file: qweight.file,
        offset: qweight.offset,
        bytes: qweight.bytes,
        layout: TensorLayout::Int4(tensors),
    }))
}

/// A quantized module of a directory.
struct Module<'a, B> {
    directory: &'a SafeTensorsDirectory<B>,
    module: &'a str,
}

impl<B> Module<'_, B> {
    fn stored(&self, part: &str) -> Option<&StoredTensor> {
        self.directory.tensors.get(&format!("{}.{part}", self.module))
    }

    fn tensor(&self, part: &str, dtype: Dtype, shape: &[usize]) -> Result<Span, CheckpointError> {
        let tensor = format!("{}.{part}", self.module);
        let Some(stored) = self.stored(part) else {
            let (rows, cols) = (shape[0], shape.get(1).copied().unwrap_or(1));
            return Err(CheckpointError::Missing { tensor, rows, cols });
        };
        if stored.dtype != dtype {
            return Err(CheckpointError::Format {
                tensor,
                expected: format!("{dtype:?}"),
                found: format!("{:?}", stored.dtype),
            });
        }
        if stored.shape != shape {
            return Err(CheckpointError::Shape {
                tensor,
                expected: shape.to_vec(),
                found: stored.shape.clone(),
            });
        }
        Ok(Span {
            file: stored.file,
            offset: stored.offset,
            bytes: stored.bytes,
        })
    }
}
