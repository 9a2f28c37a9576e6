//! The loaded kernels and how one is launched.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::driver::{CudaFunction, DriverError, result};
use cudarc::nvrtc::Ptx;

use super::attention::AttentionInput;
use super::compile::{Cubin, Origin};
use super::device::Device;
use super::error::{describe, device as device_error, driver};
use super::linear::LinearInput;
use crate::Result;

/// An argument of a kernel, by value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg<'a> {
    /// An address in device memory.
    Pointer(u64),
    U32(u32),
    U64(u64),
    F32(f32),
    Attention(&'a AttentionInput),
    Peers(&'a Peers),
    Linear(&'a LinearInput),
}

impl Arg<'_> {
    fn address(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) | Self::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Attention(value) => std::ptr::from_ref(*value).cast_mut().cast(),
            Self::Peers(value) => std::ptr::from_ref(*value).cast_mut().cast(),
            Self::Linear(value) => std::ptr::from_ref(*value).cast_mut().cast(),
        }
    }
}

/// `Peers` of `all_reduce.cu`: addresses of each rank's memory, in rank order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Peers {
    pub(crate) staging: [u64; Self::MAX],
    pub(crate) flags: [u64; Self::MAX],
}

impl Peers {
    /// Ranks, at most.
    pub(crate) const MAX: usize = 8;
}

/// A grid of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: u32,
}

impl Grid {
    pub(crate) fn new(blocks: [usize; 3], threads: u32) -> Self {
        Self {
            // What is too large stays too large for the driver, which refuses it.
            blocks: blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
            threads,
        }
    }

    /// One block per row.
    pub(crate) fn rows(rows: usize, threads: u32) -> Self {
        Self::new([rows, 1, 1], threads)
    }
}

/// Every kernel of every unit.
pub(crate) struct Kernels {
    functions: HashMap<&'static str, CudaFunction>,
    /// One per unit.
    origins: Vec<Origin>,
}

impl Kernels {
    pub(crate) fn load(device: &Device, cubins: Vec<Cubin>) -> Result<Self> {
        const OP: &str = "loading the kernels";
        let mut functions = HashMap::new();
        let mut origins = Vec::new();
        for cubin in cubins {
            let module = device
                .context
                .load_module(Ptx::from_binary(cubin.code))
                .map_err(|e| device_error(OP, format!("{}: {}", cubin.variant.unit.name, describe(e))))?;
            for &name in cubin.variant.unit.kernels {
                let function = module
                    .load_function(name)
                    .map_err(|e| device_error(OP, format!("{name}: {}", describe(e))))?;
                functions.insert(name, function);
            }
            origins.push(cubin.origin);
        }
        Ok(Self { functions, origins })
    }

    /// Where the machine code of each unit came from.
    pub(crate) fn origins(&self) -> &[Origin] {
        &self.origins
    }

    /// Queues a kernel on the stream. A grid without blocks is nothing to do.
    ///
    /// # Safety
    /// `args` must be the kernel's parameters in number and type, as the top of its file lists them, and every address
    /// must be of memory that is as large as the other arguments say and stays allocated until the stream has done this
    /// work.
    pub(crate) unsafe fn launch(
        &self,
        device: &Device,
        name: &'static str,
        grid: Grid,
        args: &[Arg<'_>],
    ) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let Some(function) = self.functions.get(name) else {
            return Err(device_error(name, "there is no such kernel"));
        };
        device.context.bind_to_thread().map_err(|e| driver(name, e))?;
        let mut addresses: Vec<*mut c_void> = args.iter().map(Arg::address).collect();
        let [x, y, z] = grid.blocks;
        // SAFETY: the function belongs to a loaded module; the driver reads the arguments during the call; the rest is
        // the caller's promise.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (grid.threads, 1, 1),
                0,
                device.stream.cu_stream(),
                &mut addresses,
            )
        }
        .map_err(|e: DriverError| device_error(name, format!("{grid:?}, {args:?}: {}", describe(e))))
    }
}
