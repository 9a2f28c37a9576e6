//! The bound of the fair policy, measured from outside: what tenants hear is what they were served.

use std::collections::BTreeMap;

use phalanx_proto::step::SequenceId;

use super::{Faults, Prng, SimExecutor, VOCAB_SIZE, scenario::SimClock};
use crate::engine::{
    Command, EngineConfig, EngineCore, EngineRequest, Event, FinishReason, SamplingParams, SchedulingPolicy,
    StopRules, TenantId,
};

const TENANTS: u64 = 3;
const REQUESTS: u64 = 30;
const LONGEST_PROMPT: u32 = 40;

/// Requests of tenants that differ in all they can, the first tenant's before the second's.
fn requests(prng: &mut Prng) -> Vec<EngineRequest> {
    let all = (0..TENANTS).flat_map(|tenant| (0..REQUESTS).map(move |index| (tenant, index)));
    all.map(|(tenant, index)| {
        let longest = [LONGEST_PROMPT, 8, 20][tenant as usize];
        let prompt = (0..prng.range(1, longest)).map(|_| prng.below(VOCAB_SIZE.into()) as u32);
        EngineRequest {
            id: SequenceId(tenant * REQUESTS + index),
            prompt: prompt.collect(),
            output: Vec::new(),
            sampling: SamplingParams::GREEDY,
            stop: StopRules {
                max_tokens: prng.range(1, [4, 30, 12][tenant as usize]),
                min_tokens: 0,
                stop_token_ids: Vec::new(),
                repetition: None,
            },
            constraint: Box::default(),
            priority: 0,
            cache_salt: None,
            tenant: TenantId(tenant),
        }
    })
    .collect()
}

/// The most that two tenants that both still wait were ever apart, as a multiple of the bound.
fn worst_gap(seed: u64, policy: SchedulingPolicy) -> f64 {
    let mut prng = Prng(seed);
    let mut config = EngineConfig::new(prng.range(20, 40), 128, VOCAB_SIZE);
    config.block_size = 4;
    config.max_num_seqs = prng.range(2, 6);
    config.max_num_batched_tokens = prng.range(8, 64);
    config.policy = policy;
    // Theorem 4.4 of the paper, with its costs of 1 and 2.
    let held = 2 * config.num_blocks * config.block_size;
    let bound = f64::from(2 * held.max(LONGEST_PROMPT));
    let requests = requests(&mut prng);
    let executor = SimExecutor::new(&config, Faults::default());
    let mut core = EngineCore::new(config, executor, SimClock::default()).expect("valid");
    let mut inbox: Vec<Command> = requests.iter().cloned().map(Command::Submit).collect();
    let mut waiting: BTreeMap<u64, u64> = (0..TENANTS).map(|tenant| (tenant, REQUESTS)).collect();
    let mut served = [0_i64; TENANTS as usize];
    let mut worst = 0.0_f64;
    while !(core.is_idle() && inbox.is_empty()) {
        let mut events = Vec::new();
        core.step(inbox.drain(..), &mut events);
        for event in events {
            match event {
                Event::Started {
                    sequence,
                    cached_tokens,
                } => {
                    let request = &requests[sequence.0 as usize];
                    *waiting.get_mut(&request.tenant.0).expect("a tenant") -= 1;
                    served[request.tenant.0 as usize] +=
                        request.prompt.len() as i64 - i64::from(cached_tokens);
                }
                Event::Token(sampled) => served[(sampled.sequence.0 / REQUESTS) as usize] += 2,
                Event::Finished { reason, .. } => assert_eq!(reason, FinishReason::Length),
                Event::Preempted { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let backlogged = waiting.iter().filter(|&(_, &count)| count > 0);
        let services: Vec<i64> = backlogged.map(|(&tenant, _)| served[tenant as usize]).collect();
        if let (Some(most), Some(least)) = (services.iter().max(), services.iter().min()) {
            worst = worst.max((most - least) as f64 / bound);
        }
    }
    worst
}

#[test]
fn backlogged_tenants_are_served_alike_within_the_bound() {
    for seed in 0..200 {
        let gap = worst_gap(seed, SchedulingPolicy::Fair);
        assert!(gap <= 1.0, "seed {seed}: {gap} times the bound");
    }
}

#[test]
fn in_order_of_arrival_they_are_not() {
    let unfair = (0..200).filter(|&seed| worst_gap(seed, SchedulingPolicy::Fcfs) > 1.0);
    assert!(unfair.count() > 100, "or the bound says nothing");
}
