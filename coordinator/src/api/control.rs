//! The Control service: operators hold the engine still, end requests and reset its cache.

use phalanx_proto::{
    RpcError,
    v1::{self, control_server::Control},
};
use tonic::{Request, Response, Status};

use super::{EngineSlot, registry::Registry};
use crate::engine::PauseMode;

#[derive(Clone)]
pub(super) struct ControlService {
    pub(super) engine: EngineSlot,
    pub(super) registry: Registry,
}

impl ControlService {
    /// False if somebody resumed before the requests in flight had ended. Errors: `Unavailable`.
    pub(super) async fn hold(&self, mode: PauseMode, clear_cache: bool) -> Result<bool, RpcError> {
        tracing::info!(?mode, clear_cache, "an operator pauses the engine");
        self.engine.running()?.pause(mode, clear_cache).await
    }

    /// Errors: `Unavailable`.
    pub(super) async fn release(&self) -> Result<(), RpcError> {
        tracing::info!("an operator resumes the engine");
        self.engine.running()?.resume().await
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn pause(&self, request: Request<v1::PauseRequest>) -> Result<Response<v1::PauseResponse>, Status> {
        let request = request.into_inner();
        let mode = match request.mode() {
            v1::PauseMode::Unspecified | v1::PauseMode::Abort => PauseMode::Abort,
            v1::PauseMode::Wait => PauseMode::Wait,
            v1::PauseMode::Keep => PauseMode::Keep,
        };
        let paused = self.hold(mode, request.clear_cache).await?;
        Ok(Response::new(v1::PauseResponse { paused }))
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        self.release().await?;
        Ok(Response::new(v1::ResumeResponse {}))
    }

    async fn abort_requests(
        &self,
        request: Request<v1::AbortRequestsRequest>,
    ) -> Result<Response<v1::AbortRequestsResponse>, Status> {
        let ids = request.into_inner().request_ids;
        let aborted = if ids.is_empty() {
            self.registry.abort_all()
        } else {
            ids.iter().filter(|id| self.registry.abort(id)).count()
        };
        tracing::info!(aborted, "an operator aborts requests");
        let aborted = aborted as u32;
        Ok(Response::new(v1::AbortRequestsResponse { aborted }))
    }

    async fn reset_prefix_cache(
        &self,
        request: Request<v1::ResetPrefixCacheRequest>,
    ) -> Result<Response<v1::ResetPrefixCacheResponse>, Status> {
        let reset_running = request.get_ref().reset_running_requests;
        tracing::info!(reset_running, "an operator resets the prefix cache");
        self.engine.running()?.reset_prefix_cache(reset_running).await?;
        Ok(Response::new(v1::ResetPrefixCacheResponse {}))
    }
}
