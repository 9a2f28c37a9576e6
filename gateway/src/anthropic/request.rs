//! Anthropic's request, and its gRPC form.

use phalanx_proto::{
    RpcError,
    limits::{MAX_MESSAGES, MAX_STOP_STRINGS, MAX_TOOLS},
    v1::{ChatRequest, OutputOptions, SamplingParams},
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::{
    blocks::Turn,
    tools::{Tool, ToolChoice, to_json},
};
use crate::openai::{
    body::{Bounded, Object, parse},
    chat::raw,
    messages::{Content, message},
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
    tools: Option<Bounded<Object<Tool>, MAX_TOOLS>>,
    tool_choice: Option<Object<ToolChoice>>,
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
        if self.thinking.as_ref().is_some_and(thinks) {
            let message = "thinking: this server cannot turn it on or off; its --reasoning-parser does";
            return Err(RpcError::invalid("thinking", message));
        }
        Ok(())
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
    let mut messages: Vec<_> = body
        .system
        .map(|content| message("system", content))
        .into_iter()
        .collect();
    for (index, Object(turn)) in turns.into_iter().enumerate() {
        messages.extend(turn.into_messages(index)?);
    }
    let choice = body.tool_choice.map(|Object(choice)| choice.into_grpc());
    let (tool_choice, parallel_tool_calls) = choice.transpose()?.unzip();
    let chat = ChatRequest {
        model: model.clone(),
        messages,
        tools_json: to_json(&body.tools.unwrap_or_default())?,
        tool_choice,
        parallel_tool_calls: parallel_tool_calls.flatten(),
        template_kwargs_json: raw("chat_template_kwargs", '{', body.chat_template_kwargs)?,
        ..ChatRequest::default()
    };
    Ok((model, chat))
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
    use phalanx_proto::v1::ChatMessage;

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
    fn calls_of_tools_and_their_results_are_messages() {
        let body =
            br#"{"model": "m", "max_tokens": 9, "tool_choice": {"type": "any"}, "tools": [{"name": "add"}],
            "messages": [
                {"role": "user", "content": "1 + 2?"},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "3"},
                    {"type": "text", "text": "Well?"}]}
            ]}"#;
        let request = Call::parse(body, "msg_1").expect("valid").request;
        let roles: Vec<&str> = request
            .messages
            .iter()
            .map(|message| message.role.as_str())
            .collect();
        assert_eq!(roles, ["user", "assistant", "tool", "user"]);
        let called = &request.messages[1];
        assert_eq!(called.reasoning.as_deref(), Some("Hm."));
        assert_eq!(called.tool_calls[0].arguments, r#"{"a": 1}"#);
        let result = &request.messages[2];
        assert_eq!(
            (result.tool_call_id.as_deref(), result.content.as_str()),
            (Some("c1"), "3")
        );
        assert!(request.tools_json.contains("\"add\""));
        assert!(request.tool_choice.is_some());
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
                "messages[0].content[0].type",
            ),
            (
                ask(r#""messages": [{"role": "user", "content": [{"type": "tool_result"}]}]"#),
                "messages[0].content[0].tool_use_id",
            ),
            (ask(&format!(r#"{hi}, "tools": [{{}}]"#)), "tools[0].name"),
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
