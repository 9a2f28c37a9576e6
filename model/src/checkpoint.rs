//! A model on disk: its configuration, and where each of its tensors lies, whatever the file format.

mod scale;

use std::{
    collections::BTreeMap,
    error::Error,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use self::scale::{ScaleInfo, may_have_scales};
use crate::{
    LayerTensor, ModelConfig, Quantization, RowSplitBlocks, TensorFormat, TensorFormats, TensorRole,
    config::ConfigError,
    gguf::{Gguf, GgufError, gguf_type_name},
    int4::{self, Int4Tensors, Span},
    safetensors::{SafeTensorsDirectory, SafeTensorsError},
};

const CONFIG_FILE: &str = "config.json";

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{}: {source}", path.display())]
    Map {
        path: PathBuf,
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("{}: {source}", path.display())]
    Gguf { path: PathBuf, source: GgufError },
    #[error(transparent)]
    SafeTensors(#[from] SafeTensorsError),
    #[error("{}: {source}", path.display())]
    Config { path: PathBuf, source: ConfigError },
    #[error("tensor `{tensor}` is missing; expected {rows} x {cols}")]
    Missing {
        tensor: String,
        rows: usize,
        cols: usize,
    },
    /// Both in `[rows, cols]` order, as Hugging Face has it.
    #[error("tensor `{tensor}` has shape {found:?}, expected {expected:?}")]
    Shape {
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("tensor `{tensor}` is {found}; expected {expected}")]
    Format {
        tensor: String,
        expected: String,
        found: String,
    },
}

/// Where a tensor lies and how. Rows are output features, columns input features; a vector has one column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub format: TensorFormat,
    pub rows: usize,
    pub cols: usize,
    /// Index into [`Checkpoint::maps`].
    pub file: usize,
    /// From the start of that file, bytes.
    pub offset: usize,
    pub bytes: usize,
    pub layout: TensorLayout,
}

/// What a tensor's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorLayout {
    /// `rows` rows of `format.row_bytes(cols)` bytes.
    Rows,
    /// Words of eight codes, with scales and zero points elsewhere: `format` is what its rows become when they are read.
    Int4(Int4Tensors),
}

/// An opened model over mapped (or otherwise held) files.
#[derive(Debug)]
pub struct Checkpoint<B> {
    path: PathBuf,
    config: ModelConfig,
    source: Source<B>,
    tensors: BTreeMap<TensorRole, TensorInfo>,
    /// Of the matrices of E4M3.
    scales: BTreeMap<TensorRole, ScaleInfo>,
    fingerprint: [u8; 32],
}

#[derive(Debug)]
enum Source<B> {
    Gguf(Gguf<B>),
    SafeTensors {
        directory: SafeTensorsDirectory<B>,
        quantization: Option<Quantization>,
    },
}

impl<B: AsRef<[u8]>> Checkpoint<B> {
    /// Opens a `.gguf` file or a Hugging Face directory. `map` gives the bytes of a file; it is called for `config.json`
    /// and the index too. Reads headers only, so it is quick whatever the model's size.
    ///
    /// # Errors
    /// A file that cannot be mapped or is malformed, an unsupported model, or a tensor that is missing or not of the
    /// shape and a format the configuration needs, named.
    pub fn open<E>(path: &Path, mut map: impl FnMut(&Path) -> Result<B, E>) -> Result<Self, CheckpointError>
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let mut map = |path: &Path| {
            map(path).map_err(|error| CheckpointError::Map {
                path: path.to_owned(),
                source: error.into(),
            })
        };
        if path.is_dir() {
            Self::open_directory(path, &mut map)
        } else {
            Self::open_gguf(path, map(path)?)
        }
    }

    fn open_gguf(path: &Path, bytes: B) -> Result<Self, CheckpointError> {
        let gguf = Gguf::parse(bytes).map_err(|source| CheckpointError::Gguf {
            path: path.to_owned(),
            source,
        })?;
        let config = ModelConfig::from_gguf(&gguf).map_err(|source| CheckpointError::Config {
            path: path.to_owned(),
            source,
        })?;
        let mut fingerprint = Fingerprint::default();
        fingerprint.file(gguf.header_bytes(), gguf.bytes().as_ref().len());
        Self::assemble(path, config, Source::Gguf(gguf), fingerprint)
    }

    fn open_directory(
        path: &Path,
        map: &mut dyn FnMut(&Path) -> Result<B, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        let config_path = path.join(CONFIG_FILE);
        let json = map(&config_path)?;
        let config =
            ModelConfig::from_config_json(json.as_ref()).map_err(|source| CheckpointError::Config {
                path: config_path,
                source,
            })?;
        let quantization =
            Quantization::from_config_json(json.as_ref()).map_err(|source| CheckpointError::Config {
                path: path.join(CONFIG_FILE),
                source,
            })?;
        let directory = SafeTensorsDirectory::open(path, map)?;
        let mut fingerprint = Fingerprint::default();
        fingerprint.file(json.as_ref(), json.as_ref().len());
        for (map, &header) in directory.maps.iter().zip(&directory.header_bytes) {
            fingerprint.file(&map.as_ref()[..header], map.as_ref().len());
        }
        let source = Source::SafeTensors {
            directory,
            quantization,
        };
        Self::assemble(path, config, source, fingerprint)
    }

    fn assemble(
        path: &Path,
        config: ModelConfig,
        source: Source<B>,
        fingerprint: Fingerprint,
    ) -> Result<Self, CheckpointError> {
        let (mut tensors, mut scales) = (BTreeMap::new(), BTreeMap::new());
        for role in config.roles() {
            let Some((rows, cols)) = config.shape(role) else {
                continue;
            };
            if let Some(info) = source.find_int4(role, [rows, cols])? {
                tensors.insert(role, info);
                continue;
            }
            match source.find(role) {
                Some(found) => {
                    let info = found.check(role, rows, cols)?;
                    if info.format == TensorFormat::F8_E4M3 {
                        scales.insert(role, source.scale(role, &info)?);
                    }
                    tensors.insert(role, info);
                }
                None if source.may_lack(role) => {}
                None => {
                    return Err(CheckpointError::Missing {
                        tensor: source.name(role),
                        rows,
                        cols,
                    });
                }
            }
        }
        let fingerprint = fingerprint.0.finalize().into();
        Ok(Self {
            path: path.to_owned(),
            config,
            source,
            tensors,
            scales,
            fingerprint,
        })
    }

    /// What it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What a directory's `config.json` says of quantization. None for GGUF files, whose tensors say it themselves.
    pub fn quantization(&self) -> Option<&Quantization> {
        match &self.source {
            Source::Gguf(_) => None,
            Source::SafeTensors { quantization, .. } => quantization.as_ref(),
        }
    }

    /// As `--quantization` names it: `gguf`, what `quant_method` says, or `none`.
    pub fn quantization_method(&self) -> &'static str {
        match &self.source {
            Source::Gguf(_) => "gguf",
            Source::SafeTensors { quantization, .. } => {
                quantization.as_ref().map_or("none", Quantization::method)
            }
        }
    }

    /// None if the model has no such tensor. With tied embeddings `LmHead` is the token embedding.
    pub fn tensor(&self, role: TensorRole) -> Option<&TensorInfo> {
        match role {
            TensorRole::LmHead if self.config.tie_word_embeddings => {
                self.tensors.get(&TensorRole::TokenEmbedding)
            }
            _ => self.tensors.get(&role),
        }
    }

    /// The tensor's data as its layout says.
    pub fn tensor_bytes(&self, role: TensorRole) -> Option<&[u8]> {
        let &TensorInfo {
            file, offset, bytes, ..
        } = self.tensor(role)?;
        self.span(Span { file, offset, bytes })
    }

    /// Bytes of one of the files. None if they are not all there.
    pub fn span(&self, span: Span) -> Option<&[u8]> {
        let file = self.maps().get(span.file)?.as_ref();
        file.get(span.offset..span.offset.checked_add(span.bytes)?)
    }

    /// What the rows of a matrix of E4M3 are scaled with, one number for each. None if the tensor is of another format.
    ///
    /// # Errors
    /// A scale that is no finite number.
    pub fn row_scales(&self, role: TensorRole) -> Result<Option<Vec<f32>>, CheckpointError> {
        let scales = self.scales.get(&role);
        scales.map(|scale| scale.read(self.maps())).transpose()
    }

    /// Every tensor, embeddings first, then in the order of [`TensorRole`].
    pub fn tensors(&self) -> impl Iterator<Item = (TensorRole, &TensorInfo)> {
        self.tensors.iter().map(|(&role, info)| (role, info))
    }

    /// A GGUF file's metadata, which holds the tokenizer. None for a directory.
    pub fn gguf(&self) -> Option<&Gguf<B>> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            Source::SafeTensors { .. } => None,
        }
    }

    /// The files that tensors lie in.
    pub fn maps(&self) -> &[B] {
        match &self.source {
            Source::Gguf(gguf) => std::slice::from_ref(gguf.bytes()),
            Source::SafeTensors { directory, .. } => &directory.maps,
        }
    }

    /// SHA-256 over the files' headers and lengths, and `config.json`. Ranks that disagree have different models.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Every tensor's format, for shard and memory plans.
    pub fn formats(&self) -> TensorFormats {
        self.tensors().map(|(role, info)| (role, info.format)).collect()
    }

    /// The block lengths that row splits must not cut.
    pub fn row_split_blocks(&self) -> RowSplitBlocks {
        RowSplitBlocks::of(self.formats())
    }
}

/// A tensor under its file's name, not yet compared with the configuration.
struct Found {
    name: String,
    /// `[rows, cols]`, or the length of a vector.
    shape: Vec<usize>,
    format: Result<TensorFormat, String>,
    file: usize,
    offset: usize,
    bytes: usize,
}

impl Found {
    fn check(self, role: TensorRole, rows: usize, cols: usize) -> Result<TensorInfo, CheckpointError> {
        let expected = if role.is_vector() {
            vec![rows]
        } else {
            vec![rows, cols]
        };
        if self.shape != expected {
            return Err(CheckpointError::Shape {
                tensor: self.name,
                expected,
                found: self.shape,
            });
        }
        let allowed = |format: TensorFormat| match format {
            TensorFormat::F8_E4M3 => may_have_scales(role),
            format => !role.is_vector() || format.is_dense(),
        };
        match self.format {
            Ok(format) if allowed(format) => {
                let Self {
                    file, offset, bytes, ..
                } = self;
                Ok(TensorInfo {
                    format,
                    rows,
                    cols,
                    file,
                    offset,
                    bytes,
                    layout: TensorLayout::Rows,
                })
            }
            format => {
                let names = TensorFormat::ALL
                    .into_iter()
                    .filter(|&format| format.is_gguf() && allowed(format))
                    .map(|f| f.to_string());
                let expected = format!("one of {}", names.collect::<Vec<_>>().join(", "));
                let found = format.map_or_else(|unknown| unknown, |format| format.to_string());
                Err(CheckpointError::Format {
                    tensor: self.name,
                    expected,
                    found,
                })
            }
        }
    }
}

impl<B: AsRef<[u8]>> Source<B> {
    fn name(&self, role: TensorRole) -> String {
        match self {
            Self::Gguf(_) => role.gguf_name(),
            Self::SafeTensors { .. } => role.hugging_face_name(),
        }
    }

    /// Attention of some GGUF files has biases on q, k and v only.
    fn may_lack(&self, role: TensorRole) -> bool {
        let output_bias = matches!(
            role,
            TensorRole::Layer {
                tensor: LayerTensor::OBias,
                ..
            }
        );
        output_bias && matches!(self, Self::Gguf(_))
    }

    fn find_int4(&self, role: TensorRole, shape: [usize; 2]) -> Result<Option<TensorInfo>, CheckpointError> {
        match self {
            Self::SafeTensors {
                directory,
                quantization: Some(Quantization::Int4(quantization)),
            } => int4::find(directory, &self.name(role), *quantization, shape),
            _ => Ok(None),
        }
    }

    /// Where the scales of a matrix of E4M3 lie.
    fn scale(&self, role: TensorRole, matrix: &TensorInfo) -> Result<ScaleInfo, CheckpointError> {
        let name = self.name(role);
        match self {
            Self::SafeTensors {
                directory,
                quantization: Some(Quantization::Fp8),
            } => ScaleInfo::find(directory, &name, matrix),
            _ => Err(CheckpointError::Format {
                tensor: name,
                expected: "another format: config.json has no quantization_config of fp8".to_owned(),
                found: matrix.format.to_string(),
            }),
        }
    }

    fn find(&self, role: TensorRole) -> Option<Found> {
        let name = self.name(role);
        match self {
            Self::Gguf(gguf) => {
                let tensor = gguf.tensor(&name)?;
                let shape = tensor.dims().iter().rev().copied().collect();
                let format = tensor.format.ok_or_else(|| gguf_type_name(tensor.type_id));
                Some(Found {
                    shape,
                    format,
                    file: 0,
                    offset: tensor.data.start,
                    bytes: tensor.data.len(),
                    name,
                })
            }
            Self::SafeTensors { directory, .. } => {
                let tensor = directory.tensors.get(&name)?;
                let format = tensor.format().ok_or_else(|| format!("{:?}", tensor.dtype));
                let (file, offset, bytes) = (tensor.file, tensor.offset, tensor.bytes);
                Some(Found {
                    shape: tensor.shape.clone(),
                    format,
                    file,
                    offset,
                    bytes,
                    name,
                })
            }
        }
    }
}

#[derive(Default)]
struct Fingerprint(Sha256);

impl Fingerprint {
    fn file(&mut self, header: &[u8], file_bytes: usize) {
        self.0.update((header.len() as u64).to_le_bytes());
        self.0.update((file_bytes as u64).to_le_bytes());
        self.0.update(header);
    }
}
