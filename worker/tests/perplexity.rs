//! How well the demo model predicts a text: as the worker runs it, and with the same weights dequantized to f32.
//!
//! The figures are printed by `cargo test -p phalanx-worker --test perplexity -- --nocapture`.

mod support;

use std::{collections::HashMap, fs::File, io::BufReader};

use candle_core::{D, Device, Result, Tensor, quantized::gguf_file};
use phalanx_coordinator::text::{GgufVocab, Tokenizer};
use phalanx_model::{Checkpoint, ModelConfig, TensorParallelOptions, TensorParallelStyle};
use phalanx_proto::v1::KvDtype;
use phalanx_shm::MappedFile;
use phalanx_worker::ModelRunner;
use support::*;

const TEXT: &str = include_str!("../../tests/data/perplexity.txt");
/// Tokens that are predicted from one another; the text is cut into windows of so many.
const WINDOW: usize = 1024;
/// Positions whose logits are computed at a time.
const ROWS: usize = 128;

fn text_tokens() -> Vec<u32> {
    let checkpoint = Checkpoint::open(&demo_model(), MappedFile::open).unwrap();
    let vocab = GgufVocab::from_metadata(checkpoint.gguf().unwrap()).unwrap();
    Tokenizer::from_gguf(&vocab).unwrap().encode(TEXT, true).unwrap()
}

/// The sum of `-ln p` over the predictions of a window: row `i` of the logits predicts token `i + 1`.
#[derive(Default)]
struct Loss {
    sum: f64,
    predictions: usize,
}

impl Loss {
    /// Logits of the rows from `first` of a window.
    fn add(&mut self, logits: &[f32], window: &[u32], first: usize) {
        let vocab = logits.len() / ROWS.min(window.len() - first);
        for (row, next) in logits.chunks_exact(vocab).zip(&window[first + 1..]) {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|&x| f64::from((x - max).exp())).sum();
            self.sum += sum.ln() + f64::from(max - row[*next as usize]);
            self.predictions += 1;
        }
    }

    fn perplexity(&self) -> f64 {
        (self.sum / self.predictions as f64).exp()
    }
}

/// Of the worker: quantized weights, activations of 8 bits, K and V in `kv_dtype`.
fn ours(tokens: &[u32], kv_dtype: KvDtype) -> f64 {
    let options = TensorParallelOptions::equal(1, TensorParallelStyle::Gather);
    let losses = Ranks::new(1, options.style).run(|rank, comm| {
        let mut assign = assign(&demo_model(), rank, &options);
        assign.kv_dtype = kv_dtype.into();
        assign.max_rows = ROWS as u32;
        assign.threads = std::thread::available_parallelism().unwrap().get() as u32;
        let mut model = load(&assign);
        let mut runner = ModelRunner::new(&mut model, comm).unwrap();
        let mut loss = Loss::default();
        for window in tokens.chunks(WINDOW) {
            for first in (0..window.len()).step_by(ROWS) {
                // A row has logits after its last token only, so each position is a row; they share their blocks.
                let positions = first..window.len().min(first + ROWS);
                let rows = positions
                    .map(|position| row(0, position, &window[position..=position], true))
                    .collect();
                loss.add(&runner.logits(&plan(0, rows)).unwrap(), window, first);
            }
        }
        loss.perplexity()
    });
    losses[0]
}

/// Llama in f32, one operation after another as the papers have them.
struct Reference {
    tensors: HashMap<String, Tensor>,
    config: ModelConfig,
    /// `[WINDOW, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    /// 0 where a position may look, negative infinity where not: `[WINDOW, WINDOW]`.
    mask: Tensor,
}

impl Reference {
    fn open() -> Result<Self> {
        let checkpoint = Checkpoint::open(&demo_model(), MappedFile::open).unwrap();
        let config = checkpoint.config().clone();
        let mut file = BufReader::new(File::open(demo_model())?);
        let content = gguf_file::Content::read(&mut file)?;
        let dequantized = |name: &String| {
            let tensor = content.tensor(&mut file, name, &Device::Cpu)?;
            Ok((name.clone(), tensor.dequantize(&Device::Cpu)?))
        };
        let tensors = content
            .tensor_infos
            .keys()
            .map(dequantized)
            .collect::<Result<_>>()?;
        let half = config.head_dim / 2;
        let angles: Vec<f32> = (0..WINDOW * half)
            .map(|i| {
                let (position, pair) = (i / half, i % half);
                let exponent = -2.0 * pair as f64 / config.head_dim as f64;
                (position as f64 * f64::from(config.rope.theta).powf(exponent)) as f32
            })
            .collect();
        let angles = Tensor::from_vec(angles, (WINDOW, half), &Device::Cpu)?;
        let mask = (0..WINDOW * WINDOW)
            .map(|i| {
                if i % WINDOW > i / WINDOW {
                    f32::NEG_INFINITY
                } else {
                    0.0
                }
            })
            .collect();
        Ok(Self {
            tensors,
            config,
            cos: angles.cos()?,
            sin: angles.sin()?,
            mask: Tensor::from_vec(mask, (WINDOW, WINDOW), &Device::Cpu)?,
        })
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.matmul(&self.tensors[name].t()?)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let scale = (mean + f64::from(self.config.rms_norm_eps))?.sqrt()?;
        x.broadcast_div(&scale)?.broadcast_mul(&self.tensors[name])
    }

    /// `[rows, heads * head_dim]` to `[heads, rows, head_dim]`.
    fn heads(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let rows = x.dim(0)?;
        x.reshape((rows, heads, self.config.head_dim))?
            .transpose(0, 1)?
            .contiguous()
    }

    /// Neighbouring values are the pairs that rotate, as GGUF files of Llama are laid out.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, rows, width) = x.dims3()?;
        let (cos, sin) = (self.cos.narrow(0, 0, rows)?, self.sin.narrow(0, 0, rows)?);
        let pairs = x.reshape((heads, rows, width / 2, 2))?;
        let (a, b) = (
            pairs.narrow(3, 0, 1)?.squeeze(3)?,
            pairs.narrow(3, 1, 1)?.squeeze(3)?,
        );
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
        Tensor::stack(&[first, second], 3)?.reshape((heads, rows, width))
    }

    fn attention(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let (q_heads, kv_heads) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let project = |name: &str, heads| {
            self.heads(
                &self.linear(x, &format!("blk.{layer}.attn_{name}.weight"))?,
                heads,
            )
        };
        let q = self.rotate(&project("q", q_heads)?)?;
        let (k, v) = (self.rotate(&project("k", kv_heads)?)?, project("v", kv_heads)?);
        let (_, rows, width) = q.dims3()?;
        // Each KV head once for every query head that reads it.
        let group = q_heads / kv_heads;
        let repeat = |x: Tensor| {
            let shape = (kv_heads, group, rows, width);
            x.unsqueeze(1)?
                .broadcast_as(shape)?
                .reshape((q_heads, rows, width))
        };
        let scores = (q.matmul(&repeat(k)?.t()?)? / (width as f64).sqrt())?;
        let mask = self.mask.narrow(0, 0, rows)?.narrow(1, 0, rows)?;
        let scores = scores.broadcast_add(&mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let out = weights
            .matmul(&repeat(v)?)?
            .transpose(0, 1)?
            .reshape((rows, q_heads * width))?;
        self.linear(&out, &format!("blk.{layer}.attn_output.weight"))
    }

    /// The last hidden states of a window, normed.
    fn forward(&self, window: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(window, &Device::Cpu)?;
        let mut x = self.tensors["token_embd.weight"].index_select(&ids, 0)?;
        for layer in 0..self.config.num_hidden_layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            x = (&x + self.attention(&self.norm(&x, &name("attn_norm"))?, layer)?)?;
            let normed = self.norm(&x, &name("ffn_norm"))?;
            let gate = self.linear(&normed, &name("ffn_gate"))?.silu()?;
            let up = self.linear(&normed, &name("ffn_up"))?;
            x = (&x + self.linear(&(gate * up)?, &name("ffn_down"))?)?;
        }
        self.norm(&x, "output_norm.weight")
    }

    fn perplexity(&self, tokens: &[u32]) -> Result<f64> {
        let mut loss = Loss::default();
        for window in tokens.chunks(WINDOW) {
            let hidden = self.forward(window)?;
            for first in (0..window.len()).step_by(ROWS) {
                let rows = hidden.narrow(0, first, ROWS.min(window.len() - first))?;
                let logits = self.linear(&rows, "token_embd.weight")?;
                loss.add(&logits.flatten_all()?.to_vec1()?, window, first);
            }
        }
        Ok(loss.perplexity())
    }
}

#[test]
#[allow(
    clippy::print_stdout,
    reason = "the figures are of interest, not only that they pass"
)]
fn perplexity_is_that_of_the_dequantized_model() {
    let tokens = text_tokens();
    assert!(tokens.len() > 3 * WINDOW, "{} tokens", tokens.len());
    let exact = Reference::open().unwrap().perplexity(&tokens).unwrap();
    println!("{} tokens: f32 {exact:.4}", tokens.len());
    for (kv_dtype, limit) in [(KvDtype::F16, 0.01), (KvDtype::Bf16, 0.01), (KvDtype::E4m3, 0.05)] {
        let found = ours(&tokens, kv_dtype);
        let change = found / exact - 1.0;
        println!("K and V in {kv_dtype:?}: {found:.4}, {:+.3} %", change * 100.0);
        assert!(
            change.abs() < limit,
            "{kv_dtype:?}: {found} instead of {exact}, {change:+}"
        );
    }
}
