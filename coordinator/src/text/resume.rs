//! Going on with completions that another server has begun.

use phalanx_proto::{RpcError, v1};

use super::PreparedRequest;
use crate::engine_thread::NewSequence;

const PARAM: &str = "resume";

impl PreparedRequest {
    /// Gives every completion the output it has already; with an empty list all of them are new.
    ///
    /// # Errors
    /// `InvalidArgument` naming `resume`: not one entry for each completion, or more tokens than the completion may
    /// have. Whether the tokens are in the vocabulary is the engine's to say.
    pub(super) fn resume(mut self, resume: Vec<v1::ResumedChoice>) -> Result<Self, RpcError> {
        if resume.is_empty() {
            return Ok(self);
        }
        let (given, n) = (resume.len(), self.sequences.len());
        if given != n {
            let message = format!("resume has {given} entries for {n} completions.");
            return Err(RpcError::invalid(PARAM, message));
        }
        let completions = self.sequences.iter_mut().zip(&mut self.ended_after);
        for ((sequence, ended_after), choice) in completions.zip(resume) {
            *ended_after = choice.ended_after;
            give(sequence, choice)?;
        }
        self.score_for_new_ones();
        Ok(self)
    }

    /// The prompt has been told to the clients of all completions but those that have not begun: the first of them
    /// scores it.
    fn score_for_new_ones(&mut self) {
        let wanted = self.sequences.first_mut();
        let wanted = wanted.and_then(|first| first.sampling.prompt_logprobs.take());
        let mut completions = self.sequences.iter_mut().zip(&self.ended_after);
        match completions.find(|(sequence, ended_after)| sequence.output.is_empty() && ended_after.is_none())
        {
            Some((new, _)) => new.sampling.prompt_logprobs = wanted,
            None => self.prompt = None,
        }
    }
}

fn give(sequence: &mut NewSequence, choice: v1::ResumedChoice) -> Result<(), RpcError> {
    let max_tokens = sequence.stop.max_tokens as usize;
    let tokens = choice
        .ended_after
        .map_or(choice.token_ids.len(), |count| count as usize);
    if tokens > max_tokens {
        let message = format!("resume has {tokens} tokens of a completion that may have {max_tokens}.");
        return Err(RpcError::invalid(PARAM, message));
    }
    sequence.output = choice.token_ids;
    Ok(())
}
