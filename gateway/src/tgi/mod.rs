//! Text Generation Inference's own API (its version 3), so that its clients can move without being changed.
//!
//! Differences are refusals by name: what this server does not do is never silently left out.

mod error;
mod params;
mod reply;
mod stream;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use phalanx_proto::limits::MAX_STOP_STRINGS;
use serde_json::json;

pub(crate) use self::params::{GenerateBody, Parameters};
use self::{error::TgiError, params::Call, stream::TgiEvents};
use crate::{
    lifecycle::Ticket,
    observe::RequestId,
    openai::{
        body,
        caller::Caller,
        error::{ApiError, broken_reply},
        reply::Whole,
        sse::Streaming,
    },
    router::Replicas,
    routes::Service,
};

/// How a route answers.
#[derive(Clone, Copy)]
enum Form {
    /// One object.
    Whole,
    /// A list of one object, as the Hub's inference API has it.
    List,
    Stream,
}

/// `POST /generate`.
pub(crate) async fn generate(
    State(service): State<Service>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, TgiError> {
    answer(&service, &request_id, request, |_| Form::Whole).await
}

/// `POST /generate_stream`.
pub(crate) async fn generate_stream(
    State(service): State<Service>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, TgiError> {
    answer(&service, &request_id, request, |_| Form::Stream).await
}

/// `POST /`: the body says whether it wants a stream.
pub(crate) async fn compat_generate(
    State(service): State<Service>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, TgiError> {
    let form = |call: &Call| if call.streams { Form::Stream } else { Form::List };
    answer(&service, &request_id, request, form).await
}

async fn answer(
    service: &Service,
    request_id: &RequestId,
    request: Request,
    form: impl FnOnce(&Call) -> Form,
) -> Result<Response, TgiError> {
    let mut ticket = service.lifecycle.admit()?;
    let replicas = service.replicas_for(request.headers());
    let caller = Caller::of(&request);
    let body = body::read(request, &service.limits).await?;
    let mut call = Call::parse(&body, caller)?;
    drop(body);
    ticket.start(1)?;
    let form = form(&call);
    let id = format!("tgi-{}", request_id.0);
    match form {
        Form::Whole => whole(&replicas, id, call, ticket)
            .await
            .map(|reply| Json(reply).into_response()),
        Form::List => whole(&replicas, id, call, ticket)
            .await
            .map(|reply| Json([reply]).into_response()),
        Form::Stream => {
            let request = call.request(&id, true);
            let chunks = replicas.generate_stream(request).await?;
            let streaming = Streaming {
                id,
                n: 1,
                prompts: vec![chunks],
                events: TgiEvents::new(call),
                ticket,
            };
            Ok(streaming.respond().await?)
        }
    }
}

async fn whole(
    replicas: &Replicas,
    id: String,
    mut call: Call,
    mut ticket: Ticket,
) -> Result<reply::Generated, TgiError> {
    let tokens = call.details;
    let request = call.request(&id, tokens);
    let reply = tokio::select! {
        reply = replicas.generate(request) => reply?,
        error = ticket.stopped() => return Err(error.into()),
    };
    let whole = Whole::join(id, 1, vec![reply])?;
    let choice = whole.choices.first();
    let choice = choice.ok_or_else(|| broken_reply("there is no choice"))?;
    Ok(reply::Generated::of(choice, &call)?)
}

/// `GET /info`.
pub(crate) async fn info(State(service): State<Service>) -> Result<Response, ApiError> {
    let models = service.backend.list_models().await?.models;
    let model = models.into_iter().next().unwrap_or_default();
    let info = json!({
        "model_id": model.id,
        "model_sha": null,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": service.limits.running_prompts,
        "max_best_of": 1,
        "max_stop_sequences": MAX_STOP_STRINGS,
        // One token at least is the model's.
        "max_input_tokens": model.max_model_len.saturating_sub(1),
        "max_total_tokens": model.max_model_len,
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "router": "phalanx",
        "version": env!("CARGO_PKG_VERSION"),
        "sha": null,
        "docker_label": null,
    });
    Ok(Json(info).into_response())
}
