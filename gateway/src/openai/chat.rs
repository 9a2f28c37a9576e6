//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use phalanx_proto::{
    RpcError,
    v1::{self, ChatRequest, Choice},
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    answer::{Delta, ReplyMessage},
    body::{self, parse},
    caller::Caller,
    error::ApiError,
    logprobs::ChatLogprobs,
    messages::{self, Messages},
    output::{OutputFields, Style},
    params::Params,
    prompt_reply::PromptReply,
    reply::{Head, Reply, Stop, Whole, finish_reason, stop_reason},
    sse::{self, Events, Piece, Streaming},
    structured,
    tools::ToolChoice,
    unoffered,
    usage::Usage,
};
use crate::{
    lifecycle::Ticket,
    observe::RequestId,
    router::{Replicas, X_SESSION_ID, session},
    routes::Service,
};

/// The fields that only this route has.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatFields {
    messages: Option<Messages>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    echo: Option<bool>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    add_special_tokens: Option<bool>,
    chat_template: Option<String>,
    reasoning_effort: Option<String>,
    include_reasoning: Option<bool>,
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
    // Passed on as they are.
    chat_template_kwargs: Option<Box<RawValue>>,
    documents: Option<Box<RawValue>>,
    tools: Option<Box<RawValue>>,
}

impl ChatFields {
    /// Alternatives per token, when log-probabilities are asked for.
    fn alternatives(&self) -> Result<Option<u32>, RpcError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Ok(Some(top.unwrap_or(0))),
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => Err(RpcError::invalid(
                "top_logprobs",
                "top_logprobs needs logprobs to be true",
            )),
        }
    }
}

/// A checked request.
struct Call {
    request: ChatRequest,
    user: Option<String>,
    streams: bool,
    n: u32,
    role: Arc<str>,
    style: Style,
}

fn prepare(body: &[u8], id: &str, service: &Service) -> Result<Call, RpcError> {
    let mut params: Params = parse(body)?;
    let fields: ChatFields = parse(body)?;
    let mut outputs: OutputFields = parse(body)?;
    unoffered::refuse_for_chat(body)?;
    let logprobs = fields.alternatives()?;
    let mut sampling = params.sampling(fields.max_completion_tokens.or(fields.max_tokens))?;
    structured::restrict(body, &mut sampling)?;
    outputs.list(&mut sampling);
    let echo = fields.echo.unwrap_or(false);
    let mut output = params.output(logprobs, echo, service.reply.force_include_usage)?;
    outputs.complete(&mut output, params.streams())?;
    let messages = messages::to_grpc(fields.messages)?;
    let continue_final_message = fields.continue_final_message.unwrap_or(false);
    let opens_turn = fields.add_generation_prompt.unwrap_or(!continue_final_message);
    let last_role = messages
        .last()
        .filter(|_| !opens_turn)
        .map(|last| last.role.as_str().into());
    let request = ChatRequest {
        request_id: id.to_owned(),
        messages,
        sampling: Some(sampling),
        output: Some(output),
        add_generation_prompt: fields.add_generation_prompt,
        template_kwargs_json: raw("chat_template_kwargs", '{', fields.chat_template_kwargs)?,
        model: params.model.take().unwrap_or_default(),
        priority: params.priority(),
        cache_salt: params.cache_salt.take(),
        timeout_ms: params.timeout_ms()?,
        truncate_prompt_tokens: outputs.truncate_prompt_tokens,
        tools_json: raw("tools", '[', fields.tools)?,
        tool_choice: fields.tool_choice.map(|choice| choice.0),
        parallel_tool_calls: fields.parallel_tool_calls,
        continue_final_message,
        documents_json: raw("documents", '[', fields.documents)?,
        chat_template: fields.chat_template.unwrap_or_default(),
        add_special_tokens: fields.add_special_tokens.unwrap_or(false),
        include_reasoning: fields.include_reasoning,
        reasoning_effort: fields.reasoning_effort.unwrap_or_default(),
        ..ChatRequest::default()
    };
    let style = outputs.style(&output, service.reply);
    Ok(Call {
        request,
        user: params.user.take(),
        streams: params.streams(),
        n: params.n(),
        role: last_role.unwrap_or_else(|| service.response_role.clone()),
        style: Style {
            // The tokens of reasoning that is left out would tell it.
            token_ids: style.token_ids && fields.include_reasoning != Some(false),
            ..style
        },
    })
}

/// JSON that begins with `first`, as it came; nothing if there is none.
pub(crate) fn raw(field: &str, first: char, value: Option<Box<RawValue>>) -> Result<String, RpcError> {
    let text = value.map_or_else(String::new, |value| Box::<str>::from(value).into());
    if text.is_empty() || text.starts_with(first) {
        return Ok(text);
    }
    let kind = if first == '{' { "an object" } else { "a list" };
    Err(RpcError::invalid(field, format!("{field} must be {kind}")))
}

pub(crate) async fn handle(
    State(service): State<Service>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut ticket = service.lifecycle.admit()?;
    let caller = Caller::of(&request);
    let header = request.headers().get(X_SESSION_ID).cloned();
    let body = body::read(request, &service.limits).await?;
    let id = format!("chatcmpl-{}", request_id.0);
    let mut call = prepare(&body, &id, &service)?;
    caller.sign(&mut call.request.tenant, &mut call.request.timeout_ms);
    drop(body);
    ticket.start(1)?;
    let replicas = service
        .backend
        .for_session(session(header.as_ref(), call.user.as_deref()));
    if !call.streams {
        return whole(&replicas, id, call, ticket).await;
    }
    let chunks = replicas.chat_stream(call.request).await;
    let chunks = chunks.map_err(in_chat_terms)?;
    let streaming = Streaming {
        id,
        n: call.n,
        prompts: vec![chunks],
        events: ChatEvents {
            n: call.n,
            role: call.role,
            style: call.style,
            opened: false,
        },
        ticket,
    };
    streaming.respond().await
}

async fn whole(
    replicas: &Replicas,
    id: String,
    call: Call,
    mut ticket: Ticket,
) -> Result<Response, ApiError> {
    let reply = tokio::select! {
        reply = replicas.chat(call.request) => reply.map_err(in_chat_terms)?,
        error = ticket.stopped() => return Err(error.into()),
    };
    let whole = Whole::join(id, call.n, vec![reply])?;
    let choices = whole
        .choices
        .iter()
        .map(|choice| ChatChoice::of(choice, &call.role, call.style))
        .collect::<Result<Vec<_>, _>>()?;
    let usage = Usage::of(whole.usage, call.style.prompt_tokens_details);
    let prompt = whole.prompts.first();
    let prompt = prompt.map_or(PromptReply::NONE, |prompt| PromptReply::of(prompt, call.style));
    let reply = Reply::new(&whole.head, "chat.completion", &choices)
        .with_usage(Some(Some(usage)))
        .with_prompt(prompt);
    Ok(Json(reply).into_response())
}

/// The coordinator calls the number of alternatives as completions do.
fn in_chat_terms(mut error: RpcError) -> RpcError {
    if error.param.as_deref() == Some("logprobs") {
        error.param = Some("top_logprobs".to_owned());
    }
    error
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: ReplyMessage<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Stop<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

impl<'a> ChatChoice<'a> {
    fn of(choice: &'a Choice, role: &'a str, style: Style) -> Result<Self, RpcError> {
        Ok(Self {
            index: choice.index,
            message: ReplyMessage::of(role, choice),
            logprobs: style
                .logprobs
                .then(|| ChatLogprobs::of(&choice.logprobs, style.tokens_as_ids)),
            finish_reason: finish_reason(choice)?,
            stop_reason: stop_reason(choice),
            token_ids: style.token_ids.then_some(choice.token_ids.as_slice()),
        })
    }
}

#[derive(Serialize)]
struct DeltaChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Stop<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

struct ChatEvents {
    n: u32,
    role: Arc<str>,
    style: Style,
    /// The events that open each choice with the role have been sent.
    opened: bool,
}

impl ChatEvents {
    fn write(&self, out: &mut Vec<u8>, head: &Head, event: Event<'_>) {
        let usage = event
            .usage
            .map(|usage| Usage::of(usage, self.style.prompt_tokens_details));
        let usage = self.style.include_usage.then_some(usage);
        let reply = Reply::new(head, "chat.completion.chunk", event.choices)
            .with_usage(usage)
            .with_prompt(event.prompt);
        sse::event(out, &reply);
    }

    fn open(&self, out: &mut Vec<u8>, head: &Head, prompt: PromptReply<'_>) {
        for index in 0..self.n {
            let choice = DeltaChoice {
                index,
                delta: Delta::opening(&self.role),
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            let event = Event {
                choices: &[choice],
                usage: None,
                prompt,
            };
            self.write(out, head, event);
        }
    }
}

/// What differs from event to event.
struct Event<'a> {
    choices: &'a [DeltaChoice<'a>],
    usage: Option<v1::Usage>,
    prompt: PromptReply<'a>,
}

impl Events for ChatEvents {
    fn piece(&mut self, out: &mut Vec<u8>, head: &Head, piece: Piece<'_>) -> Result<(), RpcError> {
        let (choice, style) = (piece.choice, self.style);
        if !std::mem::replace(&mut self.opened, true) {
            let prompt = piece.prompt;
            let prompt = prompt.map_or(PromptReply::NONE, |prompt| PromptReply::of(prompt, style));
            self.open(out, head, prompt);
        }
        // A token in the middle of a tag, or of a character.
        if says_nothing(choice) && piece.usage.is_none() && !style.token_ids {
            return Ok(());
        }
        let delta = DeltaChoice {
            index: choice.index,
            delta: Delta::of(choice),
            logprobs: (style.logprobs && !choice.logprobs.is_empty())
                .then(|| ChatLogprobs::of(&choice.logprobs, style.tokens_as_ids)),
            finish_reason: finish_reason(choice)?,
            stop_reason: stop_reason(choice),
            token_ids: style.token_ids.then_some(choice.token_ids.as_slice()),
        };
        let event = Event {
            choices: &[delta],
            usage: piece.usage,
            prompt: PromptReply::NONE,
        };
        self.write(out, head, event);
        Ok(())
    }

    fn usage(&mut self, out: &mut Vec<u8>, head: &Head, usage: v1::Usage) {
        let event = Event {
            choices: &[],
            usage: Some(usage),
            prompt: PromptReply::NONE,
        };
        self.write(out, head, event);
    }
}

/// Whether a piece of a choice has neither text nor an end.
fn says_nothing(piece: &Choice) -> bool {
    let has_reasoning = piece.reasoning.as_ref().is_some_and(|text| !text.is_empty());
    let has_text = has_reasoning || !piece.text.is_empty() || !piece.tool_calls.is_empty();
    !has_text && piece.logprobs.is_empty() && piece.finish_reason() == v1::FinishReason::Unspecified
}
