//! Collectives between two processes: `cargo run --release -p phalanx-shm --example collectives`.
//!
//! Prints a line per collective and size: its name, the bytes that every rank ends up with, and the median and 99th
//! percentile of rank 0's times in µs. In each iteration the ranks write their values anew, meet at a barrier, and then
//! time one call. `all_gather_in_place` is the one of a forward pass: values are in the arena, and a barrier and a pass that
//! reads all of them are timed. `scripts/bench-collectives` sets these beside OpenMPI's, measured by the same method.
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_shm::{GroupShape, RankPort, Segment, ShmError, Wait};

const LIMIT: Duration = Duration::from_secs(60);
const WORLD_SIZE: usize = 2;
/// A slice of a collective, as `phalanx serve` has it.
const MESSAGE_BYTES: u64 = 128 << 10;
const MOST_BYTES: usize = 4 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    match (std::env::var_os("SEGMENT"), std::env::var("RANK")) {
        (Some(path), Ok(rank)) => Ok(run_rank(path.as_ref(), rank.parse()?)?),
        _ => start(),
    }
}

/// Creates the segment and starts a process per rank, each on a core of its own as `mpirun --bind-to core` does.
fn start() -> Result<(), Box<dyn Error>> {
    let shape = GroupShape {
        world_size: WORLD_SIZE as u32,
        epoch: std::process::id(),
        plan_slots: 2,
        plan_slot_bytes: 64,
        output_slots: 2,
        output_slot_bytes: 64,
        message_bytes: MESSAGE_BYTES,
        arena_bytes: 2 * MOST_BYTES as u64,
    };
    let segment = Segment::create("/dev/shm".as_ref(), "collectives", shape)?;
    let spawn = |rank: usize| {
        let mut command = Command::new("taskset");
        command
            .args(["--cpu-list", &rank.to_string()])
            .arg(std::env::current_exe()?)
            .env("SEGMENT", segment.path())
            .env("RANK", rank.to_string())
            .spawn()
    };
    let ranks = (0..WORLD_SIZE).map(spawn).collect::<Result<Vec<Child>, _>>()?;
    for mut rank in ranks {
        let status = rank.wait()?;
        if !status.success() {
            return Err(format!("a rank ended with {status}").into());
        }
    }
    Ok(())
}

fn run_rank(path: &Path, rank: u32) -> Result<(), ShmError> {
    let segment = Arc::new(Segment::open(path)?);
    let mut port = RankPort::join(segment, rank, Wait::calibrated(), LIMIT)?;
    for bytes in (12..)
        .map(|log2| 1 << log2)
        .take_while(|&bytes| bytes <= MOST_BYTES)
    {
        let values: Vec<f32> = (0..bytes / 4)
            .map(|i| 1e-3 * i as f32 * (rank + 1) as f32)
            .collect();
        let (mut mine, mut all) = (vec![0.0; values.len()], vec![0.0; values.len()]);
        time(&mut port, ("all_reduce", bytes), |port, timed| {
            mine.copy_from_slice(&values);
            timed.call(port, |port| port.all_reduce(&mut mine))
        })?;
        let share = &values[..values.len() / WORLD_SIZE];
        time(&mut port, ("all_gather", bytes), |port, timed| {
            mine[..share.len()].copy_from_slice(share);
            timed.call(port, |port| port.all_gather(&mine[..share.len()], &mut all))
        })?;
        let (arena, mut turn) = (port.arena(), 0);
        time(&mut port, ("all_gather_in_place", bytes), |port, timed| {
            turn = (turn + MOST_BYTES) % (2 * MOST_BYTES);
            // SAFETY: a turn lies within the arena, which outlives both uses.
            let start: *mut f32 = unsafe { arena.as_ptr().add(turn) }.as_ptr().cast();
            // SAFETY: a rank writes its own share, and who read the turn before has passed the last turn's barrier.
            let own = unsafe {
                std::slice::from_raw_parts_mut(start.add(rank as usize * share.len()), share.len())
            };
            own.copy_from_slice(share);
            timed.call(port, |port| {
                port.barrier()?;
                // SAFETY: all ranks have written their shares, and write this turn again after the next one's barrier.
                black_box(sum(unsafe { std::slice::from_raw_parts(start, values.len()) }));
                Ok(())
            })
        })?;
    }
    Ok(())
}

fn sum(values: &[f32]) -> [f32; 8] {
    let mut sums = [0.0; 8];
    for values in values.as_chunks::<8>().0 {
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    sums
}

/// Times of one collective.
struct Timed(Vec<Duration>);

impl Timed {
    fn call(
        &mut self,
        port: &mut RankPort,
        call: impl FnOnce(&mut RankPort) -> Result<(), ShmError>,
    ) -> Result<(), ShmError> {
        port.barrier()?;
        let start = Instant::now();
        call(port)?;
        self.0.push(start.elapsed());
        Ok(())
    }
}

fn time(
    port: &mut RankPort,
    (name, bytes): (&str, usize),
    mut iteration: impl FnMut(&mut RankPort, &mut Timed) -> Result<(), ShmError>,
) -> Result<(), ShmError> {
    // As in the program of the other side.
    let iterations = ((64 << 20) / bytes).clamp(200, 3000);
    let mut times = Timed(Vec::with_capacity(iterations + iterations / 10));
    for _ in 0..iterations + iterations / 10 {
        iteration(port, &mut times)?;
    }
    // The first tenth warms up.
    let mut times = times.0.split_off(iterations / 10);
    times.sort_unstable();
    if port.rank() == 0 {
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
        println!("{name} {bytes} {:.3} {:.3}", at(0.5), at(0.99));
    }
    Ok(())
}
