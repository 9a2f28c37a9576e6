//! The items of a conversation, and the messages that they are for a chat template.
//!
//! One message of an assistant may be several items: what it thought, what it said, each call.

use std::fmt;

use phalanx_proto::{
    RpcError,
    limits::MAX_MESSAGES,
    v1::{ChatMessage, ToolCall},
};
use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor, value::SeqAccessDeserializer},
};

use super::reply::{self, Part};
use crate::openai::{
    body::{Bounded, Object},
    messages::{Content, message},
};

const ASSISTANT: &str = "assistant";

/// A text of the user, or a list of items.
#[derive(Debug)]
pub(super) enum Input {
    Text(String),
    Items(Bounded<Object<Item>, MAX_MESSAGES>),
}

/// An item of any type, which says what of it counts.
#[derive(Debug, Deserialize)]
pub(super) struct Item {
    r#type: Option<String>,
    role: Option<String>,
    content: Option<Content>,
    status: Option<String>,
    call_id: Option<String>,
    name: Option<String>,
    arguments: Option<String>,
    output: Option<Content>,
    summary: Option<Content>,
    encrypted_content: Option<String>,
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InputVisitor;

        impl<'de> Visitor<'de> for InputVisitor {
            type Value = Input;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a string or a list of items")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Input, E> {
                Ok(Input::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Input, A::Error> {
                Bounded::deserialize(SeqAccessDeserializer::new(items)).map(Input::Items)
            }
        }

        deserializer.deserialize_any(InputVisitor)
    }
}

impl Input {
    /// Adds the items' messages to those before them, and says whether the last one is an answer that was cut off and
    /// is to go on.
    ///
    /// # Errors
    /// `InvalidArgument` naming the item's field at fault.
    pub(super) fn add_to(self, messages: &mut Vec<ChatMessage>) -> Result<bool, RpcError> {
        let Bounded(items) = match self {
            Self::Text(text) => {
                messages.push(message("user", Content::Text(text)));
                return Ok(false);
            }
            Self::Items(items) => items,
        };
        let mut is_open = false;
        for (index, Object(item)) in items.into_iter().enumerate() {
            is_open = item.is_open();
            item.add_to(messages).map_err(|(field, why)| {
                let field = format!("input[{index}].{field}");
                let message = format!("{field} {why}");
                RpcError::invalid(field, message)
            })?;
        }
        Ok(is_open)
    }
}

/// The field at fault, and why.
type Refusal = (&'static str, &'static str);

impl Item {
    /// Whether this is an assistant's message that has not come to its end.
    fn is_open(&self) -> bool {
        let unfinished = matches!(self.status.as_deref(), Some("in_progress" | "incomplete"));
        unfinished && self.role.as_deref() == Some(ASSISTANT)
    }

    fn add_to(self, messages: &mut Vec<ChatMessage>) -> Result<(), Refusal> {
        match self.r#type.as_deref() {
            Some("message") => self.add_message(messages),
            None if self.role.is_some() => self.add_message(messages),
            Some("reasoning") => self.add_reasoning(messages),
            Some("function_call") => {
                let call = ToolCall {
                    index: 0,
                    id: self.call_id.ok_or(("call_id", "is needed"))?,
                    name: self.name.ok_or(("name", "is needed"))?,
                    arguments: self.arguments.ok_or(("arguments", "is needed"))?,
                };
                add_call(messages, call);
                Ok(())
            }
            Some("function_call_output") => {
                let output = self.output.ok_or(("output", "is needed"))?;
                let mut result = message("tool", output);
                result.tool_call_id = Some(self.call_id.ok_or(("call_id", "is needed"))?);
                messages.push(result);
                Ok(())
            }
            Some("item_reference") => Err(("type", "item_reference is not offered: send the item itself")),
            Some(_) => Err(("type", "is not offered by this server")),
            None => Err(("type", "is needed")),
        }
    }

    fn add_message(self, messages: &mut Vec<ChatMessage>) -> Result<(), Refusal> {
        let content = self.content.ok_or(("content", "is needed"))?;
        match self.role.as_deref() {
            Some(ASSISTANT) => match messages.last_mut().filter(|last| only_thinks(last)) {
                Some(last) => (last.content, last.text_parts) = content.into_fields(),
                None => messages.push(message(ASSISTANT, content)),
            },
            Some("user") => messages.push(message("user", content)),
            // What a developer says is a system message to every template there is.
            Some("system" | "developer") => messages.push(message("system", content)),
            _ => return Err(("role", "must be user, assistant, system or developer")),
        }
        Ok(())
    }

    fn add_reasoning(self, messages: &mut Vec<ChatMessage>) -> Result<(), Refusal> {
        if self.encrypted_content.is_some() {
            return Err(("encrypted_content", "cannot be read by this server"));
        }
        let told = self.content.map(Content::joined).filter(|text| !text.is_empty());
        let told = told.or(self.summary.map(Content::joined)).unwrap_or_default();
        add_thought(messages, &told);
        Ok(())
    }
}

/// Whether an assistant's message has neither said nor called anything yet.
fn only_thinks(message: &ChatMessage) -> bool {
    let is_silent = message.content.is_empty() && message.text_parts.is_empty();
    message.role == ASSISTANT && is_silent && message.tool_calls.is_empty() && message.reasoning.is_some()
}

fn add_thought(messages: &mut Vec<ChatMessage>, thought: &str) {
    match messages.last_mut().filter(|last| only_thinks(last)) {
        Some(last) => last.reasoning.get_or_insert_default().push_str(thought),
        None => messages.push(ChatMessage {
            role: ASSISTANT.to_owned(),
            reasoning: Some(thought.to_owned()),
            ..ChatMessage::default()
        }),
    }
}

fn add_call(messages: &mut Vec<ChatMessage>, mut call: ToolCall) {
    if messages.last().is_none_or(|last| last.role != ASSISTANT) {
        messages.push(message(ASSISTANT, Content::Text(String::new())));
    }
    if let Some(last) = messages.last_mut() {
        // Below MAX_MESSAGES.
        call.index = last.tool_calls.len() as u32;
        last.tool_calls.push(call);
    }
}

/// Adds the messages of a response's output, as if a client had sent its items.
pub(super) fn add_output(messages: &mut Vec<ChatMessage>, output: &[reply::Item]) {
    for item in output {
        match item {
            reply::Item::Reasoning { content, .. } => add_thought(messages, text_of(content)),
            reply::Item::Message { content, .. } => {
                let text = text_of(content).to_owned();
                match messages.last_mut().filter(|last| only_thinks(last)) {
                    Some(last) => last.content = text,
                    None => messages.push(message(ASSISTANT, Content::Text(text))),
                }
            }
            reply::Item::FunctionCall {
                call_id,
                name,
                arguments,
                ..
            } => add_call(
                messages,
                ToolCall {
                    index: 0,
                    id: call_id.clone(),
                    name: name.clone(),
                    arguments: arguments.clone(),
                },
            ),
        }
    }
}

fn text_of(content: &[Part]) -> &str {
    content.first().map_or("", Part::text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::body::parse;

    #[derive(Debug, Deserialize)]
    struct Body {
        input: Input,
    }

    fn read(input: &str) -> Result<(Vec<ChatMessage>, bool), RpcError> {
        let body: Body = parse(format!(r#"{{"input": {input}}}"#).as_bytes())?;
        let mut messages = Vec::new();
        let is_open = body.input.add_to(&mut messages)?;
        Ok((messages, is_open))
    }

    #[test]
    fn texts_and_messages() {
        let (messages, is_open) = read(r#""hi""#).expect("valid");
        assert_eq!(messages, [message("user", Content::Text("hi".into()))]);
        assert!(!is_open);
        let (messages, is_open) = read(
            r#"[{"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "message", "id": "msg_1", "role": "assistant", "status": "incomplete",
                 "content": [{"type": "output_text", "text": "yo", "annotations": []}]}]"#,
        )
        .expect("valid");
        let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant"]);
        assert_eq!(messages[2].text_parts, ["yo"]);
        assert!(is_open);
    }

    #[test]
    fn the_items_of_one_answer_are_one_message() {
        let (messages, _) = read(
            r#"[{"role": "user", "content": "1 + 2, 3 + 4?"},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}],
                 "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"type": "message", "role": "assistant", "content": "Let me see."},
                {"type": "function_call", "call_id": "a", "name": "add", "arguments": "{}"},
                {"type": "function_call", "call_id": "b", "name": "add", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": "3"},
                {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "7"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Now"}]},
                {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}]"#,
        )
        .expect("valid");
        let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["user", "assistant", "tool", "tool", "assistant"]);
        let answer = &messages[1];
        assert_eq!(
            (answer.reasoning.as_deref(), answer.content.as_str()),
            (Some("Hm."), "Let me see.")
        );
        let calls: Vec<_> = answer
            .tool_calls
            .iter()
            .map(|call| (call.index, call.id.as_str()))
            .collect();
        assert_eq!(calls, [(0, "a"), (1, "b")]);
        assert_eq!(messages[3].tool_call_id.as_deref(), Some("b"));
        assert_eq!(messages[4].reasoning.as_deref(), Some("Now"));
    }

    #[test]
    fn refusals_name_the_item() {
        for (input, param) in [
            ("5", "input"),
            (r#"["hi"]"#, "input[0]"),
            ("[{}]", "input[0].type"),
            (r#"[{"role": "wizard", "content": ""}]"#, "input[0].role"),
            (r#"[{"type": "message", "content": ""}]"#, "input[0].role"),
            (r#"[{"role": "user"}]"#, "input[0].content"),
            (r#"[{"type": "item_reference", "id": "x"}]"#, "input[0].type"),
            (r#"[{"type": "computer_call"}]"#, "input[0].type"),
            (
                r#"[{"type": "function_call", "call_id": "a", "name": "f"}]"#,
                "input[0].arguments",
            ),
            (
                r#"[{"type": "function_call_output", "output": "x"}]"#,
                "input[0].call_id",
            ),
            (
                r#"[{"type": "reasoning", "encrypted_content": "x"}]"#,
                "input[0].encrypted_content",
            ),
            (
                r#"[{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b.png"}]}]"#,
                "input[0].content[0]",
            ),
        ] {
            assert_eq!(
                read(input).expect_err(input).param.as_deref(),
                Some(param),
                "{input}"
            );
        }
        let image = r#"[{"role": "user", "content": [{"type": "input_file"}]}]"#;
        let error = read(image).expect_err("refused");
        assert!(error.message.contains("fetches nothing"), "{error}");
    }
}
