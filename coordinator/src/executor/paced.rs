//! Ranks that compute nothing. What is left to measure is everything around them.

use std::{
    thread,
    time::{Duration, Instant},
};

use phalanx_proto::step::{SampledToken, StepMasks, StepOutput, StepPlan, StepRow};

use crate::engine::{Executor, ExecutorError};

/// Gives every row that samples the next token of one text, as if a step took a fixed time.
pub struct PacedExecutor {
    text: Vec<u32>,
    step_time: Duration,
    /// When it is there, and what it is.
    in_flight: Option<(Instant, StepOutput)>,
}

impl PacedExecutor {
    /// `text` is repeated as often as needed; zero of `step_time` is a step that takes no time.
    ///
    /// # Panics
    /// If `text` is empty.
    pub fn new(text: Vec<u32>, step_time: Duration) -> Self {
        assert!(!text.is_empty(), "a text of no tokens has no next one");
        Self {
            text,
            step_time,
            in_flight: None,
        }
    }

    fn sample(&self, row: &StepRow) -> Option<SampledToken> {
        let sampling = row.sampling.as_ref()?;
        let known = row.num_computed_tokens as usize + row.token_ids.len();
        let token = self.text[known % self.text.len()];
        // The text is certain.
        let logprob = |id: u32| if id == token { 0.0 } else { f32::NEG_INFINITY };
        let listed = sampling.logprob_token_ids.iter();
        Some(SampledToken {
            sequence: row.sequence,
            token,
            finite: true,
            logprob: sampling.logprobs.map(|_| logprob(token)),
            rank: sampling.logprobs.map(|_| 1),
            top_logprobs: listed.map(|&id| (id, logprob(id))).collect(),
        })
    }
}

impl Executor for PacedExecutor {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let output = StepOutput {
            epoch: plan.epoch,
            step: plan.step,
            sampled: plan.rows.iter().filter_map(|row| self.sample(row)).collect(),
            prompt_logprobs: Vec::new(),
            forward_us: self.step_time.as_micros() as u32,
        };
        self.in_flight = Some((Instant::now() + self.step_time, output));
        Ok(())
    }

    /// Rows whose token is ruled out say the first that is not.
    fn post_masks(&mut self, masks: &StepMasks) -> Result<(), ExecutorError> {
        let step = masks.step;
        let (_, output) = self.in_flight.as_mut().ok_or(ExecutorError::Deadline { step })?;
        let mut masks = masks.masks.iter().peekable();
        for sampled in &mut output.sampled {
            let Some(mask) = masks.next_if(|mask| mask.sequence == sampled.sequence) else {
                continue;
            };
            if !mask.allowed.contains(sampled.token) {
                let first = (0..mask.allowed.vocab_size()).find(|&id| mask.allowed.contains(id));
                (sampled.token, sampled.finite) = first.map_or((0, false), |id| (id, true));
            }
        }
        Ok(())
    }

    fn wait(&mut self, step: u64, _limit: Duration) -> Result<StepOutput, ExecutorError> {
        let (ready, output) = self.in_flight.take().ok_or(ExecutorError::Deadline { step })?;
        thread::sleep(ready.saturating_duration_since(Instant::now()));
        Ok(output)
    }

    fn rebuild(&mut self) -> Result<u32, ExecutorError> {
        Err(ExecutorError::Protocol("there is no rank to replace".into()))
    }
}
