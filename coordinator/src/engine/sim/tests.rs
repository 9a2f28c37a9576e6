use std::{collections::BTreeMap, time::Duration};

use phalanx_proto::step::{ScoredToken, SequenceId};

use super::{
    End, Faults, SimExecutor, VOCAB_SIZE, oracle, prompt_oracle,
    scenario::{Scenario, SimClock},
};
use crate::engine::{
    Command, EngineConfig, EngineCore, EngineFailure, EngineRequest, Event, ExecutorError, FinishReason,
    NgramSpeculation, Progress, SamplingParams, SpeculationStats, StopRules, TenantId,
};

/// Plays many seeds and makes sure that the stories held what they are meant to test.
fn play_seeds(first: u64, count: u64, with_faults: bool) {
    let (mut ends, mut preemptions, mut hits, mut faults, mut scored) =
        (BTreeMap::<_, u64>::new(), 0, 0, 0, 0);
    let (mut guessed, mut accepted) = (0, 0);
    for seed in first..first + count {
        let report = std::panic::catch_unwind(|| Scenario::from_seed(seed, with_faults).play())
            .unwrap_or_else(|_| panic!("seed {seed}, faults {with_faults}"));
        preemptions += report.snapshot.num_preemptions;
        hits += report.snapshot.prefix_cache_hits;
        guessed += report.snapshot.speculation.num_draft_tokens;
        accepted += report.snapshot.speculation.num_accepted_tokens;
        faults += u64::from(report.num_faults);
        scored += report.num_scored;
        report
            .ends
            .into_iter()
            .for_each(|(end, n)| *ends.entry(end).or_default() += n);
    }
    for end in [
        "stop",
        "length",
        "repetition",
        "abort",
        "not finite",
        "rejected",
        "failed",
    ] {
        assert!(ends[end] > count / 20, "{end} is not covered: {ends:?}");
    }
    assert!(
        preemptions > count && hits > count,
        "{preemptions} preemptions, {hits} hits"
    );
    assert!(scored > 10 * count, "{scored} prompt tokens scored");
    assert_eq!(faults > count, with_faults, "{faults} faults");
    assert!(
        accepted > count && guessed - accepted > count,
        "{accepted} of {guessed} guesses were right"
    );
}

#[test]
fn tokens_equal_the_oracle_whatever_else_is_in_the_batch() {
    play_seeds(0, 2000, false);
}

#[test]
fn lost_ranks_never_change_a_token() {
    play_seeds(1_000_000, 2000, true);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..100 {
        let play = || Scenario::from_seed(seed, true).play();
        assert_eq!(play(), play(), "seed {seed}");
    }
}

pub(super) fn request(id: u64, prompt: Vec<u32>, max_tokens: u32) -> EngineRequest {
    EngineRequest {
        id: SequenceId(id),
        prompt,
        output: vec![],
        sampling: SamplingParams::GREEDY,
        stop: StopRules {
            max_tokens,
            min_tokens: 0,
            stop_token_ids: vec![],
            repetition: None,
        },
        constraint: Box::default(),
        priority: 0,
        cache_salt: super::salt(SequenceId(id)).map(str::to_owned),
        tenant: TenantId::default(),
    }
}

pub(super) fn core(config: &EngineConfig, faults: Faults) -> EngineCore<SimExecutor, SimClock> {
    EngineCore::new(
        config.clone(),
        SimExecutor::new(config, faults),
        SimClock::default(),
    )
    .expect("valid")
}

/// Steps until nothing is left to do.
fn finish(core: &mut EngineCore<SimExecutor, SimClock>, inbox: Vec<Command>) -> Vec<Event> {
    let mut events = Vec::new();
    core.step(inbox, &mut events);
    while !core.is_idle() {
        core.step([], &mut events);
    }
    events
}

#[test]
fn decodes_go_on_while_a_long_prompt_is_chunked() {
    let mut config = EngineConfig::new(64, 512, VOCAB_SIZE);
    config.max_num_seqs = 4;
    config.max_num_batched_tokens = 32;
    config.long_prefill_token_threshold = 8;
    let mut core = core(&config, Faults::default());
    let mut events = Vec::new();
    core.step([Command::Submit(request(0, vec![1, 2, 3], 40))], &mut events);
    let long = request(3, (0..64).collect(), 1);
    let mut inbox = vec![Command::Submit(long)];
    for turn in 0..8 {
        events.clear();
        let Progress::Stepped(stats) = core.step(inbox.drain(..), &mut events) else {
            panic!("both sequences run");
        };
        assert_eq!(stats.num_tokens, 1 + 8, "one decode and one chunk");
        let tokens = events.iter().filter_map(|event| match event {
            Event::Token(sampled) => Some(sampled.sequence.0),
            _ => None,
        });
        let expected: &[u64] = if turn == 7 { &[0, 3] } else { &[0] };
        assert!(tokens.eq(expected.iter().copied()));
    }
}

#[test]
fn an_abort_frees_the_blocks_in_the_same_turn() {
    let config = EngineConfig::new(8, 64, VOCAB_SIZE);
    let mut core = core(&config, Faults::default());
    let mut events = Vec::new();
    core.step([Command::Submit(request(1, vec![7; 40], 20))], &mut events);
    assert_eq!(core.snapshot().num_free_blocks, 5);
    events.clear();
    let abort = Command::Finish(SequenceId(1), FinishReason::Abort);
    assert_eq!(core.step([abort.clone(), abort], &mut events), Progress::Idle);
    assert_eq!(core.snapshot().num_free_blocks, 8);
    let aborted = Event::Finished {
        sequence: SequenceId(1),
        reason: FinishReason::Abort,
    };
    assert_eq!(events, [aborted], "exactly once");
}

#[test]
fn the_second_of_two_equal_prompts_computes_only_its_end() {
    let config = EngineConfig::new(32, 128, VOCAB_SIZE);
    let mut core = core(&config, Faults::default());
    let prompt: Vec<u32> = (0..50).collect();
    finish(&mut core, vec![Command::Submit(request(0, prompt.clone(), 1))]);
    let mut events = Vec::new();
    let progress = core.step([Command::Submit(request(3, prompt, 1))], &mut events);
    assert!(matches!(progress, Progress::Stepped(stats) if stats.num_tokens == 2));
    assert_eq!(
        events[0],
        Event::Started {
            sequence: SequenceId(3),
            cached_tokens: 48
        }
    );
    assert_eq!(
        (
            core.snapshot().prefix_cache_queries,
            core.snapshot().prefix_cache_hits
        ),
        (100, 48)
    );
}

#[test]
fn kv_behind_logits_that_are_no_numbers_is_not_shared() {
    let config = EngineConfig::new(32, 128, VOCAB_SIZE);
    let with_first_token = |token| {
        let mut request = request(0, vec![5; 50], 4);
        request.prompt[0] = token;
        request.sampling.seed = 7;
        request
    };
    let broken = (0..VOCAB_SIZE)
        .map(with_first_token)
        .find(|request| oracle(request) == (vec![], End::Finished(FinishReason::NotFinite)))
        .expect("one prompt in sixteen");
    let mut again = request(3, broken.prompt.clone(), 4);
    again.sampling.seed = 1;
    let mut core = core(&config, Faults::default());
    finish(&mut core, vec![Command::Submit(broken)]);
    finish(&mut core, vec![Command::Submit(again)]);
    assert_eq!(core.snapshot().prefix_cache_hits, 0);
}

#[test]
fn a_sequence_that_keeps_killing_ranks_is_given_up_and_the_others_finish() {
    let config = EngineConfig::new(32, 128, VOCAB_SIZE);
    let faults = Faults {
        poison: Some(SequenceId(2)),
        ..Faults::default()
    };
    let mut core = core(&config, faults);
    let requests: Vec<_> = (0..5).map(|id| request(id, vec![5; 9], 6)).collect();
    let events = finish(&mut core, requests.iter().cloned().map(Command::Submit).collect());
    assert!(events.contains(&Event::Lost {
        sequence: SequenceId(2),
        failed_steps: 3
    }));
    for request in requests.iter().filter(|request| request.id != SequenceId(2)) {
        let tokens = events.iter().filter_map(|event| match event {
            Event::Token(sampled) if sampled.sequence == request.id => Some(sampled.token),
            _ => None,
        });
        assert!(tokens.eq(oracle(request).0), "{:?} was only near it", request.id);
    }
}

#[test]
fn a_group_that_cannot_be_rebuilt_is_fatal() {
    let config = EngineConfig::new(32, 128, VOCAB_SIZE);
    let faults = Faults {
        poison: Some(SequenceId(0)),
        max_rebuilds: Some(1),
        ..Faults::default()
    };
    let mut core = core(&config, faults);
    let mut events = Vec::new();
    let first = core.step([Command::Submit(request(0, vec![1], 1))], &mut events);
    assert!(matches!(first, Progress::Recovered { epoch: 1, took, .. } if took > Duration::ZERO));
    let second = core.step([], &mut events);
    assert!(matches!(
        second,
        Progress::Fatal(EngineFailure::NotRebuilt { .. })
    ));
}

#[test]
fn a_rank_lost_between_steps_is_replaced_once() {
    let config = EngineConfig::new(32, 128, VOCAB_SIZE);
    let mut core = core(&config, Faults::default());
    let mut events = Vec::new();
    let request = request(0, vec![1, 2, 3], 5);
    core.step([Command::Submit(request.clone())], &mut events);
    let lost = || ExecutorError::RankLost {
        rank: 0,
        cause: "stream ended".into(),
    };
    let progress = core.rank_lost(0, lost(), &mut events);
    assert!(matches!(progress, Progress::Recovered { epoch: 1, .. }));
    assert_eq!(
        core.rank_lost(0, lost(), &mut events),
        Progress::Idle,
        "that group is gone already"
    );
    events.extend(finish(&mut core, vec![]));
    let tokens = events.iter().filter(|event| matches!(event, Event::Token(_)));
    assert_eq!(tokens.count(), oracle(&request).0.len());
}

fn scores(events: &[Event], id: u64) -> Vec<ScoredToken> {
    let mut all = Vec::new();
    for event in events {
        if let Event::PromptLogprobs { sequence, tokens } = event
            && sequence.0 == id
        {
            all.extend_from_slice(tokens);
        }
    }
    all
}

#[test]
fn a_prompt_to_be_scored_is_computed_although_it_is_cached() {
    let config = EngineConfig::new(32, 128, VOCAB_SIZE);
    let mut core = core(&config, Faults::default());
    let prompt: Vec<u32> = (0..50).collect();
    finish(&mut core, vec![Command::Submit(request(0, prompt.clone(), 1))]);
    let mut scored = request(3, prompt, 1);
    scored.sampling.prompt_logprobs = Some(2);
    let events = finish(&mut core, vec![Command::Submit(scored.clone())]);
    assert!(matches!(events[0], Event::Started { cached_tokens: 0, .. }));
    assert_eq!(scores(&events, 3), prompt_oracle(&scored));
}

#[test]
fn scores_that_are_no_numbers_end_the_request() {
    let config = EngineConfig::new(32, 128, VOCAB_SIZE);
    let with_first_token = |token| {
        let mut request = request(0, vec![5; 50], 4);
        request.prompt[0] = token;
        request.sampling.prompt_logprobs = Some(3);
        request
    };
    let broken = (0..VOCAB_SIZE)
        .map(with_first_token)
        .find(|request| oracle(request) == (vec![], End::Finished(FinishReason::NotFinite)))
        .expect("one score in 64");
    let mut core = core(&config, Faults::default());
    let events = finish(&mut core, vec![Command::Submit(broken)]);
    let finished = Event::Finished {
        sequence: SequenceId(0),
        reason: FinishReason::NotFinite,
    };
    assert_eq!(events[1..], [finished]);
}

/// Two histories that do not fit one plan take turns; both sequences end as if they were alone.
#[test]
fn penalties_look_at_every_token_however_long_the_history() {
    let mut config = EngineConfig::new(1024, 8192, 8192);
    config.max_num_seqs = 2;
    config.max_num_batched_tokens = 8192;
    assert_eq!(config.step_limits().max_history(), 8192);
    let mut core = core(&config, Faults::default());
    let requests: Vec<EngineRequest> = (0..2)
        .map(|id| {
            let mut request = request(id, (0..5000).map(|at| (at * 7 + id as u32) % 8192).collect(), 3);
            request.sampling.repetition_penalty = 1.5;
            request
        })
        .collect();
    let events = finish(&mut core, requests.iter().cloned().map(Command::Submit).collect());
    for request in &requests {
        let tokens = events.iter().filter_map(|event| match event {
            Event::Token(sampled) if sampled.sequence == request.id => Some(sampled.token),
            _ => None,
        });
        assert!(tokens.eq(oracle(request).0), "{:?}", request.id);
    }
    assert!(core.snapshot().num_steps >= 6, "a step has room for one of them");
}

#[test]
fn a_repetitive_sequence_takes_fewer_steps_and_gives_the_same_tokens() {
    let mut config = EngineConfig::new(64, 512, VOCAB_SIZE);
    config.max_num_seqs = 2;
    let mut repetitive = request(0, vec![1, 2, 3, 1, 2, 3, 1], 60);
    // Goes round in circles of three.
    repetitive.sampling.seed = 2 * 16;
    let mut steps = |speculative| {
        config.speculative = speculative;
        let mut core = core(&config, Faults::default());
        let events = finish(&mut core, vec![Command::Submit(repetitive.clone())]);
        let tokens = events.iter().filter_map(|event| match event {
            Event::Token(sampled) => Some(sampled.token),
            _ => None,
        });
        assert!(tokens.eq(oracle(&repetitive).0));
        (core.snapshot().num_steps, core.snapshot().speculation)
    };
    let (alone, none) = steps(None);
    assert_eq!((alone, none), (60, SpeculationStats::default()));
    let (guessing, stats) = steps(Some(NgramSpeculation {
        num_speculative_tokens: 4,
        prompt_lookup_min: 2,
        prompt_lookup_max: 4,
    }));
    assert!(guessing < 45, "{guessing} steps");
    assert_eq!(
        guessing + stats.num_accepted_tokens,
        60,
        "each token is one or the other"
    );
    assert_eq!(
        stats.num_accepted_per_position.iter().sum::<u64>(),
        stats.num_accepted_tokens
    );
}

#[test]
fn guesses_take_no_block_that_is_not_free() {
    // Exactly the blocks that one sequence needs: a guess that took more would preempt it.
    let mut config = EngineConfig::new(5, 80, VOCAB_SIZE);
    config.max_num_seqs = 1;
    config.speculative = Some(NgramSpeculation {
        num_speculative_tokens: 16,
        prompt_lookup_min: 1,
        prompt_lookup_max: 1,
    });
    let mut core = core(&config, Faults::default());
    let mut full = request(0, vec![9; 20], 60);
    full.sampling.seed = 0;
    let events = finish(&mut core, vec![Command::Submit(full.clone())]);
    let tokens = events.iter().filter(|event| matches!(event, Event::Token(_)));
    assert_eq!(tokens.count(), oracle(&full).0.len());
    let snapshot = core.snapshot();
    assert_eq!(snapshot.num_preemptions, 0);
    assert!(snapshot.speculation.num_accepted_tokens > 20);
}
