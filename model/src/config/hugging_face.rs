//! Hyper-parameters from a Hugging Face `config.json`. Field names and defaults: `LlamaConfig` and `MistralConfig` of
//! the transformers library.

use serde_json::{Map, Value};

use super::{
    ConfigError, ModelConfig, RopeConfig, RopeLayout, RopeScaling, check_architecture, size,
    yarn_attention_factor,
};

type Result<T> = std::result::Result<T, ConfigError>;

/// Longest `config.json` accepted, bytes.
pub(crate) const MAX_CONFIG_BYTES: usize = 1 << 20;

impl ModelConfig {
    /// Reads and validates the configuration of a Hugging Face checkpoint.
    ///
    /// # Errors
    /// Not JSON, a missing field, a value of the wrong type or out of range, an architecture or feature that is not
    /// supported.
    pub fn from_config_json(json: &[u8]) -> Result<Self> {
        if json.len() > MAX_CONFIG_BYTES {
            let limit = format!("at most {MAX_CONFIG_BYTES}");
            return Err(ConfigError::out_of_range(
                "bytes of config.json",
                json.len(),
                limit,
            ));
        }
        let object = serde_json::from_slice(json).map_err(|error| ConfigError::Json(error.to_string()))?;
        let fields = Fields::new(&object);
        let architecture = fields
            .str("model_type")?
            .ok_or_else(|| ConfigError::missing("model_type"))?;
        check_architecture(architecture)?;
        fields.refuse_unsupported()?;
        let mistral = architecture == "mistral";
        let hidden_size = fields.required_size("hidden_size")?;
        let num_attention_heads = fields.required_size("num_attention_heads")?;
        if num_attention_heads == 0 {
            return Err(ConfigError::out_of_range("num_attention_heads", 0, "at least 1"));
        }
        let head_dim = fields
            .size("head_dim")?
            .unwrap_or(hidden_size / num_attention_heads);
        let max_position_embeddings =
            fields
                .size("max_position_embeddings")?
                .unwrap_or(if mistral { 131_072 } else { 2048 });
        let sliding_window = match object.contains_key("sliding_window") {
            true => fields.size("sliding_window")?,
            false => mistral.then_some(4096),
        };
        let kv_heads = fields.size("num_key_value_heads")?;
        let config = Self {
            architecture: architecture.to_owned(),
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size")?,
            num_hidden_layers: fields.required_size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: kv_heads.unwrap_or(if mistral { 8 } else { num_attention_heads }),
            head_dim,
            vocab_size: fields.required_size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: fields.rope(head_dim, max_position_embeddings)?,
            tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: fields.bool("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.bool("mlp_bias")?.unwrap_or(false),
            sliding_window,
        };
        config.validate()?;
        Ok(config)
    }
}

/// A JSON object with typed access; null counts as absent.
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// Of the object's own name, in errors.
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    /// Of a whole file.
    pub(crate) fn new(object: &'a Map<String, Value>) -> Self {
        Self { object, prefix: "" }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.object.is_empty()
    }

    /// Whether there is such a key.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(|value| !value.is_null())
    }

    /// The values of all keys.
    pub(crate) fn values(&self) -> impl Iterator<Item = &'a Value> {
        self.object.values()
    }

    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match convert(value) {
                Some(converted) => Ok(Some(converted)),
                None => Err(ConfigError::out_of_range(
                    self.name(key),
                    shortened(value),
                    expected,
                )),
            },
        }
    }

    pub(crate) fn integer(&self, key: &str) -> Result<Option<i64>> {
        self.typed(key, "an integer", Value::as_i64)
    }

    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a non-negative integer", |value| value.as_u64().map(size))
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| ConfigError::missing(self.name(key)))
    }

    fn number(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a number", |value| {
            value.as_f64().map(|number| number as f32)
        })
    }

    fn required_number(&self, key: &str) -> Result<f32> {
        self.number(key)?
            .ok_or_else(|| ConfigError::missing(self.name(key)))
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn str(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn object(&self, key: &'static str, prefix: &'static str) -> Result<Option<Fields<'a>>> {
        let object = self.typed(key, "an object", Value::as_object)?;
        Ok(object.map(|object| Fields { object, prefix }))
    }

    fn refuse_unsupported(&self) -> Result<()> {
        if let Some(activation) = self.str("hidden_act")?.filter(|&activation| activation != "silu") {
            let reason = "only silu is supported";
            return Err(ConfigError::unsupported(
                "hidden_act",
                format!("{activation:?}"),
                reason,
            ));
        }
        Ok(())
    }

    fn rope(&self, head_dim: usize, max_position_embeddings: usize) -> Result<RopeConfig> {
        // Version 5 of the library moved theta and scaling into one object.
        let (parameters, old) = (
            self.object("rope_parameters", "rope_parameters.")?,
            self.object("rope_scaling", "rope_scaling.")?,
        );
        let scaling = parameters.as_ref().or(old.as_ref());
        let nested = |key| parameters.as_ref().map_or(Ok(None), |fields| fields.number(key));
        let partial = match self.number("partial_rotary_factor")? {
            None => nested("partial_rotary_factor")?,
            given => given,
        };
        let theta = match self.number("rope_theta")? {
            None => nested("rope_theta")?,
            given => given,
        };
        Ok(RopeConfig {
            theta: theta.unwrap_or(10_000.0),
            // Saturates where the factor is out of range; validation refuses the result.
            rotary_dim: (f64::from(partial.unwrap_or(1.0)) * head_dim as f64) as usize,
            layout: RopeLayout::Half,
            scaling: scaling.map_or(Ok(RopeScaling::None), |fields| {
                fields.scaling(max_position_embeddings)
            })?,
        })
    }

    fn scaling(&self, max_position_embeddings: usize) -> Result<RopeScaling> {
        let kind = match self.str("rope_type")? {
            None => self.str("type")?,
            given => given,
        };
        match kind.unwrap_or("default") {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear {
                factor: self.required_number("factor")?,
            }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: self.required_number("factor")?,
                low_freq_factor: self.required_number("low_freq_factor")?,
                high_freq_factor: self.required_number("high_freq_factor")?,
                original_max_position_embeddings: self.required_size("original_max_position_embeddings")?,
            }),
            "yarn" => self.yarn(max_position_embeddings),
            "dynamic" => {
                let reason = "frequencies that change with the sequence's length invalidate cached keys; \
                              supported: default, linear, llama3, yarn";
                Err(ConfigError::unsupported(
                    self.name("rope_type"),
                    "\"dynamic\"",
                    reason,
                ))
            }
            other => {
                let reason = "supported: default, linear, llama3, yarn";
                Err(ConfigError::unsupported(
                    self.name("rope_type"),
                    format!("{other:?}"),
                    reason,
                ))
            }
        }
    }

    fn yarn(&self, max_position_embeddings: usize) -> Result<RopeScaling> {
        if self.bool("truncate")? == Some(false) {
            let reason = "the ramp's bounds are always rounded";
            return Err(ConfigError::unsupported(self.name("truncate"), false, reason));
        }
        let factor = self.required_number("factor")?;
        let attention_factor = match (self.number("attention_factor")?, self.number("mscale")?) {
            (Some(given), _) => given,
            (None, Some(mscale)) => match self.number("mscale_all_dim")? {
                Some(all) => yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all),
                None => yarn_attention_factor(factor, 1.0),
            },
            (None, None) => yarn_attention_factor(factor, 1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: self
                .size("original_max_position_embeddings")?
                .unwrap_or(max_position_embeddings),
            beta_fast: self.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.number("beta_slow")?.unwrap_or(1.0),
            attention_factor,
        })
    }
}

/// A JSON value as an error shows it.
fn shortened(value: &Value) -> String {
    const LIMIT: usize = 64;
    let mut text = value.to_string();
    if text.len() > LIMIT {
        text.truncate(text.floor_char_boundary(LIMIT));
        text.push('…');
    }
    text
}
