//! What a rank may compute on, as it tells the coordinator before anything is allocated.

use phalanx_kernels::cuda::{self, DeviceInfo, Library};
use phalanx_proto::v1;

/// What a worker looks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU, and CPUs if there is none.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

impl DeviceChoice {
    /// The device of `rank`. That a GPU was asked for and there is none is for the coordinator to judge.
    pub(crate) fn probe(self, rank: u32) -> v1::Device {
        if self == Self::Cpu {
            return cpu(String::new());
        }
        match gpu_of(rank) {
            Ok(gpu) => v1::Device {
                kind: v1::DeviceKind::Cuda.into(),
                multiplies_e4m3: gpu.multiplies_e4m3(),
                name: gpu.name,
                memory_bytes: gpu.total_bytes as u64,
                free_bytes: gpu.free_bytes as u64,
                no_cuda: String::new(),
                no_nccl: cuda::require(&[Library::Nccl])
                    .err()
                    .map_or_else(String::new, |missing| missing.to_string()),
            },
            Err(reason) => cpu(reason),
        }
    }
}

fn cpu(no_cuda: String) -> v1::Device {
    v1::Device {
        kind: v1::DeviceKind::Cpu.into(),
        name: "cpu".to_owned(),
        no_cuda,
        ..Default::default()
    }
}

/// The GPU of a rank: where a rank sees one, that; where it sees those of its peers as well, the one of its number.
pub(crate) fn gpu_of(rank: u32) -> Result<DeviceInfo, String> {
    let needed = [Library::Cuda, Library::Nvrtc, Library::CublasLt];
    cuda::require(&needed).map_err(|error| error.to_string())?;
    let mut gpus = cuda::devices().map_err(|error| error.to_string())?;
    let place = if gpus.len() == 1 { 0 } else { rank as usize };
    if place < gpus.len() {
        Ok(gpus.swap_remove(place))
    } else {
        Err(format!("the CUDA driver finds {} devices", gpus.len()))
    }
}
