//! Captured decode steps: one graph for every number of rows, all on one batch that stays where it is.
//!
//! What a captured op reads lies at the address it had at the capture, so everything that differs between steps is
//! uploaded to fixed memory before the launch. An op that would upload, allocate or wait while it is captured is an
//! error that names it: see [`Device::outside_capture`].

use std::collections::BTreeMap;

use cudarc::driver::{CudaGraph, sys};

use super::attention::AttentionPlan;
use super::backend::CudaBackend;
use super::batch::CudaBatch;
use super::device::Device;
use super::error::{device as device_error, driver};
use crate::error::check;
use crate::{BatchInput, DecodeShape, GraphCache, KernelError, Result};

const OP: &str = "graph";
/// Other threads, such as NCCL's, may do what they like meanwhile.
const MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const NO_FLAGS: sys::CUgraphInstantiate_flags = sys::CUgraphInstantiate_flags(0);

/// Graphs of decode steps, by number of rows.
pub struct CudaGraphCache {
    shape: DecodeShape,
    batch: CudaBatch,
    graphs: BTreeMap<usize, CudaGraph>,
    /// Bytes by which the device's free memory has shrunk with the captures.
    captured_bytes: usize,
}

impl CudaGraphCache {
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub(crate) fn new(backend: &CudaBackend, shape: DecodeShape) -> Result<Self> {
        Ok(Self {
            batch: CudaBatch::fixed(backend, &shape)?,
            shape,
            graphs: BTreeMap::new(),
            captured_bytes: 0,
        })
    }
}

impl GraphCache<CudaBackend> for CudaGraphCache {
    fn load(&mut self, backend: &CudaBackend, input: &BatchInput, rows: usize) -> Result<()> {
        check(OP, rows <= self.shape.rows, || {
            format!("{rows} rows, at most {}", self.shape.rows)
        })?;
        self.batch.refill(backend, input, rows)?;
        let checked = self.batch.checked();
        checked.check_blocks(OP, self.shape.num_blocks, self.shape.block_size)?;
        checked.check_slots(OP, self.shape.num_blocks.saturating_mul(self.shape.block_size))
    }

    fn batch(&self) -> &CudaBatch {
        &self.batch
    }

    fn capture(&mut self, backend: &CudaBackend, ops: impl FnOnce(&CudaBatch) -> Result<()>) -> Result<()> {
        let free = || backend.device.context.mem_get_info().map_or(0, |(free, _)| free);
        backend.synchronize()?;
        let before = free();
        let graph = capture(&backend.device, || ops(&self.batch))?;
        // Now, not at the first launch.
        graph.upload().map_err(|e| driver(OP, e))?;
        backend.synchronize()?;
        self.captured_bytes += before.saturating_sub(free());
        self.graphs.insert(self.batch.num_rows(), graph);
        Ok(())
    }

    fn replay(&self, _backend: &CudaBackend) -> Result<()> {
        let rows = self.batch.num_rows();
        let Some(graph) = self.graphs.get(&rows) else {
            return Err(KernelError::Shape {
                op: OP,
                message: format!("no step of {rows} rows was captured"),
            });
        };
        graph.launch().map_err(|e| driver(OP, e))
    }

    fn bytes(&self) -> usize {
        let plan = self.batch.attention_plan.borrow();
        self.captured_bytes + self.batch.bytes() + plan.as_ref().map_or(0, AttentionPlan::bytes)
    }
}

/// Captures what `ops` puts into the stream, in place of doing it.
///
/// # Errors
/// What `ops` returns, and then nothing is captured; [`KernelError::Device`] if the driver finds something in it that
/// no graph can hold.
fn capture(device: &Device, ops: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    device.stream.begin_capture(MODE).map_err(|e| driver(OP, e))?;
    device.capturing.set(true);
    let done = ops();
    device.capturing.set(false);
    // In any case: a stream that captures is of no use to anybody.
    let graph = device.stream.end_capture(NO_FLAGS);
    done?;
    graph
        .map_err(|e| driver(OP, e))?
        .ok_or_else(|| device_error(OP, "nothing was captured"))
}
