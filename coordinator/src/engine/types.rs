//! The engine's vocabulary: what goes in, what comes out, and the two seams it is driven through.

use std::time::Duration;

use phalanx_proto::step::{
    Penalties, SampledToken, ScoredToken, SequenceId, StepMasks, StepOutput, StepPlan,
};

use super::{Constraint, ConstraintError, RepetitionDetection, pause::PauseMode, request::RequestError};

/// Time since the engine's start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Instant(pub Duration);

pub trait Clock {
    fn now(&self) -> Instant;
}

/// The rank group seen as one device.
pub trait Executor {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError>;
    /// The masks of the plan that was submitted last, which has said that they follow.
    fn post_masks(&mut self, masks: &StepMasks) -> Result<(), ExecutorError>;
    /// The output of `step`, or an error once `limit` has passed since the call.
    fn wait(&mut self, step: u64, limit: Duration) -> Result<StepOutput, ExecutorError>;
    /// Replaces lost ranks and forms a new group, whose epoch is returned. All KV is gone.
    fn rebuild(&mut self) -> Result<u32, ExecutorError>;
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecutorError {
    #[error("rank {rank} lost: {cause}")]
    RankLost { rank: u32, cause: String },
    #[error("step {step} missed its deadline")]
    Deadline { step: u64 },
    #[error("{0}")]
    Protocol(String),
    /// The group is being shut down on purpose.
    #[error("the group is closed")]
    Closed,
}

/// One sequence to be completed. Text has become tokens, names have become ids, defaults have been filled in.
#[derive(Clone, Debug)]
pub struct EngineRequest {
    pub id: SequenceId,
    /// Never empty.
    pub prompt: Vec<u32>,
    /// Output that was made elsewhere, to go on from; mostly empty, never complete.
    pub output: Vec<u32>,
    pub sampling: SamplingParams,
    pub stop: StopRules,
    pub constraint: Box<Constraint>,
    /// Smaller is more urgent; only the priority policy looks at it.
    pub priority: i32,
    /// Separates prefix-cache entries of callers who must not see each other's timing.
    pub cache_salt: Option<String>,
    /// Whose request it is; only the fair policy looks at it.
    pub tenant: TenantId,
}

/// A caller, told apart by API key. Never the key itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct TenantId(pub u64);

/// How tokens are drawn; the meaning of each field is that of `phalanx_proto::step::RowSampling`.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: u64,
    pub logprobs: Option<u32>,
    pub logprob_token_ids: Vec<u32>,
    /// Score every prompt token after the first, and report so many of the best tokens beside each.
    pub prompt_logprobs: Option<u32>,
    pub logit_bias: Vec<(u32, f32)>,
}

impl SamplingParams {
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
        logprobs: None,
        logprob_token_ids: Vec::new(),
        prompt_logprobs: None,
        logit_bias: Vec::new(),
    };
    /// None when every penalty is off, so that nothing has to be counted or sent.
    pub fn penalties(&self, history: impl FnOnce() -> Vec<(u32, u32)>) -> Option<Penalties> {
        let off =
            self.repetition_penalty == 1.0 && self.presence_penalty == 0.0 && self.frequency_penalty == 0.0;
        (!off).then(|| Penalties {
            repetition: self.repetition_penalty,
            presence: self.presence_penalty,
            frequency: self.frequency_penalty,
            history: history(),
        })
    }
}

/// When a sequence ends. Stop strings are the text layer's business: it finishes the sequence by [`Command::Finish`].
#[derive(Clone, Debug, PartialEq)]
pub struct StopRules {
    /// At least 1; prompt + max_tokens fits the context.
    pub max_tokens: u32,
    /// No stop token ends the sequence earlier, and end-of-sequence tokens are banned until then.
    pub min_tokens: u32,
    /// End-of-sequence and other stop tokens; empty for ignore_eos without stop tokens.
    pub stop_token_ids: Vec<u32>,
    /// Repetition that ends the sequence, no earlier than a stop token would; none: it may repeat itself.
    pub repetition: Option<RepetitionDetection>,
}

impl StopRules {
    /// Why a sequence ends after `num_output` tokens, the last of which is `last`; none if it goes on. `repeats`: they
    /// end as [`Self::repetition`] says.
    pub(super) fn end_after(&self, num_output: usize, last: u32, repeats: bool) -> Option<FinishReason> {
        let may_end = num_output >= self.min_tokens as usize;
        if may_end && self.stop_token_ids.contains(&last) {
            Some(FinishReason::Stop)
        } else if num_output >= self.max_tokens as usize {
            Some(FinishReason::Length)
        } else if may_end && repeats {
            Some(FinishReason::Repetition)
        } else {
            None
        }
    }

    /// The same for output that was made elsewhere.
    pub fn end_of(&self, output: &[u32]) -> Option<FinishReason> {
        let repeats = self.repetition.is_some_and(|rule| rule.is_at_end_of(output));
        self.end_after(output.len(), *output.last()?, repeats)
    }
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all commands are submissions")]
pub enum Command {
    Submit(EngineRequest),
    /// Ends a sequence wherever it is: `Stop` at a stop string, `Abort` for whoever went away. Unknown or finished ids
    /// are ignored.
    Finish(SequenceId, FinishReason),
    /// Start nothing new until [`Command::Resume`]; answered by [`Event::Paused`]. It replaces a pause in force.
    Pause {
        mode: PauseMode,
        /// Reset the prefix cache once nothing is in flight; not with [`PauseMode::Keep`].
        clear_cache: bool,
    },
    /// Answered by [`Event::Resumed`], also without a pause.
    Resume,
    /// Answered by [`Event::PrefixCacheReset`].
    ResetPrefixCache {
        /// Preempt what runs, so that it is computed again.
        reset_running: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token, which is the last token of the sequence, a stop string, or the end of a grammar.
    Stop,
    Length,
    /// The output ended with a pattern as often as its request lets it.
    Repetition,
    Abort,
    /// The logits held a NaN or an infinity.
    NotFinite,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The sequence runs for the first time; so many prompt tokens came from the prefix cache.
    Started {
        sequence: SequenceId,
        cached_tokens: u32,
    },
    /// The next prompt tokens that were asked to be scored: each token after the first exactly once, in order, and all
    /// of them before the first `Token`.
    PromptLogprobs {
        sequence: SequenceId,
        tokens: Vec<ScoredToken>,
    },
    Token(SampledToken),
    /// Exactly one of `Finished`, `Failed`, `Rejected` and `Lost` is every submitted sequence's last event.
    Finished {
        sequence: SequenceId,
        reason: FinishReason,
    },
    /// It gave its blocks back to a more urgent sequence and will be computed again.
    Preempted {
        sequence: SequenceId,
    },
    /// It can never run.
    Rejected {
        sequence: SequenceId,
        cause: RequestError,
    },
    /// It cannot go on under its constraint.
    Failed {
        sequence: SequenceId,
        cause: ConstraintError,
    },
    /// So many steps in a row that ran it lost the group: it may be what kills the ranks, so it is not tried again.
    Lost {
        sequence: SequenceId,
        failed_steps: u32,
    },
    /// Of the sequences in flight when the engine was paused, none runs any more.
    Paused,
    Resumed,
    PrefixCacheReset,
}
