//! Anthropic's Messages API, for its clients.

mod blocks;
mod error;
mod reply;
mod request;
mod stream;
mod tools;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use phalanx_proto::v1::{TokenizeRequest, tokenize_request::Input};
use serde_json::json;

pub(crate) use self::request::{CountBody, MessagesBody};
use self::{
    error::AnthropicError,
    reply::Message,
    request::{Call, conversation},
    stream::MessageEvents,
};
use crate::{
    lifecycle::Ticket,
    observe::RequestId,
    openai::{body, caller::Caller, error::broken_reply, reply::Whole, sse::Streaming},
    router::Replicas,
    routes::Service,
};

/// `POST /v1/messages`.
pub(crate) async fn messages(
    State(service): State<Service>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, AnthropicError> {
    let mut ticket = service.lifecycle.admit()?;
    let replicas = service.replicas_for(request.headers());
    let caller = Caller::of(&request);
    let body = body::read(request, &service.limits).await?;
    let id = format!("msg_{}", request_id.0);
    let mut call = Call::parse(&body, &id)?;
    caller.sign(&mut call.request.tenant, &mut call.request.timeout_ms);
    drop(body);
    ticket.start(1)?;
    if !call.streams {
        return whole(&replicas, id, call, ticket).await;
    }
    let chunks = replicas.chat_stream(call.request).await?;
    let streaming = Streaming {
        id,
        n: 1,
        prompts: vec![chunks],
        events: MessageEvents::default(),
        ticket,
    };
    Ok(streaming.respond().await?)
}

async fn whole(
    replicas: &Replicas,
    id: String,
    call: Call,
    mut ticket: Ticket,
) -> Result<Response, AnthropicError> {
    let reply = tokio::select! {
        reply = replicas.chat(call.request) => reply?,
        error = ticket.stopped() => return Err(error.into()),
    };
    let whole = Whole::join(id, 1, vec![reply])?;
    let choice = whole.choices.first();
    let choice = choice.ok_or_else(|| broken_reply("there is no choice"))?;
    Ok(Json(Message::whole(&whole.head, choice, whole.usage)?).into_response())
}

/// `POST /v1/messages/count_tokens`.
pub(crate) async fn count_tokens(
    State(service): State<Service>,
    request: Request,
) -> Result<Response, AnthropicError> {
    let mut ticket = service.lifecycle.admit()?;
    let body = body::read(request, &service.limits).await?;
    let fields: CountBody = body::parse(&body)?;
    fields.refuse_unoffered()?;
    let (model, chat) = conversation(fields)?;
    ticket.start(1)?;
    let request = TokenizeRequest {
        model,
        input: Some(Input::Chat(chat)),
        ..TokenizeRequest::default()
    };
    let input_tokens = service.backend.tokenize(request).await?.token_ids.len();
    Ok(Json(json!({"input_tokens": input_tokens})).into_response())
}
