//! Why a model's text side (tokenizer, template, generation defaults) cannot be loaded.

use std::{io, path::PathBuf};

use phalanx_model::gguf::GgufError;

/// An error of loading. Requests fail with [`phalanx_proto::RpcError`] instead.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{file} is not valid: {reason}")]
    File { file: String, reason: String },
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field} is {value:?}, which is not supported; supported: {supported}")]
    Unsupported {
        field: &'static str,
        value: String,
        supported: String,
    },
    #[error("{field} is {value}, limit {limit}")]
    OverLimit {
        field: &'static str,
        value: u64,
        limit: u64,
    },
    #[error("{field} holds {value}, {reason}")]
    Invalid {
        field: &'static str,
        value: String,
        reason: String,
    },
    #[error("chat template: {0}")]
    Template(String),
}

impl TextError {
    pub(crate) fn invalid(
        field: &'static str,
        value: impl std::fmt::Display,
        reason: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field,
            value: value.to_string(),
            reason: reason.into(),
        }
    }
    pub(crate) fn file(file: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::File {
            file: file.into(),
            reason: reason.to_string(),
        }
    }
    /// An error unless `value <= limit`.
    pub(crate) fn check_limit(field: &'static str, value: usize, limit: usize) -> Result<(), Self> {
        if value <= limit {
            return Ok(());
        }
        Err(Self::OverLimit {
            field,
            value: value as u64,
            limit: limit as u64,
        })
    }
}
