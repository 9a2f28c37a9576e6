//! One completion of a running request: new, or gone on with where another server left it.

use std::sync::Arc;

use phalanx_proto::RpcError;

use super::{EngineSlot, assembler::ChoiceAssembler};
use crate::{
    engine::StopRules,
    engine_thread::{Milestones, NewSequence, Submission},
    text::{PreparedRequest, Tokenizer},
};

pub(super) struct Choice {
    pub(super) assembler: ChoiceAssembler,
    /// None once no more is wanted of the sequence.
    pub(super) submission: Option<Submission>,
}

/// A completion whose sequence is queued, if it needs one; nothing else has been set up for it.
pub(super) struct Queued {
    rules: StopRules,
    output: Vec<u32>,
    ended_after: Option<u32>,
    submission: Option<Submission>,
}

impl Queued {
    /// Queues `sequence` unless what is there of it is all of it: another server has said so (`ended_after`), or did
    /// not get to say so. Errors: the engine's.
    pub(super) fn submit(
        sequence: NewSequence,
        ended_after: Option<u32>,
        engine: &EngineSlot,
    ) -> Result<Self, RpcError> {
        let (rules, output) = (sequence.stop.clone(), sequence.output.clone());
        let is_over = ended_after.is_some() || rules.end_of(&output).is_some();
        Ok(Self {
            submission: (!is_over).then(|| engine.submit(sequence)).transpose()?,
            rules,
            output,
            ended_after,
        })
    }
}

impl Queued {
    /// The engine's side of its times, if it has one.
    pub(super) fn milestones(&self) -> Option<Arc<Milestones>> {
        Some(self.submission.as_ref()?.milestones.clone())
    }
}

impl Choice {
    /// Completion `index` of `request`.
    pub(super) fn new(
        request: &PreparedRequest,
        index: usize,
        queued: Queued,
        tokenizer: &Tokenizer,
    ) -> Self {
        let Queued {
            rules,
            output,
            ended_after,
            submission,
        } = queued;
        let end = rules.end_of(&output);
        let mut assembler = ChoiceAssembler::new(request, index, rules, tokenizer);
        match ended_after {
            Some(tokens) => assembler.skip(tokens),
            None => assembler.replay(&output),
        }
        if let (Some(reason), false) = (end, assembler.is_finished()) {
            assembler.finish(reason);
        }
        let mut choice = Self {
            assembler,
            submission,
        };
        choice.stop_if_finished();
        choice
    }

    /// Lets go of the sequence if the text is complete; true if it is.
    pub(super) fn stop_if_finished(&mut self) -> bool {
        if !self.assembler.is_finished() {
            return false;
        }
        // By a stop string, unless the engine has said so: then there is nothing left to stop.
        if let Some(submission) = self.submission.take() {
            submission.stop();
        }
        true
    }
}
