//! OpenAI's Responses API: a conversation is answered by items, which may be stored and made in the background.

mod background;
mod draft;
mod events;
mod format;
mod items;
mod reply;
mod request;
mod store;
mod stream;
mod tools;

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
};
use futures_util::StreamExt;
use http::Uri;
use phalanx_proto::{RpcError, v1::ChatRequest};

pub use self::store::StoreLimits;
use self::{
    background::{Job, follow},
    draft::Draft,
    events::Log,
    reply::Status,
    request::{Call, Context, in_own_terms, not_found},
    store::{Keeper, Key, Record},
    stream::ResponseEvents,
};
pub(crate) use self::{request::ResponsesFields, store::Store};
use crate::{
    auth::Tenant,
    lifecycle::Ticket,
    openai::{
        body,
        caller::Caller,
        error::ApiError,
        sse::{self, Streaming},
    },
    query,
    router::{Replicas, X_SESSION_ID, session},
    routes::Service,
};

const RESPONSE_ID: &str = "response_id";
const STARTING_AFTER: &str = "starting_after";

/// `POST /v1/responses`.
pub(crate) async fn create(State(service): State<Service>, request: Request) -> Result<Response, ApiError> {
    let mut ticket = service.lifecycle.admit()?;
    let caller = Caller::of(&request);
    let header = request.headers().get(X_SESSION_ID).cloned();
    let body = body::read(request, &service.limits).await?;
    let context = Context {
        store: service.responses.as_ref(),
        tenant: caller.tenant(),
    };
    let mut call = Call::parse(&body, context)?;
    let is_background = call.reply.echo.background;
    let own_timeout_ms = call.chat.timeout_ms;
    caller.sign(&mut call.chat.tenant, &mut call.chat.timeout_ms);
    if is_background {
        // Nobody waits for it, and so no proxy gives it up.
        call.chat.timeout_ms = own_timeout_ms;
    }
    drop(body);
    ticket.start(1)?;
    let replicas = service
        .backend
        .for_session(session(header.as_ref(), call.user.as_deref()));
    let key = context.key(&call.reply.id);
    let conversation = std::mem::take(&mut call.conversation);
    let stores = call.reply.echo.store;
    let keeper = context.store.filter(|_| stores);
    let keeper = keeper.map(|store| Keeper::new(Arc::clone(store), key, conversation));
    if is_background && call.chat.model.is_empty() {
        // The client is told which it is before the model has said anything.
        let models = replicas.list_models().await?.models;
        call.reply.model = models.into_iter().next().map(|card| card.id).unwrap_or_default();
    }
    let run = Run {
        replicas,
        chat: call.chat,
        draft: Draft::new(call.reply, service.reply.tokens_as_token_ids),
        ticket,
    };
    match keeper {
        Some(keeper) if is_background => run.in_background(keeper, call.streams).await,
        keeper if call.streams => run.streamed(keeper).await,
        keeper => run.whole(keeper).await,
    }
}

/// A request that is about to be asked.
struct Run {
    replicas: Replicas,
    chat: ChatRequest,
    draft: Draft,
    ticket: Ticket,
}

impl Run {
    /// Answers with the whole response, of which a stream is read too: it alone tells which tokens were thoughts.
    async fn whole(mut self, keeper: Option<Keeper>) -> Result<Response, ApiError> {
        let answer = async {
            let mut chunks = self.replicas.chat_stream(self.chat).await.map_err(in_own_terms)?;
            while let Some(chunk) = chunks.next().await {
                self.draft.chunk(&mut (), &chunk?)?;
            }
            self.draft.end(&mut ())?;
            Ok::<_, RpcError>(self.draft.reply)
        };
        let reply = tokio::select! {
            reply = answer => reply?,
            error = self.ticket.stopped() => return Err(error.into()),
        };
        let response = Json(&reply).into_response();
        if let Some(keeper) = keeper {
            keeper.keep(reply);
        }
        Ok(response)
    }

    /// Answers with events.
    async fn streamed(self, keeper: Option<Keeper>) -> Result<Response, ApiError> {
        let chunks = self.replicas.chat_stream(self.chat).await.map_err(in_own_terms)?;
        let streaming = Streaming {
            id: self.draft.reply.id.clone(),
            n: 1,
            prompts: vec![chunks],
            events: ResponseEvents::new(self.draft, keeper),
            ticket: self.ticket,
        };
        streaming.respond().await
    }

    /// Answers at once with the queued response, or with its events as they come, and goes on whoever listens.
    async fn in_background(self, keeper: Keeper, streams: bool) -> Result<Response, ApiError> {
        let chunks = self.replicas.chat_stream(self.chat).await.map_err(in_own_terms)?;
        let (store, key, record) = keeper.begin(self.draft.reply.clone(), streams)?;
        let job = Job {
            store,
            key,
            record: Arc::clone(&record),
            draft: self.draft,
            chunks,
            ticket: self.ticket,
            log: streams.then(Log::default),
        };
        let queued = record.reply();
        let events = follow(&record, 0);
        tokio::spawn(job.run());
        Ok(match streams {
            true => sse::response(events),
            false => Json(&*queued).into_response(),
        })
    }
}

/// Whose responses there are to be found: those made with the same API key.
fn find(service: &Service, tenant: Option<Extension<Tenant>>, id: &str) -> Result<Arc<Record>, RpcError> {
    let tenant = tenant.map_or_else(String::new, |Extension(tenant)| tenant.0.to_string());
    let key = Key {
        tenant,
        id: id.to_owned(),
    };
    let record = service.responses.as_ref().and_then(|store| store.get(&key));
    record.ok_or_else(|| not_found(id, RESPONSE_ID))
}

/// `GET /v1/responses/{response_id}`: the response as it is, or with `stream=true` the events of one that is made in the
/// background, those after `starting_after`.
pub(crate) async fn retrieve(
    State(service): State<Service>,
    tenant: Option<Extension<Tenant>>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let record = find(&service, tenant, &id)?;
    if !query::flag(&uri, "stream", false)? {
        return Ok(Json(&*record.reply()).into_response());
    }
    if !record.has_events() {
        let message =
            "stream: only a response that was created with background and stream true can be streamed";
        return Err(RpcError::invalid("stream", message).into());
    }
    let from = match query::value(&uri, STARTING_AFTER) {
        None => 0,
        Some(number) => {
            let number = number
                .parse::<usize>()
                .ok()
                .and_then(|number| number.checked_add(1));
            let message = "starting_after must be the sequence number of an event";
            number.ok_or_else(|| RpcError::invalid(STARTING_AFTER, message))?
        }
    };
    Ok(sse::response(follow(&record, from)))
}

/// `POST /v1/responses/{response_id}/cancel`.
pub(crate) async fn cancel(
    State(service): State<Service>,
    tenant: Option<Extension<Tenant>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let record = find(&service, tenant, &id)?;
    record.cancel();
    let reply = record.reply();
    if reply.status != Status::Cancelled {
        // In vLLM's words.
        let message = "Cannot cancel a synchronous response.";
        return Err(RpcError::invalid(RESPONSE_ID, message).into());
    }
    Ok(Json(&*reply).into_response())
}
