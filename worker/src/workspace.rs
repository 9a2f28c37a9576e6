//! Activations of one group, allocated once for the largest step.

use phalanx_kernels::{Backend, Communicator, Result};
use phalanx_model::TensorParallelStyle;

use crate::assignment::Assignment;

/// `wide` and `hidden` are what collectives work on. Within a step they take turns; after the last layer's collective
/// on `hidden` the sampler's exchange comes before the next step's embedding writes `hidden` again.
pub struct Workspace<B: Backend> {
    /// `[max_tokens, hidden]`: the output of a sublayer, before it is added to the residual stream.
    pub hidden: B::Buffer,
    /// `[max_tokens, max(q_dim, intermediate)]`: attention output, then the MLP's inner activation. In reduce style
    /// only this rank's part of either.
    pub wide: B::Buffer,
    /// `[max_tokens, hidden]`: the residual stream.
    pub residual: B::Buffer,
    /// `[max_tokens, hidden]`
    pub normed: B::Buffer,
    /// `[max_tokens, (q heads + 2 kv heads) * head_dim]` of this rank.
    pub qkv: B::Buffer,
    /// `[max_tokens, 2 * intermediate]` of this rank.
    pub gate_up: B::Buffer,
    /// `[max_rows, hidden]`: the final hidden states that are sampled from.
    pub sampled: B::Buffer,
    /// `[max_rows, vocab]` of this rank.
    pub logits: B::Buffer,
    /// `0..max_tokens`
    pub row_numbers: Vec<u32>,
}

impl<B: Backend> Workspace<B> {
    /// Every rank of the group calls this at the same point: communicator buffers are allocated in the same order.
    pub fn new<C: Communicator<B>>(backend: &B, comm: &mut C, assignment: &Assignment) -> Result<Self> {
        let (config, shard) = (&assignment.config, assignment.shard());
        let tokens = assignment.limits.max_tokens as usize;
        let rows = assignment.limits.max_rows as usize;
        let hidden = comm.buffer(backend, tokens, config.hidden_size)?;
        let wide = match assignment.plan.style {
            TensorParallelStyle::Gather => {
                comm.buffer(backend, tokens, config.q_dim().max(config.intermediate_size))?
            }
            TensorParallelStyle::Reduce => {
                let q_dim = shard.q_heads.len() * config.head_dim;
                backend.buffer(tokens, q_dim.max(shard.intermediate.len()))?
            }
        };
        let qkv = (shard.q_heads.len() + 2 * shard.kv_heads.len()) * config.head_dim;
        Ok(Self {
            hidden,
            wide,
            residual: backend.buffer(tokens, config.hidden_size)?,
            normed: backend.buffer(tokens, config.hidden_size)?,
            qkv: backend.buffer(tokens, qkv)?,
            gate_up: backend.buffer(tokens, 2 * shard.intermediate.len())?,
            sampled: backend.buffer(rows, config.hidden_size)?,
            logits: backend.buffer(rows, shard.vocab.len())?,
            row_numbers: (0..assignment.limits.max_tokens).collect(),
        })
    }
}
