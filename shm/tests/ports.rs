//! The ports of a group whose parties are threads: limits, errors and who is named.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use phalanx_shm::{
    AbortReason, Awaited, Corruption, EnginePort, GroupShape, Party, Progress, RankPort, Segment, ShmError,
    Wait,
};

/// Short enough to run into, long enough to be hit by nobody who is on their way.
const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(60);
/// Every wait that is not over at once goes to sleep: the path with more to go wrong.
const WAIT: Wait = Wait::PASSIVE;

const SHAPE: GroupShape = GroupShape {
    world_size: 2,
    epoch: 3,
    plan_slots: 2,
    plan_slot_bytes: 64,
    output_slots: 1,
    output_slot_bytes: 64,
    message_bytes: 64,
    arena_bytes: 8192,
};

/// A segment whose name is gone already: every test has its own.
fn group(shape: GroupShape) -> Arc<Segment> {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    Arc::new(Segment::create(directory.path(), "ports", shape).unwrap())
}

fn rank(segment: &Arc<Segment>, rank: u32, limit: Duration) -> RankPort {
    RankPort::join(Arc::clone(segment), rank, WAIT, limit).unwrap()
}

fn engine(segment: &Arc<Segment>) -> EnginePort {
    EnginePort::join(Arc::clone(segment), WAIT).unwrap()
}

fn put(text: &[u8]) -> impl FnOnce(&mut [u8]) -> Result<usize, ShmError> {
    move |slot| {
        slot[..text.len()].copy_from_slice(text);
        Ok(text.len())
    }
}

#[test]
fn a_party_joins_once() {
    let segment = group(SHAPE);
    let _ports = (rank(&segment, 1, SHORT), engine(&segment));
    let again = |number| RankPort::join(Arc::clone(&segment), number, WAIT, SHORT).unwrap_err();
    assert!(matches!(
        again(1),
        ShmError::RankTaken {
            party: Party::Rank(1)
        }
    ));
    assert!(matches!(
        again(2),
        ShmError::NoSuchRank {
            rank: 2,
            world_size: 2
        }
    ));
    assert!(matches!(again(u32::MAX), ShmError::NoSuchRank { .. }));
    let second = EnginePort::join(Arc::clone(&segment), WAIT).unwrap_err();
    assert!(matches!(second, ShmError::RankTaken { party: Party::Engine }));
}

#[test]
fn those_who_have_not_joined_are_named() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let segment = Arc::new(Segment::create(directory.path(), "join", SHAPE).unwrap());
    let _one = rank(&segment, 1, SHORT);
    let error = segment.unlink_when_joined(SHORT).unwrap_err();
    let ShmError::NotJoined { ref missing, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(missing, &[Party::Rank(0), Party::Engine]);
    assert_eq!(error.to_string(), "not joined within 30ms: rank 0, the engine");
    assert!(segment.path().exists(), "a late party can still come");
    thread::scope(|scope| {
        scope.spawn(|| segment.unlink_when_joined(LONG).unwrap());
        let _rest = (rank(&segment, 0, SHORT), engine(&segment));
    });
    assert!(!segment.path().exists());
}

#[test]
fn an_abort_ends_the_wait_for_parties_to_join() {
    let segment = group(SHAPE);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| segment.unlink_when_joined(LONG).unwrap_err());
        segment.abort(AbortReason::Shutdown);
        let error = waiting.join().unwrap();
        assert!(
            matches!(
                error,
                ShmError::Aborted {
                    reason: AbortReason::Shutdown
                }
            ),
            "{error}"
        );
    });
    let late = RankPort::join(Arc::clone(&segment), 0, WAIT, SHORT).unwrap_err();
    assert!(matches!(late, ShmError::Aborted { .. }), "{late}");
}

#[test]
fn plans_and_outputs_pass_in_order() {
    let segment = group(SHAPE);
    let (mut engine, mut zero, mut one) =
        (engine(&segment), rank(&segment, 0, LONG), rank(&segment, 1, LONG));
    // More than there are slots, so that every slot is used several times.
    thread::scope(|scope| {
        scope.spawn(move || {
            for step in 0..100u8 {
                assert_eq!(
                    zero.next_plan(<[u8]>::to_vec).unwrap(),
                    vec![step; usize::from(step % 65)]
                );
                zero.publish_output(put(&[step])).unwrap();
            }
        });
        scope.spawn(move || {
            (0..100)
                .for_each(|step: u8| assert_eq!(one.next_plan(<[u8]>::len).unwrap(), usize::from(step % 65)));
        });
        for step in 0..100u8 {
            engine
                .publish_plan(LONG, put(&vec![step; usize::from(step % 65)]))
                .unwrap();
            if step > 0 {
                assert_eq!(engine.wait_output(LONG, <[u8]>::to_vec).unwrap(), [step - 1]);
            }
        }
        assert_eq!(engine.wait_output(LONG, <[u8]>::to_vec).unwrap(), [99]);
    });
}

#[test]
fn a_full_ring_names_the_reader_and_goes_on() {
    let segment = group(SHAPE);
    let (mut engine, mut zero, mut one) =
        (engine(&segment), rank(&segment, 0, LONG), rank(&segment, 1, LONG));
    for _ in 0..2 {
        engine.publish_plan(SHORT, put(b"plan")).unwrap();
        zero.next_plan(|_| ()).unwrap();
    }
    let error = engine.publish_plan(SHORT, put(b"plan")).unwrap_err();
    let expected = (Party::Rank(1), Awaited::PlanRead);
    assert!(
        matches!(error, ShmError::TimedOut { party, awaited, .. } if (party, awaited) == expected),
        "{error}"
    );
    assert_eq!(segment.abort_reason(), None, "the engine's supervisor decides");
    one.next_plan(|_| ()).unwrap();
    engine.publish_plan(SHORT, put(b"last")).unwrap();
    assert_eq!(zero.next_plan(<[u8]>::to_vec).unwrap(), b"last");
}

#[test]
fn a_plan_that_fails_is_not_published() {
    let segment = group(SHAPE);
    let (mut engine, mut zero) = (engine(&segment), rank(&segment, 0, LONG));
    let full = |slot: &mut [u8]| {
        Err(ShmError::TooLong {
            len: 1,
            limit: slot.len() as u64,
        })
    };
    assert!(matches!(
        engine.publish_plan(SHORT, full),
        Err(ShmError::TooLong { limit: 64, .. })
    ));
    let lie = |_: &mut [u8]| Ok::<_, ShmError>(65);
    assert!(matches!(
        engine.publish_plan(SHORT, lie),
        Err(ShmError::TooLong { len: 65, limit: 64 })
    ));
    engine.publish_plan(SHORT, put(b"good")).unwrap();
    assert_eq!(zero.next_plan(<[u8]>::to_vec).unwrap(), b"good");
}

#[test]
fn the_engine_learns_which_rank_is_behind() {
    let segment = group(SHAPE);
    let (mut engine, mut zero, mut one) =
        (engine(&segment), rank(&segment, 0, LONG), rank(&segment, 1, LONG));
    engine.publish_plan(SHORT, put(b"plan")).unwrap();
    zero.next_plan(|_| ()).unwrap();
    one.next_plan(|_| ()).unwrap();
    thread::scope(|scope| {
        // Rank 0 waits in a barrier to which rank 1 does not come.
        let waiting = scope.spawn(move || zero.barrier().unwrap_err());
        while segment.barrier_counts() != [1, 0] {
            std::hint::spin_loop();
        }
        let error = engine.wait_output(SHORT, |_| ()).unwrap_err();
        let expected = (Party::Rank(1), Awaited::Output);
        let fits = matches!(error, ShmError::TimedOut { party, awaited, .. } if (party, awaited) == expected);
        assert!(fits, "{error}");
        segment.abort(AbortReason::TimedOut(Party::Rank(1)));
        segment.abort(AbortReason::Shutdown);
        let error = waiting.join().unwrap();
        let first = AbortReason::TimedOut(Party::Rank(1));
        assert!(
            matches!(error, ShmError::Aborted { reason } if reason == first),
            "{error}"
        );
    });
    let after = engine.publish_plan(SHORT, put(b"plan")).unwrap_err();
    assert!(matches!(after, ShmError::Aborted { .. }), "{after}");
    let after = one.next_plan(|_| ()).unwrap_err();
    assert!(matches!(after, ShmError::Aborted { .. }), "{after}");
}

#[test]
fn only_rank_0_publishes_and_the_engine_must_read() {
    let segment = group(SHAPE);
    let (mut zero, mut one) = (rank(&segment, 0, SHORT), rank(&segment, 1, LONG));
    let error = one.publish_output(put(b"no")).unwrap_err();
    assert!(matches!(error, ShmError::NotRankZero { rank: 1 }));
    zero.publish_output(put(b"first")).unwrap();
    let error = zero.publish_output(put(b"second")).unwrap_err();
    let expected = (Party::Engine, Awaited::OutputRead);
    assert!(
        matches!(error, ShmError::TimedOut { party, awaited, .. } if (party, awaited) == expected),
        "{error}"
    );
    assert_eq!(segment.abort_reason(), Some(AbortReason::TimedOut(Party::Engine)));
}

#[test]
fn nothing_more_is_done_after_a_failed_barrier() {
    let segment = group(SHAPE);
    let mut zero = rank(&segment, 0, SHORT);
    let error = zero.barrier().unwrap_err();
    assert_eq!(error.to_string(), "rank 1 did not reach barrier #1 within 30ms");
    let reason = AbortReason::TimedOut(Party::Rank(1));
    for after in [
        zero.barrier(),
        zero.exchange(b"x").map(drop),
        zero.all_reduce(&mut [1.0]),
    ] {
        assert!(
            matches!(after, Err(ShmError::Aborted { reason: r }) if r == reason),
            "{after:?}"
        );
    }
    assert_eq!((zero.barrier_count(), segment.barrier_counts()), (1, vec![1, 0]));
}

/// Both ranks make one call each, on two threads.
fn both<A: Send, B: Send>(
    segment: &Arc<Segment>,
    first: impl FnOnce(&mut RankPort) -> A + Send,
    second: impl FnOnce(&mut RankPort) -> B + Send,
) -> (A, B) {
    let (mut zero, mut one) = (rank(segment, 0, LONG), rank(segment, 1, LONG));
    thread::scope(|scope| {
        let other = scope.spawn(move || second(&mut one));
        (first(&mut zero), other.join().unwrap())
    })
}

#[test]
fn ranks_in_different_calls_notice() {
    let segment = group(SHAPE);
    let (a, b) = both(
        &segment,
        |p| p.exchange(b"x").map(drop),
        |p| p.all_reduce(&mut [1.0]),
    );
    let expected = [(a, Party::Rank(1)), (b, Party::Rank(0))];
    // One of them sees it first and aborts; the other may learn either way.
    assert!(
        expected
            .iter()
            .any(|(result, _)| matches!(result, Err(ShmError::Corrupt { .. })))
    );
    for (result, peer) in expected {
        match result.unwrap_err() {
            ShmError::Corrupt {
                party,
                problem:
                    Corruption::Field {
                        field: "kind of operation",
                        ..
                    },
            } => {
                assert_eq!(party, peer);
            }
            ShmError::Aborted {
                reason: AbortReason::OutOfStep(_),
            } => {}
            other => panic!("{other}"),
        }
    }
    assert!(matches!(segment.abort_reason(), Some(AbortReason::OutOfStep(_))));
}

#[test]
fn ranks_that_disagree_on_a_length_or_a_root_notice() {
    let segment = group(SHAPE);
    let lengths = both(
        &segment,
        |p| p.all_reduce(&mut [1.0; 4]),
        |p| p.all_reduce(&mut [1.0; 5]),
    );
    assert!(lengths.0.is_err() && lengths.1.is_err());
    let segment = group(SHAPE);
    let roots = both(
        &segment,
        |p| p.broadcast(0, &mut [1u8; 4]),
        |p| p.broadcast(1, &mut [2u8; 4]),
    );
    assert!(roots.0.is_err() && roots.1.is_err());
}

#[test]
fn what_is_wrong_with_a_call_is_said_before_anything_is_sent() {
    let segment = group(SHAPE);
    let mut port = rank(&segment, 0, SHORT);
    assert!(matches!(
        port.exchange(&[0; 65]),
        Err(ShmError::TooLong { len: 65, limit: 64 })
    ));
    let wrong = port.all_gather(&[1u8], &mut [0; 3]);
    assert!(matches!(
        wrong,
        Err(ShmError::WrongLength {
            found: 3,
            expected: 2
        })
    ));
    let wrong = port.gather(1, &[1u8], &mut [0; 2]);
    assert!(
        matches!(
            wrong,
            Err(ShmError::WrongLength {
                found: 2,
                expected: 0
            })
        ),
        "only the root has a result"
    );
    assert!(matches!(
        port.broadcast(2, &mut [0u8]),
        Err(ShmError::NoSuchRank {
            rank: 2,
            world_size: 2
        })
    ));
    assert_eq!((port.barrier_count(), segment.abort_reason()), (0, None));
}

#[test]
fn collectives_take_many_slices_and_none() {
    let segment = group(SHAPE);
    let run = |port: &mut RankPort| {
        let me = port.rank();
        // 100 floats are 400 bytes, seven slices of 64.
        let mut sum: Vec<f32> = (0..100).map(|i| (i * (me + 1)) as f32).collect();
        port.all_reduce(&mut sum).unwrap();
        assert!(sum.iter().enumerate().all(|(i, sum)| *sum == 3.0 * i as f32));
        let mut all = [9u32; 200];
        port.all_gather(&[me; 100], &mut all).unwrap();
        assert!(all[..100].iter().all(|value| *value == 0) && all[100..].iter().all(|value| *value == 1));
        port.all_reduce(&mut []).unwrap();
        port.broadcast::<u8>(1, &mut []).unwrap();
        port.barrier_count()
    };
    assert_eq!(both(&segment, run, run), (7 + 7 + 1 + 1, 16));
}

#[test]
fn the_arena_is_shared_and_outlives_its_port() {
    let segment = group(SHAPE);
    let arena = rank(&segment, 0, SHORT).arena();
    drop(segment);
    assert_eq!((arena.len(), arena.as_ptr().addr().get() % 4096), (8192, 0));
    // SAFETY: nobody else has the segment any more; it is zero at first.
    let bytes = unsafe { std::slice::from_raw_parts_mut(arena.as_ptr().as_ptr(), arena.len()) };
    assert!(bytes.iter().all(|byte| *byte == 0));
    bytes.fill(1);
}

#[test]
fn ports_move_between_threads() {
    fn is_send<T: Send>() {}
    fn is_shared<T: Send + Sync>() {}
    is_send::<EnginePort>();
    is_send::<RankPort>();
    is_shared::<Segment>();
    is_shared::<phalanx_shm::Arena>();
    is_shared::<phalanx_shm::MappedFile>();
}

#[test]
fn only_the_creator_removes_the_name() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let segment = Segment::create(directory.path(), "name", SHAPE).unwrap();
    let path = segment.path().to_owned();
    let opened = Segment::open(&path).unwrap();
    assert_eq!(opened.shape(), &SHAPE);
    assert!(matches!(
        opened.unlink_when_joined(SHORT),
        Err(ShmError::NotOurs { .. })
    ));
    drop(opened);
    assert!(path.exists());
    drop(segment);
    assert!(!path.exists());
}

#[test]
fn everybody_sees_how_far_every_rank_is() {
    let segment = group(GroupShape {
        arena_bytes: Progress::bytes(2),
        ..SHAPE
    });
    let progress = |number| Progress::new(rank(&segment, number, SHORT).arena(), 2).unwrap();
    let (mine, other) = (progress(0), progress(1));
    assert_eq!(mine.counts(), [0, 0]);
    mine.set(0, 3);
    other.set(1, u64::MAX);
    other.set(2, 9);
    assert_eq!(mine.counts(), [3, u64::MAX]);
    assert_eq!(other.counts(), mine.counts());
    other.beat(1);
    other.beat(1);
    other.beat(2);
    assert_eq!(mine.beats(), [0, 2]);

    assert_eq!(mine.testimony(0), None);
    other.testify(1, 0, "does not move");
    other.testify(1, 0, "is said once");
    other.testify(2, 1, "there is no such witness");
    assert_eq!(mine.testimony(0).as_deref(), Some("does not move"));
    assert_eq!(mine.testimony(1), None);
    mine.testify(0, 1, &"x".repeat(1000));
    assert!((100..1000).contains(&other.testimony(1).unwrap().len()));

    let small = group(SHAPE);
    let arena = rank(&small, 0, SHORT).arena();
    assert!(Progress::new(arena.clone(), 16).is_some());
    assert!(Progress::new(arena, 17).is_none());
}
