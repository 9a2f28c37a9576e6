//! What ranks are built on: a backend and the collectives that go with it. The step loop is compiled once for each, so
//! that nothing on the way of a step is called through a table.

use std::{cell::RefCell, rc::Rc};

use phalanx_kernels::{
    Backend, Communicator, KernelError,
    comm::{NcclCommunicator, NcclGroup, ShmCommunicator, StepLayout},
    cpu::CpuBackend,
    cuda::CudaBackend,
};
use phalanx_shm::RankPort;

use crate::{assignment::Assignment, device::gpu_of, layers};

pub(crate) trait Platform {
    type Backend: Backend;
    type Comm: Communicator<Self::Backend>;

    /// Opens the rank's device.
    fn backend(&self, assignment: &Assignment) -> Result<Self::Backend, KernelError>;

    /// Bytes of the device's own memory that nobody has taken; none where it has none of its own.
    fn free_bytes(&self, backend: &Self::Backend) -> Result<Option<u64>, KernelError>;

    /// The identity of the group to come, where one rank has to make it and this is the one.
    fn group_id(&self, assignment: &Assignment) -> Result<Option<Vec<u8>>, KernelError>;

    fn join(&self, backend: &Self::Backend, place: Place<'_>) -> Result<Self::Comm, KernelError>;
}

/// A rank's place in a group.
pub(crate) struct Place<'a> {
    pub(crate) assignment: &'a Assignment,
    pub(crate) port: Rc<RefCell<RankPort>>,
    /// As one rank made it in [`Platform::group_id`], if any did.
    pub(crate) group_id: &'a [u8],
}

/// CPUs of one host, which share activations in `/dev/shm`.
pub(crate) struct Cpu;

impl Platform for Cpu {
    type Backend = CpuBackend;
    type Comm = ShmCommunicator;

    fn backend(&self, assignment: &Assignment) -> Result<CpuBackend, KernelError> {
        CpuBackend::new(assignment.threads)
    }

    fn free_bytes(&self, _backend: &CpuBackend) -> Result<Option<u64>, KernelError> {
        Ok(None)
    }

    fn group_id(&self, _assignment: &Assignment) -> Result<Option<Vec<u8>>, KernelError> {
        Ok(None)
    }

    fn join(&self, _backend: &CpuBackend, place: Place<'_>) -> Result<ShmCommunicator, KernelError> {
        Ok(ShmCommunicator::new(place.port, place.assignment.plan.style))
    }
}

/// One GPU per rank, with NCCL between them.
pub(crate) struct Cuda;

impl Platform for Cuda {
    type Backend = CudaBackend;
    type Comm = NcclCommunicator;

    fn backend(&self, assignment: &Assignment) -> Result<CudaBackend, KernelError> {
        let gpu = gpu_of(assignment.rank as u32).map_err(|message| KernelError::Device {
            op: "opening the device",
            message,
        })?;
        CudaBackend::new(gpu.ordinal)
    }

    fn free_bytes(&self, backend: &CudaBackend) -> Result<Option<u64>, KernelError> {
        backend.free_bytes().map(Some)
    }

    fn group_id(&self, assignment: &Assignment) -> Result<Option<Vec<u8>>, KernelError> {
        if assignment.rank == 0 && assignment.world_size() > 1 {
            NcclCommunicator::unique_id().map(Some)
        } else {
            Ok(None)
        }
    }

    fn join(&self, backend: &CudaBackend, place: Place<'_>) -> Result<NcclCommunicator, KernelError> {
        let assignment = place.assignment;
        let style = assignment.plan.style;
        let group = NcclGroup {
            port: place.port,
            unique_id: place.group_id,
            style,
            step_timeout: assignment.step_timeout,
            step_layout: StepLayout {
                before_layers: layers::EMBEDDING_COLLECTIVES,
                per_layer: layers::collectives_per_layer(style),
                layers: assignment.config.num_hidden_layers,
            },
            custom_all_reduce: assignment.custom_all_reduce,
        };
        let comm = NcclCommunicator::join(backend, group)?;
        if assignment.world_size() > 1 {
            match comm.one_shot_limit() {
                Ok(bytes) => tracing::info!(bytes, "shorter sums are made without NCCL"),
                Err(reason) => tracing::info!(reason, "all sums are NCCL's"),
            }
        }
        Ok(comm)
    }
}
