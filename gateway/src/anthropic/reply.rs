//! Anthropic's message, whole or as a stream begins it.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, Choice, FinishReason, choice::StopReason},
};
use serde::Serialize;

use crate::openai::reply::Head;

#[derive(Serialize)]
pub(super) struct Message<'a> {
    id: &'a str,
    r#type: &'static str,
    role: &'static str,
    model: &'a str,
    content: Vec<TextBlock<'a>>,
    #[serde(flatten)]
    stop: Stop<'a>,
    usage: Usage,
}

#[derive(Serialize)]
pub(super) struct TextBlock<'a> {
    r#type: &'static str,
    text: &'a str,
}

impl<'a> TextBlock<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        Self { r#type: "text", text }
    }
}

/// Why a message ended; nulls while it goes on.
#[derive(Default, Serialize)]
pub(super) struct Stop<'a> {
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
}

#[derive(Serialize)]
pub(super) struct Usage {
    input_tokens: u32,
    output_tokens: u32,
    /// Already counted in `input_tokens` by OpenAI, beside them by Anthropic.
    cache_read_input_tokens: u32,
}

impl<'a> Message<'a> {
    /// # Errors
    /// Those of [`Stop::of`].
    pub(super) fn whole(head: &'a Head, choice: &'a Choice, usage: v1::Usage) -> Result<Self, RpcError> {
        Ok(Self {
            content: vec![TextBlock::of(&choice.text)],
            stop: Stop::of(choice)?,
            ..Self::begun(head, usage)
        })
    }

    /// Without content yet.
    pub(super) fn begun(head: &'a Head, usage: v1::Usage) -> Self {
        Self {
            id: &head.id,
            r#type: "message",
            role: "assistant",
            model: &head.model,
            content: Vec::new(),
            stop: Stop::default(),
            usage: Usage::of(usage),
        }
    }
}

impl<'a> Stop<'a> {
    /// # Errors
    /// `Internal` for a generation that failed, `Cancelled` for one that was aborted: Anthropic has no name for those.
    pub(super) fn of(choice: &'a Choice) -> Result<Self, RpcError> {
        let (reason, sequence) = match (choice.finish_reason(), &choice.stop_reason) {
            (FinishReason::Length, _) => ("max_tokens", None),
            (FinishReason::Stop, Some(StopReason::StopString(text))) => {
                ("stop_sequence", Some(text.as_str()))
            }
            (FinishReason::Stop | FinishReason::ToolCalls, _) => ("end_turn", None),
            (FinishReason::Abort, _) => {
                return Err(RpcError::new(ErrorKind::Cancelled, "the request was aborted"));
            }
            (FinishReason::Error | FinishReason::Unspecified, _) => {
                return Err(RpcError::new(ErrorKind::Internal, "the generation failed"));
            }
        };
        Ok(Self {
            stop_reason: Some(reason),
            stop_sequence: sequence,
        })
    }
}

impl Usage {
    pub(super) fn of(usage: v1::Usage) -> Self {
        Self {
            input_tokens: usage.prompt_tokens.saturating_sub(usage.cached_tokens),
            output_tokens: usage.completion_tokens,
            cache_read_input_tokens: usage.cached_tokens,
        }
    }
}
