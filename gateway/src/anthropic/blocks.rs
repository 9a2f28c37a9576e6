//! The blocks of a turn, and the messages that they are for a chat template.

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
use serde_json::value::RawValue;

use crate::openai::{
    body::{Bounded, Object},
    messages::{Content, message},
};

/// One turn of the conversation.
#[derive(Debug, Deserialize)]
pub(super) struct Turn {
    role: Option<String>,
    content: Option<Blocks>,
}

/// A text, or a list of blocks.
#[derive(Debug)]
enum Blocks {
    Text(String),
    List(Bounded<Object<Block>, MAX_MESSAGES>),
}

/// A block of any type, which says what of it counts.
#[derive(Debug, Deserialize)]
struct Block {
    r#type: Option<String>,
    text: Option<String>,
    thinking: Option<String>,
    id: Option<String>,
    name: Option<String>,
    input: Option<Box<RawValue>>,
    tool_use_id: Option<String>,
    content: Option<Content>,
}

impl<'de> Deserialize<'de> for Blocks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BlocksVisitor;

        impl<'de> Visitor<'de> for BlocksVisitor {
            type Value = Blocks;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a string or a list of blocks")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Blocks, E> {
                Ok(Blocks::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, blocks: A) -> Result<Blocks, A::Error> {
                Bounded::deserialize(SeqAccessDeserializer::new(blocks)).map(Blocks::List)
            }
        }

        deserializer.deserialize_any(BlocksVisitor)
    }
}

/// The field within a message that is at fault, and why.
type Refusal = (String, &'static str);

impl Turn {
    /// The messages of the turn with this number: one, and before it one for every result of a tool.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field at fault.
    pub(super) fn into_messages(self, index: usize) -> Result<Vec<ChatMessage>, RpcError> {
        self.messages().map_err(|(field, why)| {
            let field = format!("messages[{index}].{field}");
            let message = format!("{field}: {why}");
            RpcError::invalid(field, message)
        })
    }

    fn messages(self) -> Result<Vec<ChatMessage>, Refusal> {
        let refuse = |field: &str, why| (field.to_owned(), why);
        let role = self.role.ok_or_else(|| refuse("role", "is needed"))?;
        if !["user", "assistant", "system"].contains(&role.as_str()) {
            return Err(refuse("role", "must be user or assistant"));
        }
        let blocks = match self.content {
            None => return Err(refuse("content", "is needed")),
            Some(Blocks::Text(text)) => return Ok(vec![message(&role, Content::Text(text))]),
            Some(Blocks::List(Bounded(blocks))) => blocks,
        };
        let mut messages = Vec::new();
        let mut own = message(&role, Content::Parts(Vec::new()));
        for (index, Object(block)) in blocks.into_iter().enumerate() {
            let refuse = |(field, why): (&str, _)| (format!("content[{index}].{field}"), why);
            messages.extend(block.add_to(&mut own).map_err(refuse)?);
        }
        let is_empty = own.text_parts.is_empty() && own.tool_calls.is_empty() && own.reasoning.is_none();
        if !is_empty || messages.is_empty() {
            messages.push(own);
        }
        Ok(messages)
    }
}

impl Block {
    /// Adds what the block says to the turn's message; the result of a tool is a message of its own.
    fn add_to(self, own: &mut ChatMessage) -> Result<Option<ChatMessage>, (&'static str, &'static str)> {
        match self.r#type.as_deref() {
            Some("text") => own.text_parts.push(self.text.ok_or(("text", "is needed"))?),
            Some("thinking") => own
                .reasoning
                .get_or_insert_default()
                .push_str(&self.thinking.unwrap_or_default()),
            // Nobody but its maker can read it.
            Some("redacted_thinking") => {}
            Some("tool_use") => {
                let arguments = self.input.as_deref().map_or("{}", RawValue::get).to_owned();
                own.tool_calls.push(ToolCall {
                    index: own.tool_calls.len() as u32,
                    id: self.id.ok_or(("id", "is needed"))?,
                    name: self.name.ok_or(("name", "is needed"))?,
                    arguments,
                });
            }
            Some("tool_result") => {
                let content = self.content.unwrap_or(Content::Text(String::new()));
                let mut result = message("tool", content);
                result.tool_call_id = Some(self.tool_use_id.ok_or(("tool_use_id", "is needed"))?);
                return Ok(Some(result));
            }
            Some(_) => return Err(("type", "is not offered by this server")),
            None => return Err(("type", "is needed")),
        }
        Ok(None)
    }
}
