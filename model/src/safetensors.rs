//! Hugging Face checkpoints: a directory with `config.json` and either `model.safetensors` or
//! `model.safetensors.index.json` with the shards it names. Format: <https://huggingface.co/docs/safetensors>.
//!
//! Headers are decoded by the `safetensors` crate; its own entry point adds header and data lengths without a check,
//! so where tensors end is compared with the file here.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use ::safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use crate::{TensorFormat, checkpoint::CheckpointError};

/// Longest header of a shard, bytes: the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest index, bytes, and most shards it may name.
const MAX_INDEX_BYTES: usize = 16 << 20;
const MAX_SHARDS: usize = 1024;
/// The header's length comes first, as a little-endian u64.
const LENGTH_BYTES: usize = 8;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// A file of a checkpoint directory that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct SafeTensorsError {
    pub file: PathBuf,
    pub problem: SafeTensorsProblem,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SafeTensorsProblem {
    #[error("{what} is {value} bytes, limit {limit}")]
    TooLong {
        what: &'static str,
        value: u64,
        limit: u64,
    },
    #[error("header: {0}")]
    Header(String),
    #[error("tensor data ends {data} bytes after the header, the file {file} bytes after it")]
    DataLength { data: u64, file: u64 },
    #[error("index: {0}")]
    Index(String),
    #[error("index: `{0}` is not the plain name of a .safetensors file")]
    FileName(String),
    #[error("index: {found} shards, limit {limit}")]
    TooManyShards { found: usize, limit: usize },
    #[error("tensor `{0}`, which the index places here, is not in this file")]
    NotInShard(String),
}

/// One tensor as its header declares it.
#[derive(Clone, Debug)]
pub(crate) struct StoredTensor {
    /// Index into the directory's maps.
    pub(crate) file: usize,
    /// From the start of the file.
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
}

impl StoredTensor {
    pub(crate) fn format(&self) -> Option<TensorFormat> {
        match self.dtype {
            Dtype::F32 => Some(TensorFormat::F32),
            Dtype::F16 => Some(TensorFormat::F16),
            Dtype::BF16 => Some(TensorFormat::BF16),
            Dtype::F8_E4M3 => Some(TensorFormat::F8_E4M3),
            _ => None,
        }
    }
}

/// The shards of a directory and all their tensors.
#[derive(Debug)]
pub(crate) struct SafeTensorsDirectory<B> {
    pub(crate) maps: Vec<B>,
    pub(crate) tensors: BTreeMap<String, StoredTensor>,
    /// Of each map: length prefix and header, bytes.
    pub(crate) header_bytes: Vec<usize>,
}

impl<B: AsRef<[u8]>> SafeTensorsDirectory<B> {
    pub(crate) fn open(
        directory: &Path,
        map: &mut dyn FnMut(&Path) -> Result<B, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        let mut opened = Self {
            maps: Vec::new(),
            tensors: BTreeMap::new(),
            header_bytes: Vec::new(),
        };
        let index_path = directory.join(INDEX_FILE);
        if !index_path.exists() {
            let path = directory.join(SINGLE_FILE);
            let tensors = opened.add_shard(&path, map(&path)?)?;
            opened.tensors.extend(tensors);
            return Ok(opened);
        }
        let weight_map = read_index(&index_path, map(&index_path)?.as_ref())?;
        let mut names_in: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, file) in &weight_map {
            names_in.entry(file).or_default().push(name);
        }
        for (file, names) in names_in {
            let path = directory.join(file);
            let mut tensors = opened.add_shard(&path, map(&path)?)?;
            for name in names {
                let (name, tensor) = tensors.remove_entry(name).ok_or_else(|| SafeTensorsError {
                    file: path.clone(),
                    problem: SafeTensorsProblem::NotInShard(name.to_owned()),
                })?;
                opened.tensors.insert(name, tensor);
            }
        }
        Ok(opened)
    }

    fn add_shard(&mut self, path: &Path, map: B) -> Result<BTreeMap<String, StoredTensor>, SafeTensorsError> {
        let failed = |problem| SafeTensorsError {
            file: path.to_owned(),
            problem,
        };
        let (start, metadata) = read_header(map.as_ref()).map_err(failed)?;
        let stored = metadata.tensors().into_iter().map(|(name, info)| {
            let (from, to) = info.data_offsets;
            // Both ends are within the file, so neither the sum nor the difference overflows.
            let (offset, bytes) = (start + from, to - from);
            let tensor = StoredTensor {
                file: self.maps.len(),
                offset,
                bytes,
                shape: info.shape.clone(),
                dtype: info.dtype,
            };
            (name, tensor)
        });
        let tensors = stored.collect();
        self.maps.push(map);
        self.header_bytes.push(start);
        Ok(tensors)
    }
}

/// Where data starts, and the header. Decoding checks that the tensors' data lie end to end and fit their shapes.
fn read_header(file: &[u8]) -> Result<(usize, Metadata), SafeTensorsProblem> {
    let header = |message: &str| SafeTensorsProblem::Header(message.to_owned());
    let (length, rest) = file
        .split_first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| header("the file has no length"))?;
    let value = u64::from_le_bytes(*length);
    let limit = MAX_HEADER_BYTES.min(rest.len() as u64);
    if value > limit {
        return Err(SafeTensorsProblem::TooLong {
            what: "the header",
            value,
            limit,
        });
    }
    let (json, data) = rest.split_at(value as usize);
    let metadata: Metadata = serde_json::from_slice(json).map_err(|error| header(&error.to_string()))?;
    let data_length = metadata.data_len() as u64;
    if data_length != data.len() as u64 {
        return Err(SafeTensorsProblem::DataLength {
            data: data_length,
            file: data.len() as u64,
        });
    }
    Ok((LENGTH_BYTES + json.len(), metadata))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The file of each tensor.
fn read_index(path: &Path, json: &[u8]) -> Result<BTreeMap<String, String>, SafeTensorsError> {
    let failed = |problem| SafeTensorsError {
        file: path.to_owned(),
        problem,
    };
    if json.len() > MAX_INDEX_BYTES {
        let (value, limit) = (json.len() as u64, MAX_INDEX_BYTES as u64);
        return Err(failed(SafeTensorsProblem::TooLong {
            what: "the index",
            value,
            limit,
        }));
    }
    let index: Index =
        serde_json::from_slice(json).map_err(|error| failed(SafeTensorsProblem::Index(error.to_string())))?;
    let files: BTreeSet<&String> = index.weight_map.values().collect();
    if files.len() > MAX_SHARDS {
        return Err(failed(SafeTensorsProblem::TooManyShards {
            found: files.len(),
            limit: MAX_SHARDS,
        }));
    }
    let odd_name = files.into_iter().find(|name| !is_plain_file_name(name));
    match odd_name {
        Some(name) => Err(failed(SafeTensorsProblem::FileName(
            name.chars().take(96).collect(),
        ))),
        None => Ok(index.weight_map),
    }
}

/// Whether joining it to the directory stays in the directory, on every system.
fn is_plain_file_name(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains("..") && !name.contains(['/', '\\', ':', '\0'])
}
