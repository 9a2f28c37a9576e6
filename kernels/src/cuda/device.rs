//! Devices, and the context and stream of the one that a rank uses.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::error::{driver, unavailable};
use super::library::{Library, require};
use crate::Result;

use sys::CUdevice_attribute as Attribute;

/// A device as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The driver's number, after `CUDA_VISIBLE_DEVICES`.
    pub ordinal: usize,
    pub name: String,
    /// Major and minor, e.g. `(9, 0)`.
    pub compute_capability: (i32, i32),
    pub total_bytes: usize,
    /// Of all processes together.
    pub free_bytes: usize,
    /// Domain, bus and device, as `nvidia-smi` prints them.
    pub pci_bus_id: String,
    pub multiprocessors: usize,
    /// Ordinals of the devices whose memory it reads directly (NVLink, or PCIe without a host in between).
    pub peers: Vec<usize>,
}

impl DeviceInfo {
    /// What NVRTC calls the architecture, e.g. `sm_90`.
    pub fn arch(&self) -> String {
        arch(self.compute_capability)
    }
}

/// Every device that the driver shows to this process.
///
/// # Errors
/// [`KernelError::Device`](crate::KernelError::Device) if there is no driver, or one that fails.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    const OP: &str = "device discovery";
    require(&[Library::Cuda]).map_err(|why| unavailable(OP, why))?;
    let count = CudaContext::device_count().map_err(|e| driver(OP, e))?;
    (0..count as usize)
        .map(|ordinal| describe(ordinal, count as usize).map_err(|e| driver(OP, e)))
        .collect()
}

fn describe(ordinal: usize, count: usize) -> Result<DeviceInfo, DriverError> {
    let context = CudaContext::new(ordinal)?;
    let (free_bytes, total_bytes) = context.mem_get_info()?;
    let device = context.cu_device();
    let mut peers = Vec::new();
    for peer in (0..count).filter(|&peer| peer != ordinal) {
        let mut can = 0;
        let peer_device = result::device::get(peer as i32)?;
        // SAFETY: both are devices that the driver has just named, and `can` outlives the call.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, device, peer_device).result()? };
        if can != 0 {
            peers.push(peer);
        }
    }
    Ok(DeviceInfo {
        ordinal,
        name: context.name()?,
        compute_capability: context.compute_capability()?,
        total_bytes,
        free_bytes,
        pci_bus_id: format!(
            "{:08X}:{:02X}:{:02X}.0",
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
        ),
        multiprocessors: context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        peers,
    })
}

fn arch((major, minor): (i32, i32)) -> String {
    format!("sm_{major}{minor}")
}

/// The context of a rank's device and the one stream that all its work is ordered by.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) arch: String,
    /// Major number of the compute capability.
    pub(crate) generation: i32,
    /// Major and minor number.
    pub(crate) capability: (i32, i32),
}

impl Device {
    /// # Errors
    /// [`KernelError::Device`](crate::KernelError::Device) if the driver has no such device.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        const OP: &str = "opening the device";
        let open = || {
            let context = CudaContext::new(ordinal)?;
            // SAFETY: there is one stream, and its order is all the order that is needed. The events would break
            // graph capture: memory would carry events that were recorded outside of it.
            unsafe { context.disable_event_tracking() };
            let capability = context.compute_capability()?;
            Ok(Self {
                stream: context.new_stream()?,
                arch: arch(capability),
                generation: capability.0,
                capability,
                context,
            })
        };
        open().map_err(|e| driver(OP, e))
    }

    /// Waits until the stream has done everything. Not on the path of a forward pass.
    pub(crate) fn synchronize(&self, op: &'static str) -> Result<()> {
        self.stream.synchronize().map_err(|e| driver(op, e))
    }
}
