//! Our chunks in vLLM's terms.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, choice},
    vllm::{
        CandidateTokenInfo, FinishInfo, GenerateResponse, PromptInfo, SequenceOutput,
        candidate_token_info::TokenInfo,
        finish_info::{FinishReason, StopReason},
    },
};

use super::request::Wanted;
use crate::text::PreparedRequest;

/// Rank of a token that is none of the candidates: it was not asked for far enough to be known.
const UNKNOWN_RANK: u32 = 0;

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
        let prompt = request.sequences.first().filter(|_| wanted.prompt_token_ids);
        Self {
            wanted,
            prompt: Some(PromptInfo {
                num_prompt_tokens: request.prompt_tokens,
                token_ids: prompt.map(|sequence| sequence.prompt.clone()).unwrap_or_default(),
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
    if let Some(candidates) = wanted.logprobs {
        for token in &choice.logprobs {
            let chosen = token.chosen.as_ref();
            output
                .logprobs
                .push(chosen.map_or(f32::NAN, |chosen| chosen.logprob));
            let rank = token
                .top
                .iter()
                .zip(1..)
                .find(|(top, _)| chosen.is_some_and(|chosen| chosen.token_id == top.token_id));
            output.ranks.push(rank.map_or(UNKNOWN_RANK, |(_, rank)| rank));
            let top = token.top.iter().take(candidates as usize);
            let tokens = top.zip(1..).map(|(top, rank)| TokenInfo {
                id: top.token_id,
                logprob: top.logprob,
                rank,
            });
            output.candidate_tokens.push(CandidateTokenInfo {
                tokens: tokens.collect(),
            });
        }
    }
    if wanted.token_ids {
        output.token_ids = choice.token_ids;
    }
    output
}

fn finish_info(choice: &v1::Choice, told: Told, cached: u32) -> Result<Option<FinishInfo>, RpcError> {
    let reason = match choice.finish_reason() {
        v1::FinishReason::Unspecified => return Ok(None),
        v1::FinishReason::Stop => FinishReason::Stop,
        v1::FinishReason::Length => FinishReason::Length,
        v1::FinishReason::Abort => FinishReason::Aborted,
        v1::FinishReason::Error => {
            return Err(RpcError::new(ErrorKind::Internal, "the generation failed"));
        }
    };
    let stop_reason = match &choice.stop_reason {
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
