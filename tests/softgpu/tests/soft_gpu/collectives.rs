//! NCCL between processes.

use std::{mem::MaybeUninit, ptr, sync::Arc, time::Instant};

use cudarc::{
    driver::{CudaSlice, CudaStream, DevicePtr},
    nccl::{Comm, Id, ReduceOp, group_end, group_start, sys},
};
use half::bf16;
use softgpu::Env;

use crate::support::{Rank, download, on_ranks, open, spawn_ranks, wait_for};

fn id(rank: &Rank) -> sys::ncclUniqueId {
    if rank.rank == 0 {
        let id = Id::new().expect("an id");
        rank.publish("id", &id.internal().map(|byte| byte as u8));
    }
    let bytes = rank.read("id");
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    for (to, from) in id.internal.iter_mut().zip(bytes) {
        *to = from as _;
    }
    id
}

fn meet(rank: &Rank) -> (Arc<CudaStream>, Comm) {
    let (_context, stream) = open();
    let id = Id::uninit(id(rank).internal);
    let comm = Comm::from_rank(stream.clone(), rank.rank, rank.world, id).expect("a communicator");
    (stream, comm)
}

/// What rank `rank` contributes at `i`, exact in bf16.
fn part(rank: usize, i: usize) -> f32 {
    ((i * 7 + rank * 13) % 101) as f32 - 50.0
}

fn all_collectives(rank: &Rank) {
    let (stream, comm) = meet(rank);
    let Rank { rank: own, world, .. } = *rank;
    // More than one slot.
    let count = 700_001;
    let send: Vec<bf16> = (0..count).map(|i| bf16::from_f32(part(own, i))).collect();
    let send = stream.clone_htod(&send).expect("copied");
    let mut sum = stream.alloc_zeros::<bf16>(count).expect("allocated");
    comm.all_reduce(&send, &mut sum, &ReduceOp::Sum)
        .expect("enqueued");
    for (i, value) in download(&stream, &sum).into_iter().enumerate() {
        let expected = (0..world).map(|rank| part(rank, i)).sum::<f32>();
        assert_eq!(value, bf16::from_f32(expected), "all_reduce [{i}]");
    }

    let own_part = |count: usize| (0..count).map(|i| part(own, i)).collect::<Vec<f32>>();
    let count = 300_000; // of f32: more than one slot
    let send = stream.clone_htod(&own_part(count)).expect("copied");
    let mut all = stream.alloc_zeros::<f32>(count * world).expect("allocated");
    comm.all_gather(&send, &mut all).expect("enqueued");
    let all = download(&stream, &all);
    assert!(
        (0..count * world).all(|i| all[i] == part(i / count, i % count)),
        "all_gather"
    );

    let piece = 150_000;
    let send = stream.clone_htod(&own_part(piece * world)).expect("copied");
    let mut scattered = stream.alloc_zeros::<f32>(piece).expect("allocated");
    comm.reduce_scatter(&send, &mut scattered, &ReduceOp::Max)
        .expect("enqueued");
    for (i, value) in download(&stream, &scattered).into_iter().enumerate() {
        let expected = (0..world)
            .map(|rank| part(rank, own * piece + i))
            .fold(f32::MIN, f32::max);
        assert_eq!(value, expected, "reduce_scatter [{i}]");
    }

    let root = world - 1;
    let mine = stream.clone_htod(&own_part(1000)).expect("copied");
    let mut theirs = stream.alloc_zeros::<f32>(1000).expect("allocated");
    let sent = (own == root).then_some(&mine);
    comm.broadcast(sent, &mut theirs, root as i32).expect("enqueued");
    let theirs = download(&stream, &theirs);
    assert!((0..1000).all(|i| theirs[i] == part(root, i)), "broadcast");

    // A ring in which everybody sends first, of more than the ring buffer holds.
    let count = 200_000;
    let mine = stream.clone_htod(&vec![own as u32; count]).expect("copied");
    let mut theirs = stream.alloc_zeros::<u32>(count).expect("allocated");
    let (next, previous) = ((own + 1) % world, (own + world - 1) % world);
    group_start().expect("a group");
    comm.send(&mine, next as i32).expect("queued");
    comm.recv(&mut theirs, previous as i32).expect("queued");
    group_end().expect("enqueued");
    assert_eq!(
        download(&stream, &theirs),
        vec![previous as u32; count],
        "send and receive"
    );
}

#[test]
fn two_ranks_agree() {
    on_ranks("collectives::two_ranks_agree", 2, &[], |rank| {
        all_collectives(&rank)
    });
}

#[test]
fn three_ranks_agree_in_spite_of_delays() {
    let settings = [(Env::JITTER_US, "2000")];
    on_ranks(
        "collectives::three_ranks_agree_in_spite_of_delays",
        3,
        &settings,
        |rank| all_collectives(&rank),
    );
}

#[test]
fn a_different_collective_is_an_error_on_all_ranks() {
    let test = "collectives::a_different_collective_is_an_error_on_all_ranks";
    let said = on_ranks(test, 2, &[], |rank| {
        let raw = Raw::meet(&rank);
        let count = 100 + rank.rank;
        let buffer = raw.stream.alloc_zeros::<f32>(128).expect("allocated");
        raw.all_reduce(&buffer, count);
        raw.stream.synchronize().expect("the stream goes on");
        assert_eq!(raw.state(), sys::ncclResult_t::ncclInvalidUsage);
        raw.abort();
    });
    for said in said.into_iter().flatten() {
        assert!(said.contains("mismatch"), "{said}");
    }
}

/// A communicator made without blocking, as a worker with a watchdog makes it.
struct Raw {
    stream: Arc<CudaStream>,
    comm: sys::ncclComm_t,
}

impl Raw {
    fn begin(rank: &Rank, id: sys::ncclUniqueId) -> Self {
        let (_context, stream) = open();
        // SAFETY: the configuration begins as NCCL_CONFIG_INITIALIZER does and is undefined in the rest (the least
        // integer and null), and all pointers outlive the call.
        unsafe {
            let mut config = MaybeUninit::<sys::ncclConfig_t>::zeroed().assume_init();
            config.size = size_of::<sys::ncclConfig_t>();
            config.magic = 0xcafe_beef;
            config.version = 22803;
            config.blocking = 0;
            let mut comm = ptr::null_mut();
            let (world, rank) = (rank.world as i32, rank.rank as i32);
            let begun = sys::ncclCommInitRankConfig(&mut comm, world, id, rank, &mut config);
            assert_eq!(begun, sys::ncclResult_t::ncclInProgress);
            Self { stream, comm }
        }
    }

    fn meet(rank: &Rank) -> Self {
        let raw = Self::begin(rank, id(rank));
        raw.settle();
        raw
    }

    fn state(&self) -> sys::ncclResult_t {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is live.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.comm, &mut state) };
        assert_eq!(asked, sys::ncclResult_t::ncclSuccess);
        state
    }

    fn settle(&self) {
        let settled = wait_for("the communicator", || {
            let state = self.state();
            (state != sys::ncclResult_t::ncclInProgress).then_some(state)
        });
        assert_eq!(settled, sys::ncclResult_t::ncclSuccess);
    }

    fn all_reduce(&self, buffer: &CudaSlice<f32>, count: usize) -> sys::ncclResult_t {
        let (address, _guard) = buffer.device_ptr(&self.stream);
        let (data_type, sum) = (sys::ncclDataType_t::ncclFloat32, sys::ncclRedOp_t::ncclSum);
        let stream = self.stream.cu_stream().cast();
        // SAFETY: the buffer is the device's and outlives the operation: every user waits for the stream.
        unsafe {
            sys::ncclAllReduce(
                address as _,
                address as _,
                count,
                data_type,
                sum,
                self.comm,
                stream,
            )
        }
    }

    fn abort(self) {
        // SAFETY: the communicator is live and not used again.
        let aborted = unsafe { sys::ncclCommAbort(self.comm) };
        assert_eq!(aborted, sys::ncclResult_t::ncclSuccess);
    }
}

#[test]
fn calls_in_progress_are_waited_for() {
    // With delays, a non-blocking communicator answers "in progress" to every call.
    let settings = [(Env::JITTER_US, "500")];
    on_ranks(
        "collectives::calls_in_progress_are_waited_for",
        2,
        &settings,
        |rank| {
            let raw = Raw::meet(&rank);
            let buffer = raw.stream.clone_htod(&[1f32; 64]).expect("copied");
            assert_eq!(raw.all_reduce(&buffer, 64), sys::ncclResult_t::ncclInProgress);
            let hasty = raw.all_reduce(&buffer, 64);
            assert_eq!(hasty, sys::ncclResult_t::ncclInvalidArgument);
            raw.settle();
            assert_eq!(download(&raw.stream, &buffer), [2.0; 64]);
            raw.abort();
        },
    );
}

#[test]
fn a_rank_that_never_comes_is_given_up() {
    let settings = [(Env::NCCL_INIT_TIMEOUT, "1")];
    on_ranks(
        "collectives::a_rank_that_never_comes_is_given_up",
        1,
        &settings,
        |rank| {
            let expected = Rank { world: 2, ..rank };
            let raw = Raw::begin(&expected, id(&expected));
            let state = wait_for("the deadline", || {
                let state = raw.state();
                (state != sys::ncclResult_t::ncclInProgress).then_some(state)
            });
            assert_eq!(state, sys::ncclResult_t::ncclSystemError);
            raw.abort();
        },
    );
}

#[test]
fn joining_can_be_aborted() {
    on_ranks("collectives::joining_can_be_aborted", 1, &[], |rank| {
        let expected = Rank { world: 2, ..rank };
        let raw = Raw::begin(&expected, id(&expected));
        assert_eq!(raw.state(), sys::ncclResult_t::ncclInProgress);
        raw.abort();
    });
}

#[test]
fn an_abort_drains_the_stream_of_a_killed_peer() {
    let test = "collectives::an_abort_drains_the_stream_of_a_killed_peer";
    let ranks = spawn_ranks(test, 2, &[], |rank| {
        let raw = Raw::meet(&rank);
        if rank.rank == 1 {
            rank.publish("ready", &[]);
            rank.read("never");
        }
        rank.read("killed");
        let buffer = raw.stream.alloc_zeros::<f32>(64).expect("allocated");
        for _ in 0..3 {
            raw.all_reduce(&buffer, 64);
        }
        let event = raw.stream.record_event(None).expect("recorded");
        let hung = Instant::now();
        wait_for("a watchdog's patience", || {
            (event.is_complete() || hung.elapsed().as_millis() > 300).then_some(())
        });
        assert!(!event.is_complete(), "without the peer nothing can be done");
        raw.abort();
        event.synchronize().expect("the stream drains");
        the_device_is_usable();
    });
    let Some(mut ranks) = ranks else { return };
    let ready = ranks.meeting.path().join("ready");
    wait_for("both ranks", || ready.exists().then_some(()));
    let mut victim = ranks.processes.remove(1);
    victim.kill();
    victim.output();
    std::fs::write(ranks.meeting.path().join("killed"), []).expect("written");
    ranks.processes.remove(0).passed(test);
}

/// The process can go on with its device, and with a new communicator of its own.
fn the_device_is_usable() {
    let (_context, stream) = open();
    let comm = Comm::from_rank(stream.clone(), 0, 1, Id::new().expect("an id")).expect("met");
    let send = stream.clone_htod(&[3f32; 8]).expect("copied");
    let mut sum = stream.alloc_zeros::<f32>(8).expect("allocated");
    comm.all_reduce(&send, &mut sum, &ReduceOp::Sum)
        .expect("enqueued");
    assert_eq!(download(&stream, &sum), [3.0; 8]);
}

#[test]
fn a_killed_peer_is_reported_if_that_is_asked_for() {
    let test = "collectives::a_killed_peer_is_reported_if_that_is_asked_for";
    let ranks = spawn_ranks(test, 2, &[(Env::NCCL_DETECT, "1")], |rank| {
        let raw = Raw::meet(&rank);
        if rank.rank == 1 {
            rank.publish("ready", &[]);
            rank.read("never");
        }
        let buffer = raw.stream.alloc_zeros::<f32>(64).expect("allocated");
        raw.all_reduce(&buffer, 64);
        raw.stream.synchronize().expect("the stream goes on");
        assert_eq!(raw.state(), sys::ncclResult_t::ncclRemoteError);
        raw.abort();
    });
    let Some(mut ranks) = ranks else { return };
    let ready = ranks.meeting.path().join("ready");
    wait_for("both ranks", || ready.exists().then_some(()));
    ranks.processes[1].kill();
    ranks.processes.remove(0).passed(test);
}
