//! What the ranks may take.

/// A CUDA context: page tables, the driver's own buffers and the module loader. An estimate, rounded up.
pub const CONTEXT_BYTES: u64 = 512 << 20;

/// Bytes available to the ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryBudget {
    pub ranks: RankBudget,
    /// Free space for the shared segment: `/dev/shm`.
    pub shared_memory: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RankBudget {
    /// All ranks and the shared segment live in the same memory: CPU ranks on one host.
    Pooled(u64),
    /// Each rank has its own.
    Gpus(GpuBudget),
}

/// A GPU for each rank.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuBudget {
    /// In rank order.
    pub gpus: Vec<GpuMemory>,
    /// The part of a GPU's memory that a rank may take, above 0 and at most 1.
    pub utilization: f32,
}

impl GpuBudget {
    /// What each rank may take beside its CUDA context, in rank order.
    pub fn bytes(&self) -> Vec<u64> {
        let budget = |gpu: &GpuMemory| gpu.budget(self.utilization);
        self.gpus.iter().map(budget).collect()
    }

    /// The GPU that gives its rank least.
    pub fn poorest(&self) -> Option<GpuMemory> {
        let budget = |gpu: &&GpuMemory| gpu.budget(self.utilization);
        self.gpus.iter().min_by_key(budget).copied()
    }
}

/// A GPU, as far as it matters to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuMemory {
    pub total: u64,
    /// Not taken by anybody when the rank looked, which has a CUDA context by then.
    pub free: u64,
    /// Whether it multiplies 8-bit floats: if not, such weights are bf16 there.
    pub multiplies_e4m3: bool,
}

impl GpuMemory {
    /// A GPU on which there is nothing but a rank's context.
    pub fn unused(total: u64, multiplies_e4m3: bool) -> Self {
        Self {
            total,
            free: total.saturating_sub(CONTEXT_BYTES),
            multiplies_e4m3,
        }
    }

    /// What of the memory that is taken is the rank's own context. Others' may be there as well.
    pub fn context(&self) -> u64 {
        self.total.saturating_sub(self.free).min(CONTEXT_BYTES)
    }

    /// What a rank may take beside its context: `utilization` of the whole, as far as it is free.
    pub fn budget(&self, utilization: f32) -> u64 {
        // As the flag was written: an f32's own digits would show in the bytes.
        let utilization = (f64::from(utilization) * 1e6).round() / 1e6;
        let share = (self.total as f64 * utilization) as u64;
        share.saturating_sub(self.context()).min(self.free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn utilization_is_of_the_whole_with_the_context_and_never_more_than_is_free() {
        let gpu = GpuMemory::unused(80 * GIB, true);
        assert_eq!(gpu.budget(0.9), 72 * GIB - CONTEXT_BYTES);
        assert_eq!(gpu.budget(1.0), 80 * GIB - CONTEXT_BYTES);
        // Half of it belongs to another process; a share that lies within the other half is whole.
        let shared = GpuMemory {
            free: 40 * GIB,
            ..gpu
        };
        assert_eq!(shared.budget(0.25), 20 * GIB - CONTEXT_BYTES);
        assert_eq!(shared.budget(0.9), 40 * GIB);
        let small = |free| GpuMemory {
            total: GIB,
            free,
            ..gpu
        };
        assert_eq!(small(GIB).budget(1.0), GIB);
        assert_eq!(small(0).budget(1.0), 0);
    }
}
