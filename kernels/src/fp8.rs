//! Matrices of [`E4m3`] with one scale per row, made from those of a model file: online quantization.

use phalanx_model::TensorFormat;

use crate::cpu::quant::dequantize_row;
use crate::{E4m3, KernelError, Result, WeightSource};

/// `[rows, cols]` codes, row-major; a weight is its code times the scale of its row (output feature).
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Matrix {
    cols: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Fp8Matrix {
    /// Rounds each row's weights to codes of its own scale, which brings its largest magnitude to [`E4m3::MAX`].
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the source is quantized already, or shorter than it says.
    pub fn quantize(source: &WeightSource<'_>) -> Result<Self> {
        let wrong = |message| KernelError::Shape {
            op: "quantization to fp8",
            message,
        };
        let WeightSource { format, cols, .. } = *source;
        if !matches!(format, TensorFormat::F32 | TensorFormat::F16 | TensorFormat::BF16) {
            return Err(wrong(format!("{format} weights are not plain numbers")));
        }
        let row_bytes = format
            .row_bytes(cols)
            .ok_or_else(|| wrong(format!("rows of {cols}")))?;
        let (mut codes, mut scales) = (Vec::new(), Vec::with_capacity(source.rows));
        codes.reserve_exact(source.rows.saturating_mul(cols));
        let mut values = vec![0.0; cols];
        for row in 0..source.rows {
            let bytes = row
                .checked_mul(source.row_stride)
                .and_then(|start| source.data.get(start..start.checked_add(row_bytes)?))
                .ok_or_else(|| wrong(format!("row {row} lies outside of {} bytes", source.data.len())))?;
            dequantize_row(format, bytes, &mut values)?;
            let scale = scale_of(&values);
            codes.extend(values.iter().map(|value| E4m3::from_f32(value / scale).to_bits()));
            scales.push(scale);
        }
        Ok(Self { cols, codes, scales })
    }

    pub fn source(&self) -> WeightSource<'_> {
        WeightSource {
            format: TensorFormat::F8_E4M3,
            rows: self.scales.len(),
            cols: self.cols,
            data: &self.codes,
            row_stride: self.cols,
            row_scales: Some(&self.scales),
        }
    }
}

/// 1 where there is nothing to scale, or the scale's inverse would not be a number.
fn scale_of(values: &[f32]) -> f32 {
    let largest = values
        .iter()
        .fold(0.0f32, |largest, value| largest.max(value.abs()));
    if largest > 1e-30 { largest / E4m3::MAX } else { 1.0 }
}
