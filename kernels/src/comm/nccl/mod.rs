//! GPUs of one host, over NCCL.
//!
//! Collectives go into the backend's stream and return at once. Small host messages go through the segment, as between
//! CPU ranks, and so does the news that a peer is lost.

mod handle;
mod ledger;
mod one_shot;
mod watchdog;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaStream, result as driver_result, sys as driver};
use cudarc::nccl::result::{self, NcclError, NcclStatus};
use cudarc::nccl::sys;
use phalanx_model::TensorParallelStyle;
use phalanx_shm::{AbortReason, Party, Progress, RankPort, Segment};

use crate::cuda::{CudaBackend, CudaBuffer, Library, require};
use crate::error::check;
use crate::{Backend, CapturedCollectives, Communicator, GatherLayout, KernelError, Result};
use handle::{Clique, Handle, InitDeadline};
pub use ledger::StepLayout;
use ledger::{Ledger, Operation};
use one_shot::{OneShot, Unavailable};
use watchdog::Watchdog;

use super::layout::check_layout;

/// Connecting the ranks takes seconds on a large host. Waiting ends earlier when the group is aborted.
const INIT_LIMIT: Duration = Duration::from_secs(90);
const VALUE: usize = size_of::<f32>();

type Status = Result<NcclStatus, NcclError>;

/// A group as a rank joins it.
pub struct NcclGroup<'a> {
    /// The worker reads plans from the same port.
    pub port: Rc<RefCell<RankPort>>,
    /// From one rank's [`NcclCommunicator::unique_id`]; each serves one group. Not read by a rank that is alone.
    pub unique_id: &'a [u8],
    /// In gather style, [`all_gather`](Communicator::all_gather) of columns passes through memory of its own.
    pub style: TensorParallelStyle,
    /// From the first collective of a step to its end.
    pub step_timeout: Duration,
    pub step_layout: StepLayout,
    /// Sums short messages without NCCL where all devices reach each other's memory. The same on all ranks.
    pub custom_all_reduce: bool,
}

/// Collectives of one rank with its own GPU. A rank that is alone needs no NCCL.
pub struct NcclCommunicator {
    port: Rc<RefCell<RankPort>>,
    segment: Arc<Segment>,
    rank: usize,
    world_size: usize,
    stream: Arc<CudaStream>,
    style: TensorParallelStyle,
    /// While a graph is captured, what has been put into it.
    capture: RefCell<Option<CapturedCollectives>>,
    /// None for a rank that is alone. Before `staging`: memory can be freed only after the collectives on it have ended.
    watchdog: Option<Watchdog>,
    /// For short sums. Behind `watchdog`, which ends what waits in its kernels.
    one_shot: Result<OneShot, Unavailable>,
    /// The ranks' columns one after another, each part dense; as large as the largest buffer.
    staging: Option<CudaBuffer>,
}

impl NcclCommunicator {
    /// The identity of a group to come, which all its ranks must be given. This process must live until they have joined.
    ///
    /// # Errors
    /// [`KernelError::Device`] if there is no NCCL, or it finds no network interface.
    pub fn unique_id() -> Result<Vec<u8>> {
        require_nccl()?;
        Ok(handle::unique_id()?.internal.map(|byte| byte as u8).to_vec())
    }

    /// Waits until all ranks have come here with the same identity.
    ///
    /// # Errors
    /// [`KernelError::Device`] if NCCL is missing or fails; [`KernelError::Collective`] if the group is aborted or the
    /// ranks are not connected in time; [`KernelError::Shape`] for an identity that is none.
    pub fn join(backend: &CudaBackend, group: NcclGroup<'_>) -> Result<Self> {
        let (segment, rank, world_size, arena) = {
            let port = group.port.borrow();
            let (rank, world_size) = (port.rank() as usize, port.world_size() as usize);
            (Arc::clone(port.segment()), rank, world_size, port.arena())
        };
        let mut comm = Self {
            port: group.port,
            segment,
            rank,
            world_size,
            stream: Arc::clone(&backend.device.stream),
            style: group.style,
            capture: RefCell::default(),
            watchdog: None,
            one_shot: Err("it is turned off".to_owned()),
            staging: None,
        };
        if world_size > 1 {
            let progress = Progress::new(arena, world_size as u32);
            let progress =
                progress.ok_or_else(|| shape("join", "no room for the ranks' progress".to_owned()))?;
            let mut handle = comm.connect(group.unique_id)?;
            if group.custom_all_reduce {
                comm.one_shot = OneShot::join(backend, &mut comm.port.borrow_mut())?;
            }
            if let Ok(one_shot) = &comm.one_shot {
                handle.give_up_with(one_shot.given_up());
            }
            let ledger = Ledger::new(progress, rank as u32, group.step_layout);
            let segment = Arc::clone(&comm.segment);
            // Earlier than the coordinator, which knows less about why a step does not end.
            let limit = group.step_timeout * 9 / 10;
            comm.watchdog = Some(Watchdog::start(handle, ledger, segment, limit)?);
        }
        Ok(comm)
    }

    /// The bytes up to which sums do without NCCL, or why none do.
    ///
    /// # Errors
    /// In words: it was turned off, or which rank's device does not reach which memory.
    pub fn one_shot_limit(&self) -> Result<usize, &str> {
        match &self.one_shot {
            Ok(one_shot) => Ok(one_shot.limit_bytes()),
            Err(reason) => Err(reason),
        }
    }

    fn connect(&self, unique_id: &[u8]) -> Result<Handle> {
        require_nccl()?;
        let Ok(internal) = <[u8; size_of::<sys::ncclUniqueId>()]>::try_from(unique_id) else {
            return Err(shape("join", format!("an NCCL id of {} bytes", unique_id.len())));
        };
        self.bind()?;
        let handle = Handle::init(&Clique {
            unique_id: sys::ncclUniqueId {
                internal: internal.map(|byte| byte as _),
            },
            rank: self.rank,
            world_size: self.world_size,
        })?;
        let deadline = InitDeadline::after(INIT_LIMIT);
        handle.settle(|| match self.segment.abort_reason() {
            Some(reason) => Err(KernelError::Collective(format!(
                "the group was aborted: {reason}"
            ))),
            None => deadline.check(),
        })?;
        Ok(handle)
    }

    /// Sums rows over the ranks and leaves each its share: rank `r` gets rows `r * rows..` of the sum, `rows` of them.
    /// `x` has `world_size * rows` rows.
    ///
    /// # Errors
    /// As the other collectives.
    pub fn reduce_scatter(&mut self, out: &mut CudaBuffer, x: &CudaBuffer, rows: usize) -> Result<()> {
        const OP: &str = "reduce_scatter";
        out.check_width(OP, rows, x.width())?;
        x.check(OP, rows.saturating_mul(self.world_size), x.width())?;
        let (from, to, count) = (pointer(x.ptr()), pointer(out.ptr()), rows * x.width());
        if self.watchdog.is_none() {
            return self.copy(out.ptr(), x.ptr(), Plane::dense(rows, x.width()));
        }
        // SAFETY: both buffers hold the counts checked above and live until the stream has done this (`enqueue`).
        self.enqueue(OP, count, |comm, stream| unsafe {
            result::reduce_scatter(from, to, count, FLOAT, SUM, comm, stream)
        })
    }

    /// Rank `root`'s rows replace those of all others.
    ///
    /// # Errors
    /// As the other collectives.
    pub fn broadcast(&mut self, buffer: &mut CudaBuffer, rows: usize, root: usize) -> Result<()> {
        const OP: &str = "broadcast";
        let (at, count) = self.rows(OP, buffer, rows, root)?;
        // SAFETY: as in `reduce_scatter`.
        self.enqueue(OP, count, |comm, stream| unsafe {
            result::broadcast(at, at, count, FLOAT, root as i32, comm, stream)
        })
    }

    /// To a peer that calls [`recv`](Self::recv) with as many values.
    ///
    /// # Errors
    /// As the other collectives.
    pub fn send(&mut self, buffer: &CudaBuffer, rows: usize, peer: usize) -> Result<()> {
        const OP: &str = "send";
        let (at, count) = self.rows(OP, buffer, rows, peer)?;
        // SAFETY: as in `reduce_scatter`.
        self.enqueue(OP, count, |comm, stream| unsafe {
            result::send(at, count, FLOAT, peer as i32, comm, stream)
        })
    }

    /// From a peer that calls [`send`](Self::send).
    ///
    /// # Errors
    /// As the other collectives.
    pub fn recv(&mut self, buffer: &mut CudaBuffer, rows: usize, peer: usize) -> Result<()> {
        const OP: &str = "recv";
        let (at, count) = self.rows(OP, buffer, rows, peer)?;
        // SAFETY: as in `reduce_scatter`.
        self.enqueue(OP, count, |comm, stream| unsafe {
            result::recv(at, count, FLOAT, peer as i32, comm, stream)
        })
    }

    /// The address and number of the values in leading rows, for a call that names `peer`.
    fn rows(
        &self,
        op: &'static str,
        buffer: &CudaBuffer,
        rows: usize,
        peer: usize,
    ) -> Result<(Pointer, usize)> {
        buffer.check(op, rows, buffer.width())?;
        check(op, peer < self.world_size, || {
            format!("rank {peer} of {}", self.world_size)
        })?;
        Ok((pointer(buffer.ptr()), rows * buffer.width()))
    }

    /// Puts a collective of `count` values into the stream, behind everything the backend has put there. Buffers are
    /// not freed before the stream is done with them: the backend's memory waits for the device.
    fn enqueue(
        &self,
        name: &'static str,
        count: usize,
        call: impl FnOnce(sys::ncclComm_t, sys::cudaStream_t) -> Status,
    ) -> Result<()> {
        let Some(watchdog) = &self.watchdog else {
            return Ok(());
        };
        self.bind()?;
        let operation = Operation {
            name,
            bytes: count * VALUE,
        };
        let stream: sys::cudaStream_t = self.stream.cu_stream().cast();
        match &mut *self.capture.borrow_mut() {
            Some(captured) => {
                captured.0.push((name, operation.bytes));
                watchdog.capture(operation, |comm| call(comm, stream))
            }
            None => watchdog.call(operation, |comm| call(comm, stream)),
        }
    }

    fn bind(&self) -> Result<()> {
        let bound = self.stream.context().bind_to_thread();
        bound.map_err(|error| device("binding the context", error))
    }

    /// Every rank's columns: packed into the staging buffer, broadcast from there, and put in their places.
    fn gather_columns(
        &mut self,
        buffer: &CudaBuffer,
        rows: usize,
        ranges: &[std::ops::Range<usize>],
    ) -> Result<()> {
        let Some(staging) = &self.staging else {
            return Err(shape("all_gather", "of columns in reduce style".to_owned()));
        };
        staging.check("all_gather", rows, buffer.width())?;
        let part = |rank: usize| {
            let columns = &ranges[rank];
            let dense = staging.ptr() + (rows * columns.start * VALUE) as u64;
            (buffer.column(columns.start), dense, columns.len())
        };
        let plane = |columns| Plane {
            rows,
            columns,
            from_stride: columns,
            to_stride: columns,
        };
        let stride = buffer.width();
        let (own, packed, columns) = part(self.rank);
        self.copy(
            packed,
            own,
            Plane {
                from_stride: stride,
                ..plane(columns)
            },
        )?;
        let parts: Vec<_> = (0..self.world_size).map(part).collect();
        self.enqueue("all_gather", rows * stride, |comm, stream| {
            result::group_start()?;
            for (root, &(_, dense, columns)) in parts.iter().enumerate().filter(|(_, part)| part.2 > 0) {
                let (at, count) = (pointer(dense), rows * columns);
                // SAFETY: the parts tile the staging buffer, which holds as many values (checked above), and as in
                // `reduce_scatter`.
                unsafe { result::broadcast(at, at, count, FLOAT, root as i32, comm, stream)? };
            }
            result::group_end()
        })?;
        for (rank, &(place, dense, columns)) in parts.iter().enumerate() {
            if rank != self.rank {
                self.copy(
                    place,
                    dense,
                    Plane {
                        to_stride: stride,
                        ..plane(columns)
                    },
                )?;
            }
        }
        Ok(())
    }

    fn sum(&mut self, name: &'static str, buffer: &mut CudaBuffer, rows: usize) -> Result<()> {
        let (at, count) = (pointer(buffer.ptr()), rows * buffer.width());
        if let (Some(watchdog), Ok(one_shot)) = (&self.watchdog, &self.one_shot)
            && one_shot.takes(count)
        {
            let bytes = count * VALUE;
            match &mut *self.capture.borrow_mut() {
                Some(captured) => captured.0.push((name, bytes)),
                None => watchdog.launch([Operation { name, bytes }])?,
            }
            return one_shot.enqueue(buffer, count);
        }
        // SAFETY: as in `reduce_scatter`; NCCL allows the sum to replace its own term.
        self.enqueue(name, count, |comm, stream| unsafe {
            result::all_reduce(at, at, count, FLOAT, SUM, comm, stream)
        })
    }

    /// Copies f32 within the device's memory, in stream order.
    fn copy(&self, to: u64, from: u64, plane: Plane) -> Result<()> {
        let Plane {
            rows,
            columns,
            from_stride,
            to_stride,
        } = plane;
        if rows * columns == 0 {
            return Ok(());
        }
        self.bind()?;
        let copy = driver::CUDA_MEMCPY2D {
            srcMemoryType: driver::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: from,
            srcPitch: from_stride * VALUE,
            dstMemoryType: driver::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: to,
            dstPitch: to_stride * VALUE,
            WidthInBytes: columns * VALUE,
            Height: rows,
            srcXInBytes: 0,
            srcY: 0,
            srcHost: std::ptr::null(),
            srcArray: std::ptr::null_mut(),
            dstXInBytes: 0,
            dstY: 0,
            dstHost: std::ptr::null_mut(),
            dstArray: std::ptr::null_mut(),
        };
        // SAFETY: both planes lie within buffers that the callers have checked, and the driver copies the description.
        let done = unsafe { driver::cuMemcpy2DAsync_v2(&copy, self.stream.cu_stream()) };
        done.result().map_err(|error| device("copying columns", error))
    }
}

/// A part of a matrix; widths in values.
#[derive(Clone, Copy)]
struct Plane {
    rows: usize,
    columns: usize,
    from_stride: usize,
    to_stride: usize,
}

impl Plane {
    fn dense(rows: usize, columns: usize) -> Self {
        Self {
            rows,
            columns,
            from_stride: columns,
            to_stride: columns,
        }
    }
}

const FLOAT: sys::ncclDataType_t = sys::ncclDataType_t::ncclFloat32;
const SUM: sys::ncclRedOp_t = sys::ncclRedOp_t::ncclSum;

type Pointer = *mut std::ffi::c_void;

fn pointer(address: u64) -> Pointer {
    std::ptr::without_provenance_mut(address as usize)
}

fn shape(op: &'static str, message: String) -> KernelError {
    KernelError::Shape { op, message }
}

fn device(op: &'static str, error: impl std::fmt::Display) -> KernelError {
    KernelError::Device {
        op,
        message: error.to_string(),
    }
}

fn require_nccl() -> Result<()> {
    require(&[Library::Nccl]).map_err(|missing| device("NCCL", missing))
}

impl Communicator<CudaBackend> for NcclCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn buffer(&mut self, backend: &CudaBackend, rows: usize, width: usize) -> Result<CudaBuffer> {
        let staged = self
            .staging
            .as_ref()
            .map_or(0, |staging| staging.rows() * staging.width());
        let gathers = self.style == TensorParallelStyle::Gather && self.watchdog.is_some();
        if gathers && staged < rows.saturating_mul(width) {
            self.staging = Some(backend.buffer(rows, width)?);
        }
        backend.buffer(rows, width)
    }

    fn start_rows(&mut self, buffer: &mut CudaBuffer, rows: usize) -> Result<()> {
        const OP: &str = "start_rows";
        buffer.check(OP, rows, buffer.width())?;
        if self.watchdog.is_none() {
            return Ok(());
        }
        self.bind()?;
        let bytes = rows * buffer.width() * VALUE;
        // SAFETY: the buffer has as many rows, checked above.
        unsafe { driver_result::memset_d8_async(buffer.ptr(), 0, bytes, self.stream.cu_stream()) }
            .map_err(|error| device(OP, error))
    }

    fn all_gather(&mut self, buffer: &mut CudaBuffer, rows: usize, layout: GatherLayout<'_>) -> Result<()> {
        buffer.check("all_gather", rows, buffer.width())?;
        check_layout(layout, self.world_size, rows, buffer.width())?;
        match layout {
            _ if self.watchdog.is_none() => Ok(()),
            GatherLayout::Columns(ranges) => self.gather_columns(buffer, rows, ranges),
            // Rows have one writer each, and the others' are zero: the sum is the gathered buffer. Once a step, for the
            // embedding; sending each run of rows from its writer would be a call per run, and another graph per step.
            GatherLayout::Rows(_) => self.sum("all_gather", buffer, rows),
        }
    }

    fn all_reduce(&mut self, buffer: &mut CudaBuffer, rows: usize) -> Result<()> {
        buffer.check("all_reduce", rows, buffer.width())?;
        self.sum("all_reduce", buffer, rows)
    }

    fn exchange(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        if let Some(watchdog) = &self.watchdog {
            watchdog.meet();
        }
        let exchanged = self.port.borrow_mut().exchange(message);
        if let Some(watchdog) = &self.watchdog {
            watchdog.rest();
        }
        // The watchdog knows better why the group has ended.
        let aborted = || self.watchdog.as_ref().and_then(Watchdog::aborted);
        exchanged.map_err(|error| KernelError::Collective(aborted().unwrap_or_else(|| error.to_string())))
    }

    fn begin_capture(&mut self) {
        self.capture = RefCell::new(Some(CapturedCollectives::default()));
    }

    fn end_capture(&mut self) -> CapturedCollectives {
        self.capture.take().unwrap_or_default()
    }

    fn replay(&mut self, captured: &CapturedCollectives) -> Result<()> {
        let operations = captured.0.iter().map(|&(name, bytes)| Operation { name, bytes });
        self.watchdog
            .as_ref()
            .map_or(Ok(()), |watchdog| watchdog.launch(operations))
    }

    fn abort(&self) {
        self.segment
            .abort(AbortReason::Lost(Party::Rank(self.rank as u32)));
        if let Some(watchdog) = &self.watchdog {
            watchdog.abort("this rank has given up");
        }
    }
}
