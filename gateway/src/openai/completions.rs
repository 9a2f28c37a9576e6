//! `POST /v1/completions`.

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use futures_util::future::try_join_all;
use phalanx_proto::{
    RpcError,
    v1::{self, Choice, GenerateRequest, PromptOutput},
};
use serde::{Deserialize, Serialize};

use super::{
    body::{self, parse},
    caller::Caller,
    error::ApiError,
    logprobs::CompletionLogprobs,
    output::{OutputFields, ReplyOptions, Style},
    params::Params,
    prompt::Prompts,
    prompt_reply::PromptReply,
    reply::{Head, Reply, Stop, Whole, finish_reason, stop_reason},
    sse::{self, Events, Piece, Streaming},
    structured, unoffered,
    usage::Usage,
};
use crate::{
    lifecycle::Ticket,
    limits::MAX_CHOICES,
    observe::RequestId,
    router::{Replicas, X_SESSION_ID, session},
    routes::Service,
};

const OBJECT: &str = "text_completion";

/// The fields that only this route has.
#[derive(Debug, Deserialize)]
pub(crate) struct CompletionFields {
    prompt: Option<Prompts>,
    /// OpenAI's default for this route; `null` asks for as many as fit.
    #[serde(default = "default_max_tokens")]
    max_tokens: Option<u32>,
    /// Alternatives per token.
    logprobs: Option<u32>,
    echo: Option<bool>,
    add_special_tokens: Option<bool>,
}

#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
fn default_max_tokens() -> Option<u32> {
    Some(16)
}

/// A checked request, as one gRPC request for every prompt.
struct Call {
    requests: Vec<GenerateRequest>,
    user: Option<String>,
    streams: bool,
    n: u32,
    style: Style,
}

fn prepare(body: &[u8], id: &str, options: ReplyOptions) -> Result<Call, RpcError> {
    let mut params: Params = parse(body)?;
    let fields: CompletionFields = parse(body)?;
    let mut outputs: OutputFields = parse(body)?;
    unoffered::refuse_for_completions(body)?;
    let mut sampling = params.sampling(fields.max_tokens)?;
    structured::restrict(body, &mut sampling)?;
    outputs.list(&mut sampling);
    let echo = fields.echo.unwrap_or(false);
    let mut output = params.output(fields.logprobs, echo, options.force_include_usage)?;
    outputs.complete(&mut output, params.streams())?;
    let prompts = fields.prompt.map(|prompts| prompts.0).unwrap_or_default();
    if prompts.is_empty() {
        return Err(RpcError::invalid("prompt", "prompt: at least one is needed"));
    }
    let n = params.n();
    let choices = prompts.len().saturating_mul(n as usize);
    if choices > MAX_CHOICES {
        let message = format!(
            "{} prompts with n = {n} are {choices} choices, more than {MAX_CHOICES}",
            prompts.len()
        );
        return Err(RpcError::invalid("n", message));
    }
    let (model, several) = (params.model.take().unwrap_or_default(), prompts.len() > 1);
    let (priority, cache_salt) = (params.priority(), params.cache_salt.take());
    let timeout_ms = params.timeout_ms()?;
    let requests = prompts
        .into_iter()
        .enumerate()
        .map(|(index, prompt)| GenerateRequest {
            request_id: if several {
                format!("{id}-{index}")
            } else {
                id.to_owned()
            },
            model: model.clone(),
            prompt: Some(prompt),
            sampling: Some(sampling.clone()),
            output: Some(output),
            add_special_tokens: fields.add_special_tokens,
            priority,
            cache_salt: cache_salt.clone(),
            timeout_ms,
            truncate_prompt_tokens: outputs.truncate_prompt_tokens,
            ..GenerateRequest::default()
        });
    Ok(Call {
        requests: requests.collect(),
        user: params.user.take(),
        streams: params.streams(),
        n,
        style: outputs.style(&output, options),
    })
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
    let id = format!("cmpl-{}", request_id.0);
    let mut call = prepare(&body, &id, service.reply)?;
    for request in &mut call.requests {
        caller.sign(&mut request.tenant, &mut request.timeout_ms);
    }
    drop(body);
    ticket.start(call.requests.len())?;
    let replicas = service
        .backend
        .for_session(session(header.as_ref(), call.user.as_deref()));
    if !call.streams {
        return whole(&replicas, id, call, ticket).await;
    }
    let prompts = call
        .requests
        .into_iter()
        .map(|request| replicas.generate_stream(request));
    let streaming = Streaming {
        id,
        n: call.n,
        prompts: try_join_all(prompts).await?,
        events: CompletionEvents { style: call.style },
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
    let replies = call
        .requests
        .into_iter()
        .map(|request| replicas.generate(request));
    let replies = tokio::select! {
        replies = try_join_all(replies) => replies?,
        error = ticket.stopped() => return Err(error.into()),
    };
    let whole = Whole::join(id, call.n, replies)?;
    let choices = whole
        .choices_and_prompts()
        .map(|(choice, prompt)| CompletionChoice::of(choice, Some(prompt), call.style))
        .collect::<Result<Vec<_>, _>>()?;
    let usage = Usage::of(whole.usage, call.style.prompt_tokens_details);
    let reply = Reply::new(&whole.head, OBJECT, &choices).with_usage(Some(Some(usage)));
    Ok(Json(reply).into_response())
}

/// A choice, or in a stream a piece of one: this route has one shape for both.
#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<CompletionLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Stop<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(flatten)]
    prompt: PromptReply<'a>,
}

impl<'a> CompletionChoice<'a> {
    /// `prompt`: what is to be told of it, but not with a later piece of a stream.
    fn of(choice: &'a Choice, prompt: Option<&'a PromptOutput>, style: Style) -> Result<Self, RpcError> {
        Ok(Self {
            index: choice.index,
            text: &choice.text,
            logprobs: style
                .logprobs
                .then(|| CompletionLogprobs::of(&choice.logprobs, style.tokens_as_ids)),
            finish_reason: finish_reason(choice)?,
            stop_reason: stop_reason(choice),
            token_ids: style.token_ids.then_some(choice.token_ids.as_slice()),
            prompt: prompt.map_or(PromptReply::NONE, |prompt| PromptReply::of(prompt, style)),
        })
    }
}

struct CompletionEvents {
    style: Style,
}

impl CompletionEvents {
    fn write(
        &self,
        out: &mut Vec<u8>,
        head: &Head,
        choices: &[CompletionChoice<'_>],
        usage: Option<v1::Usage>,
    ) {
        let usage = usage.map(|usage| Usage::of(usage, self.style.prompt_tokens_details));
        let usage = self.style.include_usage.then_some(usage);
        sse::event(out, &Reply::new(head, OBJECT, choices).with_usage(usage));
    }
}

impl Events for CompletionEvents {
    fn piece(&mut self, out: &mut Vec<u8>, head: &Head, piece: Piece<'_>) -> Result<(), RpcError> {
        let choice = CompletionChoice::of(piece.choice, piece.prompt, self.style)?;
        self.write(out, head, &[choice], piece.usage);
        Ok(())
    }

    fn usage(&mut self, out: &mut Vec<u8>, head: &Head, usage: v1::Usage) {
        self.write(out, head, &[], Some(usage));
    }
}
