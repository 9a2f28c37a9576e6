//! A seeded story: configuration, arrivals, aborts and faults, played against the engine and compared with the oracle.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use phalanx_proto::step::{ScoredToken, SequenceId};

use super::{
    End, Faults, Prng, SimExecutor, VOCAB_SIZE, grammar, indexer::Indexer, listed_oracle, mix, oracle,
    prompt_oracle, salt,
};
use crate::engine::{
    Clock, Command, EngineConfig, EngineCore, EngineRequest, Event, FinishReason, Instant, NgramSpeculation,
    PrefixHashAlgo, Progress, RepetitionDetection, SamplingParams, SchedulingPolicy, Snapshot, StopRules,
    TenantId,
};

/// Time passes with every look at it.
#[derive(Default)]
pub(super) struct SimClock(Cell<u64>);

impl Clock for SimClock {
    fn now(&self) -> Instant {
        self.0.set(self.0.get() + 1);
        Instant(Duration::from_millis(self.0.get()))
    }
}

pub(super) struct Scenario {
    pub(super) config: EngineConfig,
    pub(super) faults: Faults,
    /// Commands by the turn they arrive in.
    pub(super) commands: BTreeMap<u64, Vec<Command>>,
    pub(super) requests: BTreeMap<SequenceId, EngineRequest>,
}

/// What a scenario came to, for sums over many seeds and for comparing two runs of one seed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) trace: u64,
    pub(super) snapshot: Snapshot,
    pub(super) num_faults: u32,
    pub(super) num_tokens: u64,
    /// Prompt tokens that were scored.
    pub(super) num_scored: u64,
    pub(super) ends: BTreeMap<&'static str, u64>,
}

/// What the owner of a sequence has heard so far.
#[derive(Default)]
struct Heard {
    started: bool,
    scored: Vec<ScoredToken>,
    tokens: Vec<u32>,
    /// Beside each of them, those that the request lists.
    listed: Vec<Vec<(u32, f32)>>,
    end: Option<Event>,
}

impl Scenario {
    pub(super) fn from_seed(seed: u64, with_faults: bool) -> Self {
        let mut prng = Prng(seed);
        let config = config(&mut prng);
        let shared: Vec<u32> = (0..48).map(|_| prng.below(VOCAB_SIZE.into()) as u32).collect();
        let (mut commands, mut requests) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::new());
        let mut turn = 0;
        for index in 0..4 + prng.below(14) {
            turn += prng.below(4);
            let request = request(SequenceId(index), &shared, &config, &mut prng);
            let arrivals = commands.entry(turn).or_default();
            arrivals.push(Command::Submit(request.clone()));
            if prng.one_in(5) {
                let abort = turn + prng.below(20);
                let aborts = commands.entry(abort).or_default();
                aborts.push(Command::Finish(request.id, FinishReason::Abort));
            }
            requests.insert(request.id, request);
        }
        super::pauses::add(&mut commands, turn, &mut prng);
        let faults = Faults {
            one_in: if with_faults { 5 + prng.below(20) } else { 0 },
            most: 30,
            seed: prng.next(),
            ..Faults::default()
        };
        Self {
            config,
            faults,
            commands,
            requests,
        }
    }

    /// Plays the story to its end and checks everything that must hold whatever happens.
    pub(super) fn play(&self) -> Report {
        let executor = SimExecutor::new(&self.config, self.faults);
        let observed = executor.observed();
        let mut core = EngineCore::new(self.config.clone(), executor, SimClock::default()).expect("valid");
        let mut heard: BTreeMap<SequenceId, Heard> = BTreeMap::new();
        let (mut commands, mut trace, mut turn) = (self.commands.clone(), 0, 0);
        let mut decoding = BTreeSet::new();
        let mut indexer = Indexer::new(&self.config);
        while !commands.is_empty() || !core.is_idle() {
            let inbox = commands.remove(&turn).unwrap_or_default();
            for command in &inbox {
                if let Command::Submit(request) = command {
                    heard.insert(request.id, Heard::default());
                }
            }
            let mut events = Vec::new();
            // A pause keeps it waiting.
            let oldest = oldest_live(&heard, &inbox).filter(|_| !core.snapshot().paused);
            let progress = core.step(inbox, &mut events);
            indexer.follow(core.take_kv_events());
            assert_eq!(indexer.blocks(), core.cached_blocks(), "what an indexer knows");
            let said = format!("{progress:?} {events:?}");
            trace = said.bytes().fold(trace, |hash, byte| mix(hash, byte.into()));
            follow_decodes(&mut decoding, &events);
            for event in events {
                hear(&mut heard, event);
            }
            if let Progress::Recovered { .. } = progress {
                decoding.clear();
            }
            if let Progress::Stepped(_) = progress {
                let planned = &observed.lock().unwrap().last_plan;
                // One that drew its first token in this very step was part of it as well.
                assert!(
                    decoding.iter().all(|id| planned.contains(id)),
                    "every decode is part of every step"
                );
            }
            if let (SchedulingPolicy::Fcfs, Progress::Stepped(_), Some(oldest)) =
                (self.config.policy, &progress, oldest)
            {
                let planned = &observed.lock().unwrap().last_plan;
                assert!(
                    planned.contains(&oldest),
                    "the oldest sequence is part of every step"
                );
            }
            assert!(!matches!(progress, Progress::Fatal(_)), "{progress:?}");
            assert!(turn < 20_000, "livelock");
            turn += 1;
        }
        let snapshot = core.snapshot();
        assert_eq!(
            snapshot.num_free_blocks, snapshot.num_blocks,
            "every block came back"
        );
        let observed = observed.lock().unwrap();
        Report {
            trace: mix(trace, observed.trace),
            snapshot,
            num_faults: observed.num_faults,
            num_tokens: heard.values().map(|heard| heard.tokens.len() as u64).sum(),
            num_scored: heard.values().map(|heard| heard.scored.len() as u64).sum(),
            ends: self.compare(&heard),
        }
    }

    /// Every sequence against the oracle; how often each end was met.
    fn compare(&self, heard: &BTreeMap<SequenceId, Heard>) -> BTreeMap<&'static str, u64> {
        let mut ends = BTreeMap::new();
        for (id, request) in &self.requests {
            let heard = &heard[id];
            let end = heard.end.as_ref().expect("every sequence has an end");
            let listed = listed_oracle(request, &heard.tokens);
            assert_eq!(heard.listed, listed, "{id:?} with exactly what it lists");
            let name = match end {
                Event::Rejected { .. } => {
                    assert!(request.check(&self.config).is_err() && heard.tokens.is_empty());
                    "rejected"
                }
                Event::Failed { .. } => {
                    let (tokens, expected) = oracle(request);
                    assert_eq!((&heard.tokens, End::Failed), (&tokens, expected), "{id:?}");
                    "failed"
                }
                Event::Finished { reason, .. } => {
                    let (tokens, expected) = oracle(request);
                    let scored = prompt_oracle(request);
                    if matches!(reason, FinishReason::Abort | FinishReason::NotFinite) {
                        assert!(scored.starts_with(&heard.scored), "{id:?} before its end");
                    } else {
                        assert_eq!(heard.scored, scored, "{id:?}");
                    }
                    if *reason == FinishReason::Abort {
                        assert!(tokens.starts_with(&heard.tokens), "{id:?} before its abort");
                        "abort"
                    } else {
                        let end = End::Finished(*reason);
                        assert_eq!((&heard.tokens, end), (&tokens, expected), "{id:?}");
                        match reason {
                            FinishReason::Stop => "stop",
                            FinishReason::Length => "length",
                            FinishReason::Repetition => "repetition",
                            _ => "not finite",
                        }
                    }
                }
                other => panic!("{id:?} ended with {other:?}"),
            };
            *ends.entry(name).or_default() += 1;
        }
        ends
    }
}

/// Keeps the sequences that have drawn a token and need one step for the next.
fn follow_decodes(decoding: &mut BTreeSet<SequenceId>, events: &[Event]) {
    for event in events {
        match event {
            Event::Token(sampled) => {
                decoding.insert(sampled.sequence);
            }
            Event::Preempted { sequence }
            | Event::Finished { sequence, .. }
            | Event::Failed { sequence, .. } => {
                decoding.remove(sequence);
            }
            _ => {}
        }
    }
}

/// Under first come, first served: the one that must be part of the next step.
fn oldest_live(heard: &BTreeMap<SequenceId, Heard>, inbox: &[Command]) -> Option<SequenceId> {
    // Commands of this very turn may end sequences before the step is planned.
    let quiet = inbox.is_empty();
    let mut live = heard.iter().filter(|(_, heard)| heard.end.is_none());
    live.next().map(|(id, _)| *id).filter(|_| quiet)
}

fn hear(all: &mut BTreeMap<SequenceId, Heard>, event: Event) {
    let id = match &event {
        Event::Paused | Event::Resumed | Event::PrefixCacheReset => return,
        Event::Token(sampled) => sampled.sequence,
        Event::Started { sequence, .. }
        | Event::PromptLogprobs { sequence, .. }
        | Event::Preempted { sequence }
        | Event::Finished { sequence, .. }
        | Event::Failed { sequence, .. }
        | Event::Rejected { sequence, .. }
        | Event::Lost { sequence, .. } => *sequence,
    };
    let heard = all.get_mut(&id).expect("an event of a submitted sequence");
    assert!(heard.end.is_none(), "{event:?} after {:?}", heard.end);
    match event {
        Event::Started { .. } => assert!(!std::mem::replace(&mut heard.started, true), "started twice"),
        Event::PromptLogprobs { tokens, .. } => {
            assert!(heard.started && heard.tokens.is_empty());
            heard.scored.extend(tokens);
        }
        Event::Token(sampled) => {
            assert!(heard.started && sampled.finite);
            heard.tokens.push(sampled.token);
            heard.listed.push(sampled.top_logprobs);
        }
        Event::Preempted { .. } => assert!(heard.started),
        end => heard.end = Some(end),
    }
}

fn config(prng: &mut Prng) -> EngineConfig {
    let mut config = EngineConfig::new(prng.range(5, 40), 64, VOCAB_SIZE);
    config.block_size = [1, 2, 4, 8][prng.below(4) as usize];
    if config.block_size == 1 {
        config.num_blocks += 24;
    }
    config.max_num_seqs = prng.range(1, 8);
    config.max_num_batched_tokens = config.max_num_seqs + prng.range(0, 24);
    config.long_prefill_token_threshold = [0, 0, 1, 3, 8][prng.below(5) as usize];
    config.watermark = [0.0, 0.01, 0.1, 0.3][prng.below(4) as usize];
    config.reserve_full_isl = !prng.one_in(3);
    if !prng.one_in(4) {
        let prompt_lookup_min = prng.range(1, 3);
        config.speculative = Some(NgramSpeculation {
            num_speculative_tokens: prng.range(1, 6),
            prompt_lookup_min,
            prompt_lookup_max: prompt_lookup_min + prng.range(0, 2),
        });
    }
    config.enable_prefix_caching = !prng.one_in(4);
    config.kv_events = true;
    config.prefix_hash_algo = [PrefixHashAlgo::Builtin, PrefixHashAlgo::Sha256Cbor][prng.below(2) as usize];
    let policies = [
        SchedulingPolicy::Fcfs,
        SchedulingPolicy::Priority,
        SchedulingPolicy::Fair,
    ];
    config.policy = policies[prng.below(3) as usize];
    config.max_edits_per_row = [10, 64][prng.below(2) as usize];
    config.max_step_failures = u32::MAX - 1;
    config.epoch = prng.range(0, 3);
    config.prefix_cache_seed = [prng.next() as u8; 32];
    config
}

/// Of sizes that the simulated model goes round in, as long as it has not seen itself too often.
fn repetition(prng: &mut Prng) -> Option<RepetitionDetection> {
    if !prng.one_in(3) {
        return None;
    }
    let min_pattern_size = prng.range(1, 3);
    Some(RepetitionDetection {
        min_pattern_size,
        max_pattern_size: min_pattern_size + prng.range(0, 4),
        min_count: prng.range(2, 3),
    })
}

fn request(id: SequenceId, shared: &[u32], config: &EngineConfig, prng: &mut Prng) -> EngineRequest {
    let mut prompt = Vec::new();
    if !prng.one_in(3) {
        prompt.extend(&shared[..prng.below(shared.len() as u64 / 2) as usize]);
    }
    let own = prng.range(u32::from(prompt.is_empty()), 20);
    prompt.extend((0..own).map(|_| prng.below(VOCAB_SIZE.into()) as u32));
    let mut tokens = |most: u64| -> Vec<u32> {
        let count = prng.below(most + 1);
        (0..count).map(|_| prng.below(VOCAB_SIZE.into()) as u32).collect()
    };
    // Together within the smallest max_edits_per_row.
    let (stop_token_ids, biased) = (tokens(6), tokens(3));
    let max_tokens = prng.range(1, 16);
    let mut sampling = SamplingParams::GREEDY;
    sampling.seed = prng.next();
    sampling.temperature = prng.below(3) as f32;
    sampling.logit_bias = biased.into_iter().map(|id| (id, f32::NEG_INFINITY)).collect();
    if prng.one_in(3) {
        sampling.repetition_penalty = 1.25;
    }
    if prng.one_in(3) {
        sampling.frequency_penalty = 0.5;
    }
    if prng.one_in(3) {
        sampling.prompt_logprobs = Some(prng.range(0, 3));
    }
    if prng.one_in(3) {
        sampling.logprobs = Some(prng.range(0, 3));
        let count = prng.below(5);
        let ids = (0..count).map(|_| prng.below(VOCAB_SIZE.into()) as u32);
        sampling.logprob_token_ids = ids.collect();
    }
    // Now and then one that no configuration of this size can run.
    let oversized = if prng.one_in(40) { config.max_model_len } else { 0 };
    let mut request = EngineRequest {
        id,
        prompt,
        output: vec![],
        sampling,
        stop: StopRules {
            max_tokens: max_tokens + oversized,
            min_tokens: prng.range(0, max_tokens),
            stop_token_ids,
            repetition: repetition(prng),
        },
        constraint: Box::new(grammar::constraint(prng)),
        priority: prng.range(0, 3) as i32,
        cache_salt: salt(id).map(str::to_owned),
        tenant: TenantId(prng.below(3)),
    };
    // Now and then one that another engine has begun.
    if oversized == 0 && prng.one_in(4) {
        let (mut tokens, _) = oracle(&request);
        tokens.truncate(prng.below(tokens.len().max(1) as u64) as usize);
        request.output = tokens;
    }
    request
}
