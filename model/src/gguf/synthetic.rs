//! Models of any geometry with random weights. Speed does not depend on the values; correctness tests want values that
//! keep activations finite and of order one.

use std::io::{self, Write};

use half::{bf16, f16};

use super::{GgufWriter, TensorDeclaration, WriteError};
use crate::{ModelConfig, RopeScaling, TensorFormat, TensorRole, config::ROPE_FACTORS_TENSOR};

impl GgufWriter {
    /// Keys and tensors of a llama-architecture model of this geometry; `format` chooses each matrix's format (vectors
    /// are always F32). The caller adds the tokenizer's keys, if any, and writes it with [`RandomWeights`].
    ///
    /// # Errors
    /// A row that is not a whole number of the chosen format's blocks.
    pub fn llama(
        config: &ModelConfig,
        format: impl Fn(TensorRole) -> TensorFormat,
    ) -> Result<GgufWriter, WriteError> {
        let mut writer = GgufWriter::new();
        writer.llama_metadata(config);
        for role in config.roles() {
            let Some((rows, cols)) = config.shape(role) else {
                continue;
            };
            let (dims, format) = match role.is_vector() {
                true => (vec![rows], TensorFormat::F32),
                false => (vec![cols, rows], format(role)),
            };
            writer.tensor(role.gguf_name(), &dims, format)?;
        }
        if let RopeScaling::FrequencyFactors { factors } = &config.rope.scaling {
            writer.tensor(ROPE_FACTORS_TENSOR, &[factors.len()], TensorFormat::F32)?;
        }
        Ok(writer)
    }

    fn llama_metadata(&mut self, config: &ModelConfig) {
        self.metadata("general.architecture", "llama");
        let integers = [
            ("block_count", config.num_hidden_layers),
            ("context_length", config.max_position_embeddings),
            ("embedding_length", config.hidden_size),
            ("feed_forward_length", config.intermediate_size),
            ("attention.head_count", config.num_attention_heads),
            ("attention.head_count_kv", config.num_key_value_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.head_dim),
            ("rope.dimension_count", config.rope.rotary_dim),
            ("vocab_size", config.vocab_size),
        ];
        for (key, value) in integers
            .into_iter()
            .chain(config.sliding_window.map(|w| ("attention.sliding_window", w)))
        {
            self.metadata(format!("llama.{key}"), value as u64);
        }
        self.metadata("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps);
        self.metadata("llama.rope.freq_base", config.rope.theta);
        if let RopeScaling::Linear { factor } = config.rope.scaling {
            self.metadata("llama.rope.scaling.type", "linear");
            self.metadata("llama.rope.scaling.factor", factor);
        }
    }
}

/// Fills tensors with values that depend on the seed and the tensor's name alone. Norm weights are near 1, biases and
/// frequency factors as small as they should be, matrices scaled by `1 / sqrt(cols)`, in every format.
#[derive(Clone, Copy, Debug)]
pub struct RandomWeights {
    seed: u64,
}

impl RandomWeights {
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// For [`GgufWriter::write`].
    pub fn fill(&self, tensor: &TensorDeclaration, out: &mut dyn Write) -> io::Result<()> {
        let mut random = SplitMix64(
            tensor
                .name
                .bytes()
                .fold(self.seed, |hash, byte| SplitMix64(hash ^ u64::from(byte)).next()),
        );
        let cols = tensor.dims[0];
        let (mean, deviation) = match (tensor.dims.len(), tensor.name.ends_with("bias")) {
            (1, false) => (1.0, 0.05),
            (1, true) => (0.0, 0.05),
            _ => (0.0, 1.0 / (cols as f32).sqrt()),
        };
        let block_bytes = tensor.format.block_bytes();
        let row_blocks = cols / tensor.format.block_len();
        let mut row = vec![0; row_blocks * block_bytes];
        for _ in 0..tensor.bytes / row.len() as u64 {
            for block in row.chunks_exact_mut(block_bytes) {
                match tensor.format {
                    TensorFormat::F32 => block.copy_from_slice(&random.value(mean, deviation).to_le_bytes()),
                    TensorFormat::F16 => {
                        block.copy_from_slice(&f16::from_f32(random.value(mean, deviation)).to_le_bytes());
                    }
                    TensorFormat::BF16 => {
                        block.copy_from_slice(&bf16::from_f32(random.value(mean, deviation)).to_le_bytes());
                    }
                    quantized => random.block(quantized, deviation, block),
                }
            }
            out.write_all(&row)?;
        }
        Ok(())
    }
}

/// Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform, with this mean and standard deviation.
    fn value(&mut self, mean: f32, deviation: f32) -> f32 {
        let unit = (self.next() >> 40) as f32 / (1 << 24) as f32;
        mean + deviation * 3.0_f32.sqrt() * (2.0 * unit - 1.0)
    }

    /// Random quants and sub-block scales under block scales that give about this deviation around zero.
    fn block(&mut self, format: TensorFormat, deviation: f32, block: &mut [u8]) {
        for chunk in block.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
        // Offsets of the two halves of the block's scale: what multiplies a quant, and the minimum that is added
        // (subtracted in the K formats). `levels` quants spread evenly deviate by levels / sqrt(12); a 6-bit sub-block
        // scale averages 31.5, the signed 8-bit one of Q6_K about 64 in size.
        let step = |levels: f32| deviation * 12.0_f32.sqrt() / levels;
        let (scale_at, scale, minimum) = match format {
            TensorFormat::Q4_0 => (0, step(16.0), None),
            TensorFormat::Q4_1 => (0, step(16.0), Some(-7.5 * step(16.0))),
            TensorFormat::Q5_0 => (0, step(32.0), None),
            TensorFormat::Q5_1 => (0, step(32.0), Some(-15.5 * step(32.0))),
            TensorFormat::Q8_0 => (0, step(256.0), None),
            TensorFormat::Q4_K => (0, step(16.0) / 31.5, Some(7.5 * step(16.0) / 31.5)),
            TensorFormat::Q5_K => (0, step(32.0) / 31.5, Some(15.5 * step(32.0) / 31.5)),
            TensorFormat::Q6_K => (208, step(64.0) / 64.0, None),
            TensorFormat::F32
            | TensorFormat::F16
            | TensorFormat::BF16
            | TensorFormat::Int4
            | TensorFormat::F8_E4M3 => return,
        };
        block[scale_at..scale_at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        if let Some(minimum) = minimum {
            block[2..4].copy_from_slice(&f16::from_f32(minimum).to_le_bytes());
        }
    }
}
