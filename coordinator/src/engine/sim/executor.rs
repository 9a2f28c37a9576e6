//! The simulated rank group.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use phalanx_proto::step::{
    SampledToken, ScoredPrompt, SequenceId, StepLimits, StepMasks, StepOutput, StepPlan, TokenMask,
    decode_masks, decode_plan, encode_masks, encode_plan,
};

use super::{Prng, VOCAB_SIZE, kv_entry, logprob, logprobs_of, mix, sample, score};
use crate::engine::{EngineConfig, Executor, ExecutorError};

/// What goes wrong, and how often.
#[derive(Clone, Copy, Default)]
pub(crate) struct Faults {
    /// One step in so many is lost; 0: none.
    pub(crate) one_in: u64,
    /// But no more than this: a prompt that takes longer than the ranks live would never end.
    pub(crate) most: u32,
    pub(crate) seed: u64,
    /// Every step that has this sequence in it is lost.
    pub(crate) poison: Option<SequenceId>,
    /// No group can be formed again after so many.
    pub(crate) max_rebuilds: Option<u32>,
}

/// What the test sees of the ranks.
#[derive(Default)]
pub(crate) struct Observed {
    pub(crate) last_plan: Vec<SequenceId>,
    pub(crate) num_faults: u32,
    /// Of every plan, in order.
    pub(crate) trace: u64,
}

pub(crate) struct SimExecutor {
    limits: StepLimits,
    block_size: usize,
    /// One entry per token slot of every block.
    kv: Vec<Option<u64>>,
    epoch: u32,
    last_step: u64,
    pending: Option<StepPlan>,
    masks: Option<Vec<TokenMask>>,
    ring_slot: Vec<u8>,
    faults: Faults,
    prng: Prng,
    num_rebuilds: u32,
    observed: Arc<Mutex<Observed>>,
}

impl SimExecutor {
    pub(crate) fn new(config: &EngineConfig, faults: Faults) -> Self {
        let limits = config.step_limits();
        Self {
            limits,
            block_size: config.block_size as usize,
            kv: vec![None; (config.num_blocks * config.block_size) as usize],
            epoch: config.epoch,
            last_step: 0,
            pending: None,
            masks: None,
            ring_slot: vec![0; limits.plan_slot_bytes()],
            faults,
            prng: Prng(faults.seed),
            num_rebuilds: 0,
            observed: Arc::default(),
        }
    }

    pub(crate) fn observed(&self) -> Arc<Mutex<Observed>> {
        Arc::clone(&self.observed)
    }

    /// Sends the plan through the ring's codec, as the ranks would get it.
    fn receive(&mut self, plan: &StepPlan) -> StepPlan {
        let len = encode_plan(plan, &mut self.ring_slot).expect("a plan within its limits fits its slot");
        let bytes = &self.ring_slot[..len];
        let decoded = decode_plan(bytes, &self.limits).expect("a plan the codec takes");
        assert_eq!(&decoded, plan);
        assert_eq!(plan.epoch, self.epoch, "plan of a dead group");
        assert_eq!(plan.step, self.last_step + 1, "steps count up by one");
        self.last_step = plan.step;
        let mut observed = self.observed.lock().unwrap();
        observed.trace = bytes.iter().fold(observed.trace, |hash, &b| mix(hash, b.into()));
        observed.last_plan = plan.rows.iter().map(|row| row.sequence).collect();
        decoded
    }

    fn run(&mut self, plan: &StepPlan, masks: &[TokenMask]) -> StepOutput {
        let mut masks = masks.iter().peekable();
        let (mut sampled, mut prompt_logprobs) = (Vec::new(), Vec::new());
        for row in &plan.rows {
            let distinct: BTreeSet<_> = row.block_table.iter().collect();
            assert_eq!(distinct.len(), row.block_table.len(), "a block twice in a table");
            let start = row.num_computed_tokens as usize;
            let end = start + row.token_ids.len();
            assert_eq!(
                row.block_table.len(),
                end.div_ceil(self.block_size),
                "table length"
            );
            let slot = |position: usize| {
                let block = row.block_table[position / self.block_size].0 as usize;
                block * self.block_size + position % self.block_size
            };
            for (offset, &token) in row.token_ids.iter().enumerate() {
                self.kv[slot(start + offset)] = Some(kv_entry(token, row.sequence));
            }
            let context = |end| (0..end).map(|position| self.kv[slot(position)].unwrap_or(u64::MAX));
            if let Some(wanted) = &row.prompt_logprobs {
                let first = start + wanted.first as usize + 1;
                let known = (first..).zip(&wanted.targets);
                prompt_logprobs.push(ScoredPrompt {
                    sequence: row.sequence,
                    tokens: known
                        .map(|(at, &token)| score(context(at), token, wanted.top))
                        .collect(),
                });
            }
            if let Some(sampling) = &row.sampling {
                let mask = masks.next_if(|mask| mask.sequence == row.sequence);
                let context: Vec<u64> = context(end).collect();
                let (token, finite) = sample(&context, sampling, mask.map(|mask| &mask.allowed));
                sampled.push(SampledToken {
                    sequence: row.sequence,
                    token,
                    finite,
                    logprob: sampling.logprobs.map(|_| logprob(&context, token)),
                    rank: sampling.logprobs.map(|_| 1),
                    top_logprobs: logprobs_of(&context, &sampling.logprob_token_ids),
                });
            }
        }
        assert_eq!(masks.next(), None, "a mask is that of a sampled row");
        StepOutput {
            epoch: plan.epoch,
            step: plan.step,
            sampled,
            prompt_logprobs,
            forward_us: 1,
        }
    }

    /// An answer that must not be believed.
    fn garble(&mut self, mut output: StepOutput, masks: &[TokenMask]) -> StepOutput {
        if self.prng.one_in(2) && break_mask(&mut output, masks) {
            return output;
        }
        match (self.prng.below(6), output.sampled.first().cloned()) {
            (0, Some(mut foreign)) => {
                foreign.sequence = SequenceId(u64::MAX);
                output.sampled[0] = foreign;
            }
            (1, Some(mut unknown)) => {
                unknown.token = VOCAB_SIZE;
                output.sampled[0] = unknown;
            }
            (2, Some(again)) => output.sampled.push(again),
            (3, _) => output.step -= 1,
            (4, _) if output.prompt_logprobs.pop().is_some() => {}
            (5, Some(first)) if first.finite && output.sampled[0].top_logprobs.pop().is_some() => {}
            _ => output.epoch += 1,
        }
        output
    }

    fn strikes(&mut self, one_in: u64) -> bool {
        self.prng.one_in(one_in) && self.observed.lock().unwrap().num_faults < self.faults.most
    }

    fn lost(&self, cause: &str) -> ExecutorError {
        self.observed.lock().unwrap().num_faults += 1;
        ExecutorError::RankLost {
            rank: 1,
            cause: cause.into(),
        }
    }
}

impl Executor for SimExecutor {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let plan = self.receive(plan);
        let poisoned = |id: SequenceId| Some(id) == self.faults.poison;
        if plan.rows.iter().any(|row| poisoned(row.sequence)) {
            return Err(self.lost("poison"));
        }
        if self.strikes(3 * self.faults.one_in) {
            return Err(self.lost("on submit"));
        }
        self.pending = Some(plan);
        self.masks = None;
        Ok(())
    }

    fn post_masks(&mut self, masks: &StepMasks) -> Result<(), ExecutorError> {
        let len = encode_masks(masks, &mut self.ring_slot).expect("masks within their limits fit their slot");
        let decoded = decode_masks(&self.ring_slot[..len], &self.limits).expect("masks the codec takes");
        assert_eq!(&decoded, masks);
        assert_eq!(
            (masks.epoch, masks.step),
            (self.epoch, self.last_step),
            "masks of the last plan"
        );
        if self.strikes(5 * self.faults.one_in) {
            return Err(self.lost("on masks"));
        }
        self.masks = Some(decoded.masks);
        Ok(())
    }

    fn wait(&mut self, step: u64, _limit: Duration) -> Result<StepOutput, ExecutorError> {
        let plan = self.pending.take().expect("a step was submitted");
        let masks = self.masks.take();
        assert_eq!(
            masks.is_some(),
            plan.masks_follow,
            "masks come when they were announced"
        );
        let masks = masks.unwrap_or_default();
        let output = self.run(&plan, &masks);
        if self.strikes(self.faults.one_in) {
            let lost = self.lost("while computing");
            return match self.prng.below(3) {
                0 => Err(lost),
                1 => Err(ExecutorError::Deadline { step }),
                _ => Ok(self.garble(output, &masks)),
            };
        }
        Ok(output)
    }

    fn rebuild(&mut self) -> Result<u32, ExecutorError> {
        if self.faults.max_rebuilds == Some(self.num_rebuilds) {
            return Err(ExecutorError::Protocol("no replacement rank".into()));
        }
        self.num_rebuilds += 1;
        self.epoch += 1;
        self.kv.fill(None);
        Ok(self.epoch)
    }
}

/// Draws a token that its mask rules out; false if no mask does.
fn break_mask(output: &mut StepOutput, masks: &[TokenMask]) -> bool {
    for mask in masks {
        let mut sampled = output.sampled.iter_mut().filter(|sampled| sampled.finite);
        let sampled = sampled.find(|sampled| sampled.sequence == mask.sequence);
        let ruled_out = (0..VOCAB_SIZE).find(|&id| !mask.allowed.contains(id));
        if let (Some(sampled), Some(ruled_out)) = (sampled, ruled_out) {
            sampled.token = ruled_out;
            return true;
        }
    }
    false
}
