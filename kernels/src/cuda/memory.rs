//! Device memory by purpose, and the pinned host memory that uploads pass through.
//!
//! All of it is used in the order of the one stream: memory that is given out again is written only after what came
//! before has read it.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, DriverError, result, sys};

use super::device::Device;
use super::error::driver;
use crate::{KernelError, Result};

/// Where regions start: as `cuMemAlloc` aligns, and more than any vector load or cublasLt asks for.
const ALIGNMENT: usize = 256;

/// A driver's allocation.
struct Slab {
    context: Arc<CudaContext>,
    start: sys::CUdeviceptr,
    bytes: usize,
}

impl Slab {
    fn new(device: &Device, what: &'static str, bytes: usize) -> Result<Arc<Self>> {
        let context = Arc::clone(&device.context);
        // SAFETY: the memory is not read before something has been written to it in stream order.
        let start = context
            .bind_to_thread()
            .and_then(|()| unsafe { result::malloc_sync(bytes) });
        match start {
            Ok(start) => Ok(Arc::new(Self {
                context,
                start,
                bytes,
            })),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(KernelError::OutOfMemory {
                what,
                requested: bytes,
                free: device.context.mem_get_info().map_or(0, |(free, _)| free),
            }),
            Err(error) => Err(driver(what, error)),
        }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // A context that has failed cannot free; there is nothing to do about it, and nobody to tell.
        let _ = self.context.bind_to_thread();
        // SAFETY: `start` came from `malloc_sync`, and this is its only owner. The driver waits for work that uses it.
        let _ = unsafe { result::free_sync(self.start) };
    }
}

/// Part of an allocation, which lives as long as any of its parts.
#[derive(Clone)]
pub(crate) struct Region {
    slab: Arc<Slab>,
    offset: usize,
    bytes: usize,
}

impl Region {
    pub(crate) fn ptr(&self) -> u64 {
        self.slab.start + self.offset as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Fills it with zeros, in stream order.
    pub(crate) fn zero(&self, device: &Device) -> Result<()> {
        // SAFETY: the region lies within its slab, which `self` keeps.
        unsafe { result::memset_d8_async(self.ptr(), 0, self.bytes, device.stream.cu_stream()) }
            .map_err(|e| driver("memset", e))
    }
}

/// How an arena gets more memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Growth {
    /// By so many bytes at least: at start, for what stays.
    Slabs(usize),
    /// Never: for what comes and goes with every step.
    Fixed,
}

/// Memory for one purpose.
pub(crate) struct Arena {
    what: &'static str,
    growth: Growth,
    current: RefCell<Option<(Arc<Slab>, usize)>>,
}

impl Arena {
    pub(crate) fn growing(what: &'static str, slab_bytes: usize) -> Self {
        Self {
            what,
            growth: Growth::Slabs(slab_bytes),
            current: RefCell::new(None),
        }
    }

    pub(crate) fn fixed(device: &Device, what: &'static str, bytes: usize) -> Result<Self> {
        Ok(Self {
            what,
            growth: Growth::Fixed,
            current: RefCell::new(Some((Slab::new(device, what, bytes)?, 0))),
        })
    }

    /// At least one byte, so that every region has an address.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub(crate) fn alloc(&self, device: &Device, bytes: usize) -> Result<Region> {
        device.outside_capture(self.what)?;
        let too_large = || KernelError::OutOfMemory {
            what: self.what,
            requested: bytes,
            free: 0,
        };
        let padded = bytes
            .max(1)
            .checked_next_multiple_of(ALIGNMENT)
            .ok_or_else(too_large)?;
        let mut current = self.current.borrow_mut();
        if let Some((slab, used)) = current.as_mut() {
            if Arc::strong_count(slab) == 1 {
                // All regions are gone.
                *used = 0;
            }
            if padded <= slab.bytes - *used {
                let offset = *used;
                *used += padded;
                return Ok(Region {
                    slab: Arc::clone(slab),
                    offset,
                    bytes,
                });
            }
        }
        let slab_bytes = match (self.growth, current.as_ref()) {
            (Growth::Slabs(slab_bytes), _) => slab_bytes,
            (Growth::Fixed, current) => {
                return Err(KernelError::OutOfMemory {
                    what: self.what,
                    requested: bytes,
                    free: current.map_or(0, |(slab, used)| slab.bytes - used),
                });
            }
        };
        // What is large gets memory of its own, so that nothing is left over.
        let alone = padded > slab_bytes / 2;
        let slab = Slab::new(device, self.what, if alone { padded } else { slab_bytes })?;
        if !alone {
            *current = Some((Arc::clone(&slab), padded));
        }
        Ok(Region {
            slab,
            offset: 0,
            bytes,
        })
    }
}

/// Page-locked host memory: the device copies it without the driver's own staging, and asynchronously.
pub(crate) struct Pinned {
    context: Arc<CudaContext>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is plain bytes that this value owns.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Zeroed.
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Self> {
        let context = Arc::clone(&device.context);
        // Not write-combined: downloads read it.
        // SAFETY: what comes back is zeroed before anybody reads it.
        let start = unsafe { result::malloc_host(bytes, 0) }.map_err(|e| driver("pinned host memory", e))?;
        let start = start.cast::<u8>();
        // SAFETY: the driver has just given `bytes` bytes at `start`.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self {
            context,
            start,
            bytes,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `start` is valid for `bytes` initialized bytes; the device writes them only inside `download`, which
        // borrows exclusively.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; uploads that read the memory have ended (`Staging` waits for their event).
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// Copies `(offset, length)` of `source` here and waits for it. Not on the path of a forward pass.
    pub(crate) fn download(
        &mut self,
        device: &Device,
        (source, (offset, len)): (&Region, (usize, usize)),
    ) -> Result<&[u8]> {
        const OP: &str = "download";
        device.outside_capture(OP)?;
        crate::error::check(
            OP,
            len <= self.bytes && offset.saturating_add(len) <= source.bytes(),
            || format!("{len} bytes at {offset} of {}", source.bytes()),
        )?;
        let target = &mut self.bytes_mut()[..len];
        // SAFETY: the range lies within `source`, checked above, and the copy ends before this function returns.
        unsafe { result::memcpy_dtoh_async(target, source.ptr() + offset as u64, device.stream.cu_stream()) }
            .map_err(|e| driver(OP, e))?;
        device.synchronize(OP)?;
        Ok(&self.bytes()[..len])
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: `start` came from `malloc_host`, and this is its only owner.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}

/// Pinned buffers that take turns: one is filled while the other is copied.
pub(crate) struct Staging {
    slots: [RefCell<(Pinned, CudaEvent)>; 2],
    next: Cell<usize>,
    slot_bytes: usize,
}

impl Staging {
    pub(crate) fn new(device: &Device, slot_bytes: usize) -> Result<Self> {
        let slot = || {
            let event = device.context.new_event(None).map_err(|e| driver("event", e))?;
            Ok(RefCell::new((Pinned::new(device, slot_bytes)?, event)))
        };
        Ok(Self {
            slots: [slot()?, slot()?],
            next: Cell::new(0),
            slot_bytes,
        })
    }

    /// The most bytes that [`upload_with`](Self::upload_with) takes.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Copies `bytes` to the start of `target`, in chunks, in stream order. `bytes` may be changed afterwards.
    pub(crate) fn upload(&self, device: &Device, target: &Region, bytes: &[u8]) -> Result<()> {
        for (index, chunk) in bytes.chunks(self.slot_bytes).enumerate() {
            let range = (index * self.slot_bytes, chunk.len());
            self.upload_with(device, (target, range), |slot| slot.copy_from_slice(chunk))?;
        }
        Ok(())
    }

    /// Copies what `fill` writes to `(offset, length)` of the target.
    pub(crate) fn upload_with(
        &self,
        device: &Device,
        (target, (offset, len)): (&Region, (usize, usize)),
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        const OP: &str = "upload";
        device.outside_capture(OP)?;
        crate::error::check(
            OP,
            len <= self.slot_bytes && offset.saturating_add(len) <= target.bytes(),
            || format!("{len} bytes at {offset} of {}", target.bytes()),
        )?;
        let slot = self.next.get();
        self.next.set((slot + 1) % self.slots.len());
        let (pinned, copied) = &mut *self.slots[slot].borrow_mut();
        copied.synchronize().map_err(|e| driver(OP, e))?;
        let bytes = &mut pinned.bytes_mut()[..len];
        fill(bytes);
        // SAFETY: the range lies within `target`, checked above; the slot stays as it is until `copied` says that the
        // copy is over.
        unsafe { result::memcpy_htod_async(target.ptr() + offset as u64, bytes, device.stream.cu_stream()) }
            .and_then(|()| copied.record(&device.stream))
            .map_err(|e| driver(OP, e))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for slot in &self.slots {
            // The device may still read the memory that is about to be unlocked.
            let _ = slot.borrow().1.synchronize();
        }
    }
}
