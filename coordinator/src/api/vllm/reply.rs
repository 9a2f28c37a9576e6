//! Our chunks in vLLM's terms.

use phalanx_proto::{
    ErrorKind, RpcError,
    limits::REPETITION_DETECTED,
    v1::{self, choice},
    vllm::{
        CandidateTokenInfo, FinishInfo, GenerateResponse, PromptInfo, SequenceOutput,
        candidate_token_info::TokenInfo,
        finish_info::{FinishReason, StopReason},
    },
};

use super::request::Wanted;
use crate::text::PreparedRequest;

/// Rank of a token that has none, as the first of a prompt.
const NO_RANK: u32 = 0;

/// The replies to one request.
pub(super) struct Replies {
    wanted: Wanted,
    /// Still to be told, with the first piece.
    prompt: Option<PromptInfo>,
    /// By index.
    sequences: Vec<Told>,
}

/// What has been told of a sequence.
#[derive(Clone, Copy, Default)]
struct Told {
    tokens: u32,
    last: Option<u32>,
}

impl Replies {
    pub(super) fn new(wanted: Wanted, request: &PreparedRequest) -> Self {
        Self {
            wanted,
            prompt: Some(PromptInfo {
                num_prompt_tokens: request.prompt_tokens,
                ..PromptInfo::default()
            }),
            sequences: vec![Told::default(); request.sequences.len()],
        }
    }

    /// None for a chunk that has nothing of a sequence.
    ///
    /// # Errors
    /// `Internal` for a sequence that failed: vLLM has no finish reason for it.
    pub(super) fn convert(&mut self, chunk: v1::GenerateChunk) -> Result<Option<GenerateResponse>, RpcError> {
        let cached = chunk.usage.unwrap_or_default().cached_tokens;
        if let (Some(info), Some(prompt)) = (&mut self.prompt, chunk.prompt) {
            let tokens = Scores::of(&prompt.logprobs, self.wanted.prompt_logprobs);
            info.token_ids = prompt.token_ids;
            (info.logprobs, info.ranks, info.candidate_tokens) =
                (tokens.logprobs, tokens.ranks, tokens.candidates);
        }
        let Some(choice) = chunk.choice else {
            return Ok(None);
        };
        let Some(told) = self.sequences.get_mut(choice.index as usize) else {
            return Ok(None);
        };
        told.tokens += choice.token_ids.len() as u32;
        told.last = choice.token_ids.last().copied().or(told.last);
        let finish_info = finish_info(&choice, *told, cached)?;
        Ok(Some(GenerateResponse {
            prompt_info: self.prompt.take(),
            outputs: Some(output(self.wanted, choice, finish_info)),
        }))
    }
}

fn output(wanted: Wanted, choice: v1::Choice, finish_info: Option<FinishInfo>) -> SequenceOutput {
    let mut output = SequenceOutput {
        index: choice.index,
        num_tokens: choice.token_ids.len() as u32,
        finish_info,
        ..SequenceOutput::default()
    };
    if wanted.text {
        output.text = choice.text;
    }
    let tokens = Scores::of(&choice.logprobs, wanted.logprobs);
    (output.logprobs, output.ranks, output.candidate_tokens) =
        (tokens.logprobs, tokens.ranks, tokens.candidates);
    if wanted.token_ids {
        output.token_ids = choice.token_ids;
    }
    output
}

/// Log-probabilities in vLLM's form: three lists of one length.
#[derive(Default)]
struct Scores {
    logprobs: Vec<f32>,
    ranks: Vec<u32>,
    candidates: Vec<CandidateTokenInfo>,
}

impl Scores {
    /// Of `tokens`, with at most `candidates` for each; empty if none are wanted.
    fn of(tokens: &[v1::TokenLogprobs], candidates: Option<u32>) -> Self {
        let mut scores = Self::default();
        let Some(candidates) = candidates else {
            return scores;
        };
        for token in tokens {
            let chosen = token.chosen.as_ref();
            scores
                .logprobs
                .push(chosen.map_or(f32::NAN, |chosen| chosen.logprob));
            scores
                .ranks
                .push(chosen.and_then(|chosen| chosen.rank).unwrap_or(NO_RANK));
            let top = token.top.iter().take(candidates as usize);
            let tokens = top.zip(1..).map(|(top, rank)| TokenInfo {
                id: top.token_id,
                logprob: top.logprob,
                rank: top.rank.unwrap_or(rank),
            });
            scores.candidates.push(CandidateTokenInfo {
                tokens: tokens.collect(),
            });
        }
        scores
    }
}

fn finish_info(choice: &v1::Choice, told: Told, cached: u32) -> Result<Option<FinishInfo>, RpcError> {
    let reason = match choice.finish_reason() {
        v1::FinishReason::Unspecified => return Ok(None),
        // A request of vLLM's has no tools to call.
        v1::FinishReason::Stop | v1::FinishReason::ToolCalls | v1::FinishReason::Repetition => {
            FinishReason::Stop
        }
        v1::FinishReason::Length => FinishReason::Length,
        v1::FinishReason::Abort => FinishReason::Aborted,
        v1::FinishReason::Error => {
            return Err(RpcError::new(ErrorKind::Internal, "the generation failed"));
        }
    };
    let stop_reason = match &choice.stop_reason {
        // vLLM's message has no finish reason for it.
        _ if choice.finish_reason() == v1::FinishReason::Repetition => {
            Some(StopReason::StopString(REPETITION_DETECTED.to_owned()))
        }
        Some(choice::StopReason::StopString(text)) => Some(StopReason::StopString(text.clone())),
        Some(choice::StopReason::StopTokenId(id)) => Some(StopReason::StopTokenId(*id)),
        // Ours does not tell of the end-of-sequence token; it is the last one.
        None if reason == FinishReason::Stop => told.last.map(StopReason::EosTokenId),
        None => None,
    };
    Ok(Some(FinishInfo {
        num_output_tokens: told.tokens,
        finish_reason: reason.into(),
        stop_reason,
        num_cached_tokens: Some(cached),
        ..FinishInfo::default()
    }))
}

/// Puts the next piece of the same sequence behind what there is of it.
pub(super) fn append(whole: &mut GenerateResponse, piece: GenerateResponse) {
    let (Some(whole), Some(piece)) = (&mut whole.outputs, piece.outputs) else {
        return;
    };
    whole.text.push_str(&piece.text);
    whole.num_tokens += piece.num_tokens;
    whole.token_ids.extend(piece.token_ids);
    whole.logprobs.extend(piece.logprobs);
    whole.ranks.extend(piece.ranks);
    whole.candidate_tokens.extend(piece.candidate_tokens);
    whole.finish_info = piece.finish_info.or(whole.finish_info.take());
}
