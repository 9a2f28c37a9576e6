//! Random matrices and the ways to multiply with them.

use std::ops::Range;
use std::sync::LazyLock;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use phalanx_kernels::WeightSource;
use phalanx_kernels::cpu::linear::{Isa, Output, PackedWeight, Rows, Scratch};
use phalanx_kernels::cpu::memory::Arena;
use phalanx_kernels::cpu::pool::Pool;
use phalanx_kernels::cpu::quant::{dequantize_row, quantize_row};
use phalanx_model::TensorFormat;

pub(crate) static POOLS: LazyLock<[Pool; 3]> = LazyLock::new(|| [1, 2, 3].map(|n| Pool::new(n).unwrap()));

/// xorshift64*.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// In -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Activations with an outlier here and there.
    pub(crate) fn activations(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|i| self.unit() * if i % 97 == 0 { 8.0 } else { 1.0 })
            .collect()
    }
}

pub(crate) fn is_dense(format: TensorFormat) -> bool {
    format.block_len() == 1
}

/// Byte offsets of a block's f16 scales.
pub(crate) fn scale_offsets(format: TensorFormat) -> &'static [usize] {
    match format {
        TensorFormat::Q4_0 | TensorFormat::Q5_0 | TensorFormat::Q8_0 | TensorFormat::Int4 => &[0],
        TensorFormat::Q4_1 | TensorFormat::Q5_1 | TensorFormat::Q4_K | TensorFormat::Q5_K => &[0, 2],
        TensorFormat::Q6_K => &[208],
        TensorFormat::F32 | TensorFormat::F16 | TensorFormat::BF16 | TensorFormat::F8_E4M3 => &[],
    }
}

/// Scales of rows.
static ONES: [f32; 1024] = [1.0; 1024];

/// Rows in a file's layout.
pub(crate) struct Matrix {
    pub(crate) format: TensorFormat,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Vec<u8>,
}

impl Matrix {
    /// Any codes and integer scales; f16 scales of 2^-8 to 2^-5 with either sign.
    pub(crate) fn random(format: TensorFormat, rows: usize, cols: usize, rng: &mut Noise) -> Self {
        if is_dense(format) {
            let weights: Vec<f32> = (0..rows * cols).map(|_| rng.unit()).collect();
            return Self {
                format,
                rows,
                cols,
                data: quantize_row(format, &weights).unwrap(),
            };
        }
        let bytes = rows * format.row_bytes(cols).unwrap();
        let mut data: Vec<u8> = (0..bytes).map(|_| (rng.next() >> 32) as u8).collect();
        for block in data.chunks_exact_mut(format.block_bytes()) {
            for &at in scale_offsets(format) {
                let bits = (7 + rng.next() as u16 % 3) << 10 | rng.next() as u16 & 0x83ff;
                block[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            }
            if format == TensorFormat::Int4 {
                let zero_point = half::f16::from_f32((rng.next() % 17) as f32);
                block[2..4].copy_from_slice(&zero_point.to_le_bytes());
            }
        }
        Self {
            format,
            rows,
            cols,
            data,
        }
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.cols).unwrap()
    }

    /// Rows `range` of the matrix.
    pub(crate) fn source(&self, range: Range<usize>) -> WeightSource<'_> {
        let stride = self.row_bytes();
        WeightSource {
            format: self.format,
            rows: range.len(),
            cols: self.cols,
            data: &self.data[range.start * stride..range.end * stride],
            row_stride: stride,
            row_scales: (self.format == TensorFormat::F8_E4M3).then(|| &ONES[range]),
        }
    }

    pub(crate) fn pack(&self) -> PackedWeight {
        pack(&[self.source(0..self.rows)])
    }

    pub(crate) fn dequantized(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in self
            .data
            .chunks_exact(self.row_bytes())
            .zip(out.chunks_exact_mut(self.cols))
        {
            dequantize_row(self.format, row, out).unwrap();
        }
        out
    }

    /// By candle, or by the definition where candle lacks the format.
    pub(crate) fn dequantized_by_others(&self) -> Vec<f32> {
        match self.format {
            TensorFormat::Int4 => return self.data.chunks_exact(20).flat_map(int4_weights).collect(),
            // `tests/e4m3.rs` compares it with its definition.
            TensorFormat::F8_E4M3 => return self.dequantized(),
            _ => {}
        }
        let dtype = match self.format {
            TensorFormat::F32 => GgmlDType::F32,
            TensorFormat::F16 => GgmlDType::F16,
            TensorFormat::BF16 => GgmlDType::BF16,
            TensorFormat::Q4_0 => GgmlDType::Q4_0,
            TensorFormat::Q4_1 => GgmlDType::Q4_1,
            TensorFormat::Q5_0 => GgmlDType::Q5_0,
            TensorFormat::Q5_1 => GgmlDType::Q5_1,
            TensorFormat::Q8_0 => GgmlDType::Q8_0,
            TensorFormat::Q4_K => GgmlDType::Q4K,
            TensorFormat::Q5_K => GgmlDType::Q5K,
            TensorFormat::Q6_K => GgmlDType::Q6K,
            TensorFormat::Int4 | TensorFormat::F8_E4M3 => unreachable!("decoded above"),
        };
        let storage = QStorage::from_data((&self.data[..]).into(), &Device::Cpu, dtype).unwrap();
        let tensor = QTensor::new(storage, (self.rows, self.cols)).unwrap();
        tensor
            .dequantize(&Device::Cpu)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }
}

/// `d * code - d * z`, rounded once.
fn int4_weights(block: &[u8]) -> impl Iterator<Item = f32> {
    let half = |at: usize| half::f16::from_le_bytes([block[at], block[at + 1]]).to_f64();
    let (scale, zero_point) = (half(0), half(2));
    let codes = block[4..].iter();
    let codes = codes
        .clone()
        .map(|byte| byte & 15)
        .chain(codes.map(|byte| byte >> 4));
    codes
        .map(move |code| (scale * f64::from(code) - scale * zero_point) as f32)
        .collect::<Vec<_>>()
        .into_iter()
}

pub(crate) fn pack(parts: &[WeightSource<'_>]) -> PackedWeight {
    PackedWeight::pack(parts, &POOLS[1], &Arena::new()).unwrap()
}

/// `weight` times the rows of `x`, with `threads` threads.
pub(crate) fn multiply(weight: &PackedWeight, x: &[f32], isa: Isa, threads: usize) -> Vec<f32> {
    let rows = x.len() / weight.cols();
    let mut y = vec![f32::NAN; rows * weight.rows()];
    let x = Rows {
        data: x,
        rows,
        stride: weight.cols(),
    };
    let out = Output {
        data: &mut y,
        stride: weight.rows(),
        column: 0,
        bias: None,
    };
    weight
        .matmul(&POOLS[threads - 1], &mut Scratch::new(isa), x, out)
        .unwrap();
    y
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The columns of `blocks` 32-blocks, or the next number the format allows.
pub(crate) fn cols(format: TensorFormat, blocks: usize) -> usize {
    (blocks * 32).next_multiple_of(format.block_len())
}
