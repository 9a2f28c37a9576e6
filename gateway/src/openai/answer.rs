//! What a model answered: the messages of a chat's reply and the deltas of its stream.

use phalanx_proto::v1::Choice;
use serde::Serialize;

use super::tools::ReplyCall;

#[derive(Serialize)]
pub(super) struct ReplyMessage<'a> {
    role: &'a str,
    /// Null where the model only thought, or only called tools.
    content: Option<&'a str>,
    refusal: Option<&'static str>,
    #[serde(flatten)]
    reasoning: Option<Reasoning<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<ReplyCall<'a>>>,
}

/// Reasoning under its present and its former name.
#[derive(Clone, Copy, Default, Serialize)]
struct Reasoning<'a> {
    reasoning: Option<&'a str>,
    reasoning_content: Option<&'a str>,
}

impl<'a> Reasoning<'a> {
    fn of(text: &'a str) -> Self {
        let text = Some(text).filter(|text| !text.is_empty());
        Self {
            reasoning: text,
            reasoning_content: text,
        }
    }
}

impl<'a> ReplyMessage<'a> {
    pub(super) fn of(role: &'a str, choice: &'a Choice) -> Self {
        let reasoning = choice.reasoning.as_deref().map(Reasoning::of);
        let tool_calls = ReplyCall::whole(&choice.tool_calls);
        let says_more = tool_calls.is_some() || reasoning.is_some_and(|told| told.reasoning.is_some());
        Self {
            role,
            content: Some(choice.text.as_str()).filter(|text| !(text.is_empty() && says_more)),
            refusal: None,
            reasoning,
            tool_calls,
        }
    }
}

#[derive(Default, Serialize)]
pub(super) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(flatten)]
    reasoning: Option<Reasoning<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<ReplyCall<'a>>>,
}

impl<'a> Delta<'a> {
    /// Says whose turn it is.
    pub(super) fn opening(role: &'a str) -> Self {
        Self {
            role: Some(role),
            content: Some(""),
            ..Self::default()
        }
    }

    pub(super) fn of(piece: &'a Choice) -> Self {
        let given = |text: &'a str| Some(text).filter(|text| !text.is_empty());
        let reasoning = piece.reasoning.as_deref().and_then(given);
        Self {
            role: None,
            content: given(&piece.text),
            reasoning: reasoning.map(Reasoning::of),
            tool_calls: ReplyCall::pieces(&piece.tool_calls),
        }
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::ToolCall;
    use serde_json::{Value, json};

    use super::*;

    fn called(reasoning: Option<&str>) -> Choice {
        Choice {
            reasoning: reasoning.map(str::to_owned),
            tool_calls: vec![ToolCall {
                index: 0,
                id: "call-1".to_owned(),
                name: "f".to_owned(),
                arguments: "{}".to_owned(),
            }],
            ..Choice::default()
        }
    }

    fn json(value: impl Serialize) -> Value {
        serde_json::to_value(value).expect("serializes")
    }

    #[test]
    fn messages_have_what_was_said_and_no_more() {
        let text = Choice {
            text: "Hi".to_owned(),
            ..Choice::default()
        };
        assert_eq!(
            json(ReplyMessage::of("assistant", &text)),
            json!({"role": "assistant", "content": "Hi", "refusal": null})
        );
        let call = json!({"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}});
        assert_eq!(
            json(ReplyMessage::of("assistant", &called(Some("Hm.")))),
            json!({"role": "assistant", "content": null, "refusal": null, "reasoning": "Hm.",
                "reasoning_content": "Hm.", "tool_calls": [call]})
        );
        let silent = Choice {
            reasoning: Some(String::new()),
            ..Choice::default()
        };
        assert_eq!(
            json(ReplyMessage::of("assistant", &silent)),
            json!({"role": "assistant", "content": "", "refusal": null, "reasoning": null, "reasoning_content": null})
        );
    }

    #[test]
    fn deltas_have_the_calls_index() {
        assert_eq!(
            json(Delta::of(&called(Some("")))),
            json!({"tool_calls": [{"index": 0, "id": "call-1", "type": "function",
                "function": {"name": "f", "arguments": "{}"}}]})
        );
        let more = Choice {
            tool_calls: vec![ToolCall {
                index: 1,
                arguments: "1}".to_owned(),
                ..ToolCall::default()
            }],
            ..Choice::default()
        };
        assert_eq!(
            json(Delta::of(&more)),
            json!({"tool_calls": [{"index": 1, "function": {"arguments": "1}"}}]})
        );
        assert_eq!(json(Delta::of(&Choice::default())), json!({}));
    }
}
