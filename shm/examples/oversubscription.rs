//! Waiting when cores are short: `cargo run --release -p phalanx-shm --example oversubscription [-- ROUNDS]`.
//!
//! Ranks repeat a step of fixed work and a sum of 8 KiB, under each policy of [`Wait`] in turn, with more ranks than
//! cores, and beside a busy stranger. Printed are the medians over the rounds of the mean µs per step. Nothing is pinned.
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_shm::{GroupShape, RankPort, Segment, ShmError, Wait};

const LIMIT: Duration = Duration::from_secs(60);
const POLICIES: [&str; 3] = ["ADAPTIVE", "calibrated", "PASSIVE"];
/// Work of a step in µs, and steps of a run.
const STEPS: [(u32, u32); 2] = [(20, 4000), (200, 1000)];
/// Values summed at the end of a step: 8 KiB.
const VALUES: usize = 2048;

fn policy(name: &str) -> Wait {
    match name {
        "ADAPTIVE" => Wait::ADAPTIVE,
        "calibrated" => Wait::calibrated(),
        _ => Wait::PASSIVE,
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let variable = |name| std::env::var(name);
    match (std::env::var_os("SEGMENT"), variable("RANK"), variable("POLICY")) {
        (Some(path), Ok(rank), Ok(wait)) => {
            let steps = variable("STEPS")?.parse()?;
            let work = variable("WORK")?.parse()?;
            Ok(run_rank(
                path.as_ref(),
                rank.parse()?,
                policy(&wait),
                (steps, work),
            )?)
        }
        (_, Ok(hog), _) if hog == "hog" => {
            // Not for ever, should nobody be left to end it.
            let start = Instant::now();
            while start.elapsed() < LIMIT {
                compute(1 << 20);
            }
            Ok(())
        }
        _ => compare(std::env::args().nth(1).map_or(Ok(5), |rounds| rounds.parse())?),
    }
}

/// Arithmetic in registers.
fn compute(rounds: u64) {
    let sum = (0..rounds).fold(black_box(1u64), |sum, i| {
        sum.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(i)
    });
    black_box(sum);
}

/// Rounds of [`compute`] that take a µs, at best.
fn rounds_per_us() -> f64 {
    const ROUNDS: u64 = 1 << 16;
    let time = |_| {
        let start = Instant::now();
        compute(ROUNDS);
        start.elapsed()
    };
    let shortest = (0..50).map(time).min().unwrap_or_default();
    ROUNDS as f64 / (shortest.as_secs_f64() * 1e6)
}

fn compare(rounds: usize) -> Result<(), Box<dyn Error>> {
    let cores = std::thread::available_parallelism()?.get() as u32;
    println!("{cores} cores, calibrated is {:?}", Wait::calibrated());
    println!(
        "{:<36}{:>12}{:>12}{:>12}",
        "µs per step", POLICIES[0], POLICIES[1], POLICIES[2]
    );
    let rounds_per_us = rounds_per_us();
    for (work_us, steps) in STEPS {
        for (ranks, hog) in [
            (cores, false),
            (cores, true),
            (cores + 1, false),
            (2 * cores, false),
        ] {
            let work = (f64::from(work_us) * rounds_per_us) as u64;
            let mut times = [const { Vec::new() }; POLICIES.len()];
            for _ in 0..rounds {
                for (policy, times) in POLICIES.iter().zip(&mut times) {
                    times.push(run_group(ranks, hog, policy, (steps, work))?);
                }
            }
            let medians = times.map(|mut times| {
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            });
            let stranger = if hog { " and a stranger" } else { "" };
            let name = format!("{work_us} µs of work, {ranks} ranks{stranger}");
            println!(
                "{name:<36}{:>12.1}{:>12.1}{:>12.1}",
                medians[0], medians[1], medians[2]
            );
        }
    }
    Ok(())
}

/// Ends with its owner, however that ends.
struct Hog(Child);

impl Drop for Hog {
    fn drop(&mut self) {
        // It may be gone already, and nobody waits for what it returns.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Mean µs per step on rank 0.
fn run_group(ranks: u32, hog: bool, policy: &str, (steps, work): (u32, u64)) -> Result<f64, Box<dyn Error>> {
    let shape = GroupShape {
        world_size: ranks,
        epoch: std::process::id(),
        plan_slots: 2,
        plan_slot_bytes: 64,
        output_slots: 2,
        output_slot_bytes: 64,
        message_bytes: 128 << 10,
        arena_bytes: 0,
    };
    let segment = Segment::create("/dev/shm".as_ref(), "oversubscription", shape)?;
    let program = std::env::current_exe()?;
    let hog = hog.then(|| Command::new(&program).env("RANK", "hog").spawn().map(Hog));
    let _hog = hog.transpose()?;
    let spawn = |rank: u32| {
        Command::new(&program)
            .env("SEGMENT", segment.path())
            .env("RANK", rank.to_string())
            .env("POLICY", policy)
            .env("STEPS", steps.to_string())
            .env("WORK", work.to_string())
            .stdout(Stdio::piped())
            .spawn()
    };
    let ranks = (0..ranks).map(spawn).collect::<Result<Vec<Child>, _>>()?;
    let mut mean = None;
    for rank in ranks {
        let output = rank.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("a rank ended with {}", output.status).into());
        }
        mean = mean.or(String::from_utf8(output.stdout)?.trim().parse().ok());
    }
    mean.ok_or_else(|| "rank 0 printed no time".into())
}

fn run_rank(path: &Path, rank: u32, wait: Wait, (steps, work): (u32, u64)) -> Result<(), ShmError> {
    let segment = Arc::new(Segment::open(path)?);
    let mut port = RankPort::join(segment, rank, wait, LIMIT)?;
    let mut values = vec![0f32; VALUES];
    port.barrier()?;
    let start = Instant::now();
    for _ in 0..steps {
        compute(work);
        port.all_reduce(&mut values)?;
    }
    if rank == 0 {
        println!("{}", start.elapsed().as_secs_f64() * 1e6 / f64::from(steps));
    }
    Ok(())
}
