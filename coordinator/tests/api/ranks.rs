//! Ranks that say what a test has written down, one step at a time if the test wants it so.

use std::{collections::HashMap, sync::mpsc::Receiver, time::Duration};

use phalanx_coordinator::engine::{Executor, ExecutorError};
use phalanx_proto::step::{
    SampledToken, ScoredPrompt, ScoredToken, StepMasks, StepOutput, StepPlan, StepRow,
};

/// Every prompt of these tests, `Hello world`.
pub(crate) const PROMPT: &str = "Hello world";
const PROMPT_TOKENS: u32 = 2;
/// ` world`, said once a script is over and by requests without one.
pub(crate) const FILLER: u32 = 905;

/// What the next step does.
pub(crate) enum Permit {
    Step,
    LoseRank,
}

/// Under the real engine, in the place of the rank group.
pub(crate) struct ScriptedRanks {
    /// What a sequence says, by its seed.
    pub(crate) scripts: HashMap<u64, Vec<u32>>,
    /// One permit for each step; once the sender is gone, steps are free.
    pub(crate) gate: Receiver<Permit>,
    pub(crate) output: Option<StepOutput>,
}

impl ScriptedRanks {
    fn sample(&self, row: &StepRow) -> Option<SampledToken> {
        let sampling = row.sampling.as_ref()?;
        let known = row.num_computed_tokens + row.token_ids.len() as u32;
        let script = self.scripts.get(&sampling.seed).map_or(&[][..], Vec::as_slice);
        let scripted = script.get(known.saturating_sub(PROMPT_TOKENS) as usize).copied();
        let forced = sampling.bias.iter().find(|(_, bias)| *bias >= 100.0);
        let token = forced.map(|(token, _)| *token).or(scripted).unwrap_or(FILLER);
        let count = sampling.logprobs.unwrap_or(0);
        Some(SampledToken {
            sequence: row.sequence,
            token,
            finite: true,
            logprob: sampling.logprobs.map(|_| -0.5),
            rank: sampling.logprobs.map(|_| 1),
            top_logprobs: if sampling.logprob_token_ids.is_empty() {
                (0..count).map(|at| (token + at, -0.5 - at as f32)).collect()
            } else {
                let listed = sampling.logprob_token_ids.iter();
                listed
                    .map(|&id| (id, if id == token { -0.5 } else { -2.5 }))
                    .collect()
            },
        })
    }
}

/// Every known token is the second of two.
fn scored(row: &StepRow) -> Option<ScoredPrompt> {
    let wanted = row.prompt_logprobs.as_ref()?;
    let tokens = wanted.targets.iter().map(|&token| ScoredToken {
        token,
        logprob: -1.5,
        rank: 2,
        top_logprobs: [(FILLER, -0.25), (token, -1.5)]
            .into_iter()
            .take(wanted.top as usize)
            .collect(),
    });
    Some(ScoredPrompt {
        sequence: row.sequence,
        tokens: tokens.collect(),
    })
}

impl Executor for ScriptedRanks {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        if let Ok(Permit::LoseRank) = self.gate.recv() {
            return Err(ExecutorError::RankLost {
                rank: 3,
                cause: "killed".into(),
            });
        }
        self.output = Some(StepOutput {
            epoch: plan.epoch,
            step: plan.step,
            sampled: plan.rows.iter().filter_map(|row| self.sample(row)).collect(),
            prompt_logprobs: plan.rows.iter().filter_map(scored).collect(),
            forward_us: 1,
        });
        Ok(())
    }
    /// Who would say what its mask rules out says the first token that is allowed.
    fn post_masks(&mut self, masks: &StepMasks) -> Result<(), ExecutorError> {
        let sampled = self.output.iter_mut().flat_map(|output| &mut output.sampled);
        for sampled in sampled {
            let mask = masks.masks.iter().find(|mask| mask.sequence == sampled.sequence);
            let Some(allowed) = mask.map(|mask| &mask.allowed) else {
                continue;
            };
            if !allowed.contains(sampled.token) {
                let first = (0..allowed.vocab_size()).find(|&id| allowed.contains(id));
                sampled.finite = first.is_some();
                sampled.token = first.unwrap_or(0);
            }
        }
        Ok(())
    }
    fn wait(&mut self, step: u64, _: Duration) -> Result<StepOutput, ExecutorError> {
        self.output.take().ok_or(ExecutorError::Deadline { step })
    }
    fn rebuild(&mut self) -> Result<u32, ExecutorError> {
        Err(ExecutorError::Protocol(
            "there is no rank to take its place".into(),
        ))
    }
}
