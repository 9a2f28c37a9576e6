//! Ranks of one group, each with its own mapping of the segment, compute what one rank computes.

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use phalanx_kernels::comm::{ShmCommunicator, Solo};
use phalanx_kernels::cpu::{CpuBackend, CpuBuffer};
use phalanx_kernels::{
    Backend, BatchInput, Columns, Communicator, GatherLayout, KernelError, Linear, WeightSource,
};
use phalanx_model::{TensorFormat, TensorParallelStyle, memory::arena_bytes};
use phalanx_shm::{GroupShape, RankPort, Segment, Wait};

const HIDDEN: usize = 64;
const WIDE: usize = 96;
const VOCAB: usize = 50;
const MAX_ROWS: usize = 9;
const STEPS: u32 = 40;

fn shape(world_size: usize, arena_bytes: usize) -> GroupShape {
    GroupShape {
        world_size: world_size as u32,
        epoch: 1,
        plan_slots: 2,
        plan_slot_bytes: 64,
        output_slots: 2,
        output_slot_bytes: 64,
        message_bytes: 256,
        arena_bytes: arena_bytes as u64,
    }
}

fn communicator(path: &Path, rank: usize, style: TensorParallelStyle, limit: Duration) -> ShmCommunicator {
    let segment = Arc::new(Segment::open(path).unwrap());
    let port = RankPort::join(segment, rank as u32, Wait::ADAPTIVE, limit).unwrap();
    ShmCommunicator::new(Rc::new(RefCell::new(port)), style)
}

/// Runs `rank` for every rank of a group, and returns what they return, in rank order.
fn group<T: Send>(
    world_size: usize,
    style: TensorParallelStyle,
    rank: impl Fn(ShmCommunicator) -> T + Sync,
) -> Vec<T> {
    let dir = tempfile::tempdir().unwrap();
    let arena = arena_bytes(MAX_ROWS, HIDDEN).unwrap() + arena_bytes(MAX_ROWS, WIDE).unwrap();
    let segment = Segment::create(dir.path(), "test", shape(world_size, arena)).unwrap();
    thread::scope(|scope| {
        let rank = &rank;
        let ranks: Vec<_> = (0..world_size)
            .map(|r| {
                let path = segment.path();
                scope.spawn(move || rank(communicator(path, r, style, Duration::from_secs(20))))
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

/// Rank `rank`'s part of `total`, uneven on purpose.
fn share(total: usize, rank: usize, world_size: usize) -> Range<usize> {
    let at = |r: usize| {
        if r == world_size {
            total
        } else {
            r * (total / world_size - 1)
        }
    };
    at(rank)..at(rank + 1)
}

fn matrix(rows: usize, cols: usize) -> Vec<u8> {
    (0..rows * cols)
        .flat_map(|i| (((i * 37 % 101) as f32 - 50.0) / 64.0).to_le_bytes())
        .collect()
}

fn weight(
    backend: &CpuBackend,
    data: &[u8],
    rows: Range<usize>,
    cols: usize,
) -> <CpuBackend as Backend>::Weight {
    let row_stride = 4 * cols;
    let data = &data[rows.start * row_stride..rows.end * row_stride];
    let source = WeightSource {
        format: TensorFormat::F32,
        rows: rows.len(),
        cols,
        data,
        row_stride,
        row_scales: None,
    };
    backend.weight(&[source]).unwrap()
}

fn step_tokens(step: u32) -> Vec<u32> {
    (0..1 + step % MAX_ROWS as u32)
        .map(|i| (step * 13 + i * 7) % VOCAB as u32)
        .collect()
}

fn batch(tokens: &[u32]) -> BatchInput {
    let rows = tokens.len() as u32;
    BatchInput {
        token_ids: tokens.to_vec(),
        positions: (0..rows).collect(),
        slot_mapping: (0..rows).collect(),
        cu_seqlens_q: vec![0, rows],
        context_lens: vec![rows],
        block_tables: vec![0],
        cu_blocks: vec![0, 1],
    }
}

/// Embedding and a linear layer, gathered, a few times over. Returns both activations of every step.
fn forward(mut comm: impl Communicator<CpuBackend>) -> Vec<f32> {
    let backend = CpuBackend::new(1).unwrap();
    let (rank, world_size) = (comm.rank(), comm.world_size());
    let vocab: Vec<_> = (0..world_size).map(|r| share(VOCAB, r, world_size)).collect();
    let columns: Vec<_> = (0..world_size).map(|r| share(WIDE, r, world_size)).collect();
    let table = weight(&backend, &matrix(VOCAB, HIDDEN), vocab[rank].clone(), HIDDEN);
    let layer = weight(&backend, &matrix(WIDE, HIDDEN), columns[rank].clone(), HIDDEN);

    let mut hidden = comm.buffer(&backend, MAX_ROWS, HIDDEN).unwrap();
    let mut wide = comm.buffer(&backend, MAX_ROWS, WIDE).unwrap();
    let mut all = Vec::new();
    for step in 0..STEPS {
        let tokens = step_tokens(step);
        let owner = |token: u32| vocab.iter().position(|v| v.contains(&(token as usize))).unwrap() as u32;
        let writers: Vec<u32> = tokens.iter().map(|&t| owner(t)).collect();
        let rows = tokens.len();
        let batch = backend.batch(&batch(&tokens)).unwrap();
        backend
            .embedding(&mut hidden, &table, vocab[rank].clone(), &batch)
            .unwrap();
        comm.all_gather(&mut hidden, rows, GatherLayout::Rows(&writers))
            .unwrap();

        // Before the next collective: after it a peer may already write the next step's rows.
        all.extend(backend.read(&hidden, rows).unwrap());
        let out = Columns {
            buffer: &mut wide,
            start: columns[rank].start,
        };
        backend
            .linear(
                out,
                &hidden,
                &Linear {
                    weight: &layer,
                    bias: None,
                },
                rows,
            )
            .unwrap();
        comm.all_gather(&mut wide, rows, GatherLayout::Columns(&columns))
            .unwrap();

        all.extend(backend.read(&wide, rows).unwrap());
    }
    all
}

#[test]
fn gathered_activations_are_those_of_one_rank() {
    let want = forward(Solo);
    for world_size in [2, 3] {
        // In reduce style the same collectives work on buffers of a rank's own.
        for style in [TensorParallelStyle::Gather, TensorParallelStyle::Reduce] {
            for (rank, got) in group(world_size, style, forward).iter().enumerate() {
                let differs = got
                    .iter()
                    .zip(&want)
                    .position(|(a, b)| a.to_bits() != b.to_bits());
                assert!(
                    got.len() == want.len() && differs.is_none(),
                    "rank {rank} of {world_size}, {style:?}: {differs:?}"
                );
            }
        }
    }
}

#[test]
fn partial_sums_are_added_in_rank_order() {
    let (rows, width) = (4, 70);
    let partial = |rank: usize| -> Vec<f32> {
        (0..rows * width)
            .map(|i| 10f32.powi(7 * rank as i32) * (i as f32 - 99.5))
            .collect()
    };
    let sum = |i: usize| (partial(0)[i] + partial(1)[i]) + partial(2)[i];
    let want: Vec<f32> = (0..rows * width).map(sum).collect();
    let sums = group(3, TensorParallelStyle::Reduce, |mut comm| {
        let backend = CpuBackend::new(1).unwrap();
        let mut buffer = comm.buffer(&backend, rows + 1, width).unwrap();
        let rank = Communicator::<CpuBackend>::rank(&comm);
        backend.write(&mut buffer, &partial(rank)).unwrap();
        comm.all_reduce(&mut buffer, rows).unwrap();
        backend.read(&buffer, rows + 1).unwrap()
    });
    for sum in sums {
        assert_eq!(sum[..rows * width], want);
        assert!(
            sum[rows * width..].iter().all(|&x| x == 0.0),
            "a row beyond the sum's"
        );
    }
}

/// Rows of embeddings, as many as a prompt's chunk has: more than goes through the message slots.
#[test]
fn large_rows_reach_ranks_with_buffers_of_their_own() {
    const ROWS: usize = 300;
    const WIDTH: usize = 1024;
    let writer = |row: usize| (row * row % 7 % 2) as u32;
    let value = |row: usize, column: usize| (row * WIDTH + column) as f32;
    let expected: Vec<f32> = (0..ROWS * WIDTH).map(|i| value(i / WIDTH, i % WIDTH)).collect();
    let held = group(2, TensorParallelStyle::Reduce, |mut comm| {
        let backend = CpuBackend::new(1).unwrap();
        let mut rows = comm.buffer(&backend, ROWS, WIDTH).unwrap();
        let own = |row| writer(row) == comm.rank() as u32;
        let values = expected.iter().enumerate();
        let mine: Vec<f32> = values
            .map(|(i, &x)| if own(i / WIDTH) { x } else { -1.0 })
            .collect();
        backend.write(&mut rows, &mine).unwrap();
        let writers: Vec<u32> = (0..ROWS).map(writer).collect();
        comm.all_gather(&mut rows, ROWS, GatherLayout::Rows(&writers))
            .unwrap();
        backend.read(&rows, ROWS).unwrap()
    });
    assert!(held.iter().all(|held| *held == expected));
}

#[test]
fn messages_reach_everyone_in_rank_order() {
    let heard = group(3, TensorParallelStyle::Gather, |mut comm| {
        let rank = Communicator::<CpuBackend>::rank(&comm);
        let message = vec![rank as u8; rank * 3];
        let heard = Communicator::<CpuBackend>::exchange(&mut comm, &message).unwrap();
        let too_long = Communicator::<CpuBackend>::exchange(&mut comm, &[0; 257]);
        assert!(matches!(too_long, Err(KernelError::Collective(_))));
        heard
    });
    for heard in heard {
        assert_eq!(heard, [vec![], vec![1; 3], vec![2; 6]]);
    }
}

#[test]
fn a_missing_rank_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let arena = arena_bytes(1, 1).unwrap();
    let segment = Segment::create(dir.path(), "test", shape(2, arena)).unwrap();
    let limit = Duration::from_millis(100);
    let mut comm = communicator(segment.path(), 0, TensorParallelStyle::Gather, limit);
    let backend = CpuBackend::new(1).unwrap();
    let mut buffer = comm.buffer(&backend, 1, 1).unwrap();
    let error = comm
        .all_gather(&mut buffer, 1, GatherLayout::Columns(&[0..1, 1..1]))
        .unwrap_err();
    let KernelError::Collective(message) = &error else {
        panic!("{error}")
    };
    assert!(message.contains("rank 1"), "{message}");
}

#[test]
fn an_abort_ends_a_peers_wait() {
    let dir = tempfile::tempdir().unwrap();
    let arena = arena_bytes(1, 1).unwrap();
    let segment = Segment::create(dir.path(), "test", shape(2, arena)).unwrap();
    let limit = Duration::from_secs(60);
    let both_joined = Barrier::new(2);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut comm = communicator(segment.path(), 0, TensorParallelStyle::Gather, limit);
            both_joined.wait();
            Communicator::<CpuBackend>::exchange(&mut comm, b"anybody?")
                .unwrap_err()
                .to_string()
        });
        let comm = communicator(segment.path(), 1, TensorParallelStyle::Gather, limit);
        both_joined.wait();
        Communicator::<CpuBackend>::abort(&comm);
        let message = waiting.join().unwrap();
        assert!(message.contains("rank 1"), "{message}");
    });
}

#[test]
fn buffers_do_not_exceed_the_arena_and_layouts_are_checked() {
    group(2, TensorParallelStyle::Gather, |mut comm| {
        let backend = CpuBackend::new(1).unwrap();
        let mut buffer: CpuBuffer = comm.buffer(&backend, MAX_ROWS, HIDDEN).unwrap();
        let error = comm.buffer(&backend, MAX_ROWS, 2 * WIDE).err().unwrap();
        assert!(matches!(error, KernelError::OutOfMemory { .. }), "{error}");
        assert!(comm.buffer(&backend, usize::MAX, 2).is_err());
        for layout in [
            GatherLayout::Columns(&[0..1, 1..2, 2..HIDDEN]),
            GatherLayout::Columns(&[0..1, 1..HIDDEN + 1]),
            GatherLayout::Rows(&[0]),
            GatherLayout::Rows(&[0, 2]),
        ] {
            let error = comm.all_gather(&mut buffer, 2, layout).unwrap_err();
            assert!(matches!(error, KernelError::Shape { .. }), "{error}");
        }
        assert!(matches!(
            comm.all_reduce(&mut buffer, 1),
            Err(KernelError::Shape { .. })
        ));
    });
}
