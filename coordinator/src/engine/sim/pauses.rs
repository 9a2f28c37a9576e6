//! Pauses and resets of the prefix cache: at random in every scenario, and one by one.

use std::collections::BTreeMap;

use phalanx_proto::step::SequenceId;

use super::{Faults, Prng, VOCAB_SIZE, oracle, tests::core, tests::request};
use crate::engine::{Command, EngineConfig, EngineRequest, Event, FinishReason, PauseMode, Progress};

const MODES: [PauseMode; 3] = [PauseMode::Abort, PauseMode::Wait, PauseMode::Keep];

/// Adds a few pauses, each of which ends, and resets to a story whose last arrival is at `turn`.
pub(super) fn add(commands: &mut BTreeMap<u64, Vec<Command>>, turn: u64, prng: &mut Prng) {
    let mut insert = |turn: u64, command| commands.entry(turn).or_default().push(command);
    if prng.one_in(3) {
        let begin = prng.below(turn + 1);
        // An abort ends everything, so that a story with one tests little else.
        let mode = MODES[if prng.one_in(6) {
            0
        } else {
            1 + prng.below(2) as usize
        }];
        let clear_cache = prng.one_in(2);
        insert(begin, Command::Pause { mode, clear_cache });
        insert(begin + prng.below(12), Command::Resume);
    }
    if prng.one_in(3) {
        let reset_running = prng.one_in(2);
        insert(prng.below(turn + 20), Command::ResetPrefixCache { reset_running });
    }
}

fn config() -> EngineConfig {
    EngineConfig::new(32, 128, VOCAB_SIZE)
}

fn pause(mode: PauseMode) -> Command {
    Command::Pause {
        mode,
        clear_cache: true,
    }
}

fn tokens_of(events: &[Event], request: &EngineRequest) -> Vec<u32> {
    let tokens = events.iter().filter_map(|event| match event {
        Event::Token(sampled) if sampled.sequence == request.id => Some(sampled.token),
        _ => None,
    });
    tokens.collect()
}

fn ended(id: u64) -> Event {
    Event::Finished {
        sequence: SequenceId(id),
        reason: FinishReason::Length,
    }
}

#[test]
fn a_wait_lets_what_has_started_end_and_holds_the_rest() {
    let mut core = core(&config(), Faults::default());
    let (first, second) = (request(0, vec![1; 20], 3), request(3, vec![1; 20], 1));
    let mut events = Vec::new();
    core.step([Command::Submit(first.clone())], &mut events);
    let held = [pause(PauseMode::Wait), Command::Submit(second.clone())];
    core.step(held, &mut events);
    assert!(core.has_work() && !events.contains(&Event::Paused));
    while core.has_work() {
        core.step([], &mut events);
    }
    assert!(events.ends_with(&[ended(0), Event::Paused]), "{events:?}");
    assert_eq!(tokens_of(&events, &first), oracle(&first).0);
    assert!(core.snapshot().paused && core.snapshot().num_waiting == 1);
    assert_eq!(core.step([], &mut events), Progress::Idle, "the second one waits");

    events.clear();
    core.step([Command::Resume], &mut events);
    let started = Event::Started {
        sequence: SequenceId(3),
        cached_tokens: 0,
    };
    assert_eq!(events[..2], [Event::Resumed, started], "the cache was cleared");
    assert_eq!(tokens_of(&events, &second), oracle(&second).0);
    assert!(core.is_idle() && !core.snapshot().paused);
}

#[test]
fn kept_sequences_stand_still_and_go_on_with_the_same_tokens() {
    let mut core = core(&config(), Faults::default());
    let kept = request(0, vec![2; 9], 5);
    let mut events = Vec::new();
    core.step([Command::Submit(kept.clone())], &mut events);
    let free = core.snapshot().num_free_blocks;
    let progress = core.step([pause(PauseMode::Keep)], &mut events);
    assert_eq!((progress, events.last()), (Progress::Idle, Some(&Event::Paused)));
    assert!(!core.has_work() && !core.is_idle());
    assert_eq!(core.snapshot().num_free_blocks, free, "they keep their blocks");
    core.step([Command::Resume], &mut events);
    while core.has_work() {
        core.step([], &mut events);
    }
    assert_eq!(tokens_of(&events, &kept), oracle(&kept).0);
}

#[test]
fn an_abort_ends_everything_at_once() {
    let mut core = core(&config(), Faults::default());
    let requests = (0..3).map(|id| Command::Submit(request(id, vec![3; 9], 5)));
    let mut events = Vec::new();
    core.step(requests, &mut events);
    events.clear();
    assert_eq!(core.step([pause(PauseMode::Abort)], &mut events), Progress::Idle);
    let aborted = |id| Event::Finished {
        sequence: SequenceId(id),
        reason: FinishReason::Abort,
    };
    assert_eq!(events, [aborted(0), aborted(1), aborted(2), Event::Paused]);
    assert_eq!(core.snapshot().num_free_blocks, core.snapshot().num_blocks);
}

#[test]
fn a_reset_makes_running_sequences_start_over_if_asked() {
    for reset_running in [false, true] {
        let mut core = core(&config(), Faults::default());
        let running = request(0, (0..50).collect(), 3);
        let mut events = Vec::new();
        core.step([Command::Submit(running.clone())], &mut events);
        let reset = Command::ResetPrefixCache { reset_running };
        let Progress::Stepped(stats) = core.step([reset], &mut events) else {
            panic!("it goes on");
        };
        assert_eq!(stats.num_tokens, if reset_running { 51 } else { 1 });
        core.step([], &mut events);
        assert_eq!(tokens_of(&events, &running), oracle(&running).0);
        events.clear();
        core.step([Command::Submit(request(3, (0..50).collect(), 1))], &mut events);
        let cached_tokens = if reset_running { 48 } else { 0 };
        let started = Event::Started {
            sequence: SequenceId(3),
            cached_tokens,
        };
        assert_eq!(events[0], started, "reset_running {reset_running}");
    }
}
