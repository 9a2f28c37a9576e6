//! The messages of a conversation.

use std::fmt;

use phalanx_proto::{RpcError, limits::MAX_MESSAGES, v1::ChatMessage};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};

use super::body::{Bounded, Object};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    role: Option<String>,
    content: Option<Content>,
    name: Option<String>,
    // Counted only.
    tool_calls: Option<Vec<IgnoredAny>>,
    function_call: Option<IgnoredAny>,
}

/// The messages of one request, in order.
pub(crate) type Messages = Bounded<Object<Message>, MAX_MESSAGES>;

/// Text, from a string or from a list of text parts.
#[derive(Debug)]
pub(crate) struct Content(pub(crate) String);

/// # Errors
/// `InvalidArgument` naming the field of the message at fault.
pub(crate) fn to_grpc(messages: Option<Messages>) -> Result<Vec<ChatMessage>, RpcError> {
    let Bounded(messages) = messages.unwrap_or_default();
    if messages.is_empty() {
        return Err(RpcError::invalid("messages", "messages: at least one is needed"));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(index, Object(message))| {
            message
                .into_grpc()
                .map_err(|(field, why)| refuse(index, field, why))
        })
        .collect()
}

fn refuse(index: usize, field: &str, why: String) -> RpcError {
    let field = format!("messages[{index}].{field}");
    let message = format!("{field}: {why}");
    RpcError::invalid(field, message)
}

impl Message {
    fn into_grpc(self) -> Result<ChatMessage, (&'static str, String)> {
        let role = self.role.ok_or_else(|| ("role", "is needed".to_owned()))?;
        if !ROLES.contains(&role.as_str()) {
            // Debug, and cut: a role is as long as its sender likes.
            let shown: String = role.chars().take(32).collect();
            return Err(("role", format!("{shown:?} is not one of {}", ROLES.join(", "))));
        }
        if self.tool_calls.is_some_and(|calls| !calls.is_empty()) {
            return Err((
                "tool_calls",
                "tool calls are not offered by this server".to_owned(),
            ));
        }
        if self.function_call.is_some() {
            return Err((
                "function_call",
                "function calls are not offered by this server".to_owned(),
            ));
        }
        let content = match self.content {
            Some(Content(text)) => text,
            // An answer that was a refusal or a tool call and nothing else.
            None if role == "assistant" => String::new(),
            None => return Err(("content", "is needed".to_owned())),
        };
        Ok(ChatMessage {
            role,
            content,
            name: self.name,
        })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a string or a list of text parts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content(text.to_owned()))
    }

    /// Parts are joined by newlines, as vLLM does for templates that take a string.
    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
        let mut joined = String::new();
        let mut first = true;
        while let Some(Part(text)) = parts.next_element()? {
            if !std::mem::take(&mut first) {
                joined.push('\n');
            }
            joined.push_str(&text);
        }
        Ok(Content(joined))
    }
}

/// A text part: `{"type": "text", "text": ...}`, or the bare string that vLLM takes too.
struct Part(String);

#[derive(Deserialize)]
struct TypedPart {
    r#type: Option<String>,
    text: Option<String>,
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PartVisitor)
    }
}

struct PartVisitor;

impl<'de> Visitor<'de> for PartVisitor {
    type Value = Part;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a text part")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Part, E> {
        Ok(Part(text.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Part, A::Error> {
        let part = TypedPart::deserialize(MapAccessDeserializer::new(map))?;
        if part.r#type.as_deref().is_some_and(|kind| kind != "text") {
            return Err(A::Error::custom(
                "only parts of type \"text\" are offered by this server",
            ));
        }
        part.text
            .map(Part)
            .ok_or_else(|| A::Error::custom("a text part needs its text"))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::body::parse, *};

    #[derive(Deserialize)]
    struct Chat {
        messages: Option<Messages>,
    }

    fn messages(json: &str) -> Result<Vec<ChatMessage>, RpcError> {
        to_grpc(parse::<Chat>(format!(r#"{{"messages": {json}}}"#).as_bytes())?.messages)
    }

    #[test]
    fn parts_are_joined_and_nulls_kept_out() {
        let json = r#"[{"role": "user", "name": "ann", "content":
            [{"type": "text", "text": "a"}, "b", {"text": "c", "x": 1}]},
            {"role": "assistant", "content": null, "tool_calls": []}]"#;
        let got = messages(json).expect("valid");
        assert_eq!(
            (got[0].content.as_str(), got[0].name.as_deref()),
            ("a\nb\nc", Some("ann"))
        );
        assert_eq!((got[1].content.as_str(), got[1].role.as_str()), ("", "assistant"));
    }

    #[test]
    fn bad_messages_are_refused_by_name() {
        for (json, param) in [
            ("null", "messages"),
            ("[]", "messages"),
            ("\"hi\"", "messages"),
            ("[\"hi\"]", "messages[0]"),
            ("[{}]", "messages[0].role"),
            (r#"[{"role": "wizard", "content": ""}]"#, "messages[0].role"),
            (r#"[{"role": "user"}]"#, "messages[0].content"),
            (r#"[{"role": "user", "content": 5}]"#, "messages[0].content"),
            (
                r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#,
                "messages[0].content[0]",
            ),
            (
                r#"[{"role": "user", "content": [{"type": "text"}]}]"#,
                "messages[0].content[0]",
            ),
            (
                r#"[{"role": "assistant", "tool_calls": [{}]}]"#,
                "messages[0].tool_calls",
            ),
        ] {
            assert_eq!(
                messages(json).expect_err(json).param.as_deref(),
                Some(param),
                "{json}"
            );
        }
    }
}
