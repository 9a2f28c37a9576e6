//! The seam between the model and a device, and the one between ranks.

use std::ops::Range;

use phalanx_model::{KvDtype, RopeLayout, TensorFormat};

use crate::error::check;
use crate::{BatchInput, CandidateRequest, Candidates, Result};

/// A device's ops. One op is one method, one CPU file, one .cu file and one row of the conformance suite. Activations
/// are f32 `[rows, width]`, row-major; `rows` is the number of leading rows that count.
pub trait Backend: Sized {
    /// Activations in device memory, allocated at start.
    type Buffer;
    /// A weight matrix `[rows = outputs, cols = inputs]`, repacked for the device; dense or block-quantized.
    type Weight;
    /// A short f32 vector: norm weights, biases, rotary frequencies.
    type Vector;
    /// K and V of one layer, in blocks.
    type KvCache;
    /// A step's positions, slots and tables where the device can read them.
    type Batch;
    /// Decode steps whose ops were captured.
    type GraphCache: GraphCache<Self>;

    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer>;
    /// Several matrices of equal `cols`, stacked; each keeps its format.
    fn weight(&self, parts: &[WeightSource<'_>]) -> Result<Self::Weight>;
    fn vector(&self, values: &[f32]) -> Result<Self::Vector>;
    fn kv_cache(&self, spec: KvSpec) -> Result<Self::KvCache>;
    /// Bounds are the caller's promise: every slot and block lies within the KV cache.
    fn batch(&self, input: &BatchInput) -> Result<Self::Batch>;
    /// An empty cache; none where an op is a call and there is nothing to capture.
    fn graph_cache(&self, shape: &DecodeShape) -> Result<Option<Self::GraphCache>>;
    /// Overwrites the leading rows with whole rows from the host: for tests and tools, not on the path of a step.
    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]) -> Result<()>;
    /// Copies the first `rows` rows to the host.
    fn read(&self, buffer: &Self::Buffer, rows: usize) -> Result<Vec<f32>>;
    /// Bytes a weight takes where it lies.
    fn weight_bytes(&self, weight: &Self::Weight) -> usize;

    /// `out[t] = table[token_ids[t] - vocab.start]` for the tokens within `vocab`; other rows stay as they are.
    fn embedding(
        &self,
        out: &mut Self::Buffer,
        table: &Self::Weight,
        vocab: Range<usize>,
        batch: &Self::Batch,
    ) -> Result<()>;
    /// `out = x / sqrt(mean(x²) + eps) * weight` (Zhang & Sennrich, 2019).
    fn rms_norm(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        norm: &Norm<'_, Self>,
        rows: usize,
    ) -> Result<()>;
    /// `residual += delta; out = rms_norm(residual)`.
    #[expect(clippy::too_many_arguments, reason = "three buffers that nothing else groups")]
    fn fused_add_rms_norm(
        &self,
        out: &mut Self::Buffer,
        residual: &mut Self::Buffer,
        delta: &Self::Buffer,
        norm: &Norm<'_, Self>,
        rows: usize,
    ) -> Result<()>;
    /// `out[:, columns] = x · weightᵀ (+ bias)`.
    fn linear(
        &self,
        out: Columns<'_, Self>,
        x: &Self::Buffer,
        weight: &Linear<'_, Self>,
        rows: usize,
    ) -> Result<()>;
    /// Rotates the q and k heads of `qkv` in place.
    fn rotary_embedding(
        &self,
        qkv: &mut Self::Buffer,
        rope: &Rope<'_, Self>,
        heads: &Heads,
        batch: &Self::Batch,
    ) -> Result<()>;
    /// Writes the k and v heads of `qkv` into the cache.
    fn reshape_and_cache(
        &self,
        kv: &mut Self::KvCache,
        qkv: &Self::Buffer,
        heads: &Heads,
        batch: &Self::Batch,
    ) -> Result<()>;
    /// Causal attention of every row's q heads over its sequence's blocks; any mix of chunks and single rows.
    #[expect(
        clippy::too_many_arguments,
        reason = "three device objects that nothing else groups"
    )]
    fn paged_attention(
        &self,
        out: Columns<'_, Self>,
        qkv: &Self::Buffer,
        kv: &Self::KvCache,
        heads: &Heads,
        batch: &Self::Batch,
    ) -> Result<()>;
    /// `out[:, columns] = silu(gate) * up` where a row of `gate_up` is `[gate | up]`.
    fn silu_and_mul(&self, out: Columns<'_, Self>, gate_up: &Self::Buffer, rows: usize) -> Result<()>;
    /// `out[i] = x[rows[i]]`: the rows that are sampled.
    fn select_rows(&self, out: &mut Self::Buffer, x: &Self::Buffer, rows: &[u32]) -> Result<()>;
    /// Sampling candidates of rows of `logits`.
    fn candidates(&self, logits: &Self::Buffer, requests: &[CandidateRequest<'_>])
    -> Result<Vec<Candidates>>;
    /// How many of the first `columns` values of each threshold's row are at least its value.
    fn count_at_least(&self, x: &Self::Buffer, columns: usize, thresholds: &[Threshold]) -> Result<Vec<u32>>;
}

/// Decode steps, each of another number of rows, whose ops were captured once and are launched as one.
///
/// A step is loaded, and then either computed through [`batch`](Self::batch) as any other, or captured, or replayed.
pub trait GraphCache<B: Backend> {
    /// Takes a step with one row of each sequence, and pads it to `rows` rows: ops compute them all, but those of the
    /// padding touch no cache and are attended to by nobody. The bounds of [`Backend::batch`] are checked.
    fn load(&mut self, backend: &B, input: &BatchInput, rows: usize) -> Result<()>;
    /// The loaded step.
    fn batch(&self) -> &B::Batch;
    /// Captures `ops` on the loaded step, for all steps padded to as many rows. They must have been run before:
    /// libraries prepare themselves at the first call.
    ///
    /// # Errors
    /// [`KernelError::Capture`](crate::KernelError::Capture) if an op uploads, allocates or waits; what `ops` returns.
    fn capture(&mut self, backend: &B, ops: impl FnOnce(&B::Batch) -> Result<()>) -> Result<()>;
    /// Queues what was captured for as many rows as the loaded step has.
    fn replay(&self, backend: &B) -> Result<()>;
    /// Device memory that the cache and its graphs take.
    fn bytes(&self) -> usize;
}

/// The largest step that a [`GraphCache`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeShape {
    pub rows: usize,
    /// Most blocks of a sequence.
    pub blocks_per_row: usize,
    /// Of the KV cache.
    pub num_blocks: usize,
    pub block_size: usize,
    /// Of all attention.
    pub heads: Heads,
}

impl DecodeShape {
    /// Most tokens of a sequence.
    pub fn max_context(&self) -> usize {
        self.blocks_per_row.saturating_mul(self.block_size)
    }
}

/// The cache of a backend that captures nothing.
#[derive(Clone, Copy, Debug)]
pub enum NoGraphs {}

impl<B: Backend> GraphCache<B> for NoGraphs {
    fn load(&mut self, _backend: &B, _input: &BatchInput, _rows: usize) -> Result<()> {
        match *self {}
    }
    fn batch(&self) -> &B::Batch {
        match *self {}
    }
    fn capture(&mut self, _backend: &B, _ops: impl FnOnce(&B::Batch) -> Result<()>) -> Result<()> {
        match *self {}
    }
    fn replay(&self, _backend: &B) -> Result<()> {
        match *self {}
    }
    fn bytes(&self) -> usize {
        match *self {}
    }
}

/// Where an op writes: columns `start..` of a wider buffer.
pub struct Columns<'a, B: Backend> {
    pub buffer: &'a mut B::Buffer,
    pub start: usize,
}

/// A row of a buffer, and what its values are compared with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    pub row: usize,
    pub value: f32,
}

pub struct Norm<'a, B: Backend> {
    pub weight: &'a B::Vector,
    pub eps: f32,
}

pub struct Linear<'a, B: Backend> {
    pub weight: &'a B::Weight,
    pub bias: Option<&'a B::Vector>,
}

pub struct Rope<'a, B: Backend> {
    /// `rotary_dim / 2` inverse frequencies, scaling applied.
    pub inverse_frequencies: &'a B::Vector,
    /// Multiplies cos and sin.
    pub attention_factor: f32,
    pub layout: RopeLayout,
}

/// A rank's heads. A row of `qkv` is `[q heads | k heads | v heads]`, each `head_dim` wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub num_q: usize,
    pub num_kv: usize,
    pub head_dim: usize,
    /// The first q head's number in the whole model, and the first KV head's.
    pub q_start: usize,
    pub kv_start: usize,
    /// Query heads per KV head in the whole model.
    pub group_size: usize,
    /// Only so many of the last positions are attended to.
    pub sliding_window: Option<usize>,
}

impl Heads {
    /// The rank's KV head (counted from its first) that its q head `q` reads.
    pub fn kv_of(&self, q: usize) -> usize {
        (self.q_start + q) / self.group_size - self.kv_start
    }
    pub fn qkv_width(&self) -> usize {
        (self.num_q + 2 * self.num_kv) * self.head_dim
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSpec {
    pub num_blocks: usize,
    pub block_size: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub dtype: KvDtype,
}

/// A matrix as it lies in a model file. Row `r` is the `row_bytes(cols)` bytes at `data[r * row_stride..]`.
#[derive(Clone, Copy, Debug)]
pub struct WeightSource<'a> {
    pub format: TensorFormat,
    pub rows: usize,
    pub cols: usize,
    pub data: &'a [u8],
    /// More than a row's bytes when the input features are sharded.
    pub row_stride: usize,
    /// Of `F8_E4M3`, and only of that: what each row's codes are multiplied with.
    pub row_scales: Option<&'a [f32]>,
}

impl WeightSource<'_> {
    /// An error unless there is a scale for each row of `F8_E4M3`, and none otherwise.
    pub(crate) fn check_scales(&self, op: &'static str) -> Result<()> {
        let expected = (self.format == TensorFormat::F8_E4M3).then_some(self.rows);
        let found = self.row_scales.map(<[f32]>::len);
        check(op, found == expected, || {
            format!("{found:?} scales for {} rows of {}", self.rows, self.format)
        })
    }
}

/// NCCL's verbs, in stream order with the backend. An error ends the group's epoch.
pub trait Communicator<B: Backend> {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// A buffer that collectives may be called on. All ranks allocate the same ones in the same order.
    fn buffer(&mut self, backend: &B, rows: usize, width: usize) -> Result<B::Buffer>;
    /// Before rows are written that [`GatherLayout::Rows`] will gather: where that is a sum, all are zeroed.
    fn start_rows(&mut self, _buffer: &mut B::Buffer, _rows: usize) -> Result<()> {
        Ok(())
    }
    /// Every rank has written its own part of the first `rows` rows; afterwards all hold all of it. Two buffers in
    /// turn are enough: a buffer may be written again after one collective on another one.
    fn all_gather(&mut self, buffer: &mut B::Buffer, rows: usize, layout: GatherLayout<'_>) -> Result<()>;
    /// Sums the ranks' buffers in rank order; all hold the sum.
    fn all_reduce(&mut self, buffer: &mut B::Buffer, rows: usize) -> Result<()>;
    /// Small host messages to everyone; the result is in rank order. Bounded by the communicator's message limit.
    fn exchange(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// From here to [`end_capture`](Self::end_capture) collectives are captured with the backend's ops: nothing starts.
    fn begin_capture(&mut self) {}
    /// What [`replay`](Self::replay) is to be told before the graph is launched.
    fn end_capture(&mut self) -> CapturedCollectives {
        CapturedCollectives::default()
    }
    /// The collectives of a graph start now: for whoever watches over them.
    fn replay(&mut self, _captured: &CapturedCollectives) -> Result<()> {
        Ok(())
    }
    /// Unblocks everyone, for good.
    fn abort(&self);
}

/// The collectives of a graph in their order: names, and bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CapturedCollectives(pub(crate) Vec<(&'static str, usize)>);

/// Which part of a gathered buffer each rank has written.
#[derive(Clone, Copy, Debug)]
pub enum GatherLayout<'a> {
    /// In rank order.
    Columns(&'a [Range<usize>]),
    /// The writer of each row, after [`Communicator::start_rows`].
    Rows(&'a [u32]),
}
