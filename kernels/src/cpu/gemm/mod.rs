//! Products of quantized activations with packed weights.
//!
//! Batch invariance: output `(m, n)` is `acc = fma(f32(dot), weight_scale * activation_scale, acc)` over the 32-blocks
//! in rising K, then `acc = fma(min, activation_scale * sum, acc)` in the same block for formats with a min; dense
//! formats: `acc = fma(w, x, acc)` in rising K. `dot` is an exact integer (Q6_K: weighted with its two integer scales).
//! Neither the number of rows, nor the register tile, nor the threads, nor the place of `n` in a matrix changes that
//! sequence, and the portable kernels follow it too.

pub(crate) mod activations;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use phalanx_model::TensorFormat;

use super::pack::{GROUP, Layout};
use super::pool::Pool;
use activations::View;

/// Which kernels run. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Also AVX-512 F, BW, VL and VNNI: four products of 8-bit integers summed in 32 bits by one instruction.
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Isa {
    /// Scalar code for any machine.
    pub const PORTABLE: Self = Self(Level::Portable);

    /// The best this machine has.
    pub fn detect() -> Self {
        Self::available().last().unwrap_or(Self::PORTABLE)
    }

    /// All that this machine has, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        #[cfg(target_arch = "x86_64")]
        let vnni = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        let levels = [
            Some(Level::Portable),
            #[cfg(target_arch = "x86_64")]
            avx2.then_some(Level::Avx2),
            #[cfg(target_arch = "x86_64")]
            vnni.then_some(Level::Vnni),
        ];
        levels.into_iter().flatten().map(Self)
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_avx2(self) -> bool {
        self.0 != Level::Portable
    }

    pub(crate) fn has_vnni(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Level::Vnni;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }
}

/// Bytes of quantized activations kept hot in the second-level cache while a group's weights pass.
const ACTIVATION_CACHE: usize = 256 << 10;
/// Most activation rows of a register tile.
const MAX_TILE_ROWS: usize = 8;
/// Tasks per thread: enough that a thread that starts late does not delay the others much.
const TASKS_PER_THREAD: usize = 8;

/// The first output element of a product, and values from row to row.
#[derive(Clone, Copy)]
pub(crate) struct OutPtr {
    pub(crate) start: *mut f32,
    pub(crate) stride: usize,
}

/// One packed matrix times the call's activations.
pub(crate) struct Job<'a> {
    pub(crate) format: TensorFormat,
    /// Whole groups.
    pub(crate) panels: &'a [u8],
    /// Output features.
    pub(crate) rows: usize,
    /// Input features.
    pub(crate) cols: usize,
    pub(crate) activations: View<'a>,
    /// Activation rows.
    pub(crate) batch: usize,
    /// Valid for `batch` rows of `rows` values, which nobody else uses meanwhile.
    pub(crate) out: OutPtr,
    pub(crate) bias: Option<&'a [f32]>,
}

// SAFETY: tasks write disjoint columns through `out`; everything else is shared for reading.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    fn chunks(&self) -> usize {
        self.cols.div_ceil(Layout::of(self.format).chunk_cols())
    }

    fn group_bytes(&self) -> usize {
        self.chunks() * Layout::of(self.format).bytes
    }

    /// Activation rows whose data stay in cache together: a multiple of every tile.
    fn row_block(&self) -> usize {
        let (_, row_bytes) = self.activations.raw();
        (ACTIVATION_CACHE / row_bytes.max(1) / MAX_TILE_ROWS * MAX_TILE_ROWS).max(MAX_TILE_ROWS)
    }
}

/// Computes all jobs, their groups of outputs spread over the pool.
pub(crate) fn run(isa: Isa, pool: &Pool, jobs: &[Job<'_>]) {
    let total: usize = jobs.iter().map(Job::groups).sum();
    let tasks = if pool.threads() == 1 {
        1
    } else {
        pool.threads() * TASKS_PER_THREAD
    };
    // Pairs of groups: the wide tiles take two at a time.
    let per_task = total.div_ceil(tasks).next_multiple_of(2);
    let count = jobs
        .iter()
        .map(|job| job.groups().div_ceil(per_task.max(1)))
        .sum();
    pool.run(count, |task| {
        let mut task = task;
        for job in jobs {
            let own = job.groups().div_ceil(per_task);
            if task < own {
                let groups = task * per_task..((task + 1) * per_task).min(job.groups());
                match isa.0 {
                    Level::Portable => portable::run(job, groups),
                    // SAFETY: an `Isa` of this level comes from `detect` only; each group is given to one task.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 | Level::Vnni => unsafe { x86::run(isa, job, groups) },
                }
                return;
            }
            task -= own;
        }
    });
}
