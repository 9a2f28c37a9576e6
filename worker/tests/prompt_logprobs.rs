//! Log-probabilities of a prompt against whole rows of logits: exact, and the same however the prompt is cut and however
//! many ranks share the vocabulary.

mod support;

use phalanx_model::{TensorParallelOptions, TensorParallelStyle};
use phalanx_proto::step::{PromptLogprobs, RowSampling, SampledToken, ScoredToken, StepRow};
use support::*;

const TOP: u32 = 5;
/// Of f32 sums over chunks of the vocabulary, against f64.
const TOLERANCE: f64 = 2e-5;

fn gather(world_size: usize) -> TensorParallelOptions {
    TensorParallelOptions::equal(world_size, TensorParallelStyle::Gather)
}

/// More tokens than the workspace has rows of logits.
fn prompt() -> Vec<u32> {
    let prompt = tokens(
        "The quick brown fox jumps over the lazy dog and the capital of France is a city that has a long river \
         but the little girl who lived in a small house near the water had to be or not to be there",
    );
    assert!(prompt.len() > MAX_ROWS + 5);
    prompt
}

/// The logits after each of the first `rows` tokens, each prefix run whole and alone.
fn all_logits(prompt: &[u32], rows: usize) -> Vec<Vec<f32>> {
    let mut ranks = on_model(&demo_model(), &gather(1), |runner| {
        let step = |end: usize| {
            let prefix = row(0, 0, &prompt[..end], true);
            runner.logits(&plan(end as u64, vec![prefix])).unwrap()
        };
        (1..=rows).map(step).collect::<Vec<_>>()
    });
    ranks.swap_remove(0)
}

/// By definition, in f64.
fn log_softmax(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|&x| (f64::from(x) - f64::from(max)).exp())
        .sum();
    f64::from(logits[id as usize]) - f64::from(max) - sum.ln()
}

fn rank(logits: &[f32], id: u32) -> u32 {
    logits.iter().filter(|&&x| x >= logits[id as usize]).count() as u32
}

/// The ids of the largest logits, best first, the smaller id of equals.
fn best(logits: &[f32], count: u32) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    ids.truncate(count as usize);
    ids
}

fn scored_row(start: usize, end: usize, prompt: &[u32], skip: usize) -> StepRow {
    let targets = &prompt[start + skip + 1..prompt.len().min(end + 1)];
    StepRow {
        prompt_logprobs: (!targets.is_empty()).then(|| PromptLogprobs {
            top: TOP,
            first: skip as u32,
            targets: targets.to_vec(),
        }),
        ..row(0, start, &prompt[start..end], end == prompt.len())
    }
}

/// The scores of `prompt` computed in chunks that end at `ends`, on every rank; all ranks must agree.
fn scores(world_size: usize, prompt: &[u32], ends: &[usize]) -> Vec<ScoredToken> {
    let mut ranks = on_model(&demo_model(), &gather(world_size), |runner| {
        let mut all = Vec::new();
        let mut start = 0;
        for (step, &end) in ends.iter().enumerate() {
            let chunk = scored_row(start, end, prompt, 0);
            // Another sequence beside it, so that rows of activations and rows of the plan differ.
            let beside = row(64, 0, &prompt[..3], true);
            let output = runner
                .execute(&plan(step as u64, vec![beside, chunk]), no_masks)
                .unwrap();
            for scored in output.prompt_logprobs {
                all.extend(scored.tokens);
            }
            start = end;
        }
        all
    });
    let first = ranks.swap_remove(0);
    assert!(ranks.iter().all(|other| *other == first), "ranks disagree");
    first
}

#[test]
fn scores_are_those_of_whole_rows_of_logits() {
    let prompt = prompt();
    let scored = scores(1, &prompt, &[prompt.len()]);
    let logits = all_logits(&prompt, prompt.len() - 1);
    assert_eq!(scored.len(), logits.len());
    for (at, (scored, logits)) in scored.iter().zip(&logits).enumerate() {
        let token = prompt[at + 1];
        assert_eq!((scored.token, scored.rank), (token, rank(logits, token)));
        let error = f64::from(scored.logprob) - log_softmax(logits, token);
        assert!(error.abs() < TOLERANCE, "token {at}: off by {error}");
        let ids: Vec<u32> = scored.top_logprobs.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids, best(logits, TOP), "token {at}");
        for &(id, logprob) in &scored.top_logprobs {
            let error = f64::from(logprob) - log_softmax(logits, id);
            assert!(
                error.abs() < TOLERANCE,
                "token {at}, alternative {id}: off by {error}"
            );
        }
    }
}

#[test]
fn scores_do_not_depend_on_chunks_or_ranks() {
    let prompt = prompt();
    let whole = scores(1, &prompt, &[prompt.len()]);
    for ends in [&[1, 2, 17, prompt.len()][..], &[prompt.len() - 1, prompt.len()]] {
        assert_eq!(scores(1, &prompt, ends), whole, "chunks that end at {ends:?}");
    }
    assert_eq!(scores(2, &prompt, &[13, prompt.len()]), whole, "two ranks");
    assert_eq!(scores(3, &prompt, &[prompt.len()]), whole, "three ranks");
}

/// A row may score fewer of its tokens than it computes: after a preemption the first ones are known.
#[test]
fn a_row_scores_what_it_is_asked_for() {
    let prompt = prompt();
    let whole = scores(1, &prompt, &[prompt.len()]);
    let mut ranks = on_model(&demo_model(), &gather(1), |runner| {
        let late = scored_row(0, prompt.len(), &prompt, 20);
        runner
            .execute(&plan(0, vec![late]), no_masks)
            .unwrap()
            .prompt_logprobs
    });
    let late = ranks.swap_remove(0).swap_remove(0).tokens;
    assert_eq!(late, whole[20..]);
}

/// The sampled token's rank, where filters and temperature let another than the best be drawn.
#[test]
fn the_chosen_tokens_rank_is_counted() {
    let prompt = prompt();
    let draw = |world_size: usize| {
        let mut ranks = on_model(&demo_model(), &gather(world_size), |runner| {
            let rows = (0..4).map(|seed| StepRow {
                sampling: Some(RowSampling {
                    temperature: 3.0,
                    seed,
                    logprobs: Some(1),
                    ..RowSampling::GREEDY
                }),
                ..row(8 * seed as usize, 0, &prompt[..9], true)
            });
            runner
                .execute(&plan(0, rows.collect()), no_masks)
                .unwrap()
                .sampled
        });
        ranks.swap_remove(0)
    };
    let logits = all_logits(&prompt, 9).swap_remove(8);
    let sampled: Vec<SampledToken> = draw(1);
    assert!(sampled.iter().any(|token| token.rank > Some(20)), "a hot draw");
    for token in &sampled {
        assert_eq!(token.rank, Some(rank(&logits, token.token)));
        let error = f64::from(token.logprob.unwrap()) - log_softmax(&logits, token.token);
        assert!(error.abs() < TOLERANCE, "off by {error}");
    }
    assert_eq!(draw(2), sampled);
}
