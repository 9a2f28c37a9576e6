//! The engine's loop body, the one place where scheduler and executor meet.

use std::time::Duration;

use phalanx_proto::step::{StepMasks, StepOutput, StepPlan};

use super::{
    Clock, Command, ConfigError, EngineConfig, Event, Executor, ExecutorError, Instant, KvEvent, Snapshot,
    scheduler::Scheduler,
};

/// What one turn came to.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// No sequence can run; the next turn makes sense once there is a command.
    Idle,
    Stepped(StepStats),
    /// The group was lost and a new one has taken over; every sequence will be computed again.
    Recovered {
        epoch: u32,
        cause: ExecutorError,
        /// Time from the loss being noticed to the new group.
        took: Duration,
    },
    /// The group was lost for good. Nothing will run any more.
    Fatal(EngineFailure),
}

/// One executed step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepStats {
    pub step: u64,
    /// Tokens computed.
    pub num_tokens: usize,
    /// Rows of the plan: the sequences that were part of it, and guesses.
    pub num_rows: usize,
    /// Time from handing the plan to the executor to its output.
    pub took: Duration,
    /// The part of it that rank 0 reports.
    pub forward: Duration,
}

/// Why the engine has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineFailure {
    #[error("{0}")]
    Closed(ExecutorError),
    #[error("{cause}; no new group could be formed: {rebuild}")]
    NotRebuilt {
        cause: ExecutorError,
        rebuild: ExecutorError,
    },
}

/// The whole engine: commands in, events out. Everything that can change a sequence happens in
/// [`EngineCore::step`], on the thread of the caller.
pub struct EngineCore<E, C> {
    scheduler: Scheduler,
    executor: E,
    clock: C,
    step_timeout: Duration,
    vocab_size: u32,
}

impl<E: Executor, C: Clock> EngineCore<E, C> {
    pub fn new(config: EngineConfig, executor: E, clock: C) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self {
            step_timeout: config.step_timeout,
            vocab_size: config.vocab_size,
            scheduler: Scheduler::new(config),
            executor,
            clock,
        })
    }

    /// One turn: apply what has come in, run one step, report.
    ///
    /// Planning and booking are separate and meet only in the plan, so that a second step may one day be planned before
    /// the first one's output is in.
    pub fn step(&mut self, inbox: impl IntoIterator<Item = Command>, events: &mut Vec<Event>) -> Progress {
        for command in inbox {
            self.scheduler.apply(command, events);
        }
        let Some(plan) = self.scheduler.schedule(events) else {
            self.scheduler.settle_pause(events);
            self.scheduler.check_invariants();
            return Progress::Idle;
        };
        let started = self.clock.now();
        let progress = match self.execute(&plan) {
            Ok(output) => {
                let stats = StepStats {
                    step: plan.step,
                    num_tokens: plan.num_tokens(),
                    num_rows: plan.rows.len(),
                    took: self.since(started),
                    forward: Duration::from_micros(output.forward_us.into()),
                };
                self.scheduler.update(&plan, output, events);
                Progress::Stepped(stats)
            }
            Err(cause) => self.recover(cause, Some(&plan), events),
        };
        self.scheduler.settle_pause(events);
        self.scheduler.check_invariants();
        progress
    }

    /// Forms a new group because a rank of `epoch` was lost outside of any step. Does nothing if that epoch is over.
    pub fn rank_lost(&mut self, epoch: u32, cause: ExecutorError, events: &mut Vec<Event>) -> Progress {
        if epoch != self.snapshot().epoch {
            return Progress::Idle;
        }
        let progress = self.recover(cause, None, events);
        self.scheduler.settle_pause(events);
        self.scheduler.check_invariants();
        progress
    }

    /// No sequence is live.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Whether the next [`EngineCore::step`] would do more than apply commands.
    pub fn has_work(&self) -> bool {
        self.scheduler.has_work()
    }

    /// What has changed in the prefix cache since the last call; nothing unless the configuration asks for it.
    pub fn take_kv_events(&mut self) -> Vec<KvEvent> {
        self.scheduler.take_kv_events()
    }

    #[cfg(test)]
    pub(crate) fn cached_blocks(&self) -> std::collections::BTreeSet<super::BlockHash> {
        self.scheduler.cached_blocks()
    }

    pub fn snapshot(&self) -> Snapshot {
        self.scheduler.snapshot()
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        self.executor.submit(plan)?;
        let masks = plan.masks_follow.then(|| self.scheduler.masks(plan));
        if let Some(masks) = &masks {
            self.executor.post_masks(masks)?;
        }
        let output = self.executor.wait(plan.step, self.step_timeout)?;
        check_output(plan, &output, self.vocab_size)?;
        if let Some(masks) = &masks {
            check_masked(masks, &output)?;
        }
        Ok(output)
    }

    fn recover(
        &mut self,
        cause: ExecutorError,
        failed: Option<&StepPlan>,
        events: &mut Vec<Event>,
    ) -> Progress {
        if cause == ExecutorError::Closed {
            return Progress::Fatal(EngineFailure::Closed(cause));
        }
        let started = self.clock.now();
        match self.executor.rebuild() {
            Ok(epoch) => {
                self.scheduler.requeue_running(epoch, failed, events);
                let took = self.since(started);
                Progress::Recovered { epoch, cause, took }
            }
            Err(rebuild) => Progress::Fatal(EngineFailure::NotRebuilt { cause, rebuild }),
        }
    }

    fn since(&self, started: Instant) -> Duration {
        self.clock.now().0.saturating_sub(started.0)
    }
}

/// The ranks' answer is believed only if it answers this plan: one token for each row that asked, with the tokens that it
/// lists, and a score for each prompt token that was to be scored, in the plan's order.
fn check_output(plan: &StepPlan, output: &StepOutput, vocab_size: u32) -> Result<(), ExecutorError> {
    let protocol = |message: String| Err(ExecutorError::Protocol(message));
    if (output.epoch, output.step) != (plan.epoch, plan.step) {
        return protocol(format!(
            "output of epoch {} step {} where epoch {} step {} was asked for",
            output.epoch, output.step, plan.epoch, plan.step
        ));
    }
    let asked = plan.rows.iter().filter(|row| row.sampling.is_some());
    if !asked
        .map(|row| row.sequence)
        .eq(output.sampled.iter().map(|sampled| sampled.sequence))
    {
        return protocol(format!(
            "output of step {} does not name the plan's sequences",
            plan.step
        ));
    }
    if !answers_prompts(plan, output) {
        return protocol(format!(
            "output of step {} does not score the plan's prompt tokens",
            plan.step
        ));
    }
    if !answers_lists(plan, output) {
        return protocol(format!(
            "output of step {} does not report the tokens that the plan lists",
            plan.step
        ));
    }
    let known = |token: u32| token < vocab_size;
    match output.sampled.iter().find(|sampled| !known(sampled.token)) {
        Some(sampled) => protocol(format!(
            "token {} of {:?} is not in the vocabulary",
            sampled.token, sampled.sequence
        )),
        None => Ok(()),
    }
}

/// No rank may have drawn what its row's mask rules out.
fn check_masked(masks: &StepMasks, output: &StepOutput) -> Result<(), ExecutorError> {
    // Both are in the plan's order.
    let mut masks = masks.masks.iter().peekable();
    for sampled in &output.sampled {
        let Some(mask) = masks.next_if(|mask| mask.sequence == sampled.sequence) else {
            continue;
        };
        if sampled.finite && !mask.allowed.contains(sampled.token) {
            return Err(ExecutorError::Protocol(format!(
                "token {} of {:?} is not allowed by its mask",
                sampled.token, sampled.sequence
            )));
        }
    }
    Ok(())
}

/// Whether each row's listed tokens are reported, of an `output` that names the plan's sequences.
fn answers_lists(plan: &StepPlan, output: &StepOutput) -> bool {
    let asked = plan.rows.iter().filter_map(|row| row.sampling.as_ref());
    asked.zip(&output.sampled).all(|(sampling, sampled)| {
        let reported = sampled.top_logprobs.iter().map(|&(id, _)| id);
        let listed = &sampling.logprob_token_ids;
        listed.is_empty() || !sampled.finite || reported.eq(listed.iter().copied())
    })
}

fn answers_prompts(plan: &StepPlan, output: &StepOutput) -> bool {
    let mut answers = output.prompt_logprobs.iter();
    let mut asked = plan
        .rows
        .iter()
        .filter_map(|row| Some((row.sequence, &row.prompt_logprobs.as_ref()?.targets)));
    let all_scored = asked.all(|(sequence, targets)| {
        answers.next().is_some_and(|answer| {
            let tokens = answer.tokens.iter().map(|scored| scored.token);
            answer.sequence == sequence && tokens.eq(targets.iter().copied())
        })
    });
    all_scored && answers.next().is_none()
}
