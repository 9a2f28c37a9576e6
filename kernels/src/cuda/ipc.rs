//! Device memory that processes of one host share (CUDA IPC), and a word of host memory that running kernels look at.

use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{CudaContext, sys};

use super::device::Device;
use super::error::{device as device_error, driver};
use super::memory::{Arena, Pinned, Region};
use crate::Result;

/// Bytes of a [`SharedMemory`]'s name.
pub(crate) const HANDLE_BYTES: usize = size_of::<sys::CUipcMemHandle>();

/// The driver gives away whole pages of this size: memory that shares one with other memory would give that away, too.
const PAGE_BYTES: usize = 2 << 20;

/// `0000:17:00.0` and a terminator, with room.
const BUS_ID_BYTES: usize = 32;

/// Memory of this process's device that others can open.
pub(crate) struct SharedMemory {
    region: Region,
}

impl SharedMemory {
    /// At least `bytes` of zeros. Waits for the device.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory), [`KernelError::Device`](crate::KernelError::Device).
    pub(crate) fn new(device: &Device, what: &'static str, bytes: usize) -> Result<Self> {
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        // An allocation of its own: a handle names a whole one.
        let region = Arena::fixed(device, what, bytes)?.alloc(device, bytes)?;
        region.zero(device)?;
        device.synchronize(what)?;
        Ok(Self { region })
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.region.ptr()
    }

    /// What another process opens it by, while this value lives.
    ///
    /// # Errors
    /// [`KernelError::Device`](crate::KernelError::Device) where the driver shares no memory between processes.
    pub(crate) fn handle(&self) -> Result<[u8; HANDLE_BYTES]> {
        let mut handle = sys::CUipcMemHandle {
            reserved: [0; HANDLE_BYTES],
        };
        // SAFETY: the region is the whole of a live allocation, and `handle` outlives the call.
        unsafe { sys::cuIpcGetMemHandle(&mut handle, self.region.ptr()).result() }
            .map_err(|e| driver("cuIpcGetMemHandle", e))?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

/// Another process's [`SharedMemory`], mapped here.
pub(crate) struct OpenedMemory {
    context: Arc<CudaContext>,
    start: sys::CUdeviceptr,
}

impl OpenedMemory {
    /// # Errors
    /// [`KernelError::Device`](crate::KernelError::Device), among others where the devices cannot reach each other.
    pub(crate) fn open(device: &Device, handle: [u8; HANDLE_BYTES]) -> Result<Self> {
        const OP: &str = "cuIpcOpenMemHandle";
        let context = Arc::clone(&device.context);
        context.bind_to_thread().map_err(|e| driver(OP, e))?;
        let handle = sys::CUipcMemHandle {
            reserved: handle.map(|byte| byte as _),
        };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut start = 0;
        // SAFETY: `start` outlives the call; any bytes may be given as a handle, the driver refuses those it did not make.
        unsafe { sys::cuIpcOpenMemHandle_v2(&mut start, handle, flags).result() }
            .map_err(|e| driver(OP, e))?;
        Ok(Self { context, start })
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.start
    }
}

impl Drop for OpenedMemory {
    fn drop(&mut self) {
        // As for a slab: there is nothing to do about a failure.
        let _ = self.context.bind_to_thread();
        // SAFETY: `start` came from `cuIpcOpenMemHandle`, and this is its only owner.
        let _ = unsafe { sys::cuIpcCloseMemHandle(self.start) };
    }
}

/// Where the device sits, as the driver writes it: the same in all processes of a host.
///
/// # Errors
/// [`KernelError::Device`](crate::KernelError::Device).
pub(crate) fn bus_id(device: &Device) -> Result<String> {
    const OP: &str = "cuDeviceGetPCIBusId";
    let mut id = [0u8; BUS_ID_BYTES];
    // SAFETY: the driver writes at most so many bytes, terminator included.
    unsafe {
        sys::cuDeviceGetPCIBusId(
            id.as_mut_ptr().cast(),
            BUS_ID_BYTES as i32,
            device.context.cu_device(),
        )
        .result()
    }
    .map_err(|e| driver(OP, e))?;
    let text = id.split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// An error if the device is known not to read the memory of the one at `peer`. Of a device that this process does not
/// see nothing is known: opening its memory tells.
///
/// # Errors
/// [`KernelError::Device`](crate::KernelError::Device).
pub(crate) fn check_peer_access(device: &Device, peer: &str) -> Result<()> {
    const OP: &str = "cuDeviceCanAccessPeer";
    let Ok(id) = CString::new(peer) else {
        return Err(device_error(OP, format!("{peer:?} is no device")));
    };
    let own = device.context.cu_device();
    let (mut other, mut can) = (0, 0);
    // SAFETY: `id` is a C string, and it and `other` outlive the call.
    let seen = unsafe { sys::cuDeviceGetByPCIBusId(&mut other, id.as_ptr()).result() };
    if seen.is_err() || other == own {
        return Ok(());
    }
    // SAFETY: both are devices that the driver has named, and `can` outlives the call.
    unsafe { sys::cuDeviceCanAccessPeer(&mut can, own, other).result() }.map_err(|e| driver(OP, e))?;
    if can == 0 {
        return Err(device_error(
            OP,
            format!("no access to the memory of the device at {peer}"),
        ));
    }
    Ok(())
}

/// A word in page-locked host memory: any thread sets it, and kernels that run see it.
pub(crate) struct HostFlag {
    memory: Pinned,
}

// SAFETY: the memory is only ever accessed as one atomic word.
unsafe impl Sync for HostFlag {}

impl HostFlag {
    /// Not set.
    ///
    /// # Errors
    /// [`KernelError::Device`](crate::KernelError::Device).
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let memory = Pinned::new(device, size_of::<AtomicU32>())?;
        Ok(Self { memory })
    }

    /// For kernels. With unified addressing, which every 64-bit system has, the device knows page-locked memory by the
    /// host's own address.
    pub(crate) fn ptr(&self) -> u64 {
        self.memory.start() as u64
    }

    /// For good.
    pub(crate) fn set(&self) {
        // SAFETY: the memory holds so many bytes, is page-aligned, and is accessed as an atomic by everybody.
        let word = unsafe { &*self.memory.start().cast::<AtomicU32>() };
        word.store(1, Ordering::Release);
    }
}
