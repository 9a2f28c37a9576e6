//! What the ranks compute on: chosen by the user, or decided when all of them have said what they have.

use phalanx_model::GpuMemory;
use phalanx_proto::v1;

use crate::config::DeviceChoice;

/// The ranks' devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// CPUs of this host, which share its memory.
    Cpu,
    /// One GPU for each rank, in rank order.
    Cuda(Vec<GpuMemory>),
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
            (None, _) => Ok(Self::Cuda(devices.iter().map(memory_of).collect())),
            (Some(lack), DeviceChoice::Cuda) => Err(lack),
            (Some(lack), _) => {
                tracing::info!(%lack, "not every rank has a GPU: using CPUs");
                Ok(Self::Cpu)
            }
        }
    }
}

fn memory_of(device: &v1::Device) -> GpuMemory {
    GpuMemory {
        total: device.memory_bytes,
        free: device.free_bytes.min(device.memory_bytes),
        multiplies_e4m3: device.multiplies_e4m3,
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
}
