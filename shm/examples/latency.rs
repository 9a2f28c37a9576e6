//! Latencies between real processes: `cargo run --release -p phalanx-shm --example latency [world size]`.
//!
//! Collectives are timed on rank 0, one call after a barrier, data of all ranks in the cache of its writer. A round
//! trip is a plan from the engine to all ranks and an output back. Nothing is pinned.
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::error::Error;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_shm::{EnginePort, GroupShape, RankPort, Segment, ShmError, Wait};

const LIMIT: Duration = Duration::from_secs(60);
const ROUNDS: usize = 2000;
const WARM_UP: usize = 200;

fn main() -> Result<(), Box<dyn Error>> {
    match (std::env::var_os("SEGMENT"), std::env::var("RANK")) {
        (Some(path), Ok(rank)) => run_rank(path.as_ref(), rank.parse()?),
        _ => run_engine(
            std::env::args()
                .nth(1)
                .map_or(Ok(2), |world_size| world_size.parse())?,
        ),
    }
}

fn run_engine(world_size: u32) -> Result<(), Box<dyn Error>> {
    let shape = GroupShape {
        world_size,
        epoch: std::process::id(),
        plan_slots: 4,
        plan_slot_bytes: 1 << 16,
        output_slots: 4,
        output_slot_bytes: 1 << 16,
        message_bytes: 128 << 10,
        arena_bytes: 0,
    };
    let segment = Arc::new(Segment::create("/dev/shm".as_ref(), "latency", shape)?);
    let mut engine = EnginePort::join(Arc::clone(&segment), Wait::calibrated())?;
    let spawn = |rank: u32| {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .env("SEGMENT", segment.path())
            .env("RANK", rank.to_string())
            .spawn()
    };
    let ranks = (0..world_size).map(spawn).collect::<Result<Vec<_>, _>>()?;
    segment.unlink_when_joined(LIMIT)?;

    println!(
        "{world_size} ranks, {:?}\n{:<24}{:>9}{:>9}  µs",
        Wait::calibrated(),
        "",
        "p50",
        "p99"
    );
    let mut times = Vec::new();
    for round in 0..WARM_UP + ROUNDS {
        let start = Instant::now();
        engine.publish_plan(LIMIT, |_| Ok::<_, ShmError>(4096))?;
        engine.wait_output(LIMIT, |_| ())?;
        if round >= WARM_UP {
            times.push(start.elapsed());
        }
    }
    print("round trip, 4 KiB plan", times);
    engine.publish_plan(LIMIT, |_| Ok::<_, ShmError>(0))?;
    for mut rank in ranks {
        rank.wait()?;
    }
    Ok(())
}

fn run_rank(path: &std::path::Path, rank: u32) -> Result<(), Box<dyn Error>> {
    let segment = Arc::new(Segment::open(path)?);
    let world_size = segment.shape().world_size as usize;
    let mut port = RankPort::join(segment, rank, Wait::calibrated(), LIMIT)?;
    while port.next_plan(|plan| !plan.is_empty())? {
        if rank == 0 {
            port.publish_output(|_| Ok::<_, ShmError>(64))?;
        }
    }
    time(&mut port, "barrier", |port| port.barrier())?;
    time(&mut port, "exchange 64 B", |port| {
        port.exchange(&[0; 64]).map(drop)
    })?;
    for kib in [1, 8, 64, 256, 1024] {
        let mut values = vec![0f32; kib << 8];
        let mut all = vec![0f32; values.len() * world_size];
        time(&mut port, &format!("all_gather {kib} KiB each"), |port| {
            port.all_gather(&values, &mut all)
        })?;
        time(&mut port, &format!("all_reduce {kib} KiB"), |port| {
            port.all_reduce(&mut values)
        })?;
    }
    Ok(())
}

fn time(
    port: &mut RankPort,
    what: &str,
    mut call: impl FnMut(&mut RankPort) -> Result<(), ShmError>,
) -> Result<(), ShmError> {
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..WARM_UP + ROUNDS {
        port.barrier()?;
        let start = Instant::now();
        call(port)?;
        if round >= WARM_UP {
            times.push(start.elapsed());
        }
    }
    if port.rank() == 0 {
        print(what, times);
    }
    Ok(())
}

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
    println!("{what:<24}{:>9.2}{:>9.2}", at(0.5), at(0.99));
}
