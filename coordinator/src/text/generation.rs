//! A model's own sampling defaults, and what the operator makes of them.

use std::path::{Path, PathBuf};

use phalanx_model::gguf::{Gguf, Value as GgufValue};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{TextError, sampling::check_defaults, tokenizer::read_file};

const FILE: &str = "generation_config.json";

/// What a request's unset fields mean; unset here, they are the fields' standard defaults.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct GenerationDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 and -1 both mean no limit.
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    /// Cap on the tokens of a request that sets no `max_tokens`.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// Reads generation_config.json. Errors: a value of the wrong type or out of its range.
    pub fn from_json(json: &Value) -> Result<Self, TextError> {
        Self::parse(json, FILE)
    }

    fn parse(json: &Value, source: &str) -> Result<Self, TextError> {
        if json.is_null() {
            return Ok(Self::default());
        }
        Self::deserialize(json)
            .map_err(|error| TextError::file(source, error))?
            .checked(source)
    }

    /// From llama.cpp's `general.sampling.*`, which converters copy from generation_config.json. Errors as
    /// [`Self::from_json`].
    pub fn from_gguf<B: AsRef<[u8]>>(file: &Gguf<B>) -> Result<Self, TextError> {
        const TOP_K: &str = "general.sampling.top_k";
        let number = |key| Ok::<_, TextError>(file.f64(key)?.map(|value| value as f32));
        let integer = |value: GgufValue<'_>| {
            let no_integer = || TextError::file("the GGUF metadata", format!("{TOP_K} is no integer"));
            value.as_i64().ok_or_else(no_integer)
        };
        let defaults = Self {
            temperature: number("general.sampling.temp")?,
            top_p: number("general.sampling.top_p")?,
            top_k: file.get(TOP_K).map(integer).transpose()?,
            min_p: number("general.sampling.min_p")?,
            repetition_penalty: number("general.sampling.penalty_repeat")?,
            max_new_tokens: None,
        };
        defaults.checked("general.sampling")
    }

    fn checked(self, source: &str) -> Result<Self, TextError> {
        check_defaults(&self).map_err(|error| TextError::file(source, error.message))?;
        if self.max_new_tokens == Some(0) {
            return Err(TextError::file(
                source,
                "max_new_tokens must be at least 1, got 0.",
            ));
        }
        Ok(self)
    }

    /// These, where they are set, and otherwise `other`'s.
    fn or(self, other: Self) -> Self {
        Self {
            temperature: self.temperature.or(other.temperature),
            top_p: self.top_p.or(other.top_p),
            top_k: self.top_k.or(other.top_k),
            min_p: self.min_p.or(other.min_p),
            repetition_penalty: self.repetition_penalty.or(other.repetition_penalty),
            max_new_tokens: self.max_new_tokens.or(other.max_new_tokens),
        }
    }
}

/// Where the defaults come from (`--generation-config`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GenerationConfig {
    /// The model.
    #[default]
    Auto,
    /// Nowhere: the fields' standard defaults.
    Vllm,
    /// Another generation_config.json, or a directory with one.
    Path(PathBuf),
}

/// The operator's word on the defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationOptions {
    pub source: GenerationConfig,
    /// Fields of generation_config.json that replace those of the source.
    pub overrides: Map<String, Value>,
}

impl GenerationOptions {
    /// What requests get where the model says `model`. Errors: a file that cannot be read, a value of the wrong type or
    /// out of its range.
    pub fn resolve(&self, model: GenerationDefaults) -> Result<GenerationDefaults, TextError> {
        let source = match &self.source {
            GenerationConfig::Auto => model,
            GenerationConfig::Vllm => GenerationDefaults::default(),
            GenerationConfig::Path(path) => GenerationDefaults::parse(&read(path)?, &path.to_string_lossy())?,
        };
        let overrides = Value::Object(self.overrides.clone());
        let overrides = GenerationDefaults::parse(&overrides, "--override-generation-config")?;
        Ok(overrides.or(source))
    }
}

fn read(path: &Path) -> Result<Value, TextError> {
    let file = if path.is_dir() {
        path.join(FILE)
    } else {
        path.to_owned()
    };
    let bytes = read_file(&file)?;
    serde_json::from_slice(&bytes).map_err(|error| TextError::file(file.to_string_lossy(), error))
}

#[cfg(test)]
mod tests {
    use phalanx_model::gguf::GgufWriter;

    use super::*;

    fn object(json: Value) -> Map<String, Value> {
        match json {
            Value::Object(map) => map,
            other => panic!("{other} is no object"),
        }
    }

    #[test]
    fn the_operator_replaces_the_model_and_overrides_single_fields() {
        let model = GenerationDefaults {
            temperature: Some(0.6),
            top_k: Some(40),
            ..GenerationDefaults::default()
        };
        let mut options = GenerationOptions::default();
        assert_eq!(options.resolve(model.clone()).expect("valid"), model);
        options.overrides = object(serde_json::json!({"top_k": -1, "max_new_tokens": 9, "do_sample": true}));
        let resolved = options.resolve(model.clone()).expect("valid");
        assert_eq!((resolved.temperature, resolved.top_k), (Some(0.6), Some(-1)));
        assert_eq!(resolved.max_new_tokens, Some(9));
        options.source = GenerationConfig::Vllm;
        assert_eq!(options.resolve(model.clone()).expect("valid").temperature, None);

        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join(FILE);
        std::fs::write(&file, r#"{"temperature": 0.25, "top_k": 3}"#).expect("written");
        for path in [dir.path().to_owned(), file] {
            options.source = GenerationConfig::Path(path);
            let resolved = options.resolve(model.clone()).expect("valid");
            assert_eq!((resolved.temperature, resolved.top_k), (Some(0.25), Some(-1)));
        }
    }

    #[test]
    fn a_gguf_file_has_llama_cpps_keys() {
        let defaults = |edit: &dyn Fn(&mut GgufWriter)| {
            let mut writer = GgufWriter::new();
            edit(&mut writer);
            let bytes = writer.to_bytes(|_, _| Ok(())).expect("no tensors");
            GenerationDefaults::from_gguf(&Gguf::parse(bytes).expect("a GGUF file"))
        };
        assert_eq!(defaults(&|_| {}).expect("none"), GenerationDefaults::default());
        let found = defaults(&|writer| {
            writer.metadata("general.sampling.temp", 0.5f32);
            writer.metadata("general.sampling.top_k", 20u32);
        });
        let expected = GenerationDefaults {
            temperature: Some(0.5),
            top_k: Some(20),
            ..GenerationDefaults::default()
        };
        assert_eq!(found.expect("valid"), expected);
        let error = defaults(&|writer| {
            writer.metadata("general.sampling.top_k", 1.5f32);
        });
        assert!(error.expect_err("refused").to_string().contains("top_k"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |options: GenerationOptions| {
            let resolved = options.resolve(GenerationDefaults::default());
            resolved.expect_err("refused").to_string()
        };
        let error = refused(GenerationOptions {
            overrides: object(serde_json::json!({"top_p": 2.0})),
            ..GenerationOptions::default()
        });
        assert!(
            error.contains("--override-generation-config") && error.contains("top_p"),
            "{error}"
        );
        let error = refused(GenerationOptions {
            source: GenerationConfig::Path("/nowhere/at/all.json".into()),
            ..GenerationOptions::default()
        });
        assert!(error.contains("/nowhere/at/all.json"), "{error}");
    }
}
