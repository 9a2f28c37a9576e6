//! The messages of a conversation.

use std::fmt;

use phalanx_proto::{
    RpcError,
    limits::{MAX_MESSAGES, MAX_ROLE_BYTES, MAX_TOOL_CALLS},
    v1::{ChatMessage, ToolCall},
};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};

use super::{
    body::{Bounded, Object},
    tools::GivenCall,
};

/// The role whose messages may be without content.
const ASSISTANT: &str = "assistant";

#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    role: Option<String>,
    content: Option<Content>,
    name: Option<String>,
    tool_calls: Option<Bounded<Object<GivenCall>, MAX_TOOL_CALLS>>,
    tool_call_id: Option<String>,
    reasoning: Option<String>,
    /// Reasoning under its former name.
    reasoning_content: Option<String>,
    function_call: Option<IgnoredAny>,
}

/// The messages of one request, in order.
pub(crate) type Messages = Bounded<Object<Message>, MAX_MESSAGES>;

/// A text, or the texts of a list of parts.
#[derive(Debug)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<String>),
}

impl Content {
    /// `content` and `text_parts` of a message.
    pub(crate) fn into_fields(self) -> (String, Vec<String>) {
        match self {
            Self::Text(text) => (text, Vec::new()),
            Self::Parts(parts) => (String::new(), parts),
        }
    }

    /// All of it as one text.
    pub(crate) fn joined(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Parts(parts) => parts.concat(),
        }
    }
}

/// A message of this role and content.
pub(crate) fn message(role: &str, content: Content) -> ChatMessage {
    let (content, text_parts) = content.into_fields();
    ChatMessage {
        role: role.to_owned(),
        content,
        text_parts,
        ..ChatMessage::default()
    }
}

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

fn refuse(index: usize, field: impl fmt::Display, why: impl fmt::Display) -> RpcError {
    let field = format!("messages[{index}].{field}");
    let message = format!("{field}: {why}");
    RpcError::invalid(field, message)
}

impl Message {
    fn into_grpc(self) -> Result<ChatMessage, (String, String)> {
        let refuse = |field: &str, why: &str| (field.to_owned(), why.to_owned());
        // Any role: what it means is the template's to say.
        let role = self.role.ok_or_else(|| refuse("role", "is needed"))?;
        if !(1..=MAX_ROLE_BYTES).contains(&role.len()) {
            return Err((
                "role".to_owned(),
                format!("must have 1 to {MAX_ROLE_BYTES} bytes"),
            ));
        }
        if self.function_call.is_some() {
            return Err(refuse(
                "function_call",
                "function calls are not offered by this server",
            ));
        }
        let (content, text_parts) = match self.content {
            Some(content) => content.into_fields(),
            // An answer that was a refusal or a tool call and nothing else.
            None if role == ASSISTANT => (String::new(), Vec::new()),
            None => return Err(refuse("content", "is needed")),
        };
        Ok(ChatMessage {
            role,
            content,
            text_parts,
            name: self.name,
            tool_calls: tool_calls(self.tool_calls.unwrap_or_default())?,
            tool_call_id: self.tool_call_id,
            reasoning: self.reasoning.or(self.reasoning_content),
        })
    }
}

fn tool_calls(calls: Bounded<Object<GivenCall>, MAX_TOOL_CALLS>) -> Result<Vec<ToolCall>, (String, String)> {
    let Bounded(calls) = calls;
    let calls = calls.into_iter().enumerate().map(|(index, Object(call))| {
        let refuse = |(field, why): (&str, &str)| (format!("tool_calls[{index}].{field}"), why.to_owned());
        let mut call = call.into_grpc().map_err(refuse)?;
        // Below MAX_TOOL_CALLS.
        call.index = index as u32;
        Ok(call)
    });
    calls.collect()
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
        Ok(Content::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
        let mut texts = Vec::new();
        while let Some(Part(text)) = parts.next_element()? {
            texts.push(text);
        }
        Ok(Content::Parts(texts))
    }
}

/// A text part: `{"type": "text", "text": ...}`, or the bare string that vLLM takes too.
///
/// The other types that hold text are those of messages that came out of another API.
struct Part(String);

const TEXT_TYPES: [&str; 6] = [
    "text",
    "input_text",
    "output_text",
    "refusal",
    "reasoning_text",
    "summary_text",
];

#[derive(Deserialize)]
struct TypedPart {
    r#type: Option<String>,
    text: Option<String>,
    refusal: Option<String>,
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
        let kind = part.r#type.as_deref().unwrap_or("text");
        if !TEXT_TYPES.contains(&kind) {
            // Debug, and cut: a type is as long as its sender likes.
            let shown: String = kind.chars().take(32).collect();
            return Err(A::Error::custom(format_args!(
                "parts of type {shown:?} are not offered by this server, which reads text and fetches nothing"
            )));
        }
        part.text
            .or(part.refusal)
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
    fn parts_are_kept_and_nulls_kept_out() {
        let json = r#"[{"role": "user", "name": "ann", "content":
            [{"type": "text", "text": "a"}, "b", {"text": "c", "x": 1}]},
            {"role": "assistant", "content": null, "tool_calls": []}]"#;
        let got = messages(json).expect("valid");
        assert_eq!(got[0].text_parts, ["a", "b", "c"]);
        assert_eq!(
            (got[0].content.as_str(), got[0].name.as_deref()),
            ("", Some("ann"))
        );
        assert_eq!((got[1].content.as_str(), got[1].role.as_str()), ("", "assistant"));
    }

    #[test]
    fn calls_and_their_answers_are_carried() {
        let json = r#"[{"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
            {"id": "2", "function": {"name": "g", "arguments": {"b": 2}}}]},
            {"role": "tool", "tool_call_id": "1", "content": "x"}, {"role": "wizard", "content": "y"}]"#;
        let got = messages(json).expect("valid");
        let calls: Vec<_> = got[0]
            .tool_calls
            .iter()
            .map(|call| {
                (
                    call.index,
                    call.id.as_str(),
                    call.name.as_str(),
                    call.arguments.as_str(),
                )
            })
            .collect();
        assert_eq!(
            calls,
            [(0, "1", "f", r#"{"a": 1}"#), (1, "2", "g", r#"{"b": 2}"#)]
        );
        assert_eq!(got[0].reasoning.as_deref(), Some("Hm."));
        assert_eq!(got[1].tool_call_id.as_deref(), Some("1"));
        assert_eq!(got[2].role, "wizard");
    }

    #[test]
    fn bad_messages_are_refused_by_name() {
        for (json, param) in [
            ("null", "messages"),
            ("[]", "messages"),
            ("\"hi\"", "messages"),
            ("[\"hi\"]", "messages[0]"),
            ("[{}]", "messages[0].role"),
            (r#"[{"role": "", "content": ""}]"#, "messages[0].role"),
            (r#"[{"role": 5, "content": ""}]"#, "messages[0].role"),
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
                "messages[0].tool_calls[0].function",
            ),
            (
                r#"[{"role": "assistant", "tool_calls": [{"function": {}}]}]"#,
                "messages[0].tool_calls[0].function.name",
            ),
            (
                r#"[{"role": "assistant", "tool_calls": ["f"]}]"#,
                "messages[0].tool_calls[0]",
            ),
            (
                r#"[{"role": "assistant", "tool_calls": [{"type": "custom"}]}]"#,
                "messages[0].tool_calls[0].type",
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
