//! `vllm.Control`: what orchestrators ask of a server.

use std::sync::Arc;

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::ModelCard,
    vllm::{self, ModelInfo, ParallelismInfo, ServerInfo, control_server::Control},
};
use tokio::sync::Notify;
use tonic::{Request, Response, Status};

use crate::{
    api::{auth::AdminCheck, control},
    engine::PauseMode,
};

/// The version of vLLM's contract that is followed.
const API_VERSION: &str = "0.6";

pub(in crate::api) struct ControlService {
    /// What `phalanx.v1` does for operators.
    pub(in crate::api) control: control::ControlService,
    /// Who may do what changes everybody's service.
    pub(in crate::api) operators: AdminCheck,
    /// The first is the canonical one. Never empty.
    pub(in crate::api) models: Vec<ModelCard>,
    pub(in crate::api) tensor_parallel_size: u32,
    /// Of this process's own.
    pub(in crate::api) instance_id: String,
    pub(in crate::api) shutdown: Arc<Notify>,
}

fn not_offered(what: &str) -> Status {
    RpcError::new(
        ErrorKind::Unimplemented,
        format!("{what} is not offered by this server"),
    )
    .into()
}

/// Calls that have no meaning here.
macro_rules! not_offered {
    ($($method:ident: $request:ident -> $response:ident, $what:literal;)*) => {
        $(fn $method<'life0, 'async_trait>(
            &'life0 self,
            _: Request<vllm::$request>,
        ) -> std::pin::Pin<Box<dyn Future<Output = Result<Response<vllm::$response>, Status>> + Send + 'async_trait>>
        where
            'life0: 'async_trait,
            Self: 'async_trait,
        {
            Box::pin(std::future::ready(Err(not_offered($what))))
        })*
    };
}

impl ControlService {
    fn server_info(&self) -> Result<ServerInfo, RpcError> {
        let engine = self.control.engine.running()?.config();
        Ok(ServerInfo {
            engine_version: env!("CARGO_PKG_VERSION").to_owned(),
            api_version: API_VERSION.to_owned(),
            instance_id: self.instance_id.clone(),
            parallelism: Some(ParallelismInfo {
                tensor_parallel_size: self.tensor_parallel_size,
                pipeline_parallel_size: 1,
                data_parallel_size: 1,
                data_parallel_rank: 0,
                decode_context_parallel_size: 1,
                world_size: self.tensor_parallel_size.into(),
                data_parallel_size_local: 1,
            }),
            max_model_len: engine.max_model_len,
            kv_block_size: engine.block_size,
            total_kv_blocks: engine.num_blocks.into(),
            max_running_requests: engine.max_num_seqs.into(),
            max_batched_tokens: engine.max_num_batched_tokens.into(),
            max_loras: 0,
            rl_capabilities: None,
            proto_version: API_VERSION.to_owned(),
            effective_attention_block_size: Some(engine.block_size.into()),
        })
    }

    fn model_info(&self) -> ModelInfo {
        let mut names = self.models.iter().map(|model| model.id.clone());
        ModelInfo {
            model_id: self
                .models
                .first()
                .map_or_else(String::new, |model| model.root.clone()),
            served_model_name: names.next().unwrap_or_default(),
            served_model_aliases: names.collect(),
            supports_text_input: true,
            supports_token_ids_input: true,
            ..ModelInfo::default()
        }
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn get_server_info(
        &self,
        _: Request<vllm::GetServerInfoRequest>,
    ) -> Result<Response<ServerInfo>, Status> {
        Ok(Response::new(self.server_info()?))
    }

    async fn get_model_info(
        &self,
        _: Request<vllm::GetModelInfoRequest>,
    ) -> Result<Response<ModelInfo>, Status> {
        Ok(Response::new(self.model_info()))
    }

    /// The orderly end that SIGTERM asks for.
    async fn shutdown(
        &self,
        request: Request<vllm::ShutdownRequest>,
    ) -> Result<Response<vllm::ShutdownResponse>, Status> {
        self.operators.check(&request)?;
        self.shutdown.notify_one();
        Ok(Response::new(vllm::ShutdownResponse {}))
    }

    async fn abort(
        &self,
        request: Request<vllm::AbortRequest>,
    ) -> Result<Response<vllm::AbortResponse>, Status> {
        for id in &request.get_ref().request_ids {
            self.control.registry.abort(id);
        }
        Ok(Response::new(vllm::AbortResponse {}))
    }

    async fn list_loras(
        &self,
        _: Request<vllm::ListLorasRequest>,
    ) -> Result<Response<vllm::ListLorasResponse>, Status> {
        Ok(Response::new(vllm::ListLorasResponse::default()))
    }

    async fn get_kv_event_sources(
        &self,
        _: Request<vllm::GetKvEventSourcesRequest>,
    ) -> Result<Response<vllm::GetKvEventSourcesResponse>, Status> {
        Ok(Response::new(vllm::GetKvEventSourcesResponse::default()))
    }

    /// As `phalanx.v1` pauses. Errors: `Aborted` if somebody resumed before it was done: the reply has no room for that.
    async fn pause_generation(
        &self,
        request: Request<vllm::PauseGenerationRequest>,
    ) -> Result<Response<vllm::PauseGenerationResponse>, Status> {
        self.operators.check(&request)?;
        let request = request.into_inner();
        let mode = match request.mode() {
            vllm::PauseMode::Unspecified | vllm::PauseMode::Abort => PauseMode::Abort,
            vllm::PauseMode::Wait => PauseMode::Wait,
            vllm::PauseMode::Keep => PauseMode::Keep,
        };
        if !self
            .control
            .hold(mode, request.clear_cache.unwrap_or(true))
            .await?
        {
            return Err(Status::aborted("somebody resumed before the pause was complete"));
        }
        Ok(Response::new(vllm::PauseGenerationResponse {}))
    }

    async fn resume_generation(
        &self,
        request: Request<vllm::ResumeGenerationRequest>,
    ) -> Result<Response<vllm::ResumeGenerationResponse>, Status> {
        self.operators.check(&request)?;
        self.control.release().await?;
        Ok(Response::new(vllm::ResumeGenerationResponse {}))
    }

    async fn is_paused(
        &self,
        _: Request<vllm::IsPausedRequest>,
    ) -> Result<Response<vllm::IsPausedResponse>, Status> {
        let paused = self.control.engine.is_paused();
        Ok(Response::new(vllm::IsPausedResponse { paused }))
    }

    async fn is_sleeping(
        &self,
        _: Request<vllm::IsSleepingRequest>,
    ) -> Result<Response<vllm::IsSleepingResponse>, Status> {
        Ok(Response::new(vllm::IsSleepingResponse { sleeping: false }))
    }

    not_offered! {
        load_lora: LoadLoraRequest -> LoadLoraResponse, "adapters";
        unload_lora: UnloadLoraRequest -> UnloadLoraResponse, "adapters";
        sleep: SleepRequest -> SleepResponse, "a sleep mode";
        wake_up: WakeUpRequest -> WakeUpResponse, "a sleep mode";
        init_weight_transfer_engine: InitWeightTransferEngineRequest -> InitWeightTransferEngineResponse, "changing weights";
        start_weight_update: StartWeightUpdateRequest -> StartWeightUpdateResponse, "changing weights";
        start_draft_weight_update: StartDraftWeightUpdateRequest -> StartDraftWeightUpdateResponse, "changing weights";
        update_weights: UpdateWeightsRequest -> UpdateWeightsResponse, "changing weights";
        finish_weight_update: FinishWeightUpdateRequest -> FinishWeightUpdateResponse, "changing weights";
        update_weight_version: UpdateWeightVersionRequest -> UpdateWeightVersionResponse, "changing weights";
        get_weight_version: GetWeightVersionRequest -> GetWeightVersionResponse, "changing weights";
    }
}
