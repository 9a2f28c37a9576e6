//! The forward pass against candle's, and against itself: at any number of ranks, in any batch, in any chunks.

mod support;

use std::{
    fs::File,
    io::{BufReader, BufWriter},
    path::Path,
};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use candle_transformers::models::quantized_llama::ModelWeights;
use phalanx_model::{TensorParallelOptions, TensorParallelStyle};
use phalanx_proto::step::{SequenceId, StepMasks, StepPlan, TokenMask, TokenSet};
use phalanx_worker::{PlanError, RunError};
use support::*;

const PROMPTS: [&str; 6] = [
    "The capital of France is",
    "Once upon a time there was a little girl who lived in a small",
    "The quick brown fox jumps over the lazy",
    "Water is made of hydrogen and",
    "To be or not to be that is the",
    "One two three four five six seven eight nine",
];

fn gather(world_size: usize) -> TensorParallelOptions {
    TensorParallelOptions::equal(world_size, TensorParallelStyle::Gather)
}

/// Last-token logits of each prompt, each run alone.
fn ours(path: &Path, options: &TensorParallelOptions, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let parts = on_model(path, options, |runner| {
        let step = |(i, prompt): (usize, &Vec<u32>)| {
            runner
                .logits(&plan(i as u64, vec![row(0, 0, prompt, true)]))
                .unwrap()
        };
        prompts.iter().enumerate().map(step).collect::<Vec<_>>()
    });
    (0..prompts.len())
        .map(|i| {
            let ranks: Vec<Vec<f32>> = parts.iter().map(|rank| rank[i].clone()).collect();
            join_logits(&ranks, 1)
        })
        .collect()
}

fn candle(model: &mut ModelWeights, prompt: &[u32]) -> Vec<f32> {
    let input = Tensor::new(prompt, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = model.forward(&input, 0).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// Writes the demo model with every weight dequantized to f32.
fn write_dense(to: &Path) {
    let mut file = BufReader::new(File::open(demo_model()).unwrap());
    let content = gguf_file::Content::read(&mut file).unwrap();
    let dense = |name: &String| {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let values = tensor.dequantize(&Device::Cpu).unwrap();
        (name.clone(), QTensor::quantize(&values, GgmlDType::F32).unwrap())
    };
    let dense: Vec<(String, QTensor)> = content.tensor_infos.keys().map(dense).collect();
    let tensors: Vec<_> = dense
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let metadata: Vec<_> = content
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let mut out = BufWriter::new(File::create(to).unwrap());
    gguf_file::write(&mut out, &metadata, &tensors).unwrap();
    out.into_inner().unwrap();
}

fn candle_model(path: &Path) -> ModelWeights {
    let mut file = BufReader::new(File::open(path).unwrap());
    let content = gguf_file::Content::read(&mut file).unwrap();
    ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap()
}

fn argmax(logits: &[f32]) -> usize {
    (0..logits.len())
        .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
        .unwrap()
}

/// Root of the mean square difference, in units of `want`'s standard deviation.
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let n = want.len() as f64;
    let mean = want.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = want.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    let error = got
        .iter()
        .zip(want)
        .map(|(&a, &b)| f64::from(a - b).powi(2))
        .sum::<f64>()
        / n;
    (error / variance).sqrt()
}

/// Weights in f32: the same arithmetic as candle's, up to the order of sums. Weights as they are: candle and this
/// backend round activations to 8 bits, each in its own way, which moves this small model's logits by several percent;
/// ours must not be further from f32 than candle's.
#[test]
fn logits_are_candles() {
    let prompts: Vec<Vec<u32>> = PROMPTS.iter().map(|text| tokens(text)).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dense.gguf");
    write_dense(&path);
    let mut model = candle_model(&path);
    let exact: Vec<Vec<f32>> = prompts.iter().map(|prompt| candle(&mut model, prompt)).collect();
    drop(model);
    for ((got, want), text) in ours(&path, &gather(1), &prompts).iter().zip(&exact).zip(PROMPTS) {
        let error = relative_error(got, want);
        assert!(error < 1e-3, "{text}: {error}");
        assert_eq!(argmax(got), argmax(want), "{text}");
    }

    let quantized = ours(&demo_model(), &gather(1), &prompts);
    let mut model = candle_model(&demo_model());
    let (mut errors, mut their_errors, mut agreed) = (0.0, 0.0, 0);
    for ((got, want), prompt) in quantized.iter().zip(&exact).zip(&prompts) {
        errors += relative_error(got, want);
        their_errors += relative_error(&candle(&mut model, prompt), want);
        agreed += usize::from(argmax(got) == argmax(want));
    }
    assert!(errors < 1.2 * their_errors, "{errors} against {their_errors}");
    assert!(
        agreed + 1 >= prompts.len(),
        "{agreed} of {} first choices",
        prompts.len()
    );
}

#[test]
fn ranks_change_no_bit() {
    let prompts: Vec<Vec<u32>> = PROMPTS[..3].iter().map(|text| tokens(text)).collect();
    let alone = ours(&demo_model(), &gather(1), &prompts);
    for world_size in [2, 3] {
        assert!(
            ours(&demo_model(), &gather(world_size), &prompts) == alone,
            "{world_size} ranks"
        );
    }
    let unequal = TensorParallelOptions {
        rank_weights: Some(vec![2.0, 1.0]),
        ..gather(2)
    };
    assert!(
        ours(&demo_model(), &unequal, &prompts) == alone,
        "ranks of weight 2 and 1"
    );
}

#[test]
fn reduce_style_is_close() {
    let prompts = [tokens(PROMPTS[1])];
    let alone = ours(&demo_model(), &gather(1), &prompts).swap_remove(0);
    let reduce = TensorParallelOptions::equal(3, TensorParallelStyle::Reduce);
    let reduced = ours(&demo_model(), &reduce, &prompts).swap_remove(0);
    assert_eq!(argmax(&reduced), argmax(&alone));
    let error = relative_error(&reduced, &alone);
    assert!(error < 0.05, "{error}");
}

#[test]
fn neighbours_and_chunks_change_no_bit() {
    let prompts: Vec<Vec<u32>> = PROMPTS.iter().map(|text| tokens(text)).collect();
    let target = &prompts[1];
    let results = on_model(&demo_model(), &gather(2), |runner| {
        let alone = runner.logits(&plan(0, vec![row(0, 0, target, true)])).unwrap();
        // Sixteen sequences in one step, the target somewhere among them.
        let mut batch: Vec<_> = (0..16)
            .map(|i| row(8 * i, 0, &prompts[i % prompts.len()], true))
            .collect();
        batch[7] = row(8 * 7, 0, target, true);
        let together = runner.logits(&plan(1, batch)).unwrap();
        let together = together[7 * alone.len()..][..alone.len()].to_vec();
        // In chunks, each beside a neighbour; the last chunk is one token, as in decoding.
        let cuts = [0, 5, 6, target.len() - 1, target.len()];
        let mut chunked = Vec::new();
        for (step, cut) in cuts.windows(2).enumerate() {
            let last = cut[1] == target.len();
            let neighbour = row(40, 0, &prompts[0], false);
            let rows = vec![neighbour, row(20, cut[0], &target[cut[0]..cut[1]], last)];
            chunked = runner.logits(&plan(2 + step as u64, rows)).unwrap();
        }
        (alone, together, chunked)
    });
    for (alone, together, chunked) in results {
        assert!(alone == together, "in a batch of 16");
        assert!(alone == chunked, "in chunks");
    }
}

#[test]
fn greedy_decoding_continues_as_one_long_prompt_would() {
    let prompt = tokens(PROMPTS[0]);
    let outputs = on_model(&demo_model(), &gather(2), |runner| {
        let mut sequence = prompt.clone();
        let mut computed = 0;
        for step in 0..8 {
            let rows = vec![row(0, computed, &sequence[computed..], true)];
            let output = runner.execute(&plan(step, rows), no_masks).unwrap();
            assert!(output.sampled[0].finite);
            computed = sequence.len();
            sequence.push(output.sampled[0].token);
        }
        // The same tokens as one prompt: each is the argmax after those before it.
        for len in prompt.len()..sequence.len() {
            let rows = vec![row(50, 0, &sequence[..len], true)];
            let output = runner.execute(&plan(100, rows), no_masks).unwrap();
            assert_eq!(output.sampled[0].token, sequence[len]);
        }
        sequence
    });
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(outputs[0][prompt.len()], tokens("The Paris")[1]);
}

#[test]
fn a_masked_row_draws_what_its_mask_allows() {
    let prompt = tokens(PROMPTS[0]);
    let allowed = |sequence: u64, id: u32| {
        let mut allowed = TokenSet::empty(49_152);
        allowed.insert(id);
        TokenMask {
            sequence: SequenceId(sequence),
            allowed,
        }
    };
    let masks = |step, masks| {
        move || {
            Ok(StepMasks {
                epoch: 1,
                step,
                masks,
            })
        }
    };
    let masked_plan = |step| StepPlan {
        masks_follow: true,
        ..plan(
            step,
            vec![
                row(0, 0, &prompt, true),
                row(20, 0, &prompt, true),
                row(40, 0, &prompt, true),
            ],
        )
    };
    on_model(&demo_model(), &gather(2), |runner| {
        let free = runner
            .execute(&plan(1, vec![row(0, 0, &prompt, true)]), no_masks)
            .unwrap();
        let output = runner.execute(
            &masked_plan(2),
            masks(2, vec![allowed(0, 7), allowed(40, 49_151)]),
        );
        let drawn: Vec<u32> = output
            .unwrap()
            .sampled
            .iter()
            .map(|sampled| sampled.token)
            .collect();
        assert_eq!(drawn, [7, free.sampled[0].token, 49_151]);
        // Of another step, and in another order than the rows: refused on every rank before any of them samples.
        let late = runner.execute(&masked_plan(3), masks(2, vec![]));
        assert!(matches!(
            late,
            Err(RunError::Plan(PlanError::ForeignMasks { step: 2, .. }))
        ));
        let disordered = runner.execute(&masked_plan(4), masks(4, vec![allowed(40, 1), allowed(0, 1)]));
        assert!(matches!(
            disordered,
            Err(RunError::Plan(PlanError::MaskWithoutRow(0)))
        ));
    });
}
