//! Anthropic's request, and its gRPC form.

use phalanx_proto::{
    RpcError,
    limits::{MAX_MESSAGES, MAX_STOP_STRINGS},
    v1::{ChatMessage, ChatRequest, OutputOptions, SamplingParams},
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use crate::openai::{
    body::{Bounded, Object, parse},
    chat::raw,
    messages::Content,
    params::{finite, top_k},
};

/// What only a request for an answer has.
#[derive(Debug, Deserialize)]
pub(crate) struct MessagesBody {
    max_tokens: Option<u32>,
    stop_sequences: Option<Bounded<String, MAX_STOP_STRINGS>>,
    stream: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<i64>,
    top_p: Option<f32>,
    // About billing and the like, which there is none of here.
    #[serde(rename = "metadata")]
    _metadata: Option<IgnoredAny>,
    #[serde(rename = "service_tier")]
    _service_tier: Option<IgnoredAny>,
}

/// What a request to count tokens has; an answer needs it too.
#[derive(Debug, Deserialize)]
pub(crate) struct CountBody {
    model: Option<String>,
    messages: Option<Bounded<Object<Turn>, MAX_MESSAGES>>,
    system: Option<Content>,
    chat_template_kwargs: Option<Box<RawValue>>,
    thinking: Option<Object<Thinking>>,
    tools: Option<Vec<IgnoredAny>>,
    tool_choice: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
struct Turn {
    role: Option<String>,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
struct Thinking {
    r#type: Option<String>,
}

impl CountBody {
    /// # Errors
    /// `InvalidArgument` naming what this server does not offer.
    pub(super) fn refuse_unoffered(&self) -> Result<(), RpcError> {
        let thinks = |thinking: &Object<Thinking>| thinking.0.r#type.as_deref() != Some("disabled");
        let asked = [
            ("thinking", self.thinking.as_ref().is_some_and(thinks)),
            (
                "tools",
                self.tools.as_ref().is_some_and(|tools| !tools.is_empty()),
            ),
            ("tool_choice", self.tool_choice.is_some()),
        ];
        match asked.into_iter().find(|(_, asked)| *asked) {
            Some((field, _)) => Err(RpcError::invalid(
                field,
                format!("{field} is not offered by this server"),
            )),
            None => Ok(()),
        }
    }
}

/// The model's name and the conversation, the system prompt first.
///
/// # Errors
/// `InvalidArgument` naming the field at fault.
pub(super) fn conversation(body: CountBody) -> Result<(String, ChatRequest), RpcError> {
    let model = body.model.filter(|model| !model.is_empty());
    let model = model.ok_or_else(|| RpcError::invalid("model", "model is needed"))?;
    let Bounded(turns) = body.messages.unwrap_or_default();
    if turns.is_empty() {
        return Err(RpcError::invalid("messages", "messages: at least one is needed"));
    }
    let system = body.system.map(|content| message("system".to_owned(), content));
    let turns = turns
        .into_iter()
        .enumerate()
        .map(|(index, Object(turn))| turn.into_grpc(index));
    let messages = system.map(Ok).into_iter().chain(turns);
    let chat = ChatRequest {
        model: model.clone(),
        messages: messages.collect::<Result<_, _>>()?,
        template_kwargs_json: raw("chat_template_kwargs", '{', body.chat_template_kwargs)?,
        ..ChatRequest::default()
    };
    Ok((model, chat))
}

fn message(role: String, content: Content) -> ChatMessage {
    let (content, text_parts) = content.into_fields();
    ChatMessage {
        role,
        content,
        text_parts,
        ..ChatMessage::default()
    }
}

impl Turn {
    fn into_grpc(self, index: usize) -> Result<ChatMessage, RpcError> {
        let refuse = |field: &str, why: &str| {
            let field = format!("messages[{index}].{field}");
            let message = format!("{field}: {why}");
            Err(RpcError::invalid(field, message))
        };
        let role = match self.role.as_deref() {
            Some(role @ ("user" | "assistant" | "system")) => role.to_owned(),
            Some(_) => return refuse("role", "must be user or assistant"),
            None => return refuse("role", "is needed"),
        };
        match self.content {
            Some(content) => Ok(message(role, content)),
            None => refuse("content", "is needed"),
        }
    }
}

/// A checked request.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) request: ChatRequest,
    pub(super) streams: bool,
}

impl Call {
    /// # Errors
    /// `InvalidArgument` naming the field; ranges are the coordinator's to judge.
    pub(super) fn parse(body: &[u8], id: &str) -> Result<Self, RpcError> {
        let own: MessagesBody = parse(body)?;
        let shared: CountBody = parse(body)?;
        shared.refuse_unoffered()?;
        let streams = own.stream.unwrap_or(false);
        let sampling = own.sampling()?;
        let (_, chat) = conversation(shared)?;
        let request = ChatRequest {
            request_id: id.to_owned(),
            sampling: Some(sampling),
            output: Some(OutputOptions {
                // A stream begins with the number of prompt tokens.
                include_usage: streams,
                continuous_usage: streams,
                ..OutputOptions::default()
            }),
            ..chat
        };
        Ok(Self { request, streams })
    }
}

impl MessagesBody {
    fn sampling(self) -> Result<SamplingParams, RpcError> {
        let max_tokens = self.max_tokens;
        if max_tokens.is_none() {
            return Err(RpcError::invalid("max_tokens", "max_tokens is needed"));
        }
        Ok(SamplingParams {
            temperature: finite("temperature", self.temperature)?,
            top_p: finite("top_p", self.top_p)?,
            top_k: self.top_k.map(top_k).transpose()?,
            max_tokens,
            stop: self.stop_sequences.unwrap_or_default().0,
            ..SamplingParams::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_prompt_comes_first_and_blocks_are_joined() {
        let body = br#"{"model": "m", "max_tokens": 9, "temperature": 0.5, "top_k": 4, "stop_sequences": ["END"],
            "system": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief"}],
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}],
            "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}, "tools": [], "stream": true}"#;
        let call = Call::parse(body, "msg_1").expect("valid");
        let request = call.request;
        let text = |message: &ChatMessage| format!("{}{}", message.content, message.text_parts.join("|"));
        let messages: Vec<(&str, String)> = request
            .messages
            .iter()
            .map(|message| (message.role.as_str(), text(message)))
            .collect();
        let expected = [("system", "Be|brief"), ("user", "hi"), ("assistant", "yo")];
        assert_eq!(messages, expected.map(|(role, text)| (role, text.to_owned())));
        let sampling = request.sampling.expect("given");
        assert_eq!(
            (sampling.max_tokens, sampling.top_k, sampling.stop),
            (Some(9), Some(4), vec!["END".to_owned()])
        );
        assert!(call.streams && request.output.expect("given").continuous_usage);
    }

    #[test]
    fn refusals_name_the_field() {
        let ask = |fields: &str| format!(r#"{{"model": "m", "max_tokens": 1, {fields}}}"#);
        let hi = r#""messages": [{"role": "user", "content": "hi"}]"#;
        for (body, param) in [
            (
                r#"{"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}"#.to_owned(),
                "model",
            ),
            (
                r#"{"model": "m", "messages": [{"role": "user", "content": "hi"}]}"#.to_owned(),
                "max_tokens",
            ),
            (ask(r#""messages": []"#), "messages"),
            (
                ask(r#""messages": [{"role": "wizard", "content": "hi"}]"#),
                "messages[0].role",
            ),
            (ask(r#""messages": [{"role": "user"}]"#), "messages[0].content"),
            (
                ask(r#""messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]"#),
                "messages[0].content[0]",
            ),
            (
                ask(&format!(r#"{hi}, "thinking": {{"type": "enabled"}}"#)),
                "thinking",
            ),
            (ask(&format!(r#"{hi}, "temperature": 1e300"#)), "temperature"),
            (ask(&format!(r#"{hi}, "stop_sequences": "a""#)), "stop_sequences"),
        ] {
            let error = Call::parse(body.as_bytes(), "msg_1").expect_err(&body);
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }
}
