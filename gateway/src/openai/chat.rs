//! `POST /v1/chat/completions`.

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
    body::{self, parse},
    error::ApiError,
    logprobs::ChatLogprobs,
    messages::{self, Messages},
    params::Params,
    reply::{Head, Reply, Stop, Whole, finish_reason, stop_reason},
    sse::{self, Events, Streaming},
    unoffered,
    usage::Usage,
};
use crate::{
    lifecycle::Ticket,
    observe::RequestId,
    router::{Replicas, X_SESSION_ID, session},
    routes::Service,
};

const ROLE: &str = "assistant";

/// The fields that only this route has.
#[derive(Debug, Deserialize)]
struct ChatFields {
    messages: Option<Messages>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    add_generation_prompt: Option<bool>,
    /// Passed on as it is.
    chat_template_kwargs: Option<Box<RawValue>>,
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
    style: Style,
}

/// What the reply must contain beside the text.
#[derive(Clone, Copy)]
struct Style {
    logprobs: bool,
    include_usage: bool,
    prompt_tokens_details: bool,
}

fn prepare(body: &[u8], id: &str, prompt_tokens_details: bool) -> Result<Call, RpcError> {
    let mut params: Params = parse(body)?;
    let fields: ChatFields = parse(body)?;
    unoffered::refuse_for_chat(body)?;
    let logprobs = fields.alternatives()?;
    let sampling = params.sampling(fields.max_completion_tokens.or(fields.max_tokens))?;
    let output = params.output(logprobs, false)?;
    let style = Style {
        logprobs: logprobs.is_some(),
        include_usage: output.include_usage,
        prompt_tokens_details,
    };
    let request = ChatRequest {
        request_id: id.to_owned(),
        messages: messages::to_grpc(fields.messages)?,
        sampling: Some(sampling),
        output: Some(output),
        add_generation_prompt: fields.add_generation_prompt,
        template_kwargs_json: template_kwargs(fields.chat_template_kwargs)?,
        model: params.model.take().unwrap_or_default(),
        priority: params.priority(),
        cache_salt: params.cache_salt.take(),
        ..ChatRequest::default()
    };
    Ok(Call {
        request,
        user: params.user.take(),
        streams: params.streams(),
        n: params.n(),
        style,
    })
}

fn template_kwargs(kwargs: Option<Box<RawValue>>) -> Result<String, RpcError> {
    let text = kwargs
        .map(|kwargs| String::from(Box::<str>::from(kwargs)))
        .unwrap_or_default();
    if text.is_empty() || text.starts_with('{') {
        return Ok(text);
    }
    Err(RpcError::invalid(
        "chat_template_kwargs",
        "chat_template_kwargs must be an object",
    ))
}

pub(crate) async fn handle(
    State(service): State<Service>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut ticket = service.lifecycle.admit()?;
    let header = request.headers().get(X_SESSION_ID).cloned();
    let body = body::read(request, &service.limits).await?;
    let id = format!("chatcmpl-{}", request_id.0);
    let call = prepare(&body, &id, service.prompt_tokens_details)?;
    drop(body);
    ticket.start(1)?;
    let replicas = service
        .backend
        .for_session(session(header.as_ref(), call.user.as_deref()));
    if !call.streams {
        return whole(&replicas, id, call, ticket).await;
    }
    let chunks = replicas.chat_stream(call.request).await?;
    let streaming = Streaming {
        id,
        n: call.n,
        prompts: vec![chunks],
        events: ChatEvents {
            n: call.n,
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
        reply = replicas.chat(call.request) => reply?,
        error = ticket.stopped() => return Err(error.into()),
    };
    let whole = Whole::join(id, call.n, vec![reply])?;
    let choices = whole
        .choices
        .iter()
        .map(|choice| ChatChoice::of(choice, call.style))
        .collect::<Result<Vec<_>, _>>()?;
    let usage = Usage::of(whole.usage, call.style.prompt_tokens_details);
    let reply = Reply::new(&whole.head, "chat.completion", &choices).with_usage(Some(Some(usage)));
    Ok(Json(reply).into_response())
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: ReplyMessage<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Stop<'a>>,
}

#[derive(Serialize)]
struct ReplyMessage<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<&'static str>,
}

impl<'a> ChatChoice<'a> {
    fn of(choice: &'a Choice, style: Style) -> Result<Self, RpcError> {
        Ok(Self {
            index: choice.index,
            message: ReplyMessage {
                role: ROLE,
                content: &choice.text,
                refusal: None,
            },
            logprobs: style.logprobs.then(|| ChatLogprobs::of(&choice.logprobs)),
            finish_reason: finish_reason(choice)?,
            stop_reason: stop_reason(choice),
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
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

struct ChatEvents {
    n: u32,
    style: Style,
    /// The events that open each choice with the role have been sent.
    opened: bool,
}

impl ChatEvents {
    fn write(&self, out: &mut Vec<u8>, head: &Head, choices: &[DeltaChoice<'_>], usage: Option<v1::Usage>) {
        let usage = usage.map(|usage| Usage::of(usage, self.style.prompt_tokens_details));
        let usage = self.style.include_usage.then_some(usage);
        sse::event(
            out,
            &Reply::new(head, "chat.completion.chunk", choices).with_usage(usage),
        );
    }

    fn open(&self, out: &mut Vec<u8>, head: &Head) {
        for index in 0..self.n {
            let choice = DeltaChoice {
                index,
                delta: Delta {
                    role: Some(ROLE),
                    content: Some(""),
                },
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
            };
            self.write(out, head, &[choice], None);
        }
    }
}

impl Events for ChatEvents {
    fn piece(
        &mut self,
        out: &mut Vec<u8>,
        head: &Head,
        choice: &Choice,
        usage: Option<v1::Usage>,
    ) -> Result<(), RpcError> {
        if !std::mem::replace(&mut self.opened, true) {
            self.open(out, head);
        }
        let delta = DeltaChoice {
            index: choice.index,
            delta: Delta {
                role: None,
                content: (!choice.text.is_empty()).then_some(&choice.text),
            },
            logprobs: (self.style.logprobs && !choice.logprobs.is_empty())
                .then(|| ChatLogprobs::of(&choice.logprobs)),
            finish_reason: finish_reason(choice)?,
            stop_reason: stop_reason(choice),
        };
        self.write(out, head, &[delta], usage);
        Ok(())
    }

    fn usage(&mut self, out: &mut Vec<u8>, head: &Head, usage: v1::Usage) {
        self.write(out, head, &[], Some(usage));
    }
}
