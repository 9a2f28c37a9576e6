//! Anthropic's message, whole or as a stream begins it.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, Choice, FinishReason, ToolCall, choice::StopReason},
};
use serde::Serialize;
use serde_json::{
    json,
    value::{RawValue, to_raw_value},
};

use crate::openai::reply::Head;

#[derive(Serialize)]
pub(super) struct Message<'a> {
    id: &'a str,
    r#type: &'static str,
    role: &'static str,
    model: &'a str,
    content: Vec<Block<'a>>,
    #[serde(flatten)]
    stop: Stop<'a>,
    usage: Usage,
}

/// A piece of content, empty where a stream begins it.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Block<'a> {
    Thinking {
        thinking: &'a str,
        /// Nothing is signed here.
        signature: &'static str,
    },
    Text {
        text: &'a str,
    },
    ToolUse {
        id: &'a str,
        name: &'a str,
        input: Option<Box<RawValue>>,
    },
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
            content: blocks(choice),
            stop: Stop::of(choice, !choice.tool_calls.is_empty())?,
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

/// At least one: clients look at the first.
fn blocks(choice: &Choice) -> Vec<Block<'_>> {
    let thinking = choice.reasoning.as_deref().filter(|text| !text.is_empty());
    let mut blocks: Vec<Block<'_>> = thinking.map(Block::thinking).into_iter().collect();
    if !choice.text.is_empty() || (blocks.is_empty() && choice.tool_calls.is_empty()) {
        blocks.push(Block::Text { text: &choice.text });
    }
    blocks.extend(
        choice
            .tool_calls
            .iter()
            .map(|call| Block::call(call, input(&call.arguments))),
    );
    blocks
}

/// The arguments as an object. What the model wrote wrong is kept, as a text in one.
fn input(arguments: &str) -> Option<Box<RawValue>> {
    let object = RawValue::from_string(arguments.to_owned()).ok();
    let object = object.filter(|json| json.get().starts_with('{'));
    object.or_else(|| to_raw_value(&json!({"arguments": arguments})).ok())
}

impl<'a> Block<'a> {
    pub(super) fn thinking(thinking: &'a str) -> Self {
        Self::Thinking {
            thinking,
            signature: "",
        }
    }

    /// A call whose arguments are still to come, or `input`.
    pub(super) fn call(call: &'a ToolCall, input: Option<Box<RawValue>>) -> Self {
        Self::ToolUse {
            id: &call.id,
            name: &call.name,
            input: input.or_else(|| RawValue::from_string("{}".to_owned()).ok()),
        }
    }
}

impl<'a> Stop<'a> {
    /// `calls`: the message holds calls. OpenAI's reason for one that was asked for by name is that of a text.
    ///
    /// # Errors
    /// `Internal` for a generation that failed, `Cancelled` for one that was aborted: Anthropic has no name for those.
    pub(super) fn of(choice: &'a Choice, calls: bool) -> Result<Self, RpcError> {
        let (reason, sequence) = match (choice.finish_reason(), &choice.stop_reason) {
            (FinishReason::Length, _) => ("max_tokens", None),
            (FinishReason::ToolCalls, _) => ("tool_use", None),
            (FinishReason::Stop, _) if calls => ("tool_use", None),
            (FinishReason::Stop, Some(StopReason::StopString(text))) => {
                ("stop_sequence", Some(text.as_str()))
            }
            (FinishReason::Stop | FinishReason::Repetition, _) => ("end_turn", None),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_becomes_its_blocks() {
        let call = |arguments: &str| ToolCall {
            index: 0,
            id: "call_1".to_owned(),
            name: "add".to_owned(),
            arguments: arguments.to_owned(),
        };
        let choice = Choice {
            reasoning: Some("Hm.".to_owned()),
            tool_calls: vec![call(r#"{"a": 1}"#), call("nonsense")],
            ..Choice::default()
        };
        let json = serde_json::to_value(blocks(&choice)).expect("plain data");
        let tool = |input| json!({"type": "tool_use", "id": "call_1", "name": "add", "input": input});
        let expected = json!([
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            tool(json!({"a": 1})),
            tool(json!({"arguments": "nonsense"})),
        ]);
        assert_eq!(json, expected);
        let silent = serde_json::to_value(blocks(&Choice::default())).expect("plain data");
        assert_eq!(silent, json!([{"type": "text", "text": ""}]));
    }

    #[test]
    fn a_message_with_calls_stopped_for_them() {
        let reason = |finish: FinishReason, calls| {
            let choice = Choice {
                finish_reason: finish.into(),
                ..Choice::default()
            };
            Stop::of(&choice, calls).expect("an end").stop_reason
        };
        assert_eq!(reason(FinishReason::Stop, true), Some("tool_use"));
        assert_eq!(reason(FinishReason::Stop, false), Some("end_turn"));
        assert_eq!(reason(FinishReason::Length, true), Some("max_tokens"));
    }
}
