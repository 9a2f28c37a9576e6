//! The Admin service.

use std::sync::Arc;

use phalanx_proto::v1::{self, admin_server::Admin};
use tonic::{Request, Response, Status};

use super::{
    EngineSlot, StatusHandle,
    kv_events::{self, KvEventStream},
    registry::Registry,
};
use crate::{
    kv_events::KvEventHub,
    metrics::{self, Metrics},
};

pub(super) struct AdminService {
    pub(super) status: StatusHandle,
    pub(super) metrics: Arc<Metrics>,
    pub(super) kv_events: Option<KvEventHub>,
    pub(super) registry: Registry,
    pub(super) engine: EngineSlot,
    /// A JSON object.
    pub(super) server_info: String,
}

#[tonic::async_trait]
impl Admin for AdminService {
    type SubscribeKvEventsStream = KvEventStream;

    async fn subscribe_kv_events(
        &self,
        _: Request<v1::SubscribeKvEventsRequest>,
    ) -> Result<Response<KvEventStream>, Status> {
        Ok(Response::new(kv_events::stream(self.kv_events.as_ref())?))
    }

    async fn get_status(
        &self,
        _: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        Ok(Response::new(v1::GetStatusResponse {
            paused: self.engine.is_paused(),
            ..self.status.get()
        }))
    }

    async fn get_metrics(
        &self,
        _: Request<v1::GetMetricsRequest>,
    ) -> Result<Response<v1::GetMetricsResponse>, Status> {
        Ok(Response::new(v1::GetMetricsResponse {
            content_type: metrics::CONTENT_TYPE.to_owned(),
            body: self.metrics.encode().into_bytes(),
        }))
    }

    async fn abort_request(
        &self,
        request: Request<v1::AbortRequestRequest>,
    ) -> Result<Response<v1::AbortRequestResponse>, Status> {
        let found = self.registry.abort(&request.get_ref().request_id);
        Ok(Response::new(v1::AbortRequestResponse { found }))
    }

    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        let json = self.server_info.clone();
        Ok(Response::new(v1::GetServerInfoResponse { json }))
    }
}
