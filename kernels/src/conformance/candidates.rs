//! Sampling candidates: the result must be that of looking at every token.

use std::ops::Range;

use super::random::Random;
use super::{THREADS, Tolerances, filled};
use crate::candidates::rank;
use crate::philox::philox4x32;
use crate::{
    Backend, Candidate, CandidateRequest, Candidates, ChunkStatistics, LogitEdit, Noise, VOCAB_CHUNK,
};

/// Not whole chunks.
const VOCAB: usize = 9 * VOCAB_CHUNK + 77;

fn request(edits: &[LogitEdit]) -> CandidateRequest<'_> {
    CandidateRequest {
        row: 0,
        vocab: 0..VOCAB,
        edits,
        allowed: None,
        inverse_temperature: 1.0 / 0.7,
        noise: None,
        top: 20,
        raw_top: 5,
        scaled_statistics: true,
        raw_statistics: true,
    }
}

/// Logits with ties, of which some are wide apart and some close, and some edits of them.
fn logits(random: &mut Random, width: usize) -> Vec<f32> {
    let spread = [0.01, 1.0, 4.0, 30.0][random.below(4)];
    (0..width)
        .map(|_| (random.normal() * spread * 64.0).round() / 64.0)
        .collect()
}

fn edits(random: &mut Random) -> Vec<LogitEdit> {
    let mut ids: Vec<u32> = (0..60).map(|_| random.below(VOCAB + 100) as u32).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into_iter()
        .map(|id| LogitEdit {
            id,
            repetition: [1.0, 1.3][random.below(2)],
            add: [0.0, -0.5, 2.5, f32::NEG_INFINITY][random.below(4)],
        })
        .collect()
}

/// Of every token one, some or most; some chunks hold none.
fn mask(random: &mut Random) -> Vec<u32> {
    let most = random.below(2) == 0;
    let words = (0..VOCAB.div_ceil(32)).map(|_| match random.below(4) {
        0 => random.word(),
        1 => 1 << random.below(32),
        _ if most => u32::MAX,
        _ => 0,
    });
    words.collect()
}

fn gumbel(noise: Noise, id: usize) -> f32 {
    let counter = [
        (id / 32 * 8 + id % 8) as u32,
        0,
        noise.position as u32,
        (noise.position >> 32) as u32,
    ];
    let words = philox4x32(counter, [noise.seed as u32, (noise.seed >> 32) as u32]);
    let uniform = (f64::from(words[id / 8 % 4]) + 0.5) * 2f64.powi(-32);
    -(-uniform.ln()).ln() as f32
}

/// Every token of a row.
fn evaluate(raw: &[f32], request: &CandidateRequest<'_>) -> Vec<Candidate> {
    let vocab = raw.iter().zip(request.vocab.clone());
    vocab
        .map(|(&raw, id)| {
            let mut scaled = raw;
            if let Some(edit) = request.edits.iter().find(|e| e.id as usize == id) {
                scaled = if scaled > 0.0 {
                    scaled / edit.repetition
                } else {
                    scaled * edit.repetition
                };
                scaled += edit.add;
            }
            scaled *= request.inverse_temperature;
            let bit = id - request.vocab.start;
            if request
                .allowed
                .is_some_and(|words| words[bit / 32] >> (bit % 32) & 1 == 0)
            {
                scaled = f32::NEG_INFINITY;
            }
            Candidate {
                id: id as u32,
                raw,
                scaled,
            }
        })
        .collect()
}

fn best(mut all: Vec<Candidate>, top: usize, value: impl Fn(&Candidate) -> f32) -> Vec<Candidate> {
    all.retain(|c| value(c) > f32::NEG_INFINITY);
    all.sort_by_key(|c| rank(value(c), c.id));
    all.truncate(top);
    all
}

fn assert_statistics(got: &[ChunkStatistics], values: impl Iterator<Item = f32>, tolerance: f64) {
    let values: Vec<f64> = values.map(f64::from).collect();
    assert_eq!(got.len(), values.len().div_ceil(VOCAB_CHUNK));
    for (got, values) in got.iter().zip(values.chunks(VOCAB_CHUNK)) {
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(f64::from(got.max), max);
        // Without a token that may be drawn there is nothing to add.
        let drawable = values.iter().filter(|x| **x > f64::NEG_INFINITY);
        let sum: f64 = drawable.map(|x| (x - max).exp()).sum();
        assert!(
            (f64::from(got.sum) - sum).abs() <= sum * tolerance,
            "{} not {sum}",
            got.sum
        );
    }
}

pub fn candidates_are_the_best<B: Backend>(make: &impl Fn(usize) -> B, tolerances: &Tolerances) {
    let mut random = Random::new(40);
    let backend = make(2);
    for round in 0..12u64 {
        let rows = 3;
        let width = VOCAB + 5;
        let values: Vec<f32> = (0..rows).flat_map(|_| logits(&mut random, width)).collect();
        let buffer = filled(&backend, &values, width, 1);
        let edits = edits(&mut random);
        let masks = [(); 3].map(|()| mask(&mut random));
        let noise = |row: usize| Noise {
            seed: 0x1234_5678_9abc + round,
            position: (round << 33) + row as u64,
        };
        let requests: Vec<_> = (0..rows)
            .map(|row| CandidateRequest {
                row,
                noise: Some(noise(row)),
                top: [0, 1, 20, VOCAB][random.below(4)],
                allowed: (random.below(3) > 0).then_some(&masks[row][..]),
                ..request(&edits)
            })
            .collect();
        let found = backend.candidates(&buffer, &requests).unwrap();
        for (found, request) in found.iter().zip(&requests) {
            let raw = &values[request.row * width..][..VOCAB];
            let all = evaluate(raw, request);
            assert_eq!(found.best, best(all.clone(), request.top, |c| c.scaled));
            assert_eq!(found.raw_best, best(all.clone(), request.raw_top, |c| c.raw));
            let noisy = |c: &Candidate| c.scaled + gumbel(noise(request.row), c.id as usize);
            let winner = best(all.clone(), 1, noisy)[0];
            assert_eq!(found.perturbed.unwrap().1, winner);
            assert!((found.perturbed.unwrap().0 - noisy(&winner)).abs() < 1e-4);
            assert_statistics(
                &found.scaled_statistics,
                all.iter().map(|c| c.scaled),
                tolerances.statistics,
            );
            assert_statistics(
                &found.raw_statistics,
                all.iter().map(|c| c.raw),
                tolerances.statistics,
            );
            assert!(found.finite);
        }
    }
}

/// Bit-equal statistics included.
pub fn candidates_do_not_depend_on_the_split<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    let mut random = Random::new(41);
    let values = logits(&mut random, VOCAB);
    let edits = edits(&mut random);
    let mask = mask(&mut random);
    let noise = Some(Noise { seed: 9, position: 3 });
    let part = |backend: &B, vocab: Range<usize>| {
        let buffer = filled(backend, &values[vocab.clone()], vocab.len(), 0);
        let request = CandidateRequest {
            allowed: Some(&mask[vocab.start / 32..]),
            vocab,
            noise,
            ..request(&edits)
        };
        backend.candidates(&buffer, &[request]).unwrap().remove(0)
    };
    let whole = part(&make(1), 0..VOCAB);
    for threads in THREADS {
        let backend = make(threads);
        for cuts in [
            vec![0, VOCAB],
            vec![0, 4 * VOCAB_CHUNK, VOCAB],
            vec![0, VOCAB_CHUNK, 9 * VOCAB_CHUNK, VOCAB],
        ] {
            let mut joined = Candidates {
                finite: true,
                ..Candidates::default()
            };
            for cut in cuts.windows(2) {
                joined.append(part(&backend, cut[0]..cut[1]), &request(&edits));
            }
            assert_eq!(joined, whole, "{threads} threads, cut at {cuts:?}");
        }
    }
    let misplaced = CandidateRequest {
        vocab: 1..VOCAB,
        ..request(&edits)
    };
    let short = CandidateRequest {
        allowed: Some(&mask[1..]),
        ..request(&edits)
    };
    let backend = make(1);
    let buffer = filled(&backend, &values, VOCAB, 0);
    assert!(
        backend.candidates(&buffer, &[short]).is_err(),
        "a mask that ends before the vocabulary"
    );
    assert!(
        backend.candidates(&buffer, &[misplaced]).is_err(),
        "a part of the vocabulary that cuts a chunk"
    );
}

/// Frequencies of many draws lie within five standard deviations of the softmax.
pub fn noise_draws_from_the_softmax<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    const DRAWS: usize = 20_000;
    let logits = [2.0f32, 0.0, 1.0, -1.0, 2.0, f32::MIN, 0.5, 0.0, 3.0, -2.0];
    let ban = [LogitEdit {
        id: 8,
        repetition: 1.0,
        add: f32::NEG_INFINITY,
    }];
    let backend = make(1);
    let buffer = filled(&backend, &logits, logits.len(), 0);
    let requests: Vec<_> = (0..DRAWS as u64)
        .map(|position| CandidateRequest {
            vocab: 0..logits.len(),
            inverse_temperature: 1.0,
            noise: Some(Noise { seed: 77, position }),
            top: 0,
            raw_top: 0,
            ..request(&ban)
        })
        .collect();
    let mut counts = [0usize; 10];
    for found in backend.candidates(&buffer, &requests).unwrap() {
        counts[found.perturbed.unwrap().1.id as usize] += 1;
    }
    let weight = |id: usize| if id == 8 { 0.0 } else { f64::from(logits[id]).exp() };
    let total: f64 = (0..10).map(weight).sum();
    for (id, &count) in counts.iter().enumerate() {
        let p = weight(id) / total;
        let (mean, deviation) = (DRAWS as f64 * p, (DRAWS as f64 * p * (1.0 - p)).sqrt());
        assert!(
            (count as f64 - mean).abs() <= 5.0 * deviation,
            "token {id}: {count} draws, expected {mean:.0}"
        );
    }
}

pub fn not_finite_logits_are_reported<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    let backend = make(2);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, VOCAB / 2, VOCAB - 1] {
            let mut values = vec![0.25; 2 * VOCAB];
            values[VOCAB + place] = bad;
            let buffer = filled(&backend, &values, VOCAB, 0);
            let requests = [
                request(&[]),
                CandidateRequest {
                    row: 1,
                    ..request(&[])
                },
            ];
            let found = backend.candidates(&buffer, &requests).unwrap();
            assert!(found[0].finite);
            assert!(!found[1].finite, "{bad} at {place}");
        }
    }
}
