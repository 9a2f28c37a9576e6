//! Times the CUDA backend's ops on the first device, by the device's clock, at the sizes of an 8B Llama:
//! `cargo run --release -p phalanx-kernels --example cuda_timings [small]`.
//!
//! A line is `op, shape, microseconds, bytes, operations`, separated by tabs: bytes that must be moved at least, and
//! floating-point operations, for whoever knows what the card can do. Speed does not depend on values.
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::error::Error;

use phalanx_kernels::cuda::{CudaBackend, CudaBuffer};
use phalanx_kernels::{
    Backend, BatchInput, Columns, Heads, KernelError, KvSpec, Linear, Norm, Rope, WeightSource,
};
use phalanx_model::{KvDtype, RopeLayout, TensorFormat};

const BLOCK_SIZE: usize = 16;
const F32: usize = size_of::<f32>();

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// A model's widths, and what is computed at once.
struct Sizes {
    hidden: usize,
    intermediate: usize,
    heads: Heads,
    /// Sequences of a decoding step, and the tokens before each.
    sequences: usize,
    context: usize,
    /// Tokens of a prompt.
    prompt: usize,
    repetitions: u32,
}

impl Sizes {
    fn llama_8b() -> Self {
        Self {
            hidden: 4096,
            intermediate: 14_336,
            heads: heads(32, 8, 128),
            sequences: 16,
            context: 2048,
            prompt: 1024,
            repetitions: 50,
        }
    }

    /// For trying it out where nothing is fast.
    fn small() -> Self {
        Self {
            hidden: 256,
            intermediate: 512,
            heads: heads(4, 2, 64),
            sequences: 2,
            context: 32,
            prompt: 16,
            repetitions: 1,
        }
    }
}

fn heads(num_q: usize, num_kv: usize, head_dim: usize) -> Heads {
    Heads {
        num_q,
        num_kv,
        head_dim,
        q_start: 0,
        kv_start: 0,
        group_size: num_q / num_kv,
        sliding_window: None,
    }
}

fn main() -> Result {
    let sizes = match std::env::args().nth(1).as_deref() {
        None => Sizes::llama_8b(),
        Some("small") => Sizes::small(),
        Some(other) => return Err(format!("{other:?}: only \"small\" may be given").into()),
    };
    let timer = Timer {
        backend: CudaBackend::new(0)?,
        sizes,
    };
    timer.rows()?;
    timer.products()?;
    timer.attention()?;
    Ok(())
}

struct Timer {
    backend: CudaBackend,
    sizes: Sizes,
}

/// What an op must do at least.
struct Work {
    bytes: usize,
    operations: usize,
}

impl Timer {
    fn print(
        &self,
        op: &str,
        shape: &str,
        work: Work,
        run: impl FnMut() -> std::result::Result<(), KernelError>,
    ) -> Result {
        let took = self.backend.time(self.sizes.repetitions, run)?;
        let Work { bytes, operations } = work;
        println!(
            "{op}\t{shape}\t{:.2}\t{bytes}\t{operations}",
            took.as_secs_f64() * 1e6
        );
        Ok(())
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<CudaBuffer> {
        let mut buffer = self.backend.buffer(rows, width)?;
        let values: Vec<f32> = (0..rows * width)
            .map(|i| (i % 251) as f32 / 251.0 - 0.5)
            .collect();
        self.backend.write(&mut buffer, &values)?;
        Ok(buffer)
    }

    /// Norms and activations, of a decoding step and of a prompt.
    fn rows(&self) -> Result {
        let Sizes {
            hidden, intermediate, ..
        } = self.sizes;
        let weight = self.backend.vector(&vec![1.0; hidden])?;
        for rows in [self.sizes.sequences, self.sizes.prompt] {
            let norm = Norm {
                weight: &weight,
                eps: 1e-5,
            };
            let (mut out, mut residual) = (self.buffer(rows, hidden)?, self.buffer(rows, hidden)?);
            let delta = self.buffer(rows, hidden)?;
            let work = Work {
                bytes: 4 * rows * hidden * F32,
                operations: 4 * rows * hidden,
            };
            self.print("fused_add_rms_norm", &format!("{rows} x {hidden}"), work, || {
                self.backend
                    .fused_add_rms_norm(&mut out, &mut residual, &delta, &norm, rows)
            })?;
            let gate_up = self.buffer(rows, 2 * intermediate)?;
            let mut out = self.buffer(rows, intermediate)?;
            let work = Work {
                bytes: 3 * rows * intermediate * F32,
                operations: 5 * rows * intermediate,
            };
            self.print("silu_and_mul", &format!("{rows} x {intermediate}"), work, || {
                let buffer = &mut out;
                self.backend
                    .silu_and_mul(Columns { buffer, start: 0 }, &gate_up, rows)
            })?;
        }
        Ok(())
    }

    /// The gate and up projections, by weight format and rows.
    fn products(&self) -> Result {
        let (inputs, outputs) = (self.sizes.hidden, 2 * self.sizes.intermediate);
        for format in [TensorFormat::BF16, TensorFormat::Q4_K, TensorFormat::Q8_0] {
            let row_stride = format
                .row_bytes(inputs)
                .ok_or("the width is no multiple of a block")?;
            let source = WeightSource {
                format,
                rows: outputs,
                cols: inputs,
                // Finite as any format.
                data: &vec![0x3c; outputs * row_stride],
                row_stride,
                row_scales: None,
            };
            let weight = self.backend.weight(&[source])?;
            for rows in [1, self.sizes.sequences, self.sizes.prompt] {
                let x = self.buffer(rows, inputs)?;
                let mut out = self.buffer(rows, outputs)?;
                let work = Work {
                    bytes: self.backend.weight_bytes(&weight) + rows * (inputs + outputs) * F32,
                    operations: 2 * rows * inputs * outputs,
                };
                let shape = format!("{format:?} {outputs} x {inputs}, {rows} rows");
                self.print("linear", &shape, work, || {
                    let linear = Linear {
                        weight: &weight,
                        bias: None,
                    };
                    let buffer = &mut out;
                    self.backend
                        .linear(Columns { buffer, start: 0 }, &x, &linear, rows)
                })?;
            }
        }
        Ok(())
    }

    /// Rotary embedding, the cache's write, and attention, of a decoding step and of a prompt.
    fn attention(&self) -> Result {
        let Sizes {
            sequences,
            context,
            prompt,
            ref heads,
            ..
        } = self.sizes;
        let frequencies: Vec<f32> = (0..heads.head_dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
        let frequencies = self.backend.vector(&frequencies)?;
        let kv_width = heads.num_kv * heads.head_dim;
        for (what, sequences, rows, context) in
            [("decode", sequences, 1, context), ("prompt", 1, prompt, prompt)]
        {
            let spec = KvSpec {
                num_blocks: sequences * context.div_ceil(BLOCK_SIZE),
                block_size: BLOCK_SIZE,
                num_kv_heads: heads.num_kv,
                head_dim: heads.head_dim,
                dtype: KvDtype::F16,
            };
            let mut kv = self.backend.kv_cache(spec)?;
            let batch = self.backend.batch(&batch(sequences, rows, context))?;
            let total = sequences * rows;
            let mut qkv = self.buffer(total, heads.qkv_width())?;
            let shape = format!("{what}, {sequences} x {rows} rows at {context}");
            let rope = Rope {
                inverse_frequencies: &frequencies,
                attention_factor: 1.0,
                layout: RopeLayout::Half,
            };
            let work = Work {
                bytes: 2 * total * (heads.num_q + heads.num_kv) * heads.head_dim * F32,
                operations: 0,
            };
            self.print("rotary_embedding", &shape, work, || {
                self.backend.rotary_embedding(&mut qkv, &rope, heads, &batch)
            })?;
            let work = Work {
                bytes: 2 * total * kv_width * (F32 + 2),
                operations: 0,
            };
            self.print("reshape_and_cache", &shape, work, || {
                self.backend.reshape_and_cache(&mut kv, &qkv, heads, &batch)
            })?;
            let width = heads.num_q * heads.head_dim;
            let mut out = self.buffer(total, width)?;
            let pairs: usize = (context - rows + 1..=context).sum::<usize>() * sequences;
            let work = Work {
                bytes: sequences * context * 2 * kv_width * 2 + 2 * total * width * F32,
                operations: 4 * pairs * width,
            };
            self.print("paged_attention", &shape, work, || {
                let buffer = &mut out;
                self.backend
                    .paged_attention(Columns { buffer, start: 0 }, &qkv, &kv, heads, &batch)
            })?;
        }
        Ok(())
    }
}

/// The last `rows` tokens of so many sequences, each of `context` tokens in blocks of its own.
fn batch(sequences: usize, rows: usize, context: usize) -> BatchInput {
    let blocks = context.div_ceil(BLOCK_SIZE);
    let mut input = BatchInput {
        cu_seqlens_q: vec![0],
        cu_blocks: vec![0],
        ..BatchInput::default()
    };
    for sequence in 0..sequences {
        for position in context - rows..context {
            input.token_ids.push(0);
            input.positions.push(position as u32);
            input
                .slot_mapping
                .push((sequence * blocks * BLOCK_SIZE + position) as u32);
        }
        input
            .block_tables
            .extend((sequence * blocks..(sequence + 1) * blocks).map(|block| block as u32));
        input.context_lens.push(context as u32);
        input.cu_seqlens_q.push(input.token_ids.len() as u32);
        input.cu_blocks.push(input.block_tables.len() as u32);
    }
    input
}
