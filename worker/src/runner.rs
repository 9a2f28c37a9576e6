//! One step on one rank: plan in, sampled tokens out.

use std::{ops::Range, path::PathBuf, time::Instant};

use phalanx_kernels::{Backend, BatchInput, Communicator};
use phalanx_proto::step::{ScoredPrompt, StepMasks, StepOutput, StepPlan, StepRow, TokenSet};

use crate::{
    assignment::Assignment,
    error::{PlanError, RunError},
    graphs::DecodeGraphs,
    layers::Step,
    models::LlamaForCausalLm,
    sampler::{self, KnownRow, SamplingRow, Vocabulary},
    trace::Trace,
    workspace::Workspace,
};

/// Weights and KV cache, which outlive any group, and the device they lie on.
pub struct LoadedModel<B: Backend> {
    pub backend: B,
    pub assignment: Assignment,
    pub model: LlamaForCausalLm<B>,
    /// Bytes that weights, and K and V, take on this rank.
    pub weight_bytes: u64,
    pub kv_bytes: u64,
    /// What the weights were read from.
    pub path: PathBuf,
    /// SHA-256 over the model file's header: ranks that disagree hold different models.
    pub fingerprint: [u8; 32],
}

/// A loaded model in a group, for as long as the group lasts.
pub struct ModelRunner<'a, B: Backend, C: Communicator<B>> {
    loaded: &'a mut LoadedModel<B>,
    /// Before the communicator, which NCCL does not free while there are graphs of its collectives.
    graphs: Option<DecodeGraphs<B>>,
    comm: C,
    workspace: Workspace<B>,
    trace: Trace,
    /// Token ids of each rank.
    vocab: Vec<Range<usize>>,
}

impl<'a, B: Backend, C: Communicator<B>> ModelRunner<'a, B, C> {
    /// Allocates the group's activations. All ranks do so together.
    pub fn new(loaded: &'a mut LoadedModel<B>, mut comm: C) -> Result<Self, RunError> {
        let assignment = &loaded.assignment;
        if comm.world_size() != assignment.world_size() {
            return Err(RunError::WorldSize {
                expected: assignment.world_size(),
                found: comm.world_size(),
            });
        }
        let workspace = Workspace::new(&loaded.backend, &mut comm, assignment)?;
        let heads = loaded.model.layers[0].attention.qkv_proj.heads;
        let graphs = DecodeGraphs::new(&loaded.backend, assignment, heads)?;
        let shards = assignment.plan.ranks.iter();
        let vocab = shards.map(|shard| shard.vocab.clone()).collect();
        Ok(Self {
            loaded,
            graphs,
            comm,
            workspace,
            trace: Trace::off(),
            vocab,
        })
    }

    /// Records what is done from now on.
    pub fn record(&mut self, trace: Trace) {
        self.trace = trace;
    }

    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    pub(crate) fn assignment(&self) -> &Assignment {
        &self.loaded.assignment
    }

    /// What it runs on.
    pub fn backend(&self) -> &B {
        &self.loaded.backend
    }

    /// Captures the decode steps that the assignment names, the largest first. All ranks must call it together, before
    /// the first step. `progress(done, total)` hears of every graph.
    pub fn capture_graphs(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<(), RunError> {
        let Some(graphs) = &mut self.graphs else {
            return Ok(());
        };
        let started = Instant::now();
        let LoadedModel {
            backend,
            assignment,
            model,
            ..
        } = &mut *self.loaded;
        let sizes = &assignment.cudagraph_capture_sizes;
        progress(0, sizes.len());
        for (done, &rows) in (1..).zip(sizes.iter().rev()) {
            // What padding rows are: the embedding of token 0.
            let owners = vec![model.embed_tokens.owner(0); rows];
            let sampled: Vec<u32> = (0..rows as u32).collect();
            graphs.capture(backend, &mut self.comm, rows, |step| {
                model.step(step, &mut self.workspace, &owners, &sampled)
            })?;
            // As every step ends: the device has done it, and all ranks have met.
            backend.read(&self.workspace.logits, 1)?;
            self.comm.exchange(&[])?;
            progress(done, sizes.len());
        }
        tracing::info!(
            rank = assignment.rank,
            graphs = sizes.len(),
            bytes = graphs.bytes(),
            elapsed = ?started.elapsed(),
            "graph capturing finished"
        );
        Ok(())
    }

    /// Runs `plan` and samples the rows that ask for it. Every rank returns the same tokens; `forward_us` is left 0.
    ///
    /// `masks` is asked for the masks of a plan that says they follow, once the layers have been run or, on a device that
    /// does that by itself, queued.
    pub fn execute(
        &mut self,
        plan: &StepPlan,
        masks: impl FnOnce() -> Result<StepMasks, RunError>,
    ) -> Result<StepOutput, RunError> {
        let sampled = self.forward(plan)?;
        let masks = if plan.masks_follow { Some(masks()?) } else { None };
        let rows = sampling_rows(plan, masks.as_ref())?;
        debug_assert_eq!(rows.len(), sampled);
        let vocab = Vocabulary {
            ranks: &self.vocab,
            rank: self.loaded.assignment.rank,
        };
        let (backend, comm, logits) = (&self.loaded.backend, &mut self.comm, &self.workspace.logits);
        let sampled = self
            .trace
            .op("sample", || sampler::sample(backend, comm, logits, vocab, &rows))?;
        Ok(StepOutput {
            epoch: plan.epoch,
            step: plan.step,
            sampled,
            prompt_logprobs: self.score_prompts(plan)?,
            forward_us: 0,
        })
    }

    /// Scores the prompt tokens that the last [`Self::forward`], of this plan, was asked for. The LM head runs over as
    /// many rows at a time as the workspace has logits for, which are overwritten.
    fn score_prompts(&mut self, plan: &StepPlan) -> Result<Vec<ScoredPrompt>, RunError> {
        let wanted = prompt_rows(plan);
        let vocab = Vocabulary {
            ranks: &self.vocab,
            rank: self.loaded.assignment.rank,
        };
        let LoadedModel {
            backend,
            assignment,
            model,
            ..
        } = &*self.loaded;
        let mut scored = Vec::with_capacity(wanted.len());
        for some in wanted.chunks(assignment.limits.max_rows as usize) {
            let (rows, known): (Vec<u32>, Vec<KnownRow>) = some.iter().copied().unzip();
            model.compute_logits(backend, &mut self.workspace, &rows)?;
            let logits = &self.workspace.logits;
            scored.extend(sampler::score(backend, &mut self.comm, logits, vocab, &known)?);
        }
        let mut scored = scored.into_iter();
        let asked = plan.rows.iter().filter_map(|row| {
            let targets = row.prompt_logprobs.as_ref()?.targets.len();
            Some(ScoredPrompt {
                sequence: row.sequence,
                tokens: scored.by_ref().take(targets).collect(),
            })
        });
        Ok(asked.collect())
    }

    /// Runs `plan` and returns this rank's columns of the logits, one row after another, of the rows that would be
    /// sampled. All ranks must call it together, as with [`Self::execute`].
    pub fn logits(&mut self, plan: &StepPlan) -> Result<Vec<f32>, RunError> {
        let sampled = self.forward(plan)?;
        let logits = self.loaded.backend.read(&self.workspace.logits, sampled)?;
        // The meeting that ends every step.
        self.comm.exchange(&[])?;
        Ok(logits)
    }

    /// Leaves the logits of the sampled rows in the workspace; returns how many.
    fn forward(&mut self, plan: &StepPlan) -> Result<usize, RunError> {
        let LoadedModel {
            backend,
            assignment,
            model,
            ..
        } = &mut *self.loaded;
        let (input, sampled) = batch_input(plan, assignment)?;
        let replayed = match &mut self.graphs {
            Some(graphs) => self.trace.op("graph", || {
                graphs.replay(backend, &mut self.comm, &input, &sampled)
            })?,
            None => false,
        };
        if !replayed && input.num_rows() > 0 {
            let owners: Vec<u32> = input
                .token_ids
                .iter()
                .map(|&id| model.embed_tokens.owner(id))
                .collect();
            let batch = backend.batch(&input)?;
            let mut step = Step {
                backend: &*backend,
                comm: &mut self.comm,
                batch: &batch,
                rows: input.num_rows(),
                trace: &self.trace,
            };
            model.step(&mut step, &mut self.workspace, &owners, &sampled)?;
        }
        Ok(sampled.len())
    }
}

/// The rows to sample, each with its mask if it has one. Every mask must be a sampled row's.
fn sampling_rows<'a>(
    plan: &'a StepPlan,
    masks: Option<&'a StepMasks>,
) -> Result<Vec<SamplingRow<'a>>, PlanError> {
    if let Some(masks) = masks
        && (masks.epoch, masks.step) != (plan.epoch, plan.step)
    {
        return Err(PlanError::ForeignMasks {
            epoch: masks.epoch,
            step: masks.step,
        });
    }
    // In the plan's order.
    let mut masks = masks.into_iter().flat_map(|masks| &masks.masks).peekable();
    let mut rows = Vec::new();
    for row in &plan.rows {
        let Some(sampling) = &row.sampling else { continue };
        let mask = masks.next_if(|mask| mask.sequence == row.sequence);
        let allowed: Option<&TokenSet> = mask.map(|mask| &mask.allowed);
        rows.push(SamplingRow {
            sequence: row.sequence,
            position: end_position(row),
            sampling,
            allowed,
        });
    }
    match masks.next() {
        None => Ok(rows),
        Some(mask) => Err(PlanError::MaskWithoutRow(mask.sequence.0)),
    }
}

/// Index in its sequence of the token after the row's last.
fn end_position(row: &StepRow) -> u64 {
    u64::from(row.num_computed_tokens) + row.token_ids.len() as u64
}

/// The rows of activations that prompt tokens are scored by, in the plan's order.
fn prompt_rows(plan: &StepPlan) -> Vec<(u32, KnownRow)> {
    let mut rows = Vec::new();
    let mut start = 0;
    for row in &plan.rows {
        if let Some(wanted) = &row.prompt_logprobs {
            let known = wanted.targets.iter().map(|&token| KnownRow {
                token,
                top: wanted.top,
            });
            rows.extend((start + wanted.first..).zip(known));
        }
        start += row.token_ids.len() as u32;
    }
    rows
}

/// Flattens a plan, and names the rows of activations that are sampled from. Everything that becomes an index on the
/// device is checked here against what was allocated.
pub fn batch_input(plan: &StepPlan, assignment: &Assignment) -> Result<(BatchInput, Vec<u32>), PlanError> {
    let limits = &assignment.limits;
    let over = |row, field, value: usize, limit: u32| PlanError::OverLimit {
        row,
        field,
        value: value as u64,
        limit: limit.into(),
    };
    if plan.rows.len() > limits.max_rows as usize {
        return Err(over(
            limits.max_rows as usize,
            "rows",
            plan.rows.len(),
            limits.max_rows,
        ));
    }
    let mut input = BatchInput {
        cu_seqlens_q: vec![0],
        cu_blocks: vec![0],
        ..BatchInput::default()
    };
    let mut sampled = Vec::new();
    for (i, row) in plan.rows.iter().enumerate() {
        check_row(i, row, assignment)?;
        let total = input.token_ids.len() + row.token_ids.len();
        if total > limits.max_tokens as usize {
            return Err(over(i, "tokens", total, limits.max_tokens));
        }
        push_row(&mut input, row, assignment.block_size as u32);
        if row.sampling.is_some() {
            sampled.push(total as u32 - 1);
        }
    }
    Ok((input, sampled))
}

fn check_row(i: usize, row: &StepRow, assignment: &Assignment) -> Result<(), PlanError> {
    let limits = &assignment.limits;
    let bounded = |field, value: u64, limit: u64| {
        if value <= limit {
            Ok(())
        } else {
            Err(PlanError::OverLimit {
                row: i,
                field,
                value,
                limit,
            })
        }
    };
    let last_token = u64::from(limits.vocab_size) - 1;
    let last_block = u64::from(limits.num_blocks) - 1;
    if row.token_ids.is_empty() {
        return Err(PlanError::Empty { row: i });
    }
    for &id in &row.token_ids {
        bounded("token_ids", id.into(), last_token)?;
    }
    for block in &row.block_table {
        bounded("block_table", block.0.into(), last_block)?;
    }
    if let Some(wanted) = &row.prompt_logprobs {
        let end = u64::from(wanted.first) + wanted.targets.len() as u64;
        bounded("prompt_logprobs.targets", end, row.token_ids.len() as u64)?;
        for &id in &wanted.targets {
            bounded("prompt_logprobs.targets", id.into(), last_token)?;
        }
    }
    let blocks = row.block_table.len();
    bounded("blocks", blocks as u64, limits.max_blocks_per_row.into())?;
    let capacity = blocks as u64 * assignment.block_size as u64;
    let needed = end_position(row);
    if needed > capacity {
        return Err(PlanError::ShortBlockTable {
            row: i,
            blocks,
            capacity,
            needed,
        });
    }
    Ok(())
}

/// `row` has passed [`check_row`]: every position has its block, and slots fit u32.
fn push_row(input: &mut BatchInput, row: &StepRow, block_size: u32) {
    for (offset, &token_id) in row.token_ids.iter().enumerate() {
        let position = row.num_computed_tokens + offset as u32;
        let block = row.block_table[(position / block_size) as usize].0;
        input.token_ids.push(token_id);
        input.positions.push(position);
        input
            .slot_mapping
            .push(block * block_size + position % block_size);
    }
    // Blocks past the last token may be given but hold nothing yet.
    let context_len = row.num_computed_tokens + row.token_ids.len() as u32;
    let used = context_len.div_ceil(block_size) as usize;
    input
        .block_tables
        .extend(row.block_table[..used].iter().map(|block| block.0));
    input.context_lens.push(context_len);
    input.cu_seqlens_q.push(input.token_ids.len() as u32);
    input.cu_blocks.push(input.block_tables.len() as u32);
}
