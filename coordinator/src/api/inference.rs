//! The Inference service.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, inference_server::Inference},
};
use tonic::{Request, Response, Status};

use super::{
    EngineSlot, Envelope, Observers,
    caller::{Caller, Claims},
    observe::Observation,
    registry::{Registration, Registry},
    request_id,
    stream::RequestStream,
    unix_seconds,
};
use crate::{
    metrics::Metrics,
    text::{PreparedRequest, TextProcessor},
};

pub(super) struct Parts {
    pub(super) text: Arc<TextProcessor>,
    pub(super) engine: EngineSlot,
    pub(super) registry: Registry,
    pub(super) metrics: Arc<Metrics>,
    pub(super) observers: Observers,
    /// The first is the one replies name.
    pub(super) models: Vec<v1::ModelCard>,
}

pub(super) struct InferenceService {
    parts: Parts,
}

impl InferenceService {
    pub(super) fn new(parts: Parts) -> Self {
        Self { parts }
    }

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<RequestStream, RpcError> {
        let claims = Claims {
            tenant: &request.get_ref().tenant,
            timeout_ms: request.get_ref().timeout_ms,
        };
        let caller = Caller::of(&request, claims)?;
        let (prepared, registration) = self.prepare(request.into_inner(), &caller).await?;
        self.start(prepared, registration, caller)
    }

    /// Checks, registers and tokenizes; [`Self::start`] queues.
    pub(super) async fn prepare(
        &self,
        mut request: v1::GenerateRequest,
        caller: &Caller,
    ) -> Result<(PreparedRequest, Registration), RpcError> {
        check_model(&self.parts.models, &request.model)?;
        let registration = self.register(std::mem::take(&mut request.request_id), "cmpl")?;
        let prepared = caller.in_time(self.parts.text.prepare(request)).await?;
        Ok((prepared, registration))
    }

    async fn chat(&self, request: Request<v1::ChatRequest>) -> Result<RequestStream, RpcError> {
        let claims = Claims {
            tenant: &request.get_ref().tenant,
            timeout_ms: request.get_ref().timeout_ms,
        };
        let caller = Caller::of(&request, claims)?;
        let mut request = request.into_inner();
        check_model(&self.parts.models, &request.model)?;
        let registration = self.register(std::mem::take(&mut request.request_id), "chatcmpl")?;
        let prepared = caller.in_time(self.parts.text.prepare_chat(request)).await?;
        self.start(prepared, registration, caller)
    }

    fn register(&self, id: String, prefix: &str) -> Result<Registration, RpcError> {
        Ok(self.parts.registry.register(request_id(id, prefix)?))
    }

    pub(super) fn start(
        &self,
        mut prepared: PreparedRequest,
        mut registration: Registration,
        caller: Caller,
    ) -> Result<RequestStream, RpcError> {
        let envelope = Envelope {
            request_id: registration.id.clone(),
            model: self
                .parts
                .models
                .first()
                .map_or_else(String::new, |model| model.id.clone()),
            created: unix_seconds(),
        };
        for sequence in &mut prepared.sequences {
            sequence.tenant = caller.tenant;
        }
        registration.deadline = caller.deadline;
        let observation = Observation::start(&self.parts.observers, caller.parent, &envelope, &prepared);
        RequestStream::start(prepared, envelope, (registration, observation), &self.parts)
    }
}

/// Errors: `NotFound` for a name that none of `models` has.
pub(super) fn check_model(models: &[v1::ModelCard], name: &str) -> Result<(), RpcError> {
    if name.is_empty() || models.iter().any(|model| model.id == name) {
        return Ok(());
    }
    let message = format!("The model `{name}` does not exist.");
    Err(RpcError::new(ErrorKind::NotFound, message).with_param("model"))
}

type ChunkStream = BoxStream<'static, Result<v1::GenerateChunk, Status>>;

/// Polled by tonic as fast as the client's window allows: a slow client stops only itself, one that goes away drops it.
fn into_stream(request: RequestStream) -> Response<ChunkStream> {
    let chunks = stream::unfold(request, |mut request| async move {
        let chunk = request.next().await?;
        Some((chunk.map_err(Status::from), request))
    });
    Response::new(chunks.boxed())
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStreamStream = ChunkStream;
    type ChatStreamStream = ChunkStream;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateResponse>, Status> {
        let stream = self.generate(request).await?;
        Ok(Response::new(stream.collect().await?))
    }

    async fn generate_stream(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<ChunkStream>, Status> {
        Ok(into_stream(self.generate(request).await?))
    }

    async fn chat(
        &self,
        request: Request<v1::ChatRequest>,
    ) -> Result<Response<v1::GenerateResponse>, Status> {
        let stream = self.chat(request).await?;
        Ok(Response::new(stream.collect().await?))
    }

    async fn chat_stream(&self, request: Request<v1::ChatRequest>) -> Result<Response<ChunkStream>, Status> {
        Ok(into_stream(self.chat(request).await?))
    }

    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let max_model_len = self.parts.text.limits().max_model_len;
        let models = self.parts.models.iter().cloned();
        let models = models.map(|model| v1::ModelCard {
            max_model_len,
            ..model
        });
        Ok(Response::new(v1::ListModelsResponse {
            models: models.collect(),
        }))
    }
}
