//! What the benches share: threads, noise, and figures printed beside limits that are measured in the same run.
#![allow(dead_code, reason = "each bench uses its own part")]

use std::hint::black_box;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use phalanx_kernels::cpu::limits::{self, Limits};
use phalanx_kernels::cpu::pool::Pool;

/// Bytes that no cache holds.
pub(crate) const STREAM_BYTES: usize = 300 << 20;

/// All that the process may use.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Values in -1..1 that follow no pattern.
pub(crate) fn noise(n: usize) -> Vec<f32> {
    (0..n as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
        .collect()
}

/// What a call does, and thereby what it is compared with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// Integer products of weights: compared with reading `bytes` and with the integer arithmetic.
    Int8 { bytes: usize, operations: usize },
    /// Products of f32: compared with reading `bytes` and with the arithmetic on f32.
    F32 { bytes: usize, operations: usize },
    /// One pass: compared with a plain copy that reads and writes as much, by the same threads, from the same caches.
    Pass { read: usize, written: usize },
}

/// A group of benchmarks whose figures are printed beside their limits.
pub(crate) struct Group<'a>(BenchmarkGroup<'a, WallTime>);

impl<'a> Group<'a> {
    pub(crate) fn new(c: &'a mut Criterion, name: &str) -> Self {
        let mut group = c.benchmark_group(name);
        group.sample_size(10).warm_up_time(Duration::from_millis(100));
        group.measurement_time(Duration::from_millis(300));
        Self(group)
    }

    /// Measures `call`, which does `work`.
    pub(crate) fn measure(&mut self, name: &str, work: Work, mut call: impl FnMut()) {
        let mut times = Vec::new();
        self.0.throughput(match work {
            Work::Int8 { operations, .. } | Work::F32 { operations, .. } => {
                Throughput::Elements(operations as u64)
            }
            Work::Pass { read, written } => Throughput::Bytes((read + written) as u64),
        });
        self.0.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter_custom(|iterations| {
                let start = Instant::now();
                (0..iterations).for_each(|_| call());
                let elapsed = start.elapsed();
                times.push(elapsed.as_secs_f64() / iterations as f64);
                elapsed
            });
        });
        if times.is_empty() {
            return; // left out by the filter
        }
        times.sort_by(f64::total_cmp);
        print(name, work, times[times.len() / 2]);
    }
}

/// The limits of this run's threads.
fn limits() -> &'static Limits {
    static LIMITS: OnceLock<Limits> = OnceLock::new();
    LIMITS.get_or_init(|| limits::measure(threads()).expect("threads and memory"))
}

/// A benchmark's result is its output.
#[allow(clippy::print_stdout)]
fn print(name: &str, work: Work, seconds: f64) {
    let us = seconds * 1e6;
    let limits = limits();
    let beside = |bytes: usize, operations: usize, (unit, most): (&str, f64)| {
        let (gb, gop) = (bytes as f64 / seconds / 1e9, operations as f64 / seconds / 1e9);
        println!(
            "{name}: {us:.1} us, {gop:.1} GOP/s ({:.2} of {most:.0} in {unit}), {gb:.1} GB/s ({:.2} of {:.1} from memory)",
            gop / most,
            gb / limits.read_gb_s,
            limits.read_gb_s
        );
    };
    match work {
        Work::Int8 { bytes, operations } => beside(bytes, operations, ("int8", limits.int8_gop_s)),
        Work::F32 { bytes, operations } => beside(bytes, operations, ("f32", limits.f32_gop_s)),
        Work::Pass { read, written } => {
            let gb = (read + written) as f64 / 1e9;
            let copy = copy_seconds(read, written);
            println!(
                "{name}: {us:.1} us, {:.1} GB/s ({:.2} of a copy's {:.1})",
                gb / seconds,
                copy / seconds,
                gb / copy
            );
        }
    }
}

/// Seconds that a plain copy takes, all threads together: the least of several trials.
fn copy_seconds(read: usize, written: usize) -> f64 {
    /// Bytes worth a task of their own.
    const PER_TASK: usize = 32 << 10;
    const TRIALS: usize = 10;
    let tasks = (read.max(written) / PER_TASK).max(1);
    let share = |bytes: usize| (bytes / 8).div_ceil(tasks).max(1);
    let from = vec![1u64; share(read) * tasks];
    let mut to = vec![0u64; share(written) * tasks];
    let parts: Vec<Mutex<(&[u64], &mut [u64])>> = from
        .chunks(share(read))
        .zip(to.chunks_mut(share(written)))
        .map(Mutex::new)
        .collect();
    let pool = Pool::new(threads()).expect("threads");
    let pass = || {
        pool.run(tasks, |task| {
            let mut part = parts[task].lock().unwrap_or_else(PoisonError::into_inner);
            let (from, to) = &mut *part;
            let common = from.len().min(to.len());
            to[..common].copy_from_slice(&from[..common]);
            to[common..].fill(1);
            black_box(
                from[common..]
                    .iter()
                    .fold(0u64, |sum, word| sum.wrapping_add(*word)),
            );
            black_box(to);
        });
    };
    let time = |passes: u32| {
        let start = Instant::now();
        (0..passes).for_each(|_| pass());
        start.elapsed() / passes
    };
    let once = time(10).max(Duration::from_nanos(1));
    let passes = Duration::from_millis(1).div_duration_f64(once).ceil() as u32;
    let least = (0..TRIALS).map(|_| time(passes)).min();
    least.unwrap_or(once).as_secs_f64()
}
