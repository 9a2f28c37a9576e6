//! The Llama family: pre-norm decoder, grouped-query attention with rotary positions, SwiGLU.

use phalanx_kernels::{Backend, Columns, Communicator, Norm, Result};

use crate::{
    layers::{
        MergedColumnParallelLinear, ParallelLmHead, QkvParallelLinear, RotaryEmbedding, RowParallelLinear,
        Step, VocabParallelEmbedding,
    },
    workspace::Workspace,
};

/// Weights and KV cache of one rank.
pub struct LlamaForCausalLm<B: Backend> {
    pub embed_tokens: VocabParallelEmbedding<B>,
    /// Never empty.
    pub layers: Vec<LlamaDecoderLayer<B>>,
    pub norm: RmsNorm<B>,
    pub lm_head: ParallelLmHead<B>,
    pub rotary: RotaryEmbedding<B>,
}

pub struct LlamaDecoderLayer<B: Backend> {
    pub input_norm: RmsNorm<B>,
    pub attention: LlamaAttention<B>,
    pub post_attention_norm: RmsNorm<B>,
    pub mlp: LlamaMlp<B>,
}

pub struct LlamaAttention<B: Backend> {
    pub qkv_proj: QkvParallelLinear<B>,
    pub o_proj: RowParallelLinear<B>,
    pub kv_cache: B::KvCache,
}

pub struct LlamaMlp<B: Backend> {
    pub gate_up_proj: MergedColumnParallelLinear<B>,
    pub down_proj: RowParallelLinear<B>,
}

pub struct RmsNorm<B: Backend> {
    pub weight: B::Vector,
    pub eps: f32,
}

impl<B: Backend> RmsNorm<B> {
    fn view(&self) -> Norm<'_, B> {
        Norm {
            weight: &self.weight,
            eps: self.eps,
        }
    }
}

impl<B: Backend> LlamaForCausalLm<B> {
    /// [`Self::forward`], then [`Self::compute_logits`] of the rows `sampled`. On a GPU all of it is queued, and nothing
    /// waits, so it can be captured.
    pub fn step<C: Communicator<B>>(
        &mut self,
        step: &mut Step<'_, B, C>,
        ws: &mut Workspace<B>,
        owners: &[u32],
        sampled: &[u32],
    ) -> Result<()> {
        self.forward(step, ws, owners)?;
        if sampled.is_empty() {
            return Ok(());
        }
        step.trace
            .op("lm_head", || self.compute_logits(step.backend, ws, sampled))
    }

    /// Computes the step's tokens: their K and V go to the cache, the final hidden states to `ws.normed`.
    /// `owners` names the rank that embeds each row.
    pub fn forward<C: Communicator<B>>(
        &mut self,
        step: &mut Step<'_, B, C>,
        ws: &mut Workspace<B>,
        owners: &[u32],
    ) -> Result<()> {
        self.embed_tokens.forward(step, &mut ws.hidden, owners)?;
        let (backend, rows, trace) = (step.backend, step.rows, step.trace);
        backend.select_rows(&mut ws.residual, &ws.hidden, &ws.row_numbers[..rows])?;
        let norm = self.layers[0].input_norm.view();
        trace.op("rms_norm", || {
            backend.rms_norm(&mut ws.normed, &ws.residual, &norm, rows)
        })?;
        for i in 0..self.layers.len() {
            self.layers[i].forward(step, ws, &self.rotary)?;
            // The sum that closes a layer is one pass with the norm that opens the next.
            let norm = self.layers.get(i + 1).map_or(&self.norm, |next| &next.input_norm);
            trace.op("fused_add_rms_norm", || {
                backend.fused_add_rms_norm(&mut ws.normed, &mut ws.residual, &ws.hidden, &norm.view(), rows)
            })?;
        }
        Ok(())
    }

    /// This rank's logits after some rows of the last [`Self::forward`]: row `i` of `ws.logits` belongs to `rows[i]`.
    pub fn compute_logits(&self, backend: &B, ws: &mut Workspace<B>, rows: &[u32]) -> Result<()> {
        backend.select_rows(&mut ws.sampled, &ws.normed, rows)?;
        self.lm_head
            .forward(backend, &mut ws.logits, &ws.sampled, rows.len())
    }
}

impl<B: Backend> LlamaDecoderLayer<B> {
    /// From `ws.normed` to `ws.hidden`, which is still to be added to `ws.residual`.
    fn forward<C: Communicator<B>>(
        &mut self,
        step: &mut Step<'_, B, C>,
        ws: &mut Workspace<B>,
        rotary: &RotaryEmbedding<B>,
    ) -> Result<()> {
        self.attention.forward(step, ws, rotary)?;
        let norm = self.post_attention_norm.view();
        step.trace.op("fused_add_rms_norm", || {
            step.backend
                .fused_add_rms_norm(&mut ws.normed, &mut ws.residual, &ws.hidden, &norm, step.rows)
        })?;
        self.mlp.forward(step, ws)
    }
}

impl<B: Backend> LlamaAttention<B> {
    fn forward<C: Communicator<B>>(
        &mut self,
        step: &mut Step<'_, B, C>,
        ws: &mut Workspace<B>,
        rotary: &RotaryEmbedding<B>,
    ) -> Result<()> {
        let (backend, trace, heads) = (step.backend, step.trace, &self.qkv_proj.heads);
        trace.op("qkv_proj", || {
            self.qkv_proj.forward(backend, &mut ws.qkv, &ws.normed, step.rows)
        })?;
        trace.op("rotary_embedding", || {
            backend.rotary_embedding(&mut ws.qkv, &rotary.view(), heads, step.batch)
        })?;
        trace.op("reshape_and_cache", || {
            backend.reshape_and_cache(&mut self.kv_cache, &ws.qkv, heads, step.batch)
        })?;
        let part = Columns {
            buffer: &mut ws.wide,
            start: self.o_proj.input_start(),
        };
        trace.op("paged_attention", || {
            backend.paged_attention(part, &ws.qkv, &self.kv_cache, heads, step.batch)
        })?;
        trace.op("o_proj", || {
            self.o_proj.forward(step, &mut ws.hidden, &mut ws.wide)
        })
    }
}

impl<B: Backend> LlamaMlp<B> {
    fn forward<C: Communicator<B>>(&self, step: &mut Step<'_, B, C>, ws: &mut Workspace<B>) -> Result<()> {
        step.trace.op("gate_up_proj", || {
            self.gate_up_proj
                .forward(step.backend, &mut ws.gate_up, &ws.normed, step.rows)
        })?;
        let part = Columns {
            buffer: &mut ws.wide,
            start: self.down_proj.input_start(),
        };
        step.trace.op("silu_and_mul", || {
            step.backend.silu_and_mul(part, &ws.gate_up, step.rows)
        })?;
        step.trace.op("down_proj", || {
            self.down_proj.forward(step, &mut ws.hidden, &mut ws.wide)
        })
    }
}
