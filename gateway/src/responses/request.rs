//! The request for a response, and its gRPC form.

use std::{collections::BTreeMap, sync::Arc};

use phalanx_proto::{
    ErrorKind, RpcError,
    limits::MAX_TOOLS,
    v1::{ChatMessage, ChatRequest, OutputOptions},
};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::{
    format::Text,
    items::Input,
    reply::{Echo, Reasoning, Reply, Status},
    store::{Key, Store, id_is_taken},
    tools::{Tool, to_json},
};
use crate::{
    limits::MAX_REQUEST_ID,
    observe::{is_usable, random_hex},
    openai::{
        body::{Bounded, Object, parse},
        chat::raw,
        messages::{Content, message},
        params::Params,
        structured,
        tools::ToolChoice,
        unoffered,
    },
};

/// Things that a reply may be asked to include.
const MAX_INCLUDED: usize = 32;
const LOGPROBS: &str = "message.output_text.logprobs";
/// Of what never occurs here, so that there is nothing to include.
const NOTHING: [&str; 6] = [
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
];

/// The fields that only this route has.
#[derive(Debug, Deserialize)]
pub(crate) struct ResponsesFields {
    background: Option<bool>,
    chat_template_kwargs: Option<Box<RawValue>>,
    include: Option<Bounded<String, MAX_INCLUDED>>,
    include_reasoning: Option<bool>,
    input: Option<Input>,
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    /// Of tools that the server runs, of which there are none.
    max_tool_calls: Option<u32>,
    metadata: Option<BTreeMap<String, String>>,
    parallel_tool_calls: Option<bool>,
    previous_response_id: Option<String>,
    prompt_cache_key: Option<String>,
    reasoning: Option<Object<AskedReasoning>>,
    request_id: Option<String>,
    safety_identifier: Option<String>,
    #[serde(rename = "service_tier")]
    _service_tier: Option<IgnoredAny>,
    store: Option<bool>,
    text: Option<Object<Text>>,
    tool_choice: Option<ToolChoice>,
    tools: Option<Bounded<Object<Tool>, MAX_TOOLS>>,
    top_logprobs: Option<u32>,
    truncation: Option<Truncation>,
}

/// What a reply repeats as it came.
#[derive(Deserialize)]
struct Repeated {
    text: Option<Box<RawValue>>,
    tool_choice: Option<Box<RawValue>>,
    tools: Option<Box<RawValue>>,
}

#[derive(Debug, Deserialize)]
struct AskedReasoning {
    effort: Option<String>,
    /// Nothing is summed up here.
    summary: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Truncation {
    /// Of a prompt that is too long the beginning is left out.
    Auto,
    #[default]
    Disabled,
}

/// A checked request.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) chat: ChatRequest,
    /// The response that has nothing yet.
    pub(super) reply: Reply,
    pub(super) user: Option<String>,
    pub(super) streams: bool,
    /// What is answered, without instructions; empty unless the response is to be stored.
    pub(super) conversation: Vec<ChatMessage>,
}

/// Whose request it is, and what there is of theirs.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) store: Option<&'a Arc<Store>>,
    pub(super) tenant: &'a str,
}

impl Context<'_> {
    pub(super) fn key(&self, id: &str) -> Key {
        Key {
            tenant: self.tenant.to_owned(),
            id: id.to_owned(),
        }
    }
}

impl Call {
    /// # Errors
    /// `InvalidArgument` naming the field, or `NotFound` for a response that is to be gone on from; ranges are the
    /// coordinator's to judge.
    pub(super) fn parse(body: &[u8], context: Context<'_>) -> Result<Self, RpcError> {
        let mut params: Params = parse(body)?;
        let mut fields: ResponsesFields = parse(body)?;
        unoffered::refuse_for_responses(body)?;
        let id = fields.id()?;
        let stores = fields.stores(context.store.is_some())?;
        if stores
            && context
                .store
                .is_some_and(|store| store.get(&context.key(&id)).is_some())
        {
            return Err(id_is_taken());
        }
        if params.n() != 1 {
            return Err(RpcError::invalid("n", "n must be 1: a response has one answer"));
        }
        let mut sampling = params.sampling(fields.max_output_tokens)?;
        structured::restrict(body, &mut sampling)?;
        if let Some(Object(text)) = &fields.text {
            text.restrict(&mut sampling)?;
        }
        let output = OutputOptions {
            include_usage: true,
            continuous_usage: false,
            ..params.output(fields.alternatives()?, false, false)?
        };
        let (conversation, goes_on) = fields.conversation(context)?;
        let kept = if stores { conversation.clone() } else { Vec::new() };
        let instructions = fields.instructions.as_ref();
        let instructions = instructions.map(|text| message("system", Content::Text(text.clone())));
        let chat = ChatRequest {
            request_id: id.clone(),
            model: params.model.take().unwrap_or_default(),
            messages: instructions.into_iter().chain(conversation).collect(),
            sampling: Some(sampling),
            output: Some(output),
            add_generation_prompt: goes_on.then_some(false),
            continue_final_message: goes_on,
            priority: params.priority(),
            cache_salt: params.cache_salt.take(),
            timeout_ms: params.timeout_ms()?,
            ..fields.chat()?
        };
        let user = params.user.take();
        let echo = fields.echo(parse(body)?, stores, &chat, user.clone());
        let mut reply = Reply::new(id, chat.model.clone(), echo);
        if reply.echo.background {
            reply.status = Status::Queued;
        }
        Ok(Self {
            user,
            reply,
            streams: params.streams(),
            conversation: kept,
            chat,
        })
    }
}

impl ResponsesFields {
    /// The client's name for the response, as with vLLM, or a new one.
    fn id(&mut self) -> Result<String, RpcError> {
        match self.request_id.take() {
            None => Ok(format!("resp_{}", random_hex())),
            Some(id) if is_usable(&id) => Ok(id),
            Some(_) => {
                let message = format!("request_id must have 1 to {MAX_REQUEST_ID} visible ASCII characters");
                Err(RpcError::invalid("request_id", message))
            }
        }
    }

    /// Whether the response is to be stored, which is the default if anything is.
    fn stores(&self, there_is_a_store: bool) -> Result<bool, RpcError> {
        let wanted = self.store.unwrap_or(true);
        let refuse = |why: &str| Err(RpcError::invalid("background", format!("background {why}")));
        match self.background {
            Some(true) if !there_is_a_store => {
                refuse("needs a server that stores responses (--enable-responses-api-store)")
            }
            Some(true) if !wanted => refuse("can only be used when store is true"),
            _ => Ok(wanted && there_is_a_store),
        }
    }

    /// Alternatives per token, when log-probabilities are to be included.
    fn alternatives(&self) -> Result<Option<u32>, RpcError> {
        let included = self.include.as_ref().map_or(&[][..], |Bounded(names)| names);
        let unknown = |name: &String| name != LOGPROBS && !NOTHING.contains(&name.as_str());
        if let Some(index) = included.iter().position(unknown) {
            let param = format!("include[{index}]");
            let message = format!("{param}: there is nothing of this name that a reply could include");
            return Err(RpcError::invalid(param, message));
        }
        match (included.iter().any(|name| name == LOGPROBS), self.top_logprobs) {
            (true, top) => Ok(Some(top.unwrap_or(0))),
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => {
                let message = format!("top_logprobs needs {LOGPROBS} in include");
                Err(RpcError::invalid("top_logprobs", message))
            }
        }
    }

    /// What is to be answered, and whether its last message is to go on.
    fn conversation(&mut self, context: Context<'_>) -> Result<(Vec<ChatMessage>, bool), RpcError> {
        let mut messages = match &self.previous_response_id {
            None => Vec::new(),
            Some(id) => {
                let record = context.store.and_then(|store| store.get(&context.key(id)));
                record
                    .ok_or_else(|| not_found(id, "previous_response_id"))?
                    .continued()?
            }
        };
        let input = self
            .input
            .take()
            .ok_or_else(|| RpcError::invalid("input", "input is needed"))?;
        let goes_on = input.add_to(&mut messages)?;
        if messages.is_empty() {
            return Err(RpcError::invalid("input", "input: at least one item is needed"));
        }
        Ok((messages, goes_on))
    }

    /// What of a chat these fields alone say.
    fn chat(&mut self) -> Result<ChatRequest, RpcError> {
        let reasoning = self
            .reasoning
            .as_ref()
            .and_then(|Object(asked)| asked.effort.clone());
        Ok(ChatRequest {
            template_kwargs_json: raw("chat_template_kwargs", '{', self.chat_template_kwargs.take())?,
            tools_json: to_json(&self.tools.take().unwrap_or_default())?,
            tool_choice: self.tool_choice.take().map(|choice| choice.0),
            parallel_tool_calls: self.parallel_tool_calls,
            include_reasoning: self.include_reasoning,
            reasoning_effort: reasoning.unwrap_or_default(),
            truncate_prompt_tokens: (self.truncation == Some(Truncation::Auto)).then_some(-1),
            ..ChatRequest::default()
        })
    }

    fn echo(self, repeated: Repeated, store: bool, chat: &ChatRequest, user: Option<String>) -> Echo {
        let sampling = chat.sampling.as_ref();
        let reasoning = self.reasoning.map(|Object(asked)| asked);
        let or = |given: Option<Box<RawValue>>, default: &str| {
            given
                .or_else(|| RawValue::from_string(default.to_owned()).ok())
                .unwrap_or_default()
        };
        Echo {
            background: self.background.unwrap_or(false),
            instructions: self.instructions,
            max_output_tokens: self.max_output_tokens,
            max_tool_calls: self.max_tool_calls,
            metadata: self.metadata.unwrap_or_default(),
            parallel_tool_calls: self.parallel_tool_calls.unwrap_or(true),
            previous_response_id: self.previous_response_id,
            prompt_cache_key: self.prompt_cache_key,
            reasoning: Reasoning {
                effort: reasoning.as_ref().and_then(|asked| asked.effort.clone()),
                summary: reasoning.and_then(|asked| asked.summary),
            },
            safety_identifier: self.safety_identifier,
            service_tier: "default",
            store,
            temperature: sampling.and_then(|sampling| sampling.temperature),
            text: or(repeated.text, r#"{"format":{"type":"text"}}"#),
            tool_choice: or(repeated.tool_choice, r#""auto""#),
            tools: or(repeated.tools, "[]"),
            top_logprobs: self.top_logprobs.unwrap_or(0),
            top_p: sampling.and_then(|sampling| sampling.top_p),
            truncation: self.truncation.unwrap_or_default(),
            user,
        }
    }
}

/// The coordinator, and what is shared with chats, call some fields as chats do.
pub(super) fn in_own_terms(mut error: RpcError) -> RpcError {
    let Some(param) = error.param.take() else {
        return error;
    };
    error.param = Some(match param.as_str() {
        "logprobs" => "top_logprobs".to_owned(),
        "max_tokens" => "max_output_tokens".to_owned(),
        "messages" | "prompt" => "input".to_owned(),
        chat if chat.starts_with("messages[") => "input".to_owned(),
        "response_format.json_schema.schema" => {
            error.message = error.message.replace(&param, "text.format.schema");
            "text.format.schema".to_owned()
        }
        format if format.starts_with("response_format") => {
            error.message = error.message.replace("response_format", "text.format");
            "text.format".to_owned()
        }
        _ => param,
    });
    error
}

/// There is no such response, or it is another one's.
pub(super) fn not_found(id: &str, param: &str) -> RpcError {
    // Debug, and cut: an id is as long as its sender likes.
    let shown: String = id.chars().take(MAX_REQUEST_ID).collect();
    RpcError::new(
        ErrorKind::NotFound,
        format!("Response with id {shown:?} not found."),
    )
    .with_param(param)
}

#[cfg(test)]
pub(super) mod tests {
    use phalanx_proto::v1::tool_choice::Mode;
    use serde_json::{Value, json};

    use super::*;
    use crate::responses::store::{Record, StoreLimits};

    /// A response with the id `resp_1` that has nothing yet.
    pub(in crate::responses) fn reply() -> Reply {
        call(r#"{"input": "hi", "request_id": "resp_1"}"#)
            .expect("valid")
            .reply
    }

    const NO_STORE: Context<'static> = Context {
        store: None,
        tenant: "",
    };

    fn call(body: &str) -> Result<Call, RpcError> {
        Call::parse(body.as_bytes(), NO_STORE)
    }

    fn echo(call: &Call) -> Value {
        serde_json::to_value(&call.reply).expect("plain data")
    }

    const FULL: &str = r#"{"model": "m", "input": "hi", "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.5,
            "top_p": 0.25, "top_k": 3, "seed": 7, "stop": "END", "include": ["message.output_text.logprobs"],
            "top_logprobs": 2, "parallel_tool_calls": false, "stream": true, "metadata": {"a": "b"}, "user": "u",
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "tool_choice": {"type": "function", "name": "f"}, "truncation": "auto", "priority": 2, "cache_salt": "s",
            "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}, "verbosity": "low"},
            "chat_template_kwargs": {"x": 1}, "service_tier": "flex", "prompt_cache_key": "k",
            "safety_identifier": "i", "max_tool_calls": 3, "store": true, "somebody_elses": 1}"#;

    #[test]
    fn every_field_is_carried() {
        let call = call(FULL).expect("valid");
        let chat = &call.chat;
        let roles: Vec<&str> = chat
            .messages
            .iter()
            .map(|message| message.role.as_str())
            .collect();
        assert_eq!((roles.as_slice(), call.streams), (&["system", "user"][..], true));
        let sampling = chat.sampling.as_ref().expect("given");
        assert_eq!(
            (
                sampling.max_tokens,
                sampling.top_k,
                sampling.seed,
                sampling.stop.len()
            ),
            (Some(9), Some(3), Some(7), 1)
        );
        let output = chat.output.expect("given");
        assert_eq!((output.logprobs, output.include_usage), (Some(2), true));
        assert_eq!(chat.tool_choice.as_ref().expect("given").mode(), Mode::Named);
        assert_eq!(
            (
                chat.truncate_prompt_tokens,
                chat.priority,
                chat.cache_salt.as_deref()
            ),
            (Some(-1), 2, Some("s"))
        );
        assert_eq!(
            (chat.reasoning_effort.as_str(), chat.template_kwargs_json.as_str()),
            ("low", r#"{"x": 1}"#)
        );
    }

    #[test]
    fn every_field_is_told() {
        let told = echo(&call(FULL).expect("valid"));
        assert!(
            told["id"]
                .as_str()
                .is_some_and(|id| id.starts_with("resp_") && id.len() == 37)
        );
        for (field, value) in [
            ("object", json!("response")),
            ("status", json!("in_progress")),
            ("model", json!("m")),
            ("output", json!([])),
            ("error", Value::Null),
            ("incomplete_details", Value::Null),
            ("usage", Value::Null),
            ("background", json!(false)),
            ("instructions", json!("Be brief.")),
            ("max_output_tokens", json!(9)),
            ("max_tool_calls", json!(3)),
            ("metadata", json!({"a": "b"})),
            ("parallel_tool_calls", json!(false)),
            ("previous_response_id", Value::Null),
            ("prompt_cache_key", json!("k")),
            ("reasoning", json!({"effort": "low", "summary": null})),
            ("safety_identifier", json!("i")),
            ("service_tier", json!("default")),
            ("store", json!(false)),
            ("temperature", json!(0.5)),
            ("text", json!({"format": {"type": "text"}, "verbosity": "low"})),
            ("tool_choice", json!({"type": "function", "name": "f"})),
            (
                "tools",
                json!([{"type": "function", "name": "f", "parameters": {}}]),
            ),
            ("top_logprobs", json!(2)),
            ("top_p", json!(0.25)),
            ("truncation", json!("auto")),
            ("user", json!("u")),
        ] {
            assert_eq!(told[field], value, "{field}");
        }
    }

    #[test]
    fn defaults_are_told_as_openai_tells_them() {
        let told = echo(&call(r#"{"input": "hi", "tools": null, "metadata": null}"#).expect("valid"));
        for (field, value) in [
            ("metadata", json!({})),
            ("parallel_tool_calls", json!(true)),
            ("reasoning", json!({"effort": null, "summary": null})),
            ("text", json!({"format": {"type": "text"}})),
            ("tool_choice", json!("auto")),
            ("tools", json!([])),
            ("truncation", json!("disabled")),
        ] {
            assert_eq!(told[field], value, "{field}");
        }
    }

    #[test]
    fn an_answer_that_was_cut_off_goes_on() {
        let body = r#"{"input": [{"role": "user", "content": "hi"},
            {"type": "message", "role": "assistant", "status": "incomplete", "content": "He"}]}"#;
        let chat = call(body).expect("valid").chat;
        assert_eq!(
            (chat.continue_final_message, chat.add_generation_prompt),
            (true, Some(false))
        );
    }

    #[test]
    fn refusals_name_the_field() {
        let long = "x".repeat(129);
        for (fields, param) in [
            (r#""input": null"#.to_owned(), "input"),
            (r#""input": []"#.to_owned(), "input"),
            (format!(r#""input": "hi", "request_id": "{long}""#), "request_id"),
            (r#""input": "hi", "n": 2"#.to_owned(), "n"),
            (r#""input": "hi", "background": true"#.to_owned(), "background"),
            (
                r#""input": "hi", "previous_response_id": "x""#.to_owned(),
                "previous_response_id",
            ),
            (r#""input": "hi", "include": ["all"]"#.to_owned(), "include[0]"),
            (r#""input": "hi", "top_logprobs": 3"#.to_owned(), "top_logprobs"),
            (
                r#""input": "hi", "logprob_token_ids": [5]"#.to_owned(),
                "logprob_token_ids",
            ),
            (r#""input": "hi", "truncation": "some""#.to_owned(), "truncation"),
            (r#""input": "hi", "metadata": {"a": 1}"#.to_owned(), "metadata.a"),
            (
                r#""input": "hi", "tool_choice": "maybe""#.to_owned(),
                "tool_choice",
            ),
            (
                r#""input": "hi", "tools": [{"type": "mcp"}]"#.to_owned(),
                "tools[0].type",
            ),
            (
                r#""input": "hi", "text": {"format": {"type": "xml"}}"#.to_owned(),
                "text.format.type",
            ),
            (r#""input": "hi", "prompt": {"id": "p"}"#.to_owned(), "prompt"),
            (r#""input": "hi", "conversation": "c""#.to_owned(), "conversation"),
            (r#""input": "hi", "reasoning": "deep""#.to_owned(), "reasoning"),
        ] {
            let error = call(&format!("{{{fields}}}")).expect_err(&fields);
            assert_eq!(error.param.as_deref(), Some(param), "{fields}: {error}");
        }
    }

    #[test]
    fn a_stored_response_is_gone_on_from_by_its_owner() {
        let store = Arc::new(Store::new(StoreLimits::default()));
        let mine = Context {
            store: Some(&store),
            tenant: "me",
        };
        let parse = |body: &str, context| Call::parse(body.as_bytes(), context);
        let first = parse(
            r#"{"input": "hi", "instructions": "Old.", "request_id": "r"}"#,
            mine,
        );
        let first = first.expect("valid");
        assert!(first.reply.echo.store);
        let mut reply = first.reply;
        reply.status = Status::Completed;
        let record = Arc::new(Record::new(reply, first.conversation, false));
        store.insert(mine.key("r"), record).expect("room");
        let next = r#"{"input": "and?", "instructions": "New.", "previous_response_id": "r"}"#;
        let chat = parse(next, mine).expect("valid").chat;
        let texts: Vec<&str> = chat
            .messages
            .iter()
            .map(|message| message.content.as_str())
            .collect();
        assert_eq!(texts, ["New.", "hi", "and?"]);
        let other = Context {
            tenant: "you",
            ..mine
        };
        assert_eq!(
            parse(next, other).expect_err("not theirs").kind,
            ErrorKind::NotFound
        );
        let taken = parse(r#"{"input": "hi", "request_id": "r"}"#, mine).expect_err("taken");
        assert_eq!(taken.param.as_deref(), Some("request_id"));
        let no_store = r#"{"input": "hi", "background": true, "store": false}"#;
        let refused = parse(no_store, mine).expect_err("not stored");
        assert_eq!(refused.param.as_deref(), Some("background"));
        let background = parse(r#"{"input": "hi", "background": true}"#, mine).expect("valid");
        assert_eq!(background.reply.status, Status::Queued);
    }

    #[test]
    fn errors_of_chats_are_told_in_own_terms() {
        for (chat, own) in [
            ("logprobs", "top_logprobs"),
            ("max_tokens", "max_output_tokens"),
            ("messages[1].role", "input"),
            ("prompt", "input"),
            ("response_format.json_schema.schema", "text.format.schema"),
            ("tools", "tools"),
        ] {
            let error = in_own_terms(RpcError::invalid(chat, "why"));
            assert_eq!(error.param.as_deref(), Some(own));
        }
    }
}
