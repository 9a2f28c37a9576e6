//! The gRPC services clients and operators talk to: Inference, Tokenizer, Admin, Control, health and reflection.

mod admin;
mod assembler;
mod auth;
mod caller;
mod choice;
mod control;
mod engine;
mod inference;
mod kv_events;
mod listen;
mod logprobs;
mod observe;
mod prompt;
mod registry;
mod secured;
mod status;
mod stream;
mod tokenizer;
mod vllm;

use std::{sync::Arc, time::SystemTime};

use phalanx_proto::{
    secret::ApiKeys,
    v1::{
        self, ModelCard, admin_server::AdminServer, control_server::ControlServer,
        inference_server::InferenceServer, tokenizer_server::TokenizerServer,
    },
    vllm::{
        control_server::ControlServer as VllmControlServer,
        inference_server::InferenceServer as VllmInferenceServer,
    },
};
use tokio::sync::Notify;
use tonic::service::{Routes, interceptor::InterceptedService};

pub use engine::EngineSlot;
pub use listen::{ListenError, Listeners, serve};
pub use observe::Observers;
pub use status::StatusHandle;

use crate::{kv_events::KvEventHub, metrics::Metrics, text::TextProcessor};

/// Most bytes of one request message, tonic's and every client's own default.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Most bytes of one reply message: a unary completion with every alternative of every token.
pub const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// What the services work on.
pub struct Api {
    pub text: Arc<TextProcessor>,
    pub engine: EngineSlot,
    /// None: they are not offered.
    pub kv_events: Option<KvEventHub>,
    pub metrics: Arc<Metrics>,
    pub status: StatusHandle,
    /// The first is the name replies carry. Never empty.
    pub served_model_names: Vec<String>,
    /// Path or repository of the weights.
    pub model_root: String,
    pub tensor_parallel_size: u32,
    /// What clients of all services but health and reflection must present, unless they come over a unix socket.
    pub api_keys: ApiKeys,
    /// What operators must present to Control, unless they come over a unix socket. Without any, nobody else may.
    pub admin_keys: ApiKeys,
    /// What `GetServerInfo` tells: a JSON object without secrets.
    pub server_info: String,
    pub observers: Observers,
    /// Told when a client asks the server to shut down.
    pub shutdown: Arc<Notify>,
}

impl Api {
    /// Inference, Tokenizer, Admin, Control, vLLM's services, grpc.health.v1 and reflection; others add their own
    /// services. Must be called within a Tokio runtime: health follows [`Api::status`] until its last handle is gone.
    pub fn routes(self) -> Routes {
        let created = unix_seconds();
        let models = self.served_model_names.into_iter().map(|id| ModelCard {
            id,
            created,
            max_model_len: self.text.limits().max_model_len,
            root: self.model_root.clone(),
        });
        let models: Vec<ModelCard> = models.collect();
        let registry = registry::Registry::default();
        let operators = auth::AdminCheck(self.admin_keys);
        let tokenizer = tokenizer::TokenizerService {
            text: self.text.clone(),
            models: models.clone(),
        };
        let control = control::ControlService {
            engine: self.engine.clone(),
            registry: registry.clone(),
        };
        let vllm_control = vllm::ControlService {
            control: control.clone(),
            operators: operators.clone(),
            models: models.clone(),
            tensor_parallel_size: self.tensor_parallel_size,
            instance_id: format!("{:016x}", phalanx_proto::secret::random_u64()),
            shutdown: self.shutdown,
        };
        let inference = Arc::new(inference::InferenceService::new(inference::Parts {
            text: self.text.clone(),
            engine: self.engine.clone(),
            registry: registry.clone(),
            metrics: self.metrics.clone(),
            observers: self.observers,
            models,
        }));
        let admin = admin::AdminService {
            status: self.status.clone(),
            metrics: self.metrics,
            kv_events: self.kv_events,
            registry,
            engine: self.engine,
            server_info: self.server_info,
        };
        let (reporter, health) = tonic_health::server::health_reporter();
        tokio::spawn(status::follow(self.status.subscribe(), reporter));
        // Probes and reflection tell nothing that the contract does not; they need no key.
        let check = auth::KeyCheck(self.api_keys);
        macro_rules! guarded {
            ($server:expr, $check:expr) => {
                InterceptedService::new(
                    $server
                        .max_decoding_message_size(MAX_REQUEST_BYTES)
                        .max_encoding_message_size(MAX_RESPONSE_BYTES),
                    $check.clone(),
                )
            };
        }
        let either = auth::EitherCheck(check.clone(), operators.clone());
        let vllm = vllm::VllmInference(inference.clone());
        let routes = Routes::new(guarded!(InferenceServer::from_arc(inference), check))
            .add_service(guarded!(TokenizerServer::new(tokenizer), check))
            .add_service(guarded!(AdminServer::new(admin), check))
            .add_service(guarded!(ControlServer::new(control), operators))
            .add_service(guarded!(VllmInferenceServer::new(vllm), check))
            .add_service(guarded!(VllmControlServer::new(vllm_control), either))
            .add_service(health);
        with_reflection(routes)
    }
}

/// Routes that also tell of their contracts.
fn with_reflection(routes: Routes) -> Routes {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(phalanx_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Older grpcurl and grpcio-reflection ask for v1alpha.
    match (builder().build_v1(), builder().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => routes.add_service(v1).add_service(v1alpha),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "gRPC reflection is off: the built-in descriptors are malformed");
            routes
        }
    }
}

fn unix_seconds() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

/// A request's id: its own if it is fit to be a log field and a header, a new one if it has none.
fn request_id(given: String, prefix: &str) -> Result<String, phalanx_proto::RpcError> {
    const MAX_BYTES: usize = 256;
    if given.is_empty() {
        return Ok(format!("{prefix}-{:016x}", phalanx_proto::secret::random_u64()));
    }
    if given.len() > MAX_BYTES || given.chars().any(char::is_control) {
        let message = format!("request_id must have at most {MAX_BYTES} bytes and no control characters.");
        return Err(phalanx_proto::RpcError::invalid("request_id", message));
    }
    Ok(given)
}

/// The envelope of every reply to one request.
#[derive(Clone, Debug)]
struct Envelope {
    request_id: String,
    model: String,
    created: i64,
}

impl Envelope {
    fn chunk(&self, choice: Option<v1::Choice>, usage: Option<v1::Usage>) -> v1::GenerateChunk {
        let Self {
            request_id,
            model,
            created,
        } = self.clone();
        v1::GenerateChunk {
            request_id,
            model,
            created,
            choice,
            usage,
            prompt: None,
        }
    }
    fn response(self, choices: Vec<v1::Choice>, usage: v1::Usage) -> v1::GenerateResponse {
        v1::GenerateResponse {
            request_id: self.request_id,
            model: self.model,
            created: self.created,
            choices,
            usage: Some(usage),
            prompt: None,
        }
    }
}
