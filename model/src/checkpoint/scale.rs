//! The scales of E4M3 matrices: a tensor `weight_scale` beside `weight`, of one number or one for each row.

use half::bf16;

use super::{CheckpointError, TensorInfo};
use crate::{
    TensorFormat, TensorRole,
    safetensors::{SafeTensorsDirectory, StoredTensor},
};

const FORMATS: [TensorFormat; 2] = [TensorFormat::F32, TensorFormat::BF16];

/// Where the scales of a matrix lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ScaleInfo {
    name: String,
    /// One of [`FORMATS`].
    format: TensorFormat,
    /// Of the matrix.
    rows: usize,
    /// One, or as many as rows.
    count: usize,
    file: usize,
    offset: usize,
    bytes: usize,
}

/// Whether a tensor may be of E4M3: the matrices of layers.
pub(super) fn may_have_scales(role: TensorRole) -> bool {
    matches!(role, TensorRole::Layer { .. }) && !role.is_vector()
}

impl ScaleInfo {
    /// The scales of the matrix `weight`.
    ///
    /// # Errors
    /// None, or scales of another shape or format than can be read.
    pub(super) fn find<B>(
        directory: &SafeTensorsDirectory<B>,
        weight: &str,
        matrix: &TensorInfo,
    ) -> Result<Self, CheckpointError> {
        let name = format!("{weight}_scale");
        let Some(tensor) = directory.tensors.get(&name) else {
            let by_blocks = format!("{weight}_scale_inv");
            return Err(match directory.tensors.get(&by_blocks) {
                Some(_) => CheckpointError::Format {
                    tensor: by_blocks,
                    expected: format!("`{name}`"),
                    found: "scales of blocks, which are not supported".to_owned(),
                },
                None => CheckpointError::Missing {
                    tensor: name,
                    rows: matrix.rows,
                    cols: 1,
                },
            });
        };
        Self::check(name, tensor, matrix.rows)
    }

    fn check(name: String, tensor: &StoredTensor, rows: usize) -> Result<Self, CheckpointError> {
        let count = match tensor.shape[..] {
            [] | [1] | [1, 1] => 1,
            [count] | [count, 1] if count == rows => count,
            _ => {
                return Err(CheckpointError::Shape {
                    tensor: name,
                    expected: vec![rows, 1],
                    found: tensor.shape.clone(),
                });
            }
        };
        let format = tensor.format().filter(|format| FORMATS.contains(format));
        let Some(format) = format else {
            return Err(CheckpointError::Format {
                tensor: name,
                expected: "one of F32, BF16".to_owned(),
                found: format!("{:?}", tensor.dtype),
            });
        };
        Ok(Self {
            name,
            format,
            rows,
            count,
            file: tensor.file,
            offset: tensor.offset,
            bytes: tensor.bytes,
        })
    }

    /// One scale for each row of the matrix.
    ///
    /// # Errors
    /// A scale that is no finite number.
    pub(super) fn read<B: AsRef<[u8]>>(&self, maps: &[B]) -> Result<Vec<f32>, CheckpointError> {
        let bytes = maps.get(self.file).and_then(|map| {
            let end = self.offset.checked_add(self.bytes)?;
            map.as_ref().get(self.offset..end)
        });
        let bytes = bytes.unwrap_or_default();
        let mut scales: Vec<f32> = match self.format {
            TensorFormat::BF16 => {
                let words = bytes.as_chunks().0.iter();
                words.map(|&word| bf16::from_le_bytes(word).to_f32()).collect()
            }
            _ => {
                let words = bytes.as_chunks().0.iter();
                words.map(|&word| f32::from_le_bytes(word)).collect()
            }
        };
        if let Some(at) = scales.iter().position(|scale| !scale.is_finite()) {
            return Err(CheckpointError::Format {
                tensor: self.name.clone(),
                expected: "finite numbers".to_owned(),
                found: format!("{} at {at}", scales[at]),
            });
        }
        if self.count == 1 {
            scales = vec![scales.first().copied().unwrap_or(f32::NAN); self.rows];
        }
        Ok(scales)
    }
}
