//! Decode steps as CUDA graphs: which steps, and what must happen beside the launch.

use std::collections::BTreeMap;

use phalanx_kernels::{
    Backend, BatchInput, CapturedCollectives, Communicator, DecodeShape, GraphCache, Heads, Result,
};

use crate::{assignment::Assignment, layers::Step, trace::Trace};

/// The captured steps of a rank in a group. All ranks have captured the same ones.
pub(crate) struct DecodeGraphs<B: Backend> {
    cache: B::GraphCache,
    /// By the number of rows.
    collectives: BTreeMap<usize, CapturedCollectives>,
}

impl<B: Backend> DecodeGraphs<B> {
    /// None if nothing is to be captured, or can be.
    pub(crate) fn new(backend: &B, assignment: &Assignment, heads: Heads) -> Result<Option<Self>> {
        let Some(&rows) = assignment.cudagraph_capture_sizes.last() else {
            return Ok(None);
        };
        let shape = DecodeShape {
            rows,
            blocks_per_row: assignment.limits.max_blocks_per_row as usize,
            num_blocks: assignment.limits.num_blocks as usize,
            block_size: assignment.block_size,
            heads,
        };
        let cache = backend.graph_cache(&shape)?;
        Ok(cache.map(|cache| Self {
            cache,
            collectives: BTreeMap::new(),
        }))
    }

    /// Runs `pass` on a step of `rows` rows of padding, then captures it.
    pub(crate) fn capture<C: Communicator<B>>(
        &mut self,
        backend: &B,
        comm: &mut C,
        rows: usize,
        mut pass: impl FnMut(&mut Step<'_, B, C>) -> Result<()>,
    ) -> Result<()> {
        self.cache.load(backend, &BatchInput::default(), rows)?;
        pass(&mut Step {
            backend,
            comm,
            batch: self.cache.batch(),
            rows,
            trace: &Trace::off(),
        })?;
        comm.begin_capture();
        let captured = self.cache.capture(backend, |batch| {
            pass(&mut Step {
                backend,
                comm,
                batch,
                rows,
                trace: &Trace::off(),
            })
        });
        let collectives = comm.end_capture();
        captured?;
        self.collectives.insert(rows, collectives);
        Ok(())
    }

    /// Queues the step's graph; false if it is not a step that was captured: one token of every sequence, all of them
    /// sampled, and no more than the largest graph has.
    pub(crate) fn replay<C: Communicator<B>>(
        &mut self,
        backend: &B,
        comm: &mut C,
        input: &BatchInput,
        sampled: &[u32],
    ) -> Result<bool> {
        let rows = input.num_rows();
        if rows != input.num_sequences() || rows != sampled.len() {
            return Ok(false);
        }
        let Some((&padded, collectives)) = self.collectives.range(rows..).next() else {
            return Ok(false);
        };
        tracing::trace!(rows, padded, "replaying a graph");
        self.cache.load(backend, input, padded)?;
        comm.replay(collectives)?;
        self.cache.replay(backend)?;
        Ok(true)
    }

    /// Device memory that they take.
    pub(crate) fn bytes(&self) -> usize {
        self.cache.bytes()
    }
}
