//! Messages as templates see them.

use minijinja::Value;
use phalanx_proto::{
    RpcError,
    limits::{MAX_MESSAGES, MAX_TOOL_CALLS},
    v1::{ChatMessage, ToolCall},
};

use crate::text::json::{Json, object};

/// Ends the last message where a completion is to go on. Its space shows whether the template trims contents, in which
/// case what stands before it is trimmed, too (Hugging Face's `continue_final_message`).
const CUT: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// How messages are shown.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Contents are lists of parts.
    pub(super) parts: bool,
    /// The last message's content ends with [`CUT`].
    pub(super) cut: bool,
}

/// The bytes of a message that a template may render.
pub(crate) fn message_bytes(message: &ChatMessage) -> usize {
    let parts = message.text_parts.iter().map(String::len);
    let calls = message
        .tool_calls
        .iter()
        .map(|call| call.name.len() + call.arguments.len());
    let reasoning = message.reasoning.as_ref().map_or(0, String::len);
    parts
        .chain(calls)
        .fold(message.content.len() + reasoning, usize::saturating_add)
}

/// The content of a message as one text.
pub(super) fn text(message: &ChatMessage) -> String {
    if message.text_parts.is_empty() {
        return message.content.clone();
    }
    message.text_parts.join("\n")
}

/// The template's `messages`. Errors name the message and the field at fault.
pub(super) fn to_value(messages: &[ChatMessage], shape: Shape) -> Result<Value, RpcError> {
    if messages.is_empty() {
        return Err(RpcError::invalid(
            "messages",
            "messages must hold at least one message.",
        ));
    }
    if messages.len() > MAX_MESSAGES {
        let message = format!(
            "messages has {} messages, at most {MAX_MESSAGES} are allowed.",
            messages.len()
        );
        return Err(RpcError::invalid("messages", message));
    }
    let last = messages.len() - 1;
    let values = messages.iter().enumerate().map(|(at, message)| {
        let shape = Shape {
            cut: shape.cut && at == last,
            ..shape
        };
        message_value(message, at, shape)
    });
    values.collect::<Result<Vec<_>, _>>().map(Value::from_iter)
}

fn message_value(message: &ChatMessage, at: usize, shape: Shape) -> Result<Value, RpcError> {
    if message.role.is_empty() {
        let param = format!("messages[{at}].role");
        return Err(RpcError::invalid(param, "a message's role cannot be empty."));
    }
    let mut fields = vec![
        ("role", message.role.as_str().into()),
        ("content", content(message, shape)),
    ];
    // A template tells an absent field from an empty one.
    let given = [
        ("name", &message.name),
        ("tool_call_id", &message.tool_call_id),
        ("reasoning", &message.reasoning),
        ("reasoning_content", &message.reasoning),
    ];
    let given = given
        .into_iter()
        .filter_map(|(name, text)| Some((name, text.as_deref()?.into())));
    fields.extend(given);
    if !message.tool_calls.is_empty() {
        fields.push(("tool_calls", tool_calls(&message.tool_calls, at)?));
    }
    let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value));
    Ok(Json::Object(fields.collect()).to_value())
}

fn content(message: &ChatMessage, shape: Shape) -> Json {
    let cut = if shape.cut { CUT } else { "" };
    if !shape.parts {
        return Json::String(text(message) + cut);
    }
    let mut texts: Vec<&str> = message.text_parts.iter().map(String::as_str).collect();
    if texts.is_empty() && (!message.content.is_empty() || shape.cut) {
        texts.push(&message.content);
    }
    let last = texts.len().saturating_sub(1);
    let parts = texts.iter().enumerate().map(|(at, text)| {
        let text = format!("{text}{}", if at == last { cut } else { "" });
        object([("type", "text".into()), ("text", Json::String(text))])
    });
    Json::Array(parts.collect())
}

/// In OpenAI's shape, but with the arguments as an object: templates look into them, as with vLLM.
fn tool_calls(calls: &[ToolCall], at: usize) -> Result<Json, RpcError> {
    if calls.len() > MAX_TOOL_CALLS {
        let param = format!("messages[{at}].tool_calls");
        let message = format!(
            "{param} has {} calls, at most {MAX_TOOL_CALLS} are allowed.",
            calls.len()
        );
        return Err(RpcError::invalid(param, message));
    }
    let calls = calls.iter().enumerate().map(|(index, call)| {
        let arguments = match call.arguments.as_str() {
            "" => Json::Object(Vec::new()),
            text => serde_json::from_str(text).map_err(|error| {
                let param = format!("messages[{at}].tool_calls[{index}].function.arguments");
                let message = format!("{param} is not valid JSON: {error}");
                RpcError::invalid(param, message)
            })?,
        };
        let function = object([("name", call.name.as_str().into()), ("arguments", arguments)]);
        Ok(object([
            ("id", call.id.as_str().into()),
            ("type", "function".into()),
            ("function", function),
        ]))
    });
    calls.collect::<Result<Vec<_>, RpcError>>().map(Json::Array)
}

/// Cuts a rendered prompt where its last message's content ends. Errors: the template does not show that message.
pub(super) fn cut(mut prompt: String) -> Result<String, RpcError> {
    let Some(place) = prompt.rfind(CUT.trim_end()) else {
        let message = "continue_final_message is set, but the chat template does not show the final message.";
        return Err(RpcError::invalid("continue_final_message", message));
    };
    let is_trimmed = !prompt[place..].starts_with(CUT);
    prompt.truncate(place);
    if is_trimmed {
        prompt.truncate(prompt.trim_end().len());
    }
    Ok(prompt)
}
