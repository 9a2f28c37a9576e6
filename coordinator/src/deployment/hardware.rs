//! What the ranks compute on: chosen by the user, or decided when all of them have said what they have.

use phalanx_model::{MemoryPlan, ModelConfig, TensorFormats, TensorRole};
use phalanx_proto::v1;

use crate::config::DeviceChoice;

/// What a rank takes of its GPU beside weights, KV cache and activations: the scratch memory of kernels and of cublasLt,
/// a step's input, and what is left over in allocations. The CUDA context is there when a rank reports its free memory;
/// NCCL's buffers come out of what `gpu_memory_utilization` leaves. An estimate, rounded up.
const GPU_OVERHEAD_BYTES: u64 = 192 << 20;
const F32_BYTES: usize = 4;

/// The ranks' devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// CPUs of this host, which share its memory.
    Cpu,
    /// One GPU for each rank, in rank order.
    Cuda(Vec<GpuMemory>),
}

/// Bytes of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuMemory {
    pub total: u64,
    /// Not taken by anybody when the rank looked.
    pub free: u64,
}

/// GPUs were asked for and a rank has none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} cannot use a GPU: {reason}")]
pub struct NoGpu {
    pub rank: u32,
    pub reason: String,
}

impl Hardware {
    pub fn kind(&self) -> v1::DeviceKind {
        match self {
            Self::Cpu => v1::DeviceKind::Cpu,
            Self::Cuda(_) => v1::DeviceKind::Cuda,
        }
    }

    /// `devices` are the ranks', in rank order.
    ///
    /// # Errors
    /// [`NoGpu`] with the first rank that lacks the GPU that was asked for.
    pub fn decide(choice: DeviceChoice, devices: &[v1::Device]) -> Result<Self, NoGpu> {
        if choice == DeviceChoice::Cpu {
            return Ok(Self::Cpu);
        }
        let lacks = |device: &v1::Device| match device.kind() {
            v1::DeviceKind::Cuda if devices.len() == 1 || device.no_nccl.is_empty() => None,
            v1::DeviceKind::Cuda => Some(device.no_nccl.clone()),
            v1::DeviceKind::Cpu | v1::DeviceKind::Unspecified => Some(device.no_cuda.clone()),
        };
        let lack = devices.iter().zip(0..).find_map(|(device, rank)| {
            let reason = lacks(device)?;
            Some(NoGpu { rank, reason })
        });
        match (lack, choice) {
            (None, _) => Ok(Self::Cuda(devices.iter().map(GpuMemory::of).collect())),
            (Some(lack), DeviceChoice::Cuda) => Err(lack),
            (Some(lack), _) => {
                tracing::info!(%lack, "not every rank has a GPU: using CPUs");
                Ok(Self::Cpu)
            }
        }
    }
}

impl GpuMemory {
    fn of(device: &v1::Device) -> Self {
        Self {
            total: device.memory_bytes,
            free: device.free_bytes.min(device.memory_bytes),
        }
    }

    /// What a rank may take: `utilization` of the whole, less what others have taken already.
    pub fn budget(&self, utilization: f32) -> u64 {
        let kept_free = (self.total as f64 * f64::from(1.0 - utilization)) as u64;
        self.free.saturating_sub(kept_free)
    }
}

/// Turns the bytes of CPU ranks into those of GPU ranks: weights are bf16 or stay quantized, and activations that
/// CPU ranks share lie on every GPU, with as much again to pack them for a gather.
pub(super) fn place_on_gpus(memory: &mut MemoryPlan, config: &ModelConfig, formats: &TensorFormats) {
    let shared = std::mem::take(&mut memory.arena);
    memory.segment -= shared;
    let shards = &memory.shards;
    for (rank, bytes) in memory.ranks.iter_mut().enumerate() {
        let weight = |role: TensorRole| {
            let slice = shards.slice(config, rank, role)?;
            let (format, rows, cols) = (formats.get(&role)?, slice.rows.len(), slice.cols.len());
            let bytes = match role.is_vector() {
                true => rows * cols * F32_BYTES,
                false => format.gpu_bytes(rows, cols)?,
            };
            Some(bytes as u64)
        };
        bytes.weights = config.roles().filter_map(weight).sum();
        bytes.workspace += 2 * shared;
        bytes.overhead = GPU_OVERHEAD_BYTES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(total: u64, free: u64) -> v1::Device {
        v1::Device {
            kind: v1::DeviceKind::Cuda.into(),
            memory_bytes: total,
            free_bytes: free,
            ..Default::default()
        }
    }

    fn cpu(reason: &str) -> v1::Device {
        v1::Device {
            kind: v1::DeviceKind::Cpu.into(),
            no_cuda: reason.into(),
            ..Default::default()
        }
    }

    #[test]
    fn gpus_are_used_when_every_rank_has_one() {
        let all = [gpu(100, 90), gpu(100, 80)];
        let some = [gpu(100, 90), cpu("no device")];
        assert!(
            matches!(Hardware::decide(DeviceChoice::Auto, &all), Ok(Hardware::Cuda(gpus)) if gpus.len() == 2)
        );
        assert_eq!(Hardware::decide(DeviceChoice::Auto, &some), Ok(Hardware::Cpu));
        assert_eq!(Hardware::decide(DeviceChoice::Cpu, &all), Ok(Hardware::Cpu));
        let refused = Hardware::decide(DeviceChoice::Cuda, &some).unwrap_err();
        assert_eq!(refused.to_string(), "rank 1 cannot use a GPU: no device");
        let without_nccl = v1::Device {
            no_nccl: "no NCCL".into(),
            ..gpu(100, 90)
        };
        let alone = Hardware::decide(DeviceChoice::Cuda, std::slice::from_ref(&without_nccl));
        assert!(matches!(alone, Ok(Hardware::Cuda(_))), "NCCL is for several");
        let refused = Hardware::decide(DeviceChoice::Cuda, &[gpu(100, 90), without_nccl]).unwrap_err();
        assert_eq!(refused.to_string(), "rank 1 cannot use a GPU: no NCCL");
    }

    #[test]
    fn what_others_have_taken_is_not_given_again() {
        let memory = |total, free| GpuMemory { total, free };
        assert_eq!(memory(1000, 1000).budget(1.0), 1000);
        assert_eq!(memory(1000, 1000).budget(0.75), 750);
        assert_eq!(memory(1000, 600).budget(0.75), 350);
        assert_eq!(memory(1000, 100).budget(0.75), 0);
    }
}
