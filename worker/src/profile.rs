//! How much of a device's memory a step takes, found out by running the largest one before the KV cache is allocated.

use phalanx_kernels::{Backend, Communicator, GatherLayout, Result};
use phalanx_model::TensorParallelStyle;
use phalanx_proto::step::{BlockId, RowSampling, SequenceId, StepPlan, StepRow};

use crate::{
    assignment::Assignment,
    error::RunError,
    runner::{LoadedModel, ModelRunner},
};

/// Blocks that [`largest_step`] needs, whose sequences share them.
pub(crate) fn num_blocks(assignment: &Assignment) -> u32 {
    let limits = &assignment.limits;
    let blocks = limits.max_tokens.div_ceil(assignment.block_size as u32);
    blocks.min(limits.max_blocks_per_row)
}

/// Runs the largest step without peers, and returns what `measure` sees while everything it took is still there.
///
/// The model's KV cache has [`num_blocks`] blocks.
pub(crate) fn of_largest_step<B: Backend, T>(
    model: &mut LoadedModel<B>,
    measure: impl FnOnce(&B) -> Result<T>,
) -> Result<T, RunError> {
    let plan = largest_step(&model.assignment);
    let alone = Unconnected::of(&model.assignment);
    let mut runner = ModelRunner::new(model, alone)?;
    // What comes out is meaningless: partial sums were not added. Reading it waits for the device.
    runner.logits(&plan)?;
    Ok(measure(runner.backend())?)
}

/// As many tokens as a step may have, in as few sequences as the longest length allows. They share their blocks: each
/// writes what the others write.
fn largest_step(assignment: &Assignment) -> StepPlan {
    let limits = &assignment.limits;
    let capacity = num_blocks(assignment) as usize * assignment.block_size;
    let tokens = vec![0; limits.max_tokens as usize];
    let rows = tokens.chunks(capacity.max(1)).take(limits.max_rows as usize);
    let row = |(sequence, tokens): (u64, &[u32])| StepRow {
        sequence: SequenceId(sequence),
        token_ids: tokens.to_vec(),
        num_computed_tokens: 0,
        block_table: (0..tokens.len().div_ceil(assignment.block_size))
            .map(|block| BlockId(block as u32))
            .collect(),
        sampling: Some(RowSampling::GREEDY),
        prompt_logprobs: None,
    };
    StepPlan {
        epoch: 0,
        step: 0,
        rows: (0..).zip(rows).map(row).collect(),
        masks_follow: false,
    }
}

/// A rank's place in a group that is not there yet: collectives take the memory that they will take, and do nothing.
struct Unconnected<B: Backend> {
    rank: usize,
    world_size: usize,
    /// Where a gather puts the ranks' parts before they are put in their columns; its size in f32.
    staging: Option<(usize, B::Buffer)>,
    gathers: bool,
}

impl<B: Backend> Unconnected<B> {
    fn of(assignment: &Assignment) -> Self {
        let world_size = assignment.world_size();
        Self {
            rank: assignment.rank,
            world_size,
            staging: None,
            gathers: assignment.plan.style == TensorParallelStyle::Gather && world_size > 1,
        }
    }
}

impl<B: Backend> Communicator<B> for Unconnected<B> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn buffer(&mut self, backend: &B, rows: usize, width: usize) -> Result<B::Buffer> {
        let size = rows.saturating_mul(width);
        if self.gathers && self.staging.as_ref().is_none_or(|(staged, _)| *staged < size) {
            self.staging = Some((size, backend.buffer(rows, width)?));
        }
        backend.buffer(rows, width)
    }

    fn all_gather(&mut self, _buffer: &mut B::Buffer, _rows: usize, _layout: GatherLayout<'_>) -> Result<()> {
        Ok(())
    }

    fn all_reduce(&mut self, _buffer: &mut B::Buffer, _rows: usize) -> Result<()> {
        Ok(())
    }

    fn exchange(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![message.to_vec(); self.world_size])
    }

    fn abort(&self) {}
}
