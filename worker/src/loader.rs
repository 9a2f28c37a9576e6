//! From a model file to this rank's weights: only its own rows and columns are read, and the file's pages are given back
//! tensor by tensor, so that the process grows with its share and not with the file. What comes next is asked for ahead,
//! in all files that it lies in, so that disks are busy while tensors are copied.

mod read_ahead;

use std::{borrow::Cow, ops::Range, sync::Arc};

use phalanx_kernels::{Backend, Fp8Matrix, Heads, KernelError, KvSpec, WeightSource, int4::Int4Source};
use phalanx_model::{
    Checkpoint, CheckpointError, LayerTensor, ModelConfig, QuantizationMethod, RankShard, RopeScaling,
    TensorFormat, TensorInfo, TensorLayout, TensorParallelStyle, TensorRole, TensorSlice,
    int4::{Int4Tensors, Span},
};
use phalanx_proto::v1::Phase;
use phalanx_shm::{MappedFile, ShmError};

use read_ahead::ReadAhead;

use crate::{
    assignment::Assignment,
    layers::{
        Dense, MergedColumnParallelLinear, ParallelLmHead, QkvParallelLinear, RotaryEmbedding,
        RowParallelLinear, Split, VocabParallelEmbedding,
    },
    models::llama::{LlamaAttention, LlamaDecoderLayer, LlamaForCausalLm, LlamaMlp, RmsNorm},
    runner::LoadedModel,
};

/// Why a rank's share cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("{field} is {found} in the model file, {assigned} in the assignment")]
    Differs {
        field: &'static str,
        found: usize,
        assigned: usize,
    },
    #[error("tensor {role:?} is missing")]
    Missing { role: TensorRole },
    #[error("tensor {role:?}: rows {rows:?}, columns {cols:?} of {format:?} cannot be cut out of the file")]
    Cut {
        role: TensorRole,
        format: TensorFormat,
        rows: Range<usize>,
        cols: Range<usize>,
    },
    #[error("tensor {role:?}: {format:?} is not a format of vectors")]
    VectorFormat { role: TensorRole, format: TensorFormat },
    #[error("tensor {role:?}: {source}")]
    Int4 { role: TensorRole, source: KernelError },
    #[error("{path}: {source}")]
    File { path: String, source: ShmError },
    #[error("{path} became shorter while it was read")]
    Truncated { path: String },
}

type Result<T, E = LoadError> = std::result::Result<T, E>;

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    pub phase: Phase,
    /// Bytes of the file, of this rank's share.
    pub bytes_done: u64,
    pub bytes_total: u64,
}

/// Loads the assigned share and allocates its KV cache.
///
/// # Errors
/// A model file that is missing, malformed or not the one assigned; tensors that cannot be cut as assigned; memory.
pub fn load<B: Backend>(
    backend: B,
    assignment: Assignment,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedModel<B>> {
    let mut checkpoint = Checkpoint::open(&assignment.model_path, MappedFile::open)?;
    if assignment.quantize_to_fp8 {
        checkpoint = checkpoint.quantized(QuantizationMethod::Fp8)?;
    }
    check_same_model(checkpoint.config(), &assignment.config)?;
    let mut loader = Loader {
        backend: &backend,
        checkpoint: &checkpoint,
        assignment: &assignment,
        bytes_done: 0,
        bytes_total: 0,
        weight_bytes: 0,
        ahead: ReadAhead::default(),
        progress,
    };
    for role in checkpoint.config().roles() {
        if checkpoint.tensor(role).is_some() {
            let cut = loader.cut(role)?;
            loader.bytes_total += cut.bytes;
            let all: usize = cut.spans.iter().map(|span| span.bytes).sum();
            for span in &cut.spans {
                let range = span.offset..span.offset + span.bytes;
                let read = cut.bytes * span.bytes as u64 / all.max(1) as u64;
                loader.ahead.plan(span.file, range, read);
            }
        }
    }
    loader.ahead.advance(checkpoint.maps(), 0);
    let model = loader.model()?;
    let weight_bytes = loader.weight_bytes;
    for map in checkpoint.maps() {
        let path = || map.path().display().to_string();
        match map.still_whole() {
            Ok(true) => {}
            Ok(false) => return Err(LoadError::Truncated { path: path() }),
            Err(source) => return Err(LoadError::File { path: path(), source }),
        }
    }
    Ok(LoadedModel {
        weight_bytes,
        kv_bytes: kv_bytes(&assignment),
        path: checkpoint.path().to_owned(),
        fingerprint: checkpoint.fingerprint(),
        backend,
        assignment,
        model,
    })
}

/// Replaces the KV cache by one of `num_blocks` blocks. What was in it is gone.
///
/// # Errors
/// [`KernelError::OutOfMemory`].
pub fn allocate_kv<B: Backend>(
    loaded: &mut LoadedModel<B>,
    num_blocks: u32,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(), KernelError> {
    loaded.assignment.limits.num_blocks = num_blocks;
    let bytes_total = kv_bytes(&loaded.assignment);
    let layers = loaded.model.layers.len() as u64;
    for (layer, done) in loaded.model.layers.iter_mut().zip(0..) {
        progress(LoadProgress {
            phase: Phase::AllocatingKv,
            bytes_done: bytes_total / layers * done,
            bytes_total,
        });
        layer.attention.kv_cache = loaded.backend.kv_cache(kv_spec(&loaded.assignment))?;
    }
    loaded.kv_bytes = bytes_total;
    Ok(())
}

/// Bytes of K and V of all layers on this rank.
fn kv_bytes(assignment: &Assignment) -> u64 {
    let spec = kv_spec(assignment);
    let block = 2 * spec.block_size * spec.num_kv_heads * spec.dtype.row_bytes(spec.head_dim);
    block as u64 * spec.num_blocks as u64 * assignment.config.num_hidden_layers as u64
}

fn kv_spec(assignment: &Assignment) -> KvSpec {
    KvSpec {
        num_blocks: assignment.limits.num_blocks as usize,
        block_size: assignment.block_size,
        num_kv_heads: assignment.shard().kv_heads.len(),
        head_dim: assignment.config.head_dim,
        dtype: assignment.kv_dtype,
    }
}

/// The file must be the model that was assigned. Rotary settings may differ: contexts are extended by configuration.
fn check_same_model(found: &ModelConfig, assigned: &ModelConfig) -> Result<()> {
    let sizes = |c: &ModelConfig| {
        [
            ("hidden_size", c.hidden_size),
            ("intermediate_size", c.intermediate_size),
            ("num_hidden_layers", c.num_hidden_layers),
            ("num_attention_heads", c.num_attention_heads),
            ("num_key_value_heads", c.num_key_value_heads),
            ("head_dim", c.head_dim),
            ("vocab_size", c.vocab_size),
            ("tie_word_embeddings", c.tie_word_embeddings.into()),
            ("attention_bias", c.attention_bias.into()),
            ("mlp_bias", c.mlp_bias.into()),
        ]
    };
    for ((field, found), (_, assigned)) in sizes(found).into_iter().zip(sizes(assigned)) {
        if found != assigned {
            return Err(LoadError::Differs {
                field,
                found,
                assigned,
            });
        }
    }
    Ok(())
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint<MappedFile>,
    assignment: &'a Assignment,
    bytes_done: u64,
    bytes_total: u64,
    /// As the device holds them.
    weight_bytes: u64,
    ahead: ReadAhead,
    progress: &'a mut dyn FnMut(LoadProgress),
}

/// This rank's part of a tensor.
struct Cut<'a> {
    info: &'a TensorInfo,
    slice: TensorSlice,
    /// Where what is read lies.
    spans: Vec<Span>,
    /// Bytes that are read.
    bytes: u64,
}

impl Cut<'_> {
    fn rows(&self) -> usize {
        self.slice.rows.len()
    }

    /// `data` is what [`Loader::data`] gives, `row_scales` what [`Loader::row_scales`] does.
    fn source<'a>(&self, data: &'a [u8], row_scales: Option<&'a [f32]>) -> Option<WeightSource<'a>> {
        let (format, cols) = (self.info.format, self.slice.cols.len());
        let stored_cols = match self.info.layout {
            TensorLayout::Rows => self.info.cols,
            TensorLayout::Int4(_) => cols,
        };
        Some(WeightSource {
            format,
            rows: self.rows(),
            cols,
            data,
            row_stride: format.row_bytes(stored_cols)?,
            row_scales,
        })
    }
}

impl<'a, B: Backend> Loader<'a, B> {
    fn model(&mut self) -> Result<LlamaForCausalLm<B>> {
        let Assignment {
            config, plan, rank, ..
        } = self.assignment;
        let vocab = plan.ranks.iter().map(|shard| shard.vocab.clone()).collect();
        let table = Arc::new(self.weight(&[TensorRole::TokenEmbedding])?);
        let layers = (0..config.num_hidden_layers)
            .map(|layer| self.layer(layer))
            .collect::<Result<_>>()?;
        let norm = self.norm(TensorRole::OutputNorm)?;
        let head = if config.tie_word_embeddings {
            Arc::clone(&table)
        } else {
            Arc::new(self.weight(&[TensorRole::LmHead])?)
        };
        Ok(LlamaForCausalLm {
            embed_tokens: VocabParallelEmbedding::new(table, vocab, *rank),
            layers,
            norm,
            lm_head: ParallelLmHead::new(head),
            rotary: self.rotary()?,
        })
    }

    /// Frequency factors travel in the file only; an assigned scaling takes their place.
    fn rotary(&self) -> Result<RotaryEmbedding<B>> {
        let file = &self.checkpoint.config().rope.scaling;
        let mut rope = self.assignment.config.rope.clone();
        if rope.scaling == RopeScaling::None && matches!(file, RopeScaling::FrequencyFactors { .. }) {
            rope.scaling = file.clone();
        }
        Ok(RotaryEmbedding::new(self.backend, &rope)?)
    }

    fn layer(&mut self, layer: usize) -> Result<LlamaDecoderLayer<B>> {
        use LayerTensor::{
            Down, DownBias, Gate, GateBias, InputNorm, K, KBias, O, OBias, PostAttentionNorm, Q, QBias, Up,
            UpBias, V, VBias,
        };
        let role = |tensor| TensorRole::Layer { layer, tensor };
        let qkv = self.dense(&[Q, K, V].map(role), &[QBias, KBias, VBias].map(role))?;
        let o = self.row_parallel(role(O), role(OBias), self.q_split())?;
        let gate_up = self.dense(&[Gate, Up].map(role), &[GateBias, UpBias].map(role))?;
        let down = self.row_parallel(
            role(Down),
            role(DownBias),
            self.split(|shard| shard.intermediate.clone()),
        )?;
        Ok(LlamaDecoderLayer {
            input_norm: self.norm(role(InputNorm))?,
            attention: LlamaAttention {
                qkv_proj: QkvParallelLinear::new(qkv, self.heads()),
                o_proj: o,
                kv_cache: self.kv_cache()?,
            },
            post_attention_norm: self.norm(role(PostAttentionNorm))?,
            mlp: LlamaMlp {
                gate_up_proj: MergedColumnParallelLinear::new(gate_up),
                down_proj: down,
            },
        })
    }

    fn heads(&self) -> Heads {
        let (config, shard) = (&self.assignment.config, self.assignment.shard());
        Heads {
            num_q: shard.q_heads.len(),
            num_kv: shard.kv_heads.len(),
            head_dim: config.head_dim,
            q_start: shard.q_heads.start,
            kv_start: shard.kv_heads.start,
            group_size: config.group_size(),
            sliding_window: config.sliding_window,
        }
    }

    fn kv_cache(&mut self) -> Result<B::KvCache> {
        Ok(self.backend.kv_cache(kv_spec(self.assignment))?)
    }

    fn split(&self, columns: impl Fn(&RankShard) -> Range<usize>) -> Split {
        let plan = &self.assignment.plan;
        Split::new(
            plan.ranks.iter().map(columns).collect(),
            self.assignment.rank,
            plan.style,
        )
    }

    fn q_split(&self) -> Split {
        let head_dim = self.assignment.config.head_dim;
        self.split(|shard| shard.q_heads.start * head_dim..shard.q_heads.end * head_dim)
    }

    fn row_parallel(
        &mut self,
        weight: TensorRole,
        bias: TensorRole,
        input: Split,
    ) -> Result<RowParallelLinear<B>> {
        // Products of all ranks are summed in reduce style, so only one of them has the bias.
        let adds_bias = match self.assignment.plan.style {
            TensorParallelStyle::Gather => true,
            TensorParallelStyle::Reduce => self.assignment.rank == 0,
        };
        let biases: &[TensorRole] = if adds_bias { &[bias] } else { &[] };
        let dense = self.dense(&[weight], biases)?;
        let output = self.split(|shard| shard.hidden.clone());
        Ok(RowParallelLinear::new(dense, input, output))
    }

    fn dense(&mut self, weights: &[TensorRole], biases: &[TensorRole]) -> Result<Dense<B>> {
        let weight = self.weight(weights)?;
        let mut bias = Vec::new();
        for &role in biases {
            if self.checkpoint.tensor(role).is_some() {
                bias.extend(self.values(role)?);
            }
        }
        let bias = if bias.is_empty() {
            None
        } else {
            Some(self.vector(&bias)?)
        };
        Ok(Dense { weight, bias })
    }

    fn norm(&mut self, role: TensorRole) -> Result<RmsNorm<B>> {
        let values = self.values(role)?;
        Ok(RmsNorm {
            weight: self.vector(&values)?,
            eps: self.assignment.config.rms_norm_eps,
        })
    }

    fn weight(&mut self, roles: &[TensorRole]) -> Result<B::Weight> {
        let cuts = roles
            .iter()
            .map(|&role| self.cut(role))
            .collect::<Result<Vec<_>>>()?;
        let data = cuts
            .iter()
            .zip(roles)
            .map(|(cut, &role)| self.data(cut, role))
            .collect::<Result<Vec<_>>>()?;
        let scales = cuts
            .iter()
            .zip(roles)
            .map(|(cut, &role)| self.row_scales(cut, role))
            .collect::<Result<Vec<_>>>()?;
        let sources = (cuts.iter().zip(roles))
            .zip(data.iter().zip(&scales))
            .map(|((cut, &role), (data, scales))| {
                cut.source(data, scales.as_deref())
                    .ok_or_else(|| cut_error(role, cut.info, &cut.slice))
            })
            .collect::<Result<Vec<_>>>()?;
        let rounded = sources
            .iter()
            .zip(roles)
            .map(|(source, &role)| self.rounded(source, role))
            .collect::<Result<Vec<_>>>()?;
        let sources: Vec<WeightSource<'_>> = sources
            .iter()
            .zip(&rounded)
            .map(|(source, rounded)| rounded.as_ref().map_or(*source, Fp8Matrix::source))
            .collect();
        let weight = self.backend.weight(&sources)?;
        self.weight_bytes += self.backend.weight_bytes(&weight) as u64;
        cuts.iter().for_each(|cut| self.finish(cut));
        Ok(weight)
    }

    /// The cut's rows: in the file, or made of an AWQ or GPTQ matrix, one stack of matrices at a time.
    fn data(&self, cut: &Cut<'_>, role: TensorRole) -> Result<Cow<'a, [u8]>> {
        let outside = || cut_error(role, cut.info, &cut.slice);
        let bytes = |span: Span| self.checkpoint.span(span).ok_or_else(outside);
        let TensorLayout::Int4(tensors) = &cut.info.layout else {
            return Ok(Cow::Borrowed(bytes(cut.spans[0])?));
        };
        let source = Int4Source {
            quantization: tensors.quantization,
            rows: cut.info.rows,
            cols: cut.info.cols,
            qweight: bytes(tensors.qweight)?,
            qzeros: bytes(tensors.qzeros)?,
            scales: bytes(tensors.scales)?,
            g_idx: tensors.g_idx.map_or(Ok(&[][..]), bytes)?,
        };
        let TensorSlice { rows, cols } = cut.slice.clone();
        let blocks = source.blocks(rows, cols);
        Ok(Cow::Owned(
            blocks.map_err(|source| LoadError::Int4 { role, source })?,
        ))
    }

    /// Of the cut's rows, where the tensor has such.
    fn row_scales(&self, cut: &Cut<'_>, role: TensorRole) -> Result<Option<Vec<f32>>> {
        let Some(scales) = self.checkpoint.row_scales(role)? else {
            return Ok(None);
        };
        let own = scales.get(cut.slice.rows.clone());
        let own = own.ok_or_else(|| cut_error(role, cut.info, &cut.slice))?;
        Ok(Some(own.to_vec()))
    }

    /// The rows in E4M3, if they are to become that now.
    fn rounded(&self, source: &WeightSource<'_>, role: TensorRole) -> Result<Option<Fp8Matrix>> {
        let wanted = self.checkpoint.loaded_format(role);
        Ok(
            match wanted == Some(TensorFormat::F8_E4M3) && wanted != Some(source.format) {
                true => Some(Fp8Matrix::quantize(source)?),
                false => None,
            },
        )
    }

    fn vector(&mut self, values: &[f32]) -> Result<B::Vector> {
        self.weight_bytes += size_of_val(values) as u64;
        Ok(self.backend.vector(values)?)
    }

    /// A vector's values, of this rank.
    fn values(&mut self, role: TensorRole) -> Result<Vec<f32>> {
        let cut = self.cut(role)?;
        let mut values = vec![0.0; cut.rows()];
        match cut.info.format {
            format @ (TensorFormat::F32 | TensorFormat::F16 | TensorFormat::BF16) => {
                let bytes = self.data(&cut, role)?;
                phalanx_kernels::cpu::quant::dequantize_row(format, &bytes, &mut values)?;
            }
            format => return Err(LoadError::VectorFormat { role, format }),
        }
        self.finish(&cut);
        Ok(values)
    }

    /// What this rank reads of a tensor: whole rows, or the same bytes of every row; of an AWQ or GPTQ matrix all pages,
    /// because its rows lie across the file.
    fn cut(&self, role: TensorRole) -> Result<Cut<'a>> {
        let Assignment {
            config, plan, rank, ..
        } = self.assignment;
        let checkpoint = self.checkpoint;
        let info: &TensorInfo = checkpoint.tensor(role).ok_or(LoadError::Missing { role })?;
        let slice = plan
            .slice(config, *rank, role)
            .ok_or(LoadError::Missing { role })?;
        let cut = match &info.layout {
            TensorLayout::Rows => row_span(info, &slice).map(|(span, bytes)| (vec![span], bytes)),
            TensorLayout::Int4(tensors) => Some(int4_spans(tensors, info, &slice)),
        };
        let (spans, bytes) = cut.ok_or_else(|| cut_error(role, info, &slice))?;
        Ok(Cut {
            info,
            slice,
            spans,
            bytes,
        })
    }

    /// The tensor has been copied: its pages may go.
    fn finish(&mut self, cut: &Cut<'_>) {
        for span in &cut.spans {
            let map = &self.checkpoint.maps()[span.file];
            map.release(span.offset..span.offset + span.bytes);
        }
        self.bytes_done += cut.bytes;
        self.ahead.advance(self.checkpoint.maps(), self.bytes_done);
        (self.progress)(LoadProgress {
            phase: Phase::LoadingWeights,
            bytes_done: self.bytes_done,
            bytes_total: self.bytes_total,
        });
    }
}

fn cut_error(role: TensorRole, info: &TensorInfo, slice: &TensorSlice) -> LoadError {
    LoadError::Cut {
        role,
        format: info.format,
        rows: slice.rows.clone(),
        cols: slice.cols.clone(),
    }
}

/// From the first byte of the first row to the last of the last, and the bytes that are read of it. None if the slice
/// cuts a block or is not of this tensor.
fn row_span(info: &TensorInfo, slice: &TensorSlice) -> Option<(Span, u64)> {
    let row_stride = info.format.row_bytes(info.cols)?;
    let before = info.format.row_bytes(slice.cols.start)?;
    let row_bytes = info.format.row_bytes(slice.cols.len())?;
    let start = slice.rows.start.checked_mul(row_stride)?.checked_add(before)?;
    // The last row ends with its own bytes, not with the stride.
    let bytes = match slice.rows.len() {
        0 => 0,
        rows => (rows - 1).checked_mul(row_stride)?.checked_add(row_bytes)?,
    };
    if start.checked_add(bytes)? > info.bytes {
        return None;
    }
    let span = Span {
        file: info.file,
        offset: info.offset.checked_add(start)?,
        bytes,
    };
    Some((span, (slice.rows.len() as u64).checked_mul(row_bytes as u64)?))
}

/// All of the matrix's tensors, and the slice's share of their bytes.
fn int4_spans(tensors: &Int4Tensors, info: &TensorInfo, slice: &TensorSlice) -> (Vec<Span>, u64) {
    let spans: Vec<Span> = [tensors.qweight, tensors.qzeros, tensors.scales]
        .into_iter()
        .chain(tensors.g_idx)
        .collect();
    let all: u64 = spans.iter().map(|span| span.bytes as u64).sum();
    let part = slice.rows.len() as f64 * slice.cols.len() as f64 / (info.rows as f64 * info.cols as f64);
    (spans, (all as f64 * part) as u64)
}
