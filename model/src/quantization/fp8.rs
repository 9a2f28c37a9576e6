//! What is read of `quantization_config` of checkpoints in E4M3: those of vLLM and Transformers (`fp8`) and those of
//! LLM Compressor (`compressed-tensors`, format `float-quantized`). Either way a quantized matrix has a `weight_scale`
//! beside it, of one number or one for each output feature. Activations are always brought to E4M3 by their own
//! magnitudes, so scales of activations in the checkpoint are not read.

use serde_json::{Map, Value};

use crate::config::{ConfigError, Fields};

impl Fields<'_> {
    pub(super) fn fp8(&self) -> Result<(), ConfigError> {
        if let Some(format) = self.str("fmt")?.filter(|format| *format != "e4m3") {
            return Err(self.refused("fmt", format!("{format:?}"), "supported: e4m3"));
        }
        if self.has("weight_block_size") {
            let reason = "scales of blocks are not supported, only those of tensors and channels";
            return Err(self.refused("weight_block_size", "set", reason));
        }
        match self.str("activation_scheme")?.unwrap_or("dynamic") {
            "dynamic" | "static" => Ok(()),
            other => Err(self.refused(
                "activation_scheme",
                format!("{other:?}"),
                "supported: dynamic, static",
            )),
        }
    }

    pub(super) fn compressed_tensors(&self) -> Result<(), ConfigError> {
        match self.str("format")? {
            Some("float-quantized") => {}
            Some(other) => {
                return Err(self.refused("format", format!("{other:?}"), "supported: float-quantized"));
            }
            None => return Err(ConfigError::missing(self.name("format"))),
        }
        let groups = self
            .object("config_groups", "quantization_config.config_groups.")?
            .ok_or_else(|| ConfigError::missing(self.name("config_groups")))?;
        for group in groups.values() {
            let weights = group.get("weights").and_then(Value::as_object);
            let weights = weights.ok_or_else(|| ConfigError::missing(groups.name("*.weights")))?;
            groups.compressed_weights(weights)?;
        }
        Ok(())
    }

    fn compressed_weights(&self, weights: &Map<String, Value>) -> Result<(), ConfigError> {
        let expect = |key: &str, allowed: &[Value], reason| match weights.get(key) {
            Some(found) if !allowed.contains(found) => {
                Err(self.refused(&format!("*.weights.{key}"), found, reason))
            }
            Some(_) => Ok(()),
            None => Err(ConfigError::missing(self.name(&format!("*.weights.{key}")))),
        };
        expect("num_bits", &[8.into()], "only 8 is supported")?;
        expect("type", &["float".into()], "supported: float")?;
        let reason = "supported: tensor, channel";
        expect("strategy", &["tensor".into(), "channel".into()], reason)
    }
}
