//! [`Backend`] on a CUDA device.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use phalanx_model::{KvDtype, TensorFormat};

use super::attention;
use super::batch::CudaBatch;
use super::blas::Blas;
use super::buffer::{CudaBuffer, CudaVector};
use super::compile::{KernelCache, Origin, Variant};
use super::device::{Device, E4M3_CAPABILITY};
use super::error::{driver, unavailable};
use super::graph::CudaGraphCache;
use super::kv_cache::{self, CudaKvCache};
use super::launch::{Arg, Grid, Kernels};
use super::library::{Library, require};
use super::memory::{Arena, Pinned, Region, Staging};
use super::weight::CudaWeight;
use super::{activation, candidates, count, embedding, linear, norm, rotary};
use crate::error::check;
use crate::{
    Backend, BatchInput, CandidateRequest, Candidates, Columns, DecodeShape, Heads, KernelError, KvSpec,
    Linear, Norm, Result, Rope, Threshold, WeightSource,
};

/// Weights and activations are cut from allocations of so many bytes.
const SLAB_BYTES: usize = 32 << 20;

/// What a rank's device is used with.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// The driver's number of the device.
    pub ordinal: usize,
    pub kernel_cache: KernelCache,
    /// Bytes for what an op needs while it runs. More rows than fit are done in parts.
    pub workspace_bytes: usize,
    /// Bytes for what a step uploads: token ids, positions, block tables, sampling parameters.
    pub step_bytes: usize,
    /// Bytes of each of the pinned host buffers that everything is uploaded through.
    pub staging_bytes: usize,
}

impl CudaOptions {
    /// With the kernel cache of the user's environment.
    pub fn new(ordinal: usize) -> Self {
        Self {
            ordinal,
            kernel_cache: KernelCache::of_environment(|name| std::env::var_os(name)),
            workspace_bytes: 64 << 20,
            step_bytes: 16 << 20,
            staging_bytes: 8 << 20,
        }
    }
}

/// A rank's device: context, stream, kernels and memory. One thread drives it.
pub struct CudaBackend {
    pub(crate) device: Device,
    kernels: Arc<Kernels>,
    /// The kernels that are specialized for a head size and an element type of the cache.
    kv_kernels: RefCell<HashMap<(usize, &'static str), Arc<Kernels>>>,
    /// Those that are specialized for weights that stay quantized.
    pub(super) linear_kernels: RefCell<HashMap<TensorFormat, Arc<Kernels>>>,
    kernel_cache: KernelCache,
    pub(super) blas: Blas,
    pub(super) weights: Arena,
    pub(super) kv: Arena,
    activations: Arena,
    /// What lives as long as a step.
    step: Arena,
    pub(super) step_bytes: usize,
    /// Every op may use it from the start: ops follow each other in stream order.
    pub(super) scratch: Region,
    pub(super) staging: Staging,
    downloads: RefCell<Pinned>,
}

impl CudaBackend {
    /// Opens a device with [`CudaOptions::new`].
    ///
    /// # Errors
    /// As [`CudaBackend::open`].
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::open(CudaOptions::new(ordinal))
    }

    /// Opens the device, loads the kernels (compiling what the cache does not have) and allocates the memory of ops.
    ///
    /// # Errors
    /// [`KernelError::Device`] if a library or the device is missing or a kernel cannot be compiled,
    /// [`KernelError::OutOfMemory`].
    pub fn open(options: CudaOptions) -> Result<Self> {
        require(&[Library::Cuda, Library::CublasLt]).map_err(|why| unavailable("opening the device", why))?;
        let device = Device::open(options.ordinal)?;
        let cubins = options.kernel_cache.cubins(&device.arch, Variant::plain())?;
        let kernels = Arc::new(Kernels::load(&device, cubins)?);
        Ok(Self {
            kernels,
            kv_kernels: RefCell::default(),
            linear_kernels: RefCell::default(),
            kernel_cache: options.kernel_cache,
            blas: Blas::new(&device)?,
            weights: Arena::growing("weights", SLAB_BYTES),
            kv: Arena::growing("KV cache", SLAB_BYTES),
            activations: Arena::growing("activations", SLAB_BYTES),
            step: Arena::fixed(&device, "a step's input", options.step_bytes)?,
            step_bytes: options.step_bytes,
            scratch: Arena::fixed(&device, "workspace", options.workspace_bytes)?
                .alloc(&device, options.workspace_bytes)?,
            staging: Staging::new(&device, options.staging_bytes)?,
            downloads: RefCell::new(Pinned::new(&device, options.staging_bytes)?),
            device,
        })
    }

    /// Where the machine code of each loaded unit came from.
    pub fn kernel_origins(&self) -> Vec<Origin> {
        let mut origins = self.kernels.origins().to_vec();
        for kernels in self.kv_kernels.borrow().values() {
            origins.extend(kernels.origins());
        }
        for kernels in self.linear_kernels.borrow().values() {
            origins.extend(kernels.origins());
        }
        origins
    }

    /// Bytes of the device that nobody has taken, this process or another.
    ///
    /// # Errors
    /// [`KernelError::Device`] if the driver does not tell.
    pub fn free_bytes(&self) -> Result<u64> {
        let (free, _total) = self
            .device
            .context
            .mem_get_info()
            .map_err(|e| driver("memory", e))?;
        Ok(free as u64)
    }

    /// The kernels that are not specialized, for whoever launches them without the backend.
    pub(crate) fn plain_kernels(&self) -> Arc<Kernels> {
        Arc::clone(&self.kernels)
    }

    /// Waits until everything that was queued is done.
    ///
    /// # Errors
    /// [`KernelError::Device`] with the first failure of anything that was queued.
    pub fn synchronize(&self) -> Result<()> {
        self.device.synchronize("synchronize")
    }

    /// # Safety
    /// As `Kernels::launch`.
    pub(super) unsafe fn launch(&self, name: &'static str, grid: Grid, args: &[Arg<'_>]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.kernels.launch(&self.device, name, grid, args) }
    }

    /// Loads the kernels for a cache, once for all layers.
    pub(super) fn kv_kernels(&self, spec: &KvSpec) -> Result<Arc<Kernels>> {
        let dtype = match spec.dtype {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::BF16 => "bf16",
            KvDtype::E4M3 => "e4m3",
            KvDtype::INT8 => "int8",
        };
        let key = (spec.head_dim, dtype);
        if let Some(kernels) = self.kv_kernels.borrow().get(&key) {
            return Ok(Arc::clone(kernels));
        }
        let variants = Variant::of_kv(spec.head_dim, spec.dtype)?;
        let kernels = Arc::new(self.load_kernels(variants)?);
        self.kv_kernels.borrow_mut().insert(key, Arc::clone(&kernels));
        Ok(kernels)
    }

    /// As [`DeviceInfo::multiplies_e4m3`](super::DeviceInfo::multiplies_e4m3).
    pub fn multiplies_e4m3(&self) -> bool {
        self.device.capability >= E4M3_CAPABILITY
    }

    pub(super) fn load_kernels(&self, variants: Vec<Variant>) -> Result<Kernels> {
        let cubins = self.kernel_cache.cubins(&self.device.arch, variants)?;
        Kernels::load(&self.device, cubins)
    }

    /// Uploads words that live as long as a step, through pinned memory and in stream order.
    pub(super) fn upload_step(&self, words: &[u32]) -> Result<Region> {
        let region = self.step.alloc(&self.device, size_of_val(words))?;
        self.upload(&region, words)?;
        Ok(region)
    }

    /// Memory that stays as long as the region.
    pub(super) fn fixed_region(&self, bytes: usize) -> Result<Region> {
        self.activations.alloc(&self.device, bytes)
    }

    /// Writes the words to the start of a region, in stream order.
    pub(super) fn upload(&self, region: &Region, words: &[u32]) -> Result<()> {
        self.staging.upload(&self.device, region, bytes_of(words))
    }

    /// Copies the first `words` words of a region to the host, and waits for them.
    pub(super) fn download(&self, region: &Region, words: usize) -> Result<Vec<u32>> {
        let mut downloads = self.downloads.borrow_mut();
        let mut values = Vec::with_capacity(words);
        let bytes = words * size_of::<u32>();
        let step = downloads.len() / size_of::<u32>() * size_of::<u32>();
        for start in (0..bytes).step_by(step.max(size_of::<u32>())) {
            let len = step.min(bytes - start);
            let chunk = downloads.download(&self.device, (region, (start, len)))?;
            let words = chunk.as_chunks().0.iter();
            values.extend(words.map(|&word| u32::from_ne_bytes(word)));
        }
        Ok(values)
    }
}

/// The bytes of plain numbers.
fn bytes_of<T: PlainNumber>(values: &[T]) -> &[u8] {
    // SAFETY: the numbers have no padding, and every byte is a u8.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

trait PlainNumber: Copy {}
impl PlainNumber for u32 {}
impl PlainNumber for f32 {}

impl Backend for CudaBackend {
    type Buffer = CudaBuffer;
    type Weight = CudaWeight;
    type Vector = CudaVector;
    type KvCache = CudaKvCache;
    type Batch = CudaBatch;
    type GraphCache = CudaGraphCache;

    fn buffer(&self, rows: usize, width: usize) -> Result<CudaBuffer> {
        let bytes = rows
            .checked_mul(width)
            .and_then(|n| n.checked_mul(size_of::<f32>()));
        let bytes = bytes.ok_or(KernelError::OutOfMemory {
            what: "activations",
            requested: usize::MAX,
            free: 0,
        })?;
        let region = self.activations.alloc(&self.device, bytes)?;
        region.zero(&self.device)?;
        Ok(CudaBuffer::new(region, rows, width))
    }

    fn weight(&self, parts: &[WeightSource<'_>]) -> Result<CudaWeight> {
        CudaWeight::load(self, parts)
    }

    fn vector(&self, values: &[f32]) -> Result<CudaVector> {
        let region = self.weights.alloc(&self.device, size_of_val(values))?;
        self.staging.upload(&self.device, &region, bytes_of(values))?;
        Ok(CudaVector {
            region,
            len: values.len(),
        })
    }

    fn kv_cache(&self, spec: KvSpec) -> Result<CudaKvCache> {
        CudaKvCache::new(self, spec)
    }

    fn batch(&self, input: &BatchInput) -> Result<CudaBatch> {
        CudaBatch::new(self, input)
    }

    fn graph_cache(&self, shape: &DecodeShape) -> Result<Option<CudaGraphCache>> {
        CudaGraphCache::new(self, *shape).map(Some)
    }

    fn write(&self, buffer: &mut CudaBuffer, values: &[f32]) -> Result<()> {
        let rows = values.len().checked_div(buffer.width()).unwrap_or(0);
        check("write", rows * buffer.width() == values.len(), || {
            format!("{} values are not whole rows of {}", values.len(), buffer.width())
        })?;
        buffer.check("write", rows, buffer.width())?;
        self.staging
            .upload(&self.device, buffer.region(), bytes_of(values))
    }

    fn read(&self, buffer: &CudaBuffer, rows: usize) -> Result<Vec<f32>> {
        buffer.check("read", rows, buffer.width())?;
        let words = self.download(buffer.region(), rows * buffer.width())?;
        Ok(words.into_iter().map(f32::from_bits).collect())
    }

    fn weight_bytes(&self, weight: &CudaWeight) -> usize {
        weight.bytes()
    }

    fn embedding(
        &self,
        out: &mut CudaBuffer,
        table: &CudaWeight,
        vocab: Range<usize>,
        batch: &CudaBatch,
    ) -> Result<()> {
        embedding::embedding(self, out, table, vocab, batch)
    }

    fn rms_norm(
        &self,
        out: &mut CudaBuffer,
        x: &CudaBuffer,
        norm: &Norm<'_, Self>,
        rows: usize,
    ) -> Result<()> {
        norm::rms_norm(self, out, x, norm, rows)
    }

    fn fused_add_rms_norm(
        &self,
        out: &mut CudaBuffer,
        residual: &mut CudaBuffer,
        delta: &CudaBuffer,
        norm: &Norm<'_, Self>,
        rows: usize,
    ) -> Result<()> {
        norm::fused_add_rms_norm(self, [out, residual], delta, norm, rows)
    }

    fn linear(
        &self,
        out: Columns<'_, Self>,
        x: &CudaBuffer,
        weight: &Linear<'_, Self>,
        rows: usize,
    ) -> Result<()> {
        linear::linear(self, out, x, weight, rows)
    }

    fn rotary_embedding(
        &self,
        qkv: &mut CudaBuffer,
        rope: &Rope<'_, Self>,
        heads: &Heads,
        batch: &CudaBatch,
    ) -> Result<()> {
        rotary::rotary_embedding(self, qkv, rope, heads, batch)
    }

    fn reshape_and_cache(
        &self,
        kv: &mut CudaKvCache,
        qkv: &CudaBuffer,
        heads: &Heads,
        batch: &CudaBatch,
    ) -> Result<()> {
        kv_cache::reshape_and_cache(self, kv, qkv, heads, batch)
    }

    fn paged_attention(
        &self,
        out: Columns<'_, Self>,
        qkv: &CudaBuffer,
        kv: &CudaKvCache,
        heads: &Heads,
        batch: &CudaBatch,
    ) -> Result<()> {
        attention::paged_attention(self, out, qkv, kv, (heads, batch))
    }

    fn silu_and_mul(&self, out: Columns<'_, Self>, gate_up: &CudaBuffer, rows: usize) -> Result<()> {
        activation::silu_and_mul(self, out, gate_up, rows)
    }

    fn select_rows(&self, out: &mut CudaBuffer, x: &CudaBuffer, rows: &[u32]) -> Result<()> {
        embedding::select_rows(self, out, x, rows)
    }

    fn candidates(&self, logits: &CudaBuffer, requests: &[CandidateRequest<'_>]) -> Result<Vec<Candidates>> {
        candidates::candidates(self, logits, requests)
    }

    fn count_at_least(&self, x: &CudaBuffer, columns: usize, thresholds: &[Threshold]) -> Result<Vec<u32>> {
        count::count_at_least(self, x, columns, thresholds)
    }
}
