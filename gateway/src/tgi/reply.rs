//! TGI's whole reply, and the parts that its stream shares.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{Choice, FinishReason, TokenLogprob, TokenLogprobs, choice::StopReason},
};
use serde::Serialize;

use super::params::Call;

/// JSON has no infinities; TGI's clients expect numbers.
const FLOOR: f32 = -9999.0;

#[derive(Serialize)]
pub(super) struct Generated {
    generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

#[derive(Serialize)]
struct Details {
    finish_reason: &'static str,
    generated_tokens: usize,
    seed: Option<u64>,
    /// Filled by `decoder_input_details` only, which is not offered.
    prefill: [(); 0],
    tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Vec<Token>>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Token {
    pub(super) id: u32,
    pub(super) text: String,
    pub(super) logprob: f32,
    pub(super) special: bool,
}

impl Generated {
    /// # Errors
    /// `Internal` for a generation that failed, `Cancelled` for one that was aborted: TGI has no name for those.
    pub(super) fn of(choice: &Choice, call: &Call) -> Result<Self, RpcError> {
        let reason = finish_reason(choice)?;
        let details = call.details.then(|| Details {
            finish_reason: reason,
            generated_tokens: choice.token_ids.len(),
            seed: call.seed,
            prefill: [],
            tokens: choice.logprobs.iter().filter_map(chosen).collect(),
            top_tokens: match call.top_n_tokens {
                Some(_) => choice.logprobs.iter().map(top).collect(),
                None => Vec::new(),
            },
        });
        Ok(Self {
            generated_text: format!("{}{}", call.prefix, choice.text),
            details,
        })
    }
}

fn token(token: &TokenLogprob) -> Token {
    Token {
        id: token.token_id,
        text: token.token.clone(),
        logprob: token.logprob.max(FLOOR),
        special: token.special,
    }
}

pub(super) fn chosen(logprobs: &TokenLogprobs) -> Option<Token> {
    logprobs.chosen.as_ref().map(token)
}

pub(super) fn top(logprobs: &TokenLogprobs) -> Vec<Token> {
    logprobs.top.iter().map(token).collect()
}

/// # Errors
/// As [`Generated::of`].
pub(super) fn finish_reason(choice: &Choice) -> Result<&'static str, RpcError> {
    match (choice.finish_reason(), &choice.stop_reason) {
        (FinishReason::Length, _) => Ok("length"),
        (FinishReason::Stop, Some(StopReason::StopString(_))) => Ok("stop_sequence"),
        (FinishReason::Stop | FinishReason::ToolCalls | FinishReason::Repetition, _) => Ok("eos_token"),
        (FinishReason::Abort, _) => Err(RpcError::new(ErrorKind::Cancelled, "the request was aborted")),
        (FinishReason::Error | FinishReason::Unspecified, _) => {
            Err(RpcError::new(ErrorKind::Internal, "the generation failed"))
        }
    }
}
