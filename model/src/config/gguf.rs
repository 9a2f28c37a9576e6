//! Hyper-parameters from a GGUF file's metadata. Key names: the GGUF specification, "LLM" section.

use super::{
    ConfigError, ModelConfig, RopeConfig, RopeLayout, RopeScaling, check_architecture, size,
    yarn_attention_factor,
};
use crate::{TensorFormat, gguf::Gguf};

type Result<T> = std::result::Result<T, ConfigError>;

/// Per-frequency factors of the rotary embedding.
pub(crate) const ROPE_FACTORS_TENSOR: &str = "rope_freqs.weight";

impl ModelConfig {
    /// Reads and validates the configuration of a model in a GGUF file.
    ///
    /// # Errors
    /// A missing key, a value of the wrong type or out of range, an architecture or feature that is not supported.
    pub fn from_gguf<B: AsRef<[u8]>>(file: &Gguf<B>) -> Result<Self> {
        let architecture = file
            .str("general.architecture")?
            .ok_or_else(|| ConfigError::missing("general.architecture"))?;
        check_architecture(architecture)?;
        let keys = Keys { file, architecture };
        keys.refuse_unsupported()?;
        let hidden_size = keys.required_size("embedding_length")?;
        let num_attention_heads = keys.required_size("attention.head_count")?;
        if num_attention_heads == 0 {
            return Err(ConfigError::out_of_range(
                keys.name("attention.head_count"),
                0,
                "at least 1",
            ));
        }
        let head_dim = keys
            .size("attention.key_length")?
            .unwrap_or(hidden_size / num_attention_heads);
        let value_dim = keys.size("attention.value_length")?.unwrap_or(head_dim);
        if value_dim != head_dim {
            let limit = format!("attention.key_length, {head_dim}");
            return Err(ConfigError::out_of_range(
                keys.name("attention.value_length"),
                value_dim,
                limit,
            ));
        }
        let rotary_dim = keys.size("rope.dimension_count")?.unwrap_or(head_dim);
        let config = Self {
            architecture: architecture.to_owned(),
            hidden_size,
            intermediate_size: keys.required_size("feed_forward_length")?,
            num_hidden_layers: keys.required_size("block_count")?,
            num_attention_heads,
            num_key_value_heads: keys
                .size("attention.head_count_kv")?
                .unwrap_or(num_attention_heads),
            head_dim,
            vocab_size: keys.vocab_size()?,
            max_position_embeddings: keys.required_size("context_length")?,
            rms_norm_eps: keys
                .number("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| ConfigError::missing(keys.name("attention.layer_norm_rms_epsilon")))?,
            rope: RopeConfig {
                theta: keys.number("rope.freq_base")?.unwrap_or(10_000.0),
                rotary_dim,
                layout: RopeLayout::Interleaved,
                scaling: keys.scaling()?,
            },
            tie_word_embeddings: file.tensor("output.weight").is_none(),
            attention_bias: file.tensor("blk.0.attn_q.bias").is_some(),
            mlp_bias: file.tensor("blk.0.ffn_gate.bias").is_some(),
            sliding_window: keys
                .size("attention.sliding_window")?
                .filter(|&window| window > 0),
        };
        config.validate()?;
        Ok(config)
    }
}

/// The keys under the architecture's name.
struct Keys<'a, B> {
    file: &'a Gguf<B>,
    architecture: &'a str,
}

impl<B: AsRef<[u8]>> Keys<'_, B> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.file.u64(&self.name(key))?.map(size))
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| ConfigError::missing(self.name(key)))
    }

    fn number(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.file.f64(&self.name(key))?.map(|value| value as f32))
    }

    fn refuse_unsupported(&self) -> Result<()> {
        if let Some(experts) = self.size("expert_count")?.filter(|&experts| experts > 0) {
            let reason = "mixtures of experts are not supported";
            return Err(ConfigError::unsupported(
                self.name("expert_count"),
                experts,
                reason,
            ));
        }
        match self.file.u64("split.count")? {
            Some(parts @ 2..) => {
                let reason = "files in several parts are not supported; merge them with llama-gguf-split";
                Err(ConfigError::unsupported("split.count", parts, reason))
            }
            _ => Ok(()),
        }
    }

    fn vocab_size(&self) -> Result<usize> {
        if let Some(vocab_size) = self.size("vocab_size")? {
            return Ok(vocab_size);
        }
        let tokens = self.file.array("tokenizer.ggml.tokens")?;
        tokens
            .map(|tokens| tokens.len())
            .ok_or_else(|| ConfigError::missing(self.name("vocab_size")))
    }

    fn scaling(&self) -> Result<RopeScaling> {
        let key = self.name("rope.scaling.type");
        let kind = self.file.str(&key)?;
        let factor = match self.number("rope.scaling.factor")? {
            // Older files have the linear factor alone, under this name.
            None if kind.is_none() => self.number("rope.scale_linear")?,
            factor => factor,
        };
        let scaling = match (kind, factor) {
            (Some("none"), _) | (None, None) => RopeScaling::None,
            (Some("linear"), Some(factor)) | (None, Some(factor)) => RopeScaling::Linear { factor },
            (Some("yarn"), Some(factor)) => self.yarn(factor)?,
            (Some("linear" | "yarn"), None) => {
                return Err(ConfigError::missing(self.name("rope.scaling.factor")));
            }
            (Some(kind), _) => {
                let reason = "supported: none, linear, yarn, and the factors of rope_freqs.weight";
                return Err(ConfigError::unsupported(key, format!("{kind:?}"), reason));
            }
        };
        match (self.frequency_factors()?, scaling) {
            (None, scaling) => Ok(scaling),
            (Some(factors), RopeScaling::None) => Ok(RopeScaling::FrequencyFactors { factors }),
            (Some(factors), RopeScaling::Linear { factor }) => Ok(RopeScaling::FrequencyFactors {
                factors: factors.into_iter().map(|f| f * factor).collect(),
            }),
            (Some(_), _) => {
                let reason = "it cannot be combined with rope_freqs.weight";
                Err(ConfigError::unsupported(key, "yarn", reason))
            }
        }
    }

    fn yarn(&self, factor: f32) -> Result<RopeScaling> {
        let original_max_position_embeddings = match self.size("rope.scaling.original_context_length")? {
            Some(length) => length,
            None => self.required_size("context_length")?,
        };
        let extra = self.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast: self.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            attention_factor: extra * yarn_attention_factor(factor, 1.0),
        })
    }

    fn frequency_factors(&self) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.file.tensor(ROPE_FACTORS_TENSOR) else {
            return Ok(None);
        };
        if tensor.format != Some(TensorFormat::F32) || tensor.dims().len() != 1 {
            let (kind, reason) = (tensor.type_id, "it must be a vector of F32, type 0");
            return Err(ConfigError::unsupported(
                format!("{ROPE_FACTORS_TENSOR} type"),
                kind,
                reason,
            ));
        }
        let bytes = self.file.bytes().as_ref().get(tensor.data).unwrap_or_default();
        let (values, _) = bytes.as_chunks::<4>();
        Ok(Some(
            values.iter().map(|&value| f32::from_le_bytes(value)).collect(),
        ))
    }
}
