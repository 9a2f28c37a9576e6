//! The protocol under every interleaving of up to three parties, with a bounded number of preemptions.
//!
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target-loom cargo test -p phalanx-shm --lib`
//!
//! A lost wake-up shows as a deadlock, a missing happens-before edge as a concurrent access to an `UnsafeCell`. A party
//! that dies is a thread that stops; the kernel's futex is a model; time is an alarm that another thread rings.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread::{self, JoinHandle};

use crate::deadline::{Alarm, Deadline};
use crate::gate::{Gate, Stop};
use crate::protocol::{self, Barrier, Missing, RingReader, RingWriter};
use crate::sync::{AtomicU32, Ordering};

/// The reason that a supervisor or a survivor gives.
const LOST: u32 = 7;

/// `GATES` gates and `CELLS` payloads, as a segment has them.
struct Shared<const GATES: usize, const CELLS: usize> {
    gates: [Gate; GATES],
    cells: [UnsafeCell<u32>; CELLS],
    reason: AtomicU32,
}

// SAFETY: loom's cells panic on concurrent access; that there is none is what these tests check.
unsafe impl<const GATES: usize, const CELLS: usize> Sync for Shared<GATES, CELLS> {}

impl<const GATES: usize, const CELLS: usize> Shared<GATES, CELLS> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            gates: std::array::from_fn(|_| Gate::default()),
            cells: std::array::from_fn(|_| UnsafeCell::new(0)),
            reason: AtomicU32::new(0),
        })
    }

    fn put(&self, cell: usize, value: u32) {
        // SAFETY: loom panics if anybody else accesses the cell now.
        self.cells[cell].with_mut(|at| unsafe { *at = value });
    }

    fn get(&self, cell: usize) -> u32 {
        // SAFETY: loom panics if anybody writes the cell now.
        self.cells[cell].with(|at| unsafe { *at })
    }

    fn abort(&self) {
        protocol::abort(&self.reason, &self.gates, LOST);
    }

    /// Whoever learns of an abort from a gate sees its reason, without a fence of its own.
    fn check_aborted(&self, stop: Stop) {
        assert_eq!(stop, Stop::Aborted);
        assert_eq!(self.reason.load(Ordering::Relaxed), LOST);
    }

    /// The kernel's timeouts: the alarm rings, and whoever sleeps looks at it.
    fn ring(&self, alarm: &Alarm) {
        alarm.ring();
        self.gates.iter().for_each(Gate::disturb);
    }
}

fn model(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(run);
}

fn spawn<const G: usize, const C: usize>(
    shared: &Arc<Shared<G, C>>,
    run: impl FnOnce(&Shared<G, C>) + 'static,
) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    thread::spawn(move || run(&shared))
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn pass(barrier: &mut Barrier, gates: &[Gate], deadline: &mut Deadline) -> Result<(), Stop> {
    barrier
        .wait(gates, 0, deadline)
        .map(drop)
        .map_err(|missing| missing.stop)
}

/// Gathers in `buffers` alternating buffers of two cells, one barrier per operation.
fn gather<const C: usize>(shared: &Shared<2, C>, me: usize, (buffers, rounds): (u32, u32)) {
    let mut barrier = Barrier::new(me);
    for round in 0..rounds {
        let buffer = (round % buffers) as usize * 2;
        shared.put(buffer + me, 10 * round + me as u32);
        pass(&mut barrier, &shared.gates, &mut Deadline::never()).unwrap();
        assert_eq!(
            (shared.get(buffer), shared.get(buffer + 1)),
            (10 * round, 10 * round + 1)
        );
    }
}

#[test]
fn two_buffers_in_turn_need_one_barrier_each() {
    model(3, || {
        let shared = Shared::<2, 4>::new();
        let peer = spawn(&shared, |shared| gather(shared, 1, (2, 3)));
        gather(&shared, 0, (2, 3));
        join([peer]);
    });
}

/// The check of the check: what the protocol forbids must be caught.
#[test]
#[should_panic]
fn one_buffer_is_not_enough() {
    model(3, || {
        let shared = Shared::<2, 2>::new();
        let peer = spawn(&shared, |shared| gather(shared, 1, (1, 2)));
        gather(&shared, 0, (1, 2));
        join([peer]);
    });
}

#[test]
fn barrier_of_three_publishes_everything() {
    model(2, || {
        let shared = Shared::<3, 3>::new();
        let run = |me: usize| {
            move |shared: &Shared<3, 3>| {
                shared.put(me, 7);
                pass(&mut Barrier::new(me), &shared.gates, &mut Deadline::never()).unwrap();
                assert!((0..3).all(|cell| shared.get(cell) == 7));
            }
        };
        let peers = [spawn(&shared, run(1)), spawn(&shared, run(2))];
        run(0)(&shared);
        join(peers);
    });
}

/// Gate 0 is the head, the others are cursors; every cell is a slot.
fn write<const G: usize, const C: usize>(shared: &Shared<G, C>, messages: u32) {
    let mut ring = RingWriter::new(C as u32);
    for message in 0..messages {
        let slot = ring.claim(&shared.gates[1..], 0, &mut Deadline::never()).unwrap();
        shared.put(slot, 100 + message);
        ring.commit(&shared.gates[0]).unwrap();
    }
}

fn read<const G: usize, const C: usize>(shared: &Shared<G, C>, cursor: usize, messages: u32) {
    let mut ring = RingReader::new(C as u32);
    for message in 0..messages {
        let slot = ring.peek(&shared.gates[0], 0, &mut Deadline::never()).unwrap();
        assert_eq!(shared.get(slot), 100 + message);
        ring.done(&shared.gates[cursor]).unwrap();
    }
}

#[test]
fn a_ring_is_bounded_and_loses_nothing() {
    model(3, || {
        let shared = Shared::<2, 2>::new();
        let reader = spawn(&shared, |shared| read(shared, 1, 4));
        write(&shared, 4);
        join([reader]);
    });
}

#[test]
fn a_ring_waits_for_every_reader() {
    model(1, || {
        let shared = Shared::<3, 1>::new();
        let readers = [1, 2].map(|cursor| spawn(&shared, move |shared| read(shared, cursor, 2)));
        write(&shared, 2);
        join(readers);
    });
}

/// Plan out, output back, as engine and rank 0 do: two rings, each one's writer being the other one's reader.
#[test]
fn a_step_goes_there_and_back() {
    model(2, || {
        // Gates: plan head, plan cursor, output head, output cursor. Cells: plan, output.
        let shared = Shared::<4, 2>::new();
        let rank = spawn(&shared, |shared| {
            let (mut plans, mut outputs) = (RingReader::new(1), RingWriter::new(1));
            for _ in 0..2 {
                plans.peek(&shared.gates[0], 0, &mut Deadline::never()).unwrap();
                let plan = shared.get(0);
                plans.done(&shared.gates[1]).unwrap();
                outputs
                    .claim(&shared.gates[3..], 0, &mut Deadline::never())
                    .unwrap();
                shared.put(1, plan + 1);
                outputs.commit(&shared.gates[2]).unwrap();
            }
        });
        let (mut plans, mut outputs) = (RingWriter::new(1), RingReader::new(1));
        for step in 0..2 {
            plans
                .claim(&shared.gates[1..2], 0, &mut Deadline::never())
                .unwrap();
            shared.put(0, 10 * step);
            plans.commit(&shared.gates[0]).unwrap();
            outputs.peek(&shared.gates[2], 0, &mut Deadline::never()).unwrap();
            assert_eq!(shared.get(1), 10 * step + 1);
            outputs.done(&shared.gates[3]).unwrap();
        }
        join([rank]);
    });
}

/// Asleep, on its way to sleep or not yet there: nobody misses an abort.
#[test]
fn an_abort_at_any_point_releases_everybody() {
    model(3, || {
        let shared = Shared::<3, 1>::new(); // The third party never comes.
        let run = |me: usize| {
            move |shared: &Shared<3, 1>| {
                let stop = pass(&mut Barrier::new(me), &shared.gates, &mut Deadline::never()).unwrap_err();
                shared.check_aborted(stop);
            }
        };
        let others = [spawn(&shared, run(1)), spawn(&shared, Shared::abort)];
        run(0)(&shared);
        join(others);
    });
}

/// Where a party is killed on its way through its first barrier.
#[derive(Clone, Copy, PartialEq)]
enum Death {
    BeforeArriving,
    /// It has arrived, and wakes nobody.
    BeforeWaking,
    AfterArriving,
}

impl Death {
    const ALL: [Self; 3] = [Self::BeforeArriving, Self::BeforeWaking, Self::AfterArriving];

    fn act(self, gate: &Gate) {
        // Nobody aborts before the party is dead.
        match self {
            Self::BeforeArriving => {}
            Self::BeforeWaking => drop(gate.count_up().unwrap()),
            Self::AfterArriving => gate.advance().unwrap(),
        }
    }
}

/// Barriers until one fails: at the latest the second, at which the dead party cannot be.
fn pass_until_stopped<const C: usize>(shared: &Shared<3, C>, me: usize, deadline: &mut Deadline) -> Stop {
    let mut barrier = Barrier::new(me);
    let first = pass(&mut barrier, &shared.gates, deadline);
    first
        .and_then(|()| pass(&mut barrier, &shared.gates, deadline))
        .unwrap_err()
}

#[test]
fn a_supervisor_releases_the_survivors_of_a_barrier() {
    for death in Death::ALL {
        model(2, move || {
            let shared = Shared::<3, 1>::new();
            let run = |me| {
                move |shared: &Shared<3, 1>| {
                    let stop = pass_until_stopped(shared, me, &mut Deadline::never());
                    shared.check_aborted(stop);
                }
            };
            // The supervisor acts at any time after the death, so it may go on in the same thread.
            let dying = spawn(&shared, move |shared| {
                death.act(&shared.gates[2]);
                shared.abort();
            });
            let peer = spawn(&shared, run(1));
            run(0)(&shared);
            join([dying, peer]);
        });
    }
}

#[test]
fn a_survivor_with_a_deadline_releases_the_others() {
    for death in Death::ALL {
        model(1, move || {
            let shared = Shared::<3, 1>::new();
            let alarm = Arc::new(Alarm::default());
            let clock = Arc::clone(&alarm);
            let dying = spawn(&shared, move |shared| {
                death.act(&shared.gates[2]);
                shared.ring(&clock);
            });
            let peer = spawn(&shared, |shared| {
                let stop = pass_until_stopped(shared, 1, &mut Deadline::never());
                shared.check_aborted(stop);
            });
            let stop = pass_until_stopped(&shared, 0, &mut Deadline::on(alarm));
            assert_eq!(stop, Stop::TimedOut);
            shared.abort();
            join([dying, peer]);
        });
    }
}

/// The engine dies before, within or after publishing its only plan; two ranks wait for a second one.
#[test]
fn the_readers_of_a_dead_writer_are_released() {
    for death in Death::ALL {
        model(1, move || {
            let shared = Shared::<3, 2>::new();
            let dying = spawn(&shared, move |shared| {
                let slot = RingWriter::new(2)
                    .claim(&shared.gates[1..], 0, &mut Deadline::never())
                    .unwrap();
                shared.put(slot, 100);
                death.act(&shared.gates[0]);
                shared.abort();
            });
            let run = |cursor: usize| {
                move |shared: &Shared<3, 2>| {
                    let mut ring = RingReader::new(2);
                    let stop = (0..2)
                        .try_for_each(|_| {
                            let slot = ring.peek(&shared.gates[0], 0, &mut Deadline::never())?;
                            assert_eq!((slot, shared.get(slot)), (0, 100), "only a whole plan is seen");
                            ring.done(&shared.gates[cursor])
                        })
                        .unwrap_err();
                    shared.check_aborted(stop);
                }
            };
            let peer = spawn(&shared, run(2));
            run(1)(&shared);
            join([dying, peer]);
        });
    }
}

/// A reader dies before or after giving back the ring's only slot: the writer's deadline names it.
#[test]
fn the_writer_of_a_dead_reader_times_out() {
    for death in Death::ALL {
        model(2, move || {
            let shared = Shared::<2, 1>::new();
            let alarm = Arc::new(Alarm::default());
            let clock = Arc::clone(&alarm);
            let dying = spawn(&shared, move |shared| {
                let slot = RingReader::new(1)
                    .peek(&shared.gates[0], 0, &mut Deadline::never())
                    .unwrap();
                assert_eq!(shared.get(slot), 100);
                death.act(&shared.gates[1]);
                shared.ring(&clock);
            });
            let mut ring = RingWriter::new(1);
            let mut deadline = Deadline::on(alarm);
            let mut published = 0;
            let missing = loop {
                match ring.claim(&shared.gates[1..], 0, &mut deadline) {
                    Ok(slot) => shared.put(slot, 100 + published),
                    Err(missing) => break missing,
                }
                ring.commit(&shared.gates[0]).unwrap();
                published += 1;
            };
            assert_eq!(
                missing,
                Missing {
                    gate: 0,
                    stop: Stop::TimedOut
                }
            );
            // The alarm may ring in the moment in which the slot comes back.
            let most = if death == Death::BeforeArriving { 1 } else { 2 };
            assert!(
                (1..=most).contains(&published),
                "one plan, and another if the slot came back"
            );
            join([dying]);
        });
    }
}
