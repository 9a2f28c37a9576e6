//! How a Hugging Face checkpoint is quantized: `quantization_config` of its `config.json`. Which of its matrices are, its
//! tensors say: a quantized one has a `qweight` and no `weight`.

mod fp8;

use crate::config::{ConfigError, Fields};

/// What `quantization_config` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// 4-bit integers in groups along the input features, 8 of them in an `I32`.
    Int4(Int4Quantization),
    /// E4M3, with a scale for each matrix or each of its output features: a quantized matrix has a `weight` of that type
    /// and a `weight_scale`.
    Fp8,
}

/// AWQ (Lin et al., 2023) and GPTQ (Frantar et al., 2022), as AutoAWQ and GPTQModel store them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int4Quantization {
    pub packing: Int4Packing,
    /// Input features that share a scale and a zero point, a multiple of 32. None: all of them.
    pub group_size: Option<usize>,
    /// Every zero point is 8.
    pub symmetric: bool,
}

/// Where the codes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int4Packing {
    /// Eight output features to a word.
    Awq,
    /// Eight input features to a word.
    Gptq { zeros: GptqZeros },
}

/// What GPTQ's `qzeros` hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptqZeros {
    /// Zero points minus one: `checkpoint_format` is `gptq`.
    LessOne,
    /// Zero points: `checkpoint_format` is `gptq_v2`.
    Plain,
}

impl Quantization {
    /// Reads `quantization_config`. None if there is none.
    ///
    /// # Errors
    /// Not JSON, or a value that is missing, out of range or not supported, with its key.
    pub fn from_config_json(json: &[u8]) -> Result<Option<Self>, ConfigError> {
        let object = serde_json::from_slice(json).map_err(|error| ConfigError::Json(error.to_string()))?;
        let top = Fields::new(&object);
        let Some(fields) = top.object("quantization_config", "quantization_config.")? else {
            return Ok(None);
        };
        let method = fields
            .str("quant_method")?
            .ok_or_else(|| ConfigError::missing("quantization_config.quant_method"))?;
        match method {
            "awq" => fields.awq().map(|int4| Some(Self::Int4(int4))),
            "gptq" => fields.gptq().map(|int4| Some(Self::Int4(int4))),
            "fp8" => fields.fp8().map(|()| Some(Self::Fp8)),
            "compressed-tensors" => fields.compressed_tensors().map(|()| Some(Self::Fp8)),
            other => Err(fields.refused(
                "quant_method",
                format!("{other:?}"),
                "supported: awq, gptq, fp8, compressed-tensors",
            )),
        }
    }

    /// Its name in `quant_method` and on the command line.
    pub fn method(&self) -> &'static str {
        match self {
            Self::Int4(int4) => match int4.packing {
                Int4Packing::Awq => "awq",
                Int4Packing::Gptq { .. } => "gptq",
            },
            Self::Fp8 => "fp8",
        }
    }
}

impl Fields<'_> {
    fn awq(&self) -> Result<Int4Quantization, ConfigError> {
        self.four_bits(&["bits", "w_bit"])?;
        if let Some(version) = self
            .str("version")?
            .filter(|name| !name.eq_ignore_ascii_case("gemm"))
        {
            return Err(self.refused("version", format!("{version:?}"), "supported: gemm"));
        }
        Ok(Int4Quantization {
            packing: Int4Packing::Awq,
            group_size: self.group_size(&["group_size", "q_group_size"])?,
            symmetric: !self.bool("zero_point")?.unwrap_or(true),
        })
    }

    fn gptq(&self) -> Result<Int4Quantization, ConfigError> {
        self.four_bits(&["bits"])?;
        if self.bool("desc_act")? == Some(true) {
            let reason = "groups of input features that do not follow each other are not supported";
            return Err(self.refused("desc_act", true, reason));
        }
        if self.bool("is_marlin_format")? == Some(true) {
            return Err(self.refused(
                "is_marlin_format",
                true,
                "supported: checkpoint_format gptq, gptq_v2",
            ));
        }
        let overrides = self.object("dynamic", "quantization_config.dynamic.")?;
        if overrides.is_some_and(|modules| !modules.is_empty()) {
            return Err(self.refused("dynamic", "set", "all modules must be quantized alike"));
        }
        let zeros = match self.str("checkpoint_format")?.unwrap_or("gptq") {
            "gptq" => GptqZeros::LessOne,
            "gptq_v2" => GptqZeros::Plain,
            other => {
                let value = format!("{other:?}");
                return Err(self.refused("checkpoint_format", value, "supported: gptq, gptq_v2"));
            }
        };
        Ok(Int4Quantization {
            packing: Int4Packing::Gptq { zeros },
            group_size: self.group_size(&["group_size"])?,
            symmetric: self.bool("sym")?.unwrap_or(true),
        })
    }

    /// `keys` are names of the same value.
    fn four_bits(&self, keys: &[&'static str]) -> Result<(), ConfigError> {
        for key in keys {
            if let Some(bits) = self.size(key)? {
                return match bits {
                    4 => Ok(()),
                    bits => Err(self.refused(key, bits, "only 4 is supported")),
                };
            }
        }
        Err(ConfigError::missing(self.name(keys[0])))
    }

    fn group_size(&self, keys: &[&'static str]) -> Result<Option<usize>, ConfigError> {
        for key in keys {
            match self.integer(key)? {
                None => {}
                Some(-1) => return Ok(None),
                Some(size) if size > 0 && size % 32 == 0 => return Ok(usize::try_from(size).ok()),
                Some(size) => return Err(self.refused(key, size, "supported: -1 and multiples of 32")),
            }
        }
        Err(ConfigError::missing(self.name(keys[0])))
    }

    fn refused(&self, key: &str, value: impl std::fmt::Display, reason: &'static str) -> ConfigError {
        ConfigError::unsupported(self.name(key), value, reason)
    }
}
