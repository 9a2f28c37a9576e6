//! The forward pass against candle's, and against itself: at any number of ranks, in any batch, in any chunks.

mod support;

use std::io::Cursor;

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use candle_transformers::models::quantized_llama::ModelWeights;
use phalanx_model::{TensorParallelOptions, TensorParallelStyle};
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
fn ours(options: &TensorParallelOptions, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let parts = on_demo_model(options, |runner| {
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

/// The demo model in candle: as it is, and with every weight dequantized to f32.
fn candle_models() -> (ModelWeights, ModelWeights) {
    let file = std::fs::read(demo_model()).unwrap();
    let mut file = Cursor::new(file);
    let content = gguf_file::Content::read(&mut file).unwrap();
    let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    let dense: Vec<(String, QTensor)> = names
        .into_iter()
        .map(|name| {
            let tensor = content.tensor(&mut file, &name, &Device::Cpu).unwrap();
            let values = tensor.dequantize(&Device::Cpu).unwrap();
            let tensor = QTensor::quantize(&values, GgmlDType::F32).unwrap();
            (name, tensor)
        })
        .collect();
    let metadata: Vec<(&str, &gguf_file::Value)> = content
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<(&str, &QTensor)> = dense
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut written = Cursor::new(Vec::new());
    gguf_file::write(&mut written, &metadata, &tensors).unwrap();
    written.set_position(0);
    let dense = gguf_file::Content::read(&mut written).unwrap();
    let dense = ModelWeights::from_gguf(dense, &mut written, &Device::Cpu).unwrap();
    let quantized = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    (quantized, dense)
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

#[test]
fn logits_are_candles() {
    let prompts: Vec<Vec<u32>> = PROMPTS.iter().map(|text| tokens(text)).collect();
    let ours = ours(&gather(1), &prompts);
    let (mut quantized, mut dense) = candle_models();
    for ((prompt, text), got) in prompts.iter().zip(PROMPTS).zip(&ours) {
        let exact = candle(&mut dense, prompt);
        let theirs = candle(&mut quantized, prompt);
        let (error, their_error) = (relative_error(got, &exact), relative_error(&theirs, &exact));
        println!("{text}: error {error:.4}, candle's quantized path {their_error:.4}");
        assert_eq!(argmax(got), argmax(&exact), "{text}");
        assert_eq!(argmax(got), argmax(&theirs), "{text}");
        // Both quantize activations to 8 bits, in blocks; the weights are the same.
        assert!(error < 0.05, "{text}: {error} from f32 arithmetic");
        assert!(relative_error(got, &theirs) < 0.07, "{text}");
    }
}

#[test]
fn ranks_change_no_bit() {
    let prompts: Vec<Vec<u32>> = PROMPTS[..3].iter().map(|text| tokens(text)).collect();
    let alone = ours(&gather(1), &prompts);
    for world_size in [2, 3] {
        assert!(ours(&gather(world_size), &prompts) == alone, "{world_size} ranks");
    }
    let unequal = TensorParallelOptions {
        rank_weights: Some(vec![2.0, 1.0]),
        ..gather(2)
    };
    assert!(ours(&unequal, &prompts) == alone, "ranks of weight 2 and 1");
}

#[test]
fn reduce_style_is_close() {
    let prompts = [tokens(PROMPTS[1])];
    let alone = ours(&gather(1), &prompts).swap_remove(0);
    let reduce = TensorParallelOptions::equal(3, TensorParallelStyle::Reduce);
    let reduced = ours(&reduce, &prompts).swap_remove(0);
    assert_eq!(argmax(&reduced), argmax(&alone));
    let error = relative_error(&reduced, &alone);
    assert!(error < 0.05, "{error}");
}

#[test]
fn neighbours_and_chunks_change_no_bit() {
    let prompts: Vec<Vec<u32>> = PROMPTS.iter().map(|text| tokens(text)).collect();
    let target = &prompts[1];
    let results = on_demo_model(&gather(2), |runner| {
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
    let outputs = on_demo_model(&gather(2), |runner| {
        let mut sequence = prompt.clone();
        let mut computed = 0;
        for step in 0..8 {
            let rows = vec![row(0, computed, &sequence[computed..], true)];
            let output = runner.execute(&plan(step, rows)).unwrap();
            assert!(output.sampled[0].finite);
            computed = sequence.len();
            sequence.push(output.sampled[0].token);
        }
        // The same tokens as one prompt: each is the argmax after those before it.
        for len in prompt.len()..sequence.len() {
            let rows = vec![row(50, 0, &sequence[..len], true)];
            let output = runner.execute(&plan(100, rows)).unwrap();
            assert_eq!(output.sampled[0].token, sequence[len]);
        }
        sequence
    });
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(outputs[0][prompt.len()], tokens("The Paris")[1]);
}
