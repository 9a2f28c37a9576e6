//! What this machine can do at most, measured: the floors that kernels and whole servers are compared with.
//!
//! A decode step cannot take less time than reading the weights once; a prompt cannot take less than its integer products
//! in registers. Both depend on the machine, on the threads and on who else is using it, so they are measured beside what
//! they are compared with, not written down.

use std::hint::black_box;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::linear;
use super::memory::{Pages, Region};
use super::pool::Pool;
use super::simd::{Arithmetic, Isa, Kernel, LANES, Simd};
use crate::Result;

/// Memory that is read in one pass. It need not exceed the caches (see [`evict`]), and first touching it takes longest.
const BYTES: usize = 64 << 20;
/// Bytes of a task.
const TASK_BYTES: usize = 1 << 20;
/// Each limit is the best of so many trials: what disturbs a trial can only make it slower.
const TRIALS: usize = 5;
/// Rough length of a trial of arithmetic.
const TRIAL: Duration = Duration::from_millis(5);
/// Independent sums of an arithmetic loop. Two units with a latency of five need ten; AVX2 has registers for twelve.
const CHAINS: usize = 12;

/// The most that some number of threads can do, in 10⁹ per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Threads of all three.
    pub threads: usize,
    /// Bytes read from memory.
    pub read_gb_s: f64,
    /// Products of 8-bit integers and their additions in 32 bits, counted as two operations, by the instructions that
    /// the linear layer uses here: `vpdpbusd`, or `vpmaddubsw + vpmaddwd + vpaddd`.
    pub int8_gop_s: f64,
    /// Products of f32 and their additions, counted as two, by those that attention uses.
    pub f32_gop_s: f64,
}

/// Measures the limits of `threads` threads, the caller included, in a fraction of a second on a machine that is idle.
///
/// # Errors
/// [`KernelError::Device`](crate::KernelError::Device) if so many threads are not possible;
/// [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory) without 64 MiB to read.
pub fn measure(threads: usize) -> Result<Limits> {
    let pool = Pool::new(threads)?;
    let int8 = Int8::detect();
    let simd = Isa::detect();
    Ok(Limits {
        threads,
        read_gb_s: read(&pool, simd)? / 1e9,
        int8_gop_s: arithmetic(&pool, |rounds| int8.run(rounds)) / 1e9,
        f32_gop_s: arithmetic(&pool, |rounds| simd.run(Fma { rounds })) / 1e9,
    })
}

/// Bytes read per second.
fn read(pool: &Pool, simd: Isa) -> Result<f64> {
    let mut region = Region::zeroed(BYTES, Pages::Huge, "the measurement of memory bandwidth")?;
    let mut best = Duration::MAX;
    for _ in 0..TRIALS {
        let tasks: Vec<Mutex<&mut [f32]>> = region
            .as_mut_f32()
            .chunks_mut(TASK_BYTES / 4)
            .map(Mutex::new)
            .collect();
        // Each task takes its own lock once.
        pool.run(tasks.len(), |task| {
            evict(&mut tasks[task].lock().unwrap_or_else(PoisonError::into_inner));
        });
        let memory = region.as_f32();
        let start = Instant::now();
        pool.run(BYTES / TASK_BYTES, |task| {
            let values = &memory[task * TASK_BYTES / 4..][..TASK_BYTES / 4];
            black_box(simd.run(Sum { values }));
        });
        best = best.min(start.elapsed());
    }
    Ok(BYTES as f64 / best.as_secs_f64())
}

/// Writes ones past the caches, so that the next read of any of them comes from memory however large the caches are.
fn evict(values: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_sfence, _mm_stream_si32};
        for value in values {
            // SAFETY: SSE2 is part of x86-64; the value is this task's, and any bits are one.
            unsafe { _mm_stream_si32((&raw mut *value).cast(), 1f32.to_bits() as i32) };
        }
        // SAFETY: SSE is part of x86-64.
        unsafe { _mm_sfence() };
    }
    #[cfg(not(target_arch = "x86_64"))]
    values.fill(1.0);
}

/// The sum of whole cache lines of values, read as the kernels read them.
struct Sum<'a> {
    values: &'a [f32],
}

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        /// Vectors of two cache lines.
        const VECTORS: usize = 4;
        let mut sums = [simd.splat(0.0); VECTORS];
        for lines in self.values.as_chunks::<{ VECTORS * LANES }>().0 {
            prefetch(lines);
            for (sum, vector) in sums.iter_mut().zip(lines.as_chunks::<LANES>().0) {
                *sum = simd.add(*sum, simd.load(vector));
            }
        }
        let [a, b, c, d] = sums;
        simd.sum(simd.add(simd.add(a, b), simd.add(c, d)))
    }
}

/// Asks for what follows two cache lines, early enough.
#[inline(always)]
fn prefetch<const N: usize>(lines: &[f32; N]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        const AHEAD: usize = 4096;
        let at = lines.as_ptr().cast::<i8>().wrapping_add(AHEAD);
        // SAFETY: a prefetch of any address is a hint.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(at);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = lines;
}

/// Operations per second of a loop that returns how many products it has added, by all threads.
fn arithmetic(pool: &Pool, products: impl Fn(usize) -> u64 + Sync) -> f64 {
    const PROBE: usize = 10_000;
    products(PROBE);
    let start = Instant::now();
    products(PROBE);
    let probe = start.elapsed().max(Duration::from_nanos(1));
    let rounds = (PROBE as f64 * TRIAL.div_duration_f64(probe)) as usize;
    let rounds = rounds.clamp(PROBE, MOST_ROUNDS);
    let trials = (0..TRIALS).map(|_| {
        let total = std::sync::atomic::AtomicU64::new(0);
        let start = Instant::now();
        pool.run(pool.threads(), |_| {
            total.fetch_add(products(rounds), std::sync::atomic::Ordering::Relaxed);
        });
        2.0 * total.into_inner() as f64 / start.elapsed().as_secs_f64()
    });
    trials.fold(0.0, f64::max)
}

/// Beyond it a lane of f32 could not count the rounds.
const MOST_ROUNDS: usize = 1 << 24;

/// `rounds` multiply-adds in each of as many pairs of vectors as registers hold. All factors are 1, so the sum of the
/// lanes is their number.
struct Fma {
    rounds: usize,
}

impl Fma {
    #[inline(always)]
    fn chains<S: Simd, const CHAINS: usize>(&self, simd: S) -> u64 {
        let wide = simd.wide();
        let one = wide.splat(black_box(1.0));
        let mut sums = [wide.splat(0.0); CHAINS];
        for sum in &mut sums {
            // Different values for all the compiler knows: equal chains would be computed once.
            *sum = wide.splat(black_box(0.0));
        }
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = wide.fma(*sum, one, one);
            }
        }
        let mut products = 0;
        for sum in sums {
            for half in simd.split(sum) {
                for lane in simd.to_array(half) {
                    products += lane as u64;
                }
            }
        }
        products
    }
}

impl Kernel for Fma {
    type Output = u64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u64 {
        if S::PAIRS >= 12 {
            self.chains::<S, 12>(simd)
        } else {
            self.chains::<S, 6>(simd)
        }
    }
}

/// The instructions of the linear layer.
enum Int8 {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Int8 {
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let isa = linear::Isa::detect();
            if isa.has_vnni() {
                return Self::Vnni;
            }
            if isa.has_avx2() {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Adds `rounds` vectors of products in each of [`CHAINS`] sums and returns how many products that were.
    fn run(&self, rounds: usize) -> u64 {
        match self {
            Self::Portable => portable(rounds),
            // SAFETY: `detect` has found AVX2.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::avx2(rounds) },
            // SAFETY: `detect` has found AVX-512 F and VNNI.
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => unsafe { x86::vnni(rounds) },
        }
    }
}

/// Whatever the compiler makes of it.
fn portable(rounds: usize) -> u64 {
    const LANES: usize = 32;
    let mut sums = [0i32; LANES];
    for _ in 0..rounds {
        let (codes, x) = black_box(([1i8; LANES], [1i8; LANES]));
        for ((sum, code), x) in sums.iter_mut().zip(codes).zip(x) {
            *sum += i32::from(code) * i32::from(x);
        }
    }
    sums.iter().map(|&sum| sum as u64).sum()
}

/// All factors are 1, so the sum of the lanes is the number of products.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    use super::CHAINS;

    /// `x` without anything the compiler knows of it, and without an instruction.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn unknown(mut x: __m256i) -> __m256i {
        // SAFETY: no instruction at all; the value passes through a register.
        unsafe {
            asm!("/* {0} */", inout(ymm_reg) x, options(pure, nomem, nostack, preserves_flags));
        }
        x
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn sum_of_lanes(x: __m256i) -> u64 {
        let mut lanes = [0i32; 8];
        // SAFETY: `lanes` has room for a vector.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), x) };
        lanes.iter().map(|&lane| lane as u64).sum()
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(rounds: usize) -> u64 {
        let x = unknown(_mm256_set1_epi8(1));
        let mut codes = unknown(_mm256_set1_epi8(1));
        let ones = unknown(_mm256_set1_epi16(1));
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                // New codes every time, or the products would be computed once.
                codes = unknown(codes);
                let quads = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones);
                *sum = _mm256_add_epi32(*sum, quads);
            }
        }
        let mut products = 0;
        for sum in sums {
            products += sum_of_lanes(sum);
        }
        products
    }

    #[target_feature(enable = "avx2,avx512f,avx512vnni")]
    pub(super) fn vnni(rounds: usize) -> u64 {
        let x = _mm512_broadcast_i64x4(unknown(_mm256_set1_epi8(1)));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for sum in &mut sums {
            // Different values for all the compiler knows: equal chains would be computed once.
            *sum = _mm512_broadcast_i64x4(unknown(_mm256_setzero_si256()));
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, x);
            }
        }
        let mut products = 0;
        for sum in sums {
            products += sum_of_lanes(_mm512_castsi512_si256(sum));
            products += sum_of_lanes(_mm512_extracti64x4_epi64::<1>(sum));
        }
        products
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_add_as_many_products_as_they_say() {
        assert_eq!(portable(3), 3 * 32);
        assert_eq!(Isa::Portable.run(Fma { rounds: 5 }), 5 * 6 * 16);
        let products = Isa::detect().run(Fma { rounds: 5 });
        assert!(products == 5 * 6 * 16 || products == 5 * 12 * 16, "{products}");
        let products = match Int8::detect() {
            Int8::Portable => 32,
            #[cfg(target_arch = "x86_64")]
            Int8::Avx2 => CHAINS * 32,
            #[cfg(target_arch = "x86_64")]
            Int8::Vnni => CHAINS * 64,
        };
        assert_eq!(Int8::detect().run(7), 7 * products as u64);
    }

    #[test]
    fn memory_is_written_and_read_whole() {
        let mut values = vec![0.0; TASK_BYTES / 4];
        evict(&mut values);
        for isa in [Isa::Portable, Isa::detect()] {
            assert_eq!(isa.run(Sum { values: &values }), (TASK_BYTES / 4) as f32);
        }
    }

    #[test]
    fn limits_are_numbers_and_bad_thread_counts_errors() {
        let limits = measure(1).unwrap();
        for limit in [limits.read_gb_s, limits.int8_gop_s, limits.f32_gop_s] {
            assert!(limit.is_finite() && limit > 0.0, "{limits:?}");
        }
        assert!(measure(0).is_err());
    }
}
