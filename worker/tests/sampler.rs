//! The sampler against a plain f64 reference that sees whole rows of logits.

mod support;

use std::{collections::BTreeMap, ops::Range};

use phalanx_kernels::{Noise, cpu::CpuBackend};
use phalanx_model::TensorParallelStyle;
use phalanx_proto::step::{Penalties, RowSampling, SampledToken, SequenceId, TokenSet};
use phalanx_worker::sampler::{SamplingRow, Vocabulary, sample};
use proptest::prelude::*;
use support::{Ranks, logits_buffer};

const VOCAB: usize = 1300;

/// `(id, raw logit, scaled logit)` of the tokens that may be drawn, best first.
fn reference(logits: &[f32], sampling: &RowSampling) -> Vec<(u32, f64, f32)> {
    let history: BTreeMap<u32, u32> = sampling
        .penalties
        .iter()
        .flat_map(|p| p.history.iter().copied())
        .collect();
    let mut all: Vec<(u32, f64, f32)> = (0..logits.len() as u32)
        .map(|id| {
            let raw = logits[id as usize];
            let mut value = raw;
            if let (Some(p), Some(&count)) = (&sampling.penalties, history.get(&id)) {
                value = if value > 0.0 {
                    value / p.repetition
                } else {
                    value * p.repetition
                };
                if count > 0 {
                    value -= p.presence + p.frequency * count as f32;
                }
            }
            value += sampling
                .bias
                .iter()
                .filter(|(b, _)| *b == id)
                .map(|(_, add)| add)
                .sum::<f32>();
            let temperature = if sampling.temperature == 0.0 {
                1.0
            } else {
                sampling.temperature
            };
            (id, raw.into(), value / temperature)
        })
        .collect();
    all.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)));
    if sampling.temperature == 0.0 {
        all.truncate(1);
        return all;
    }
    let best = f64::from(all[0].2);
    let weight = |entry: &(u32, f64, f32)| (f64::from(entry.2) - best).exp();
    all.retain(|entry| weight(entry) >= f64::from(sampling.min_p));
    if sampling.top_k > 0 {
        all.truncate(sampling.top_k as usize);
    }
    let total: f64 = all.iter().map(weight).sum();
    let mut before = 0.0;
    all.retain(|entry| {
        // At least one token stays.
        let keep = before == 0.0 || before < f64::from(sampling.top_p) * total;
        before += weight(entry);
        keep
    });
    all
}

/// The draw: largest scaled logit + noise among `kept`.
fn reference_draw(kept: &[(u32, f64, f32)], noise: Noise) -> u32 {
    let perturbed = |entry: &(u32, f64, f32)| entry.2 + noise.gumbel(entry.0);
    kept.iter()
        .max_by(|a, b| perturbed(a).total_cmp(&perturbed(b)).then(b.0.cmp(&a.0)))
        .map(|entry| entry.0)
        .unwrap()
}

fn log_softmax(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    f64::from(logits[id as usize] - max) - sum.ln()
}

/// Logits that look like a model's: a few likely tokens above a wide floor.
fn model_like(seed: u32) -> Vec<f32> {
    (0..VOCAB as u32)
        .map(|id| {
            let hash =
                (id.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)).wrapping_mul(2_246_822_519);
            let unit = (hash >> 8) as f32 / (1 << 24) as f32;
            -2.0 * unit.max(1e-6).ln() - 4.0
        })
        .collect()
}

fn sampled(temperature: f32) -> RowSampling {
    RowSampling {
        temperature,
        seed: 7,
        ..RowSampling::GREEDY
    }
}

/// What `ranks` ranks draw from `rows`, row `i` at position `positions[i]`.
fn draw(
    world_size: usize,
    logits: &[f32],
    samplings: &[RowSampling],
    positions: &[u64],
) -> Vec<SampledToken> {
    let masks = vec![None; samplings.len()];
    draw_masked(world_size, logits, samplings, (positions, &masks))
}

/// The same under masks.
fn draw_masked(
    world_size: usize,
    logits: &[f32],
    samplings: &[RowSampling],
    (positions, masks): (&[u64], &[Option<TokenSet>]),
) -> Vec<SampledToken> {
    let ranks = Ranks::new(world_size, TensorParallelStyle::Gather);
    let vocab = split(logits.len(), world_size);
    let mut results = ranks.run(|rank, mut comm| {
        let backend = CpuBackend::new(1).unwrap();
        let own: Vec<Vec<f32>> = vec![logits[vocab[rank].clone()].to_vec(); samplings.len()];
        let buffer = logits_buffer(&backend, &own);
        let rows: Vec<SamplingRow<'_>> = samplings
            .iter()
            .zip(positions.iter().zip(masks))
            .map(|(sampling, (&position, mask))| SamplingRow {
                sequence: SequenceId(position),
                position,
                sampling,
                allowed: mask.as_ref(),
            })
            .collect();
        let vocabulary = Vocabulary { ranks: &vocab, rank };
        sample(&backend, &mut comm, &buffer, vocabulary, &rows).unwrap()
    });
    let first = results.swap_remove(0);
    assert!(results.iter().all(|other| *other == first), "ranks disagree");
    first
}

/// Whole chunks for each rank but the last.
fn split(vocab: usize, world_size: usize) -> Vec<Range<usize>> {
    let chunk = phalanx_kernels::VOCAB_CHUNK;
    let chunks = vocab.div_ceil(chunk);
    let start = |rank: usize| (rank * chunks / world_size * chunk).min(vocab);
    (0..world_size)
        .map(|rank| start(rank)..start(rank + 1).min(vocab))
        .collect()
}

#[test]
fn filters_and_draws_are_the_references() {
    let logits = model_like(1);
    let cases = [
        sampled(1.0),
        sampled(0.3),
        RowSampling {
            top_k: 5,
            ..sampled(1.0)
        },
        RowSampling {
            top_p: 0.9,
            ..sampled(1.0)
        },
        RowSampling {
            top_p: 0.9999,
            ..sampled(2.0)
        },
        RowSampling {
            min_p: 0.05,
            ..sampled(1.0)
        },
        RowSampling {
            min_p: 0.0001,
            top_p: 0.95,
            ..sampled(1.5)
        },
        RowSampling {
            top_k: 40,
            top_p: 0.8,
            min_p: 0.02,
            ..sampled(0.8)
        },
        RowSampling {
            top_k: 800,
            top_p: 0.99,
            ..sampled(3.0)
        },
        RowSampling {
            top_p: 0.0,
            ..sampled(1.0)
        },
        RowSampling::GREEDY,
    ];
    for position in 0..20 {
        let got = draw(1, &logits, &cases, &vec![position; cases.len()]);
        for (case, token) in cases.iter().zip(&got) {
            let kept = reference(&logits, case);
            let want = reference_draw(
                &kept,
                Noise {
                    seed: case.seed,
                    position,
                },
            );
            assert_eq!(token.token, want, "{case:?} at {position} keeps {}", kept.len());
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = model_like(2);
    let cases = [
        sampled(1.0),
        RowSampling {
            top_k: 8,
            ..sampled(1.0)
        },
        RowSampling {
            top_p: 0.5,
            ..sampled(0.7)
        },
    ];
    const DRAWS: u64 = 4000;
    for case in cases {
        let kept = reference(&logits, &case);
        let best = f64::from(kept[0].2);
        let total: f64 = kept.iter().map(|entry| (f64::from(entry.2) - best).exp()).sum();
        let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
        let positions: Vec<u64> = (0..DRAWS).collect();
        for token in draw(1, &logits, &vec![case.clone(); DRAWS as usize], &positions) {
            *counts.entry(token.token).or_default() += 1;
        }
        // Pearson's chi-square; tokens expected less than 5 times are one cell.
        let (mut chi2, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
        for entry in &kept {
            let expected = DRAWS as f64 * (f64::from(entry.2) - best).exp() / total;
            let observed = counts.remove(&entry.0).unwrap_or(0) as f64;
            if expected < 5.0 {
                rare = (rare.0 + expected, rare.1 + observed);
            } else {
                chi2 += (observed - expected).powi(2) / expected;
                cells += 1;
            }
        }
        if rare.0 > 0.0 {
            chi2 += (rare.1 - rare.0).powi(2) / rare.0;
        }
        assert!(counts.is_empty(), "drew tokens that {case:?} excludes");
        let freedom = f64::from(cells);
        assert!(
            chi2 < freedom + 4.0 * (2.0 * freedom).sqrt() + 8.0,
            "{case:?}: chi2 {chi2:.1} of {cells} cells"
        );
    }
}

#[test]
fn a_flat_distribution_makes_the_candidate_set_grow() {
    let logits = vec![0.5; VOCAB];
    let case = RowSampling {
        top_p: 0.995,
        ..sampled(1.0)
    };
    let kept = reference(&logits, &case);
    assert!(kept.len() > 1200);
    for position in 0..8 {
        let got = draw(3, &logits, std::slice::from_ref(&case), &[position]);
        assert_eq!(got[0].token, reference_draw(&kept, Noise { seed: 7, position }));
    }
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let logits = model_like(3);
    let case = RowSampling {
        logprobs: Some(5),
        bias: vec![(17, 30.0)],
        top_k: 3,
        ..sampled(0.5)
    };
    let token = draw(2, &logits, &[case], &[4]).swap_remove(0);
    assert_eq!(token.token, 17, "a bias of 30 decides");
    let close = |got: f32, id| (f64::from(got) - log_softmax(&logits, id)).abs() < 1e-4;
    assert!(close(token.logprob.unwrap(), 17));
    let plain = reference(&logits, &sampled(1.0));
    let best: Vec<u32> = plain[..5].iter().map(|entry| entry.0).collect();
    assert_eq!(
        token.top_logprobs.iter().map(|entry| entry.0).collect::<Vec<_>>(),
        best
    );
    assert!(token.top_logprobs.iter().all(|&(id, got)| close(got, id)));
}

/// Whatever the row draws from: bans, penalties and temperature are none of their business.
#[test]
fn listed_tokens_are_reported_in_their_order_in_place_of_the_best() {
    let logits = model_like(8);
    let worst = (0..VOCAB as u32)
        .min_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]))
        .unwrap();
    // Of the ends of the vocabulary, of one rank and of several, and one of them twice.
    for listed in [
        vec![1299, 0, worst, 700, 0],
        vec![3],
        (0..128).map(|at| at * 10).collect(),
    ] {
        let case = RowSampling {
            logprobs: Some(5),
            logprob_token_ids: listed.clone(),
            bias: vec![(17, 30.0), (0, f32::NEG_INFINITY)],
            top_k: 3,
            ..sampled(0.5)
        };
        let plain = RowSampling {
            logprob_token_ids: Vec::new(),
            ..case.clone()
        };
        for world_size in 1..=3 {
            let tokens = draw(world_size, &logits, &[plain.clone(), case.clone()], &[4, 4]);
            let [plain, token] = &tokens[..] else {
                panic!("two rows")
            };
            assert_eq!(token.token, 17);
            assert_eq!((token.logprob, token.rank), (plain.logprob, plain.rank));
            assert_eq!(plain.top_logprobs.len(), 5);
            assert!(
                token
                    .top_logprobs
                    .iter()
                    .map(|entry| entry.0)
                    .eq(listed.iter().copied())
            );
            for &(id, got) in &token.top_logprobs {
                let want = log_softmax(&logits, id);
                assert!((f64::from(got) - want).abs() < 1e-4, "{id}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn what_cannot_be_drawn_is_not_finite() {
    let strategies = [
        RowSampling::GREEDY,
        sampled(1.0),
        RowSampling {
            top_p: 0.5,
            logprobs: Some(0),
            logprob_token_ids: vec![5, 700],
            ..sampled(1.0)
        },
    ];
    for broken in [f32::NAN, f32::INFINITY] {
        let mut logits = model_like(4);
        logits[700] = broken;
        let got = draw(2, &logits, &strategies, &[0, 0, 0]);
        assert!(got.iter().all(|token| !token.finite), "{broken}: {got:?}");
    }
    let banned: Vec<RowSampling> = strategies
        .into_iter()
        .map(|sampling| RowSampling {
            bias: (0..VOCAB as u32).map(|id| (id, f32::NEG_INFINITY)).collect(),
            ..sampling
        })
        .collect();
    let got = draw(1, &model_like(4), &banned, &[0, 0, 0]);
    assert!(got.iter().all(|token| !token.finite), "{got:?}");
}

#[test]
fn a_ban_holds_whatever_the_strategy() {
    let logits = model_like(5);
    let best = reference(&logits, &RowSampling::GREEDY)[0].0;
    let ban = |sampling: RowSampling| RowSampling {
        bias: vec![(best, f32::NEG_INFINITY)],
        ..sampling
    };
    let cases = [
        ban(RowSampling::GREEDY),
        ban(sampled(0.2)),
        ban(RowSampling {
            top_k: 2,
            ..sampled(0.2)
        }),
    ];
    for position in 0..20 {
        let got = draw(1, &logits, &cases, &[position; 3]);
        assert!(got.iter().all(|token| token.finite && token.token != best));
    }
}

#[test]
fn a_step_without_rows_is_still_a_meeting() {
    assert_eq!(draw(2, &model_like(6), &[], &[]), []);
}

fn any_sampling() -> impl Strategy<Value = RowSampling> {
    let penalties = (
        0.5f32..2.0,
        -1.0f32..1.0,
        -1.0f32..1.0,
        prop::collection::btree_map(0..VOCAB as u32, 0..4u32, 0..30),
    );
    let penalties = penalties.prop_map(|(repetition, presence, frequency, history)| Penalties {
        repetition,
        presence,
        frequency,
        history: history.into_iter().collect(),
    });
    let bias = prop::collection::vec((0..VOCAB as u32, -3.0f32..3.0), 0..4);
    let listed = prop::collection::vec(0..VOCAB as u32, 0..=20);
    let off = |some: BoxedStrategy<f32>, none: f32| prop_oneof![some, Just(none)];
    (
        prop_oneof![Just(0.0f32), 0.1f32..3.0],
        off((0.05f32..1.0).boxed(), 1.0),
        prop_oneof![Just(0u32), 1..2000u32],
        off((0.001f32..0.5).boxed(), 0.0),
        any::<u64>(),
        prop::option::of((0..=5u32, listed)),
        prop::option::of(penalties),
        bias,
    )
        .prop_map(
            |(temperature, top_p, top_k, min_p, seed, logprobs, penalties, bias)| RowSampling {
                temperature,
                top_p,
                top_k,
                min_p,
                seed,
                logprobs: logprobs.as_ref().map(|(top, _)| *top),
                logprob_token_ids: logprobs.map(|(_, ids)| ids).unwrap_or_default(),
                penalties,
                bias,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// At any number of ranks, and to the bit.
    #[test]
    fn a_mask_is_a_ban_of_all_other_tokens(
        samplings in prop::collection::vec(any_sampling(), 1..4),
        allowed in prop::collection::btree_set(0..VOCAB as u32, 0..60),
        ranks in 1..=3usize,
    ) {
        let logits = model_like(9);
        let positions: Vec<u64> = (0..samplings.len() as u64).collect();
        let mut set = TokenSet::empty(VOCAB as u32);
        allowed.iter().for_each(|&id| set.insert(id));
        let masks = vec![Some(set); samplings.len()];
        let masked = draw_masked(ranks, &logits, &samplings, (&positions, &masks));
        let banned: Vec<RowSampling> = samplings.iter().cloned().map(|mut sampling| {
            let others = (0..VOCAB as u32).filter(|id| !allowed.contains(id));
            sampling.bias.extend(others.map(|id| (id, f32::NEG_INFINITY)));
            sampling
        }).collect();
        prop_assert_eq!(&masked, &draw(ranks, &logits, &banned, &positions));
        prop_assert!(masked.iter().all(|token| token.finite != allowed.is_empty()));
        prop_assert!(masked.iter().all(|token| !token.finite || allowed.contains(&token.token)));
    }

    /// To the bit what the best tokens' list says of them, and the draw is another's.
    #[test]
    fn a_list_changes_nothing_but_what_is_reported(
        samplings in prop::collection::vec(any_sampling(), 1..6),
        seed in 0..1000u32,
        ranks in 1..=3usize,
    ) {
        let logits = model_like(seed);
        let positions: Vec<u64> = (0..samplings.len() as u64).collect();
        let listing = draw(ranks, &logits, &samplings, &positions);
        let all: Vec<RowSampling> = samplings.iter().cloned().map(|sampling| RowSampling {
            logprobs: sampling.logprobs.map(|_| VOCAB as u32),
            logprob_token_ids: Vec::new(),
            ..sampling
        }).collect();
        let whole = draw(1, &logits, &all, &positions);
        for (sampling, (token, whole)) in samplings.iter().zip(listing.iter().zip(&whole)) {
            let drawn = |token: &SampledToken| (token.token, token.logprob, token.rank, token.finite);
            prop_assert_eq!(drawn(token), drawn(whole));
            let known: BTreeMap<u32, f32> = whole.top_logprobs.iter().copied().collect();
            let want: Vec<(u32, f32)> = sampling.logprob_token_ids.iter().map(|id| (*id, known[id])).collect();
            if want.is_empty() {
                let most = sampling.logprobs.unwrap_or(0) as usize;
                prop_assert_eq!(&token.top_logprobs[..], &whole.top_logprobs[..most]);
            } else {
                prop_assert_eq!(&token.top_logprobs, &want);
            }
        }
    }

    /// One rank, two or three: the same bits.
    #[test]
    fn the_number_of_ranks_changes_nothing(samplings in prop::collection::vec(any_sampling(), 1..6), seed in 0..1000u32) {
        let logits = model_like(seed);
        let positions: Vec<u64> = (0..samplings.len() as u64).collect();
        let alone = draw(1, &logits, &samplings, &positions);
        prop_assert_eq!(&draw(2, &logits, &samplings, &positions), &alone);
        prop_assert_eq!(&draw(3, &logits, &samplings, &positions), &alone);
        for (sampling, token) in samplings.iter().zip(&alone) {
            prop_assert!(reference(&logits, sampling).iter().any(|entry| entry.0 == token.token));
        }
    }
}
