//! What a model is made of, whether or not its weights are at hand.

use crate::{
    Checkpoint, ConfigError, ModelConfig, TensorFormat, TensorFormats, checkpoint::may_have_scales, config,
};

/// A model's sizes and the formats of its tensors: all that a memory plan needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Geometry {
    pub config: ModelConfig,
    pub formats: TensorFormats,
}

impl Geometry {
    pub fn of_checkpoint<B: AsRef<[u8]>>(checkpoint: &Checkpoint<B>) -> Self {
        Self {
            config: checkpoint.config().clone(),
            formats: checkpoint.formats(),
        }
    }

    /// With the matrices of its layers rounded to E4M3, as they are when a checkpoint of plain numbers is loaded so.
    pub fn quantized_online(mut self) -> Self {
        for (role, format) in &mut self.formats {
            if may_have_scales(*role) {
                *format = TensorFormat::F8_E4M3;
            }
        }
        self
    }

    /// Of the checkpoint that a Hugging Face `config.json` belongs to: all tensors in the type that it declares.
    ///
    /// # Errors
    /// As [`ModelConfig::from_config_json`], or an element type that is not supported.
    pub fn from_config_json(json: &[u8]) -> Result<Self, ConfigError> {
        let config = ModelConfig::from_config_json(json)?;
        let format = config::declared_dtype(json)?;
        let roles = config.roles().filter(|&role| config.shape(role).is_some());
        Ok(Self {
            formats: roles.map(|role| (role, format)).collect(),
            config,
        })
    }
}
