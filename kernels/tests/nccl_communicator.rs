//! Ranks with a GPU each, as processes on the soft GPU. Tests named `rank_*` are what a process does: they are ignored,
//! and the others start them.

use std::cell::RefCell;
use std::env;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_kernels::comm::{NcclCommunicator, NcclGroup, StepLayout};
use phalanx_kernels::cuda::CudaBackend;
use phalanx_kernels::{Backend, Communicator, GatherLayout, KernelError};
use phalanx_model::TensorParallelStyle;
use phalanx_shm::{AbortReason, GroupShape, Party, Progress, RankPort, Segment, Wait};
use softgpu::{Env, LibraryDir};

const RANK: &str = "TEST_RANK";
const SEGMENT: &str = "TEST_SEGMENT";
/// Set: no sums without NCCL.
const ONLY_NCCL: &str = "TEST_ONLY_NCCL";
/// Barriers until all ranks are in the group: the identity, two messages about their memory, and one that says so.
const IN_GROUP: u32 = 4;
/// For everything that works, on a busy machine.
const LONG: Duration = Duration::from_secs(120);
/// From the loss of a rank to the end of its peers' collectives.
const PROMPT: Duration = Duration::from_secs(1);
/// For what must not work.
const STEP_TIMEOUT: Duration = Duration::from_millis(1500);

/// The processes of a group, from outside.
struct Group {
    segment: Segment,
    ranks: Vec<Child>,
    _libraries: LibraryDir,
    _directory: tempfile::TempDir,
}

impl Group {
    fn start(body: &str, world_size: u32) -> Self {
        Self::start_in(body, world_size, &[])
    }

    fn start_in(body: &str, world_size: u32, environment: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let shape = GroupShape {
            world_size,
            epoch: 1,
            plan_slots: 1,
            plan_slot_bytes: 64,
            output_slots: 1,
            output_slot_bytes: 64,
            message_bytes: 4096,
            arena_bytes: Progress::bytes(world_size),
        };
        let segment = Segment::create(directory.path(), "nccl", shape).unwrap();
        let libraries = LibraryDir::new().unwrap();
        let start = |rank: u32| {
            let mut command = libraries.test_command(body).unwrap();
            command
                .envs(environment.iter().copied())
                .env(RANK, rank.to_string())
                .env(SEGMENT, segment.path())
                .env("CUDA_VISIBLE_DEVICES", rank.to_string())
                .env("SOFTGPU_MEM_MIB", "1024")
                .env(
                    "PHALANX_KERNEL_CACHE",
                    concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels"),
                )
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        Self {
            ranks: (0..world_size).map(start).collect(),
            segment,
            _libraries: libraries,
            _directory: directory,
        }
    }

    /// Waits until every rank has exchanged so often.
    fn wait_for_barriers(&self, count: u32) {
        let deadline = Instant::now() + LONG;
        let counts = || self.segment.barrier_counts();
        while counts().iter().any(|found| *found < count) {
            assert!(Instant::now() < deadline, "{:?}", counts());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for these ranks, which must end well.
    fn join(mut self, ranks: &[usize]) {
        for &rank in ranks {
            let child = &mut self.ranks[rank];
            let deadline = Instant::now() + LONG;
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break Some(status);
                }
                if Instant::now() >= deadline {
                    break None;
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            if !status.is_some_and(|status| status.success()) {
                let _ = child.kill();
                panic!("rank {rank}: {status:?}\n{}", output(child));
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for child in &mut self.ranks {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn output(child: &mut Child) -> String {
    let mut text = String::new();
    let _ = child.stdout.take().unwrap().read_to_string(&mut text);
    let _ = child.stderr.take().unwrap().read_to_string(&mut text);
    text
}

/// Short sums by the ranks themselves, and by NCCL.
const BOTH_WAYS: [&[(&str, &str)]; 2] = [&[], &[(ONLY_NCCL, "1")]];

/// What a rank's process works with.
struct Rank {
    number: usize,
    world_size: usize,
    backend: CudaBackend,
    comm: NcclCommunicator,
}

impl Rank {
    fn join(style: TensorParallelStyle, step_timeout: Duration) -> Self {
        let number: usize = env::var(RANK).unwrap().parse().unwrap();
        let segment = Arc::new(Segment::open(Path::new(&env::var_os(SEGMENT).unwrap())).unwrap());
        let world_size = segment.shape().world_size as usize;
        let mut port = RankPort::join(segment, number as u32, Wait::PASSIVE, LONG).unwrap();
        let own = if number == 0 && world_size > 1 {
            NcclCommunicator::unique_id().unwrap()
        } else {
            Vec::new()
        };
        let unique_id = port.exchange(&own).unwrap().swap_remove(0);
        let backend = CudaBackend::new(0).unwrap();
        let group = NcclGroup {
            port: Rc::new(RefCell::new(port)),
            unique_id: &unique_id,
            style,
            step_timeout,
            step_layout: StepLayout {
                before_layers: 1,
                per_layer: 2,
                layers: 4,
            },
            custom_all_reduce: env::var_os(ONLY_NCCL).is_none(),
        };
        let comm = NcclCommunicator::join(&backend, group).unwrap();
        Self {
            number,
            world_size,
            backend,
            comm,
        }
    }

    /// A buffer with a value of its own in every place of every rank.
    fn filled(&mut self, rows: usize, width: usize) -> <CudaBackend as Backend>::Buffer {
        let mut buffer = self.comm.buffer(&self.backend, rows, width).unwrap();
        let values: Vec<f32> = (0..rows * width).map(|at| value(self.number, at)).collect();
        self.backend.write(&mut buffer, &values).unwrap();
        buffer
    }
}

/// Small whole numbers: sums are exact.
fn value(rank: usize, at: usize) -> f32 {
    (rank * 1000 + at % 777) as f32 + 1.0
}

fn sum(world_size: usize, at: usize) -> f32 {
    (0..world_size).map(|rank| value(rank, at)).sum()
}

#[test]
#[ignore = "the body of a rank"]
fn rank_collectives() {
    let mut rank = Rank::join(TensorParallelStyle::Gather, LONG);
    let (rows, width, world_size) = (5, 11, rank.world_size);

    let mut buffer = rank.filled(rows + 1, width);
    rank.comm.all_reduce(&mut buffer, rows).unwrap();
    let reduced = rank.backend.read(&buffer, rows + 1).unwrap();
    for (at, found) in reduced.into_iter().enumerate() {
        let counted = at < rows * width;
        let expected = if counted {
            sum(world_size, at)
        } else {
            value(rank.number, at)
        };
        assert_eq!(found, expected, "all_reduce {at}");
    }

    // Uneven parts, one of them empty when there are three ranks.
    let bounds = if world_size == 3 {
        vec![0, 7, 7, 11]
    } else {
        vec![0, 3, 11]
    };
    let columns: Vec<_> = bounds.windows(2).map(|pair| pair[0]..pair[1]).collect();
    let mut buffer = rank.filled(rows, width);
    rank.comm
        .all_gather(&mut buffer, rows, GatherLayout::Columns(&columns))
        .unwrap();
    for (at, found) in rank.backend.read(&buffer, rows).unwrap().into_iter().enumerate() {
        let writer = columns
            .iter()
            .position(|range| range.contains(&(at % width)))
            .unwrap();
        assert_eq!(found, value(writer, at), "all_gather of columns, {at}");
    }

    let writers: Vec<u32> = (0..rows as u32)
        .map(|row| (row / 2) % world_size as u32)
        .collect();
    let mut buffer = rank.filled(rows, width);
    rank.comm.start_rows(&mut buffer, rows).unwrap();
    let zeroed = rank.backend.read(&buffer, rows).unwrap();
    assert!(zeroed.iter().all(|&value| value == 0.0), "{zeroed:?}");
    let own = |at: usize| {
        let mine = writers[at / width] as usize == rank.number;
        if mine { value(rank.number, at) } else { 0.0 }
    };
    let values: Vec<f32> = (0..rows * width).map(own).collect();
    rank.backend.write(&mut buffer, &values).unwrap();
    rank.comm
        .all_gather(&mut buffer, rows, GatherLayout::Rows(&writers))
        .unwrap();
    for (at, found) in rank.backend.read(&buffer, rows).unwrap().into_iter().enumerate() {
        assert_eq!(
            found,
            value(writers[at / width] as usize, at),
            "all_gather of rows, {at}"
        );
    }

    let x = rank.filled(2 * world_size, width);
    let mut out = rank.filled(3, width);
    rank.comm.reduce_scatter(&mut out, &x, 2).unwrap();
    for (at, found) in rank.backend.read(&out, 2).unwrap().into_iter().enumerate() {
        let expected = sum(world_size, rank.number * 2 * width + at);
        assert_eq!(found, expected, "reduce_scatter {at}");
    }

    let root = world_size - 1;
    let mut buffer = rank.filled(rows, width);
    rank.comm.broadcast(&mut buffer, rows, root).unwrap();
    for (at, found) in rank.backend.read(&buffer, rows).unwrap().into_iter().enumerate() {
        assert_eq!(found, value(root, at), "broadcast {at}");
    }

    let mut buffer = rank.filled(rows, width);
    match rank.number {
        0 => rank.comm.send(&buffer, rows, 1).unwrap(),
        1 => rank.comm.recv(&mut buffer, rows, 0).unwrap(),
        _ => {}
    }
    let from = if rank.number == 1 { 0 } else { rank.number };
    assert_eq!(
        rank.backend.read(&buffer, 1).unwrap()[0],
        value(from, 0),
        "send and recv"
    );

    let messages = rank.comm.exchange(&[rank.number as u8; 3]).unwrap();
    let expected: Vec<Vec<u8>> = (0..world_size as u8).map(|number| vec![number; 3]).collect();
    assert_eq!(messages, expected);
    let refused = rank.comm.broadcast(&mut buffer, rows, world_size).unwrap_err();
    assert!(matches!(refused, KernelError::Shape { .. }), "{refused}");
}

#[test]
fn two_ranks_do_all_collectives() {
    Group::start("rank_collectives", 2).join(&[0, 1]);
}

#[test]
fn three_ranks_do_all_collectives() {
    Group::start("rank_collectives", 3).join(&[0, 1, 2]);
}

#[test]
fn nothing_depends_on_when_things_are_done() {
    // Operations of streams are delayed at random, and NCCL's calls are taken later.
    Group::start_in("rank_collectives", 3, &[(Env::JITTER_US, "2000")]).join(&[0, 1, 2]);
}

/// A term of a sum whose rounding depends on the order.
fn rough(rank: usize, at: usize) -> f32 {
    ((at * 31 + rank * 17) % 101) as f32 / 7.0 * 10f32.powi(rank as i32 * 3)
}

#[test]
#[ignore = "the body of a rank"]
fn rank_short_sums() {
    let mut rank = Rank::join(TensorParallelStyle::Reduce, LONG);
    let limit = rank.comm.one_shot_limit().unwrap() / size_of::<f32>();
    // Longer than a half of the staging memory goes to NCCL, and so does what is no multiple of 16 bytes.
    for (round, width) in [4, 64, limit, 576, limit + 4, 7, limit / 2, 8, 8]
        .into_iter()
        .enumerate()
    {
        let terms = |rank: usize| (0..width).map(move |at| rough(rank, at + round));
        let mut buffer = rank.comm.buffer(&rank.backend, 1, width).unwrap();
        let own: Vec<f32> = terms(rank.number).collect();
        rank.backend.write(&mut buffer, &own).unwrap();
        rank.comm.all_reduce(&mut buffer, 1).unwrap();
        let found = rank.backend.read(&buffer, 1).unwrap();
        let mut expected = vec![0.0; width];
        for peer in 0..rank.world_size {
            for (sum, term) in expected.iter_mut().zip(terms(peer)) {
                *sum += term;
            }
        }
        let short = width <= limit && width % 4 == 0;
        for (at, (found, expected)) in found.into_iter().zip(expected).enumerate() {
            let close = (found - expected).abs() <= expected.abs() * 1e-6;
            // In rank order, to the last bit.
            assert!(
                if short { found == expected } else { close },
                "{width} wide, {at}: {found} {expected}"
            );
        }
    }
}

#[test]
fn short_sums_of_two_ranks_are_in_rank_order() {
    Group::start("rank_short_sums", 2).join(&[0, 1]);
}

#[test]
fn short_sums_of_three_ranks_are_in_rank_order() {
    Group::start_in("rank_short_sums", 3, &[(Env::JITTER_US, "500")]).join(&[0, 1, 2]);
}

#[test]
#[ignore = "the body of a rank"]
fn rank_out_of_reach() {
    let mut rank = Rank::join(TensorParallelStyle::Reduce, LONG);
    let reason = rank.comm.one_shot_limit().unwrap_err().to_owned();
    assert!(
        reason.starts_with("rank 0: ") && reason.contains("PEER_ACCESS_UNSUPPORTED"),
        "{reason}"
    );
    let mut buffer = rank.filled(2, 8);
    rank.comm.all_reduce(&mut buffer, 2).unwrap();
    assert_eq!(rank.backend.read(&buffer, 1).unwrap()[3], sum(rank.world_size, 3));
}

#[test]
fn without_peer_access_all_sums_are_nccls() {
    Group::start_in("rank_out_of_reach", 2, &[(Env::NO_PEER_ACCESS, "1")]).join(&[0, 1]);
}

#[test]
#[ignore = "the body of a rank"]
fn rank_alone() {
    let mut rank = Rank::join(TensorParallelStyle::Gather, LONG);
    let mut buffer = rank.filled(2, 3);
    rank.comm.all_reduce(&mut buffer, 2).unwrap();
    rank.comm
        .all_gather(&mut buffer, 2, GatherLayout::Rows(&[0, 0]))
        .unwrap();
    let x = rank.filled(2, 3);
    rank.comm.reduce_scatter(&mut buffer, &x, 2).unwrap();
    let values: Vec<f32> = (0..6).map(|at| value(0, at)).collect();
    assert_eq!(rank.backend.read(&buffer, 2).unwrap(), values);
    assert_eq!(rank.comm.exchange(b"me").unwrap(), [b"me"]);
}

#[test]
fn a_rank_that_is_alone_needs_no_nccl() {
    Group::start("rank_alone", 1).join(&[0]);
}

#[test]
#[ignore = "the body of a rank"]
fn rank_that_may_stay_away() {
    let mut rank = Rank::join(TensorParallelStyle::Reduce, STEP_TIMEOUT);
    let mut buffer = rank.filled(4, 8);
    rank.comm.all_reduce(&mut buffer, 4).unwrap();
    rank.backend.read(&buffer, 4).unwrap();
    if rank.number == 1 {
        // Until the others have given up, and a little longer than they are checked for.
        let error = rank.comm.exchange(b"").unwrap_err();
        assert!(error.to_string().contains("rank 1 timed out"), "{error}");
        return;
    }
    rank.comm.all_reduce(&mut buffer, 2).unwrap();
    let started = Instant::now();
    // The device waits for rank 1; whether the driver then reports a failure is its own business.
    let _ = rank.backend.read(&buffer, 2);
    let waited = started.elapsed();
    assert!(waited < STEP_TIMEOUT + PROMPT, "{waited:?}");
    let error = rank.comm.all_reduce(&mut buffer, 4).unwrap_err();
    let expected = "rank 1 never reached all_reduce #2 (layer 0, 64 bytes)";
    assert!(
        matches!(&error, KernelError::Collective(_)) && error.to_string().contains(expected)
            || error
                .to_string()
                .contains("rank 1 timed out: it never reached all_reduce #2 (layer 0, 64 bytes)"),
        "{error}"
    );
}

#[test]
fn a_rank_that_stays_away_is_named_with_the_collective() {
    for environment in BOTH_WAYS {
        Group::start_in("rank_that_may_stay_away", 3, environment).join(&[0, 1, 2]);
    }
}

#[test]
#[ignore = "the body of a rank"]
fn rank_that_may_be_killed() {
    let mut rank = Rank::join(TensorParallelStyle::Reduce, LONG);
    let mut buffer = rank.filled(4, 8);
    // Tells the test that all are in; rank 1 then waits for the end in here.
    rank.comm.exchange(b"").unwrap();
    if rank.number == 1 {
        let _ = rank.comm.exchange(b"");
    }
    // The news may be here before it.
    let _ = rank.comm.all_reduce(&mut buffer, 4);
    let _ = rank.backend.read(&buffer, 4);
    let error = rank.comm.exchange(b"").unwrap_err();
    assert_eq!(
        error.to_string(),
        "collective failed: the group was aborted: rank 1 is lost"
    );
    let error = rank.comm.all_reduce(&mut buffer, 4).unwrap_err();
    assert!(error.to_string().contains("rank 1 is lost"), "{error}");
}

#[test]
fn the_peers_of_a_killed_rank_are_released_at_once() {
    for (environment, barriers) in BOTH_WAYS.into_iter().zip([IN_GROUP, 2]) {
        let mut group = Group::start_in("rank_that_may_be_killed", 3, environment);
        group.wait_for_barriers(barriers);
        group.ranks[1].kill().unwrap();
        let killed = Instant::now();
        // As the coordinator does, who hears of it from the kernel.
        group.segment.abort(AbortReason::Lost(Party::Rank(1)));
        group.join(&[0, 2]);
        assert!(killed.elapsed() < 2 * PROMPT, "{:?}", killed.elapsed());
    }
}

#[test]
#[ignore = "the body of a rank"]
fn rank_whose_peer_nccl_misses() {
    let mut rank = Rank::join(TensorParallelStyle::Reduce, LONG);
    let mut buffer = rank.filled(4, 8);
    rank.comm.exchange(b"").unwrap();
    if rank.number == 1 {
        let _ = rank.comm.exchange(b"");
    }
    rank.comm.all_reduce(&mut buffer, 4).unwrap();
    let _ = rank.backend.read(&buffer, 4);
    let error = rank.comm.all_reduce(&mut buffer, 4).unwrap_err();
    assert!(matches!(&error, KernelError::Collective(_)), "{error}");
    let told = error.to_string();
    assert!(
        told.contains("ncclRemoteError; rank ") || told.contains("the group was aborted: rank "),
        "{told}"
    );
    assert_eq!(rank.comm.exchange(b"").unwrap_err().to_string(), told);
}

#[test]
fn a_loss_that_only_nccl_notices_ends_the_group() {
    let environment = [(Env::NCCL_DETECT, "1"), (ONLY_NCCL, "1")];
    let mut group = Group::start_in("rank_whose_peer_nccl_misses", 3, &environment);
    group.wait_for_barriers(2);
    group.ranks[1].kill().unwrap();
    group.ranks[1].wait().unwrap();
    group.join(&[0, 2]);
}
